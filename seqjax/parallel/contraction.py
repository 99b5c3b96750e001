"""Whether a recurrence contracts: its largest Lyapunov exponent, measured in parallel over stretches of time.

Newton over a trajectory takes few iterations exactly where perturbations shrink, lambda_1 < 0; where they grow, the
number of iterations approaches the number of steps (Gonzalez et al. 2025).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from seqjax.cell import Params
from seqjax.parallel._flat import At, FlatCell

HOP = 32  # steps of one stretch: the depth of the measurement is twice that


class NotContractingWarning(UserWarning):
    """Perturbations of the state grow, so that parallel evaluation has little to gain."""


def largest_exponent(flat: FlatCell, params: Params, first: Array, states: Array, inputs: At) -> Array:
    """lambda_1 in nats a step, the mean of ln |J_t u| / |u| along real steps of the cell.

    Every stretch starts at the trajectory's state there and runs twice HOP steps, of which the first half only turns u
    towards the direction that grows fastest. A reset moves the state and leaves the perturbation as it is.

    Args:
        flat: the cell.
        params: of the cell.
        first: s_0 (n,).
        states: s_1..s_T (time, n), at which stretches start; they need not be exact.
        inputs: of one sequence, leaves (time, ...).

    Returns:
        The estimate in float32: 0 without a valid step, minus infinity where a step is singular.

    Source: Benettin et al. 1980, "Lyapunov characteristic exponents for smooth dynamical systems".
    """
    time, n = states.shape
    hop = max(1, min(HOP, -(-time // 2)))
    stretches, valid = _stretches(inputs, time, hop)
    v = jnp.concatenate([first[None], states])[:time:hop]
    u = jnp.cos(jnp.arange(n, dtype=first.dtype))
    u = jnp.broadcast_to((u / jnp.linalg.norm(u))[None], v.shape)
    turn = jax.vmap(lambda v, u, at: _pushed(flat, params, v, u, at))
    v, u, grown = turn(v, u, stretches)
    if len(v) > 1:  # each stretch again, with the perturbation that the one before it has turned
        valid, later = valid[1:], jax.tree.map(lambda leaf: leaf[1:], stretches)
        _, _, grown = turn(v[:-1], u[:-1], later)
    steps = jnp.sum(valid, dtype=jnp.int32)
    mean = jnp.sum(grown) / jnp.maximum(steps, 1).astype(grown.dtype)
    return mean.astype(jnp.float32)


def _stretches(inputs: At, time: int, hop: int) -> tuple[At, Array]:
    """The inputs in stretches of `hop` steps, leaves (stretches, hop, ...), held after the end; and which are valid."""
    x, valid, restart, noise = inputs
    valid = jnp.ones(time, bool) if valid is None else valid
    count = -(-time // hop)

    def cut(leaf: Array) -> Array:
        more = jnp.broadcast_to(leaf[-1:], (count * hop - time, *leaf.shape[1:]))
        return jnp.concatenate([leaf, more]).reshape(count, hop, *leaf.shape[1:])

    x, noise, restart, valid = jax.tree.map(cut, (x, noise, restart, valid))
    here = jnp.arange(count * hop).reshape(count, hop) < time
    valid = valid & here
    return (x, valid, None if restart is None else restart & here, noise), valid


def _pushed(flat: FlatCell, params: Params, v: Array, u: Array, inputs: At) -> tuple[Array, Array, Array]:
    """The state and the perturbation after one stretch, and the logarithm of what the latter grew by."""

    def advance(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], Array]:
        (v, u), (x, valid, restart, noise) = carry, at
        if restart is not None:
            v = jnp.where(restart, flat.start(params), v)
        v, pushed = jax.jvp(lambda v: flat.step(params, v, (x, valid, None, noise)), (v,), (u,))
        size = jnp.linalg.norm(pushed)
        u = jnp.where(size > 0, pushed / jnp.where(size > 0, size, jnp.ones_like(size)), u)
        return (v, u), jnp.log(size)

    (v, u), grown = jax.lax.scan(advance, (v, u), inputs)
    return v, u, jnp.sum(grown)


def warn_of_growth(method: Any, exponents: Array, converged: Array, time: int) -> None:
    """Warns where perturbations at least double over the sequence; says nothing where the numbers are being traced."""
    if isinstance(exponents, Tracer) or isinstance(converged, Tracer) or not exponents.size:
        return
    measured = np.asarray(exponents)
    growing = measured * time > math.log(2)
    if not growing.any():
        return
    row = int(np.nanargmax(measured))
    warnings.warn(
        f"the recurrence is not contracting: its largest Lyapunov exponent is {measured[row]:+.3g} nats a step in row "
        f"{row}, positive in {growing.sum()} of {growing.size} rows, so {type(method).__name__} needs up to "
        f"{time} iterations, one for each step ({int(np.sum(converged))} of {growing.size} rows converged): use "
        f"sj.unroll, or fallback=True for what does not converge",
        NotContractingWarning,
        stacklevel=3,
    )
