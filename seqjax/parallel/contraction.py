"""The largest Lyapunov exponent of a recurrence, estimated in parallel over chunks of time.

Newton's method on a trajectory takes few iterations if perturbations shrink, lambda_1 < 0. If they grow, the number of
iterations approaches the number of steps (Gonzalez et al. 2025).
"""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from seqjax.cell import Params
from seqjax.parallel._flat import At, NewtonCell
from seqjax.parallel.methods import Method
from seqjax.sequence._sizes import is_known

CHUNK = 32  # steps; the depth of the computation is twice that


class NotContractingWarning(UserWarning):
    """Perturbations of the state grow, so parallel evaluation is hardly faster than `unroll`."""


def largest_exponent(flat: NewtonCell, params: Params, first: Array, states: Array, inputs: At) -> Array:
    """Estimates lambda_1 in nats per step, the mean of ln |J_t u| / |u| along the steps of the cell.

    Each chunk is preceded by one chunk of warm-up, in which u only turns towards the direction that grows fastest. A
    reset sets the state but does not change the perturbation.

    Args:
        flat: the cell.
        params: the parameters of the cell.
        first: s_0 (n,).
        states: s_1..s_T (time, n), from which the chunks start. They need not be exact.
        inputs: the inputs of one sequence, leaves (time, ...).

    Returns:
        The estimate in float32: 0 without a valid step, and minus infinity if a step is singular.

    Source: Benettin et al. 1980, "Lyapunov characteristic exponents for smooth dynamical systems".
    """
    time, n = states.shape
    length = max(1, min(CHUNK, -(-time // 2))) if is_known(time) else CHUNK
    chunks, valid = _divide(inputs, time, length)
    count = valid.shape[0]
    starts = jnp.concatenate([first[None], states])[jnp.arange(count) * length]
    u = jnp.cos(jnp.arange(n, dtype=first.dtype))  # an arbitrary direction, equal on every call
    u_0 = jnp.broadcast_to((u / jnp.linalg.norm(u))[None], starts.shape)
    push = jax.vmap(lambda v, u, at: _push_chunk(flat, params, v, u, at))
    v, u, growth = push(starts, u_0, chunks)
    # A second pass, in which each chunk starts with the perturbation at the end of the one before.
    if not is_known(count):
        is_later = jnp.arange(count) > 0
        v, u = (_select(is_later, jnp.roll(end, 1, axis=0), start) for end, start in ((v, starts), (u, u_0)))
        counts = is_later | (jnp.asarray(count) == 1)
        valid = valid & counts[:, None]
        growth = jnp.where(counts, push(v, u, chunks)[2], 0)
    elif count > 1:
        valid, later = valid[1:], jax.tree.map(lambda leaf: leaf[1:], chunks)
        _, _, growth = push(v[:-1], u[:-1], later)
    steps = jnp.sum(valid, dtype=jnp.int32)
    mean = jnp.sum(growth) / jnp.maximum(steps, 1).astype(growth.dtype)
    return mean.astype(jnp.float32)


def _select(chunks: Array, yes: Array, no: Array) -> Array:
    return jax.vmap(jnp.where)(chunks, yes, no)


def _divide(inputs: At, time: int, length: int) -> tuple[At, Array]:
    """Divides the inputs into chunks, leaves (chunks, length, ...). Also returns which steps are valid.

    The last chunk is padded with masked steps.
    """
    x, valid, restart, noise = inputs
    valid = jnp.ones(time, bool) if valid is None else valid
    count = -(-time // length)

    def divide(leaf: Array) -> Array:
        # Repeats the last values, because this works for any dtype, even for keys.
        padding = jnp.broadcast_to(leaf[-1:], (count * length - time, *leaf.shape[1:]))
        return jnp.concatenate([leaf, padding]).reshape(count, length, *leaf.shape[1:])

    x, noise, restart, valid = jax.tree.map(divide, (x, noise, restart, valid))
    inside = jnp.arange(count * length).reshape(count, length) < time
    valid = valid & inside
    return (x, valid, None if restart is None else restart & inside, noise), valid


def _push_chunk(flat: NewtonCell, params: Params, v: Array, u: Array, inputs: At) -> tuple[Array, Array, Array]:
    """The state and the unit perturbation after one chunk, and the logarithm of the perturbation's growth."""

    def advance(carry: tuple[Array, Array], at: At) -> tuple[tuple[Array, Array], Array]:
        (v, u), (x, valid, restart, noise) = carry, at
        # Outside the step, because inside it a reset would set the perturbation to zero.
        if restart is not None:
            v = jnp.where(restart, flat.start(params), v)
        v, pushed = jax.jvp(lambda v: flat.step(params, v, (x, valid, None, noise)), (v,), (u,))
        size = jnp.linalg.norm(pushed)
        # After a singular step any direction will do, since the sum of logarithms is minus infinity.
        u = jnp.where(size > 0, pushed / jnp.where(size > 0, size, jnp.ones_like(size)), u)
        return (v, u), jnp.log(size)

    (v, u), log_growth = jax.lax.scan(advance, (v, u), inputs)
    return v, u, jnp.sum(log_growth)


def warn_not_contracting(method: Method, exponents: Array, converged: Array, time: int) -> None:
    """Warns if perturbations at least double over the sequence. There is no warning inside a JAX transformation."""
    if isinstance(exponents, Tracer) or isinstance(converged, Tracer) or not exponents.size:
        return
    measured = np.asarray(exponents)
    growing = measured * time > math.log(2)
    if not growing.any():
        return
    row = int(np.nanargmax(measured))
    warnings.warn(
        f"perturbations grow along the trajectories of {growing.sum()} of {growing.size} rows (largest Lyapunov "
        f"exponent {measured[row]:+.3g} per step in row {row}), so {type(method).__name__} needs up to {time} "
        f"iterations, one per step ({int(np.sum(converged))} of {growing.size} rows converged): use sj.unroll, or "
        f"fallback=True for the rows that do not converge",
        NotContractingWarning,
        stacklevel=3,
    )
