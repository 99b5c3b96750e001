"""Arrays with a power of two as a separate scale, so that no value overflows or underflows at any lag.

Scaling by a power of two is exact. The exponents are integers, so the sum of a hundred thousand of them has no rounding
error. A float32 sum of the logarithms of the norms would be wrong in the third digit.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rescale(rows: Array) -> tuple[Array, Array]:
    """Divides an array by the power of two that brings its largest entry to 1/2..1; returns it and the exponent."""
    flat, exponent = rescale_rows(rows.reshape(-1), jnp.zeros((), jnp.int32))
    return flat.reshape(rows.shape), exponent


def log_power(rows: Array, exponent: Array) -> Array:
    """ln 2^exponent, in nats; minus infinity if all of `rows`, which it scales, are zero."""
    return jnp.where(jnp.any(rows != 0), exponent.astype(rows.dtype) * math.log(2), -jnp.inf).astype(rows.dtype)


def to_common_scale(u: Array, exponent_u: Array, v: Array, exponent_v: Array) -> tuple[Array, Array, Array]:
    """Writes the rows 2^exponent_u u and 2^exponent_v v as 2^e u' and 2^e v', with the larger of the two scales.

    Args:
        u, v: (..., n).
        exponent_u, exponent_v: integers (...).

    Returns:
        u', v' (..., n) and e (...).
    """
    # A row of zeros has no scale. Its exponent must not underflow the other row, which may be much smaller.
    exponent_u = jnp.where(jnp.any(u != 0, axis=-1), exponent_u, exponent_v)
    exponent_v = jnp.where(jnp.any(v != 0, axis=-1), exponent_v, exponent_u)
    e = jnp.maximum(exponent_u, exponent_v)
    return scale_by_power(u, exponent_u - e), scale_by_power(v, exponent_v - e), e


def rescale_rows(u: Float[Array, "*rows n"], e: Int[Array, "*rows"]) -> tuple[Array, Array]:
    """Returns the same values 2^e u with a new scale for each row, so that its largest entry is about 1."""
    # 2^limit and 2^-limit are both normal numbers; the reciprocal of a larger power would be subnormal or zero.
    limit = jnp.finfo(u.dtype).maxexp - 2
    shift = jnp.clip(jnp.frexp(jnp.max(jnp.abs(u), axis=-1))[1], -limit, limit)
    return scale_by_power(u, -shift), e + shift


def scale_by_power(u: Array, exponent: Array) -> Array:
    """2^exponent u, with one exponent for each row."""
    # One product by a power, because `jnp.ldexp` of every entry is slow.
    return u * jnp.ldexp(jnp.ones((), u.dtype), exponent)[..., None]
