"""Numbers with a power of two beside them, so that none overflows or vanishes at any lag.

To scale by a power of two is exact, and exponents are whole numbers, so a hundred thousand of them add up without an
error; the logarithms of the sizes themselves, added up in float32, would be wrong in the third digit.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rescaled(rows: Array) -> tuple[Array, Array]:
    """An array divided by one power of two that brings its largest entry to 1/2..1, and that exponent."""
    flat, exponent = rescaled_rows(rows.reshape(-1), jnp.zeros((), jnp.int32))
    return flat.reshape(rows.shape), exponent


def log_of_power(rows: Array, exponent: Array) -> Array:
    """The logarithm of 2^exponent, in nats; minus infinity where it scales nothing but zeros."""
    return jnp.where(jnp.any(rows != 0), exponent.astype(rows.dtype) * math.log(2), -jnp.inf).astype(rows.dtype)


def common_scale(u: Array, of_u: Array, v: Array, of_v: Array) -> tuple[Array, Array, Array]:
    """2^of_u u and 2^of_v v, rows, as 2^e u' and 2^e v' with the larger of the two scales.

    A row of zeros has no scale of its own, so one that comes early does not drown what comes later at a smaller scale.

    Args:
        u, v: (..., n).
        of_u, of_v: whole numbers (...).

    Returns:
        u', v' (..., n) and e (...).
    """
    of_u = jnp.where(jnp.any(u != 0, axis=-1), of_u, of_v)
    of_v = jnp.where(jnp.any(v != 0, axis=-1), of_v, of_u)
    e = jnp.maximum(of_u, of_v)
    return times_power(u, of_u - e), times_power(v, of_v - e), e


def rescaled_rows(u: Float[Array, "*rows n"], e: Int[Array, "*rows"]) -> tuple[Array, Array]:
    """The same 2^e u with a new scale for each row, by which its largest entry is about 1."""
    limit = jnp.finfo(u.dtype).maxexp - 2  # of a power of two that is itself a normal number
    more = jnp.clip(jnp.frexp(jnp.max(jnp.abs(u), axis=-1))[1], -limit, limit)
    return times_power(u, -more), e + more


def times_power(u: Array, exponent: Array) -> Array:
    """2^exponent u, with one exponent for each row; a product, since `jnp.ldexp` of every entry is slow."""
    return u * jnp.ldexp(jnp.ones((), u.dtype), exponent)[..., None]
