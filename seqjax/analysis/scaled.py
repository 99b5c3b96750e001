"""Rows that each carry a power of two of their own: to scale one is exact, and none overflows or vanishes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
