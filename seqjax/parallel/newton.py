"""Newton's method over one whole trajectory: the s_1..s_T for which r_t = f(s_{t-1}, x_t) - s_t is zero at every t.

Three things keep it honest where products of many Jacobians leave the range of the dtype.

- The steps up to the first one whose residual is more than rounding are settled: they are not moved again, and the scan
  starts after them. The first step that is not settled then becomes f(s_{t-1}) to the last bit, so that every iteration
  of Newton's step settles at least one more and T of them are enough, in floating point too.
- A state that is not finite is replaced by f(s_{t-1}), or else left as it was.
- A residual that is not finite counts as infinite, so that nothing with NaN has converged.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Params
from seqjax.parallel.flat import At, FlatCell
from seqjax.parallel.linear_scan import delayed
from seqjax.parallel.methods import Method

ROUNDING = 4  # rounding errors of the state's scale within which a step is settled
SHRINK, GROW, LARGEST = 0.2, 4.0, 1e12  # of the damping, after a step that was taken or refused


class Iterate(NamedTuple):
    """One trajectory on the way, and what was found out about it."""

    states: Array  # s_1..s_T (time, n)
    stepped: Array  # f(s_0)..f(s_{T-1}) (time, n)
    residuals: Array  # (time,), relative
    damping: Array
    iterations: Array
    stuck: Array


def newton(
    flat: FlatCell, method: Method, params: Params, first: Array, inputs: At, tolerance: Array, most: Array
) -> tuple[Array, Array, Array]:
    """Iterates from s_t = s_0 until max_t |f(s_{t-1}) - s_t| is within the tolerance of the states' scale.

    Args:
        flat: the cell.
        method: the way to step.
        params: of the cell.
        first: s_0 (n,).
        inputs: of one sequence, leaves (time, ...).
        tolerance: on the residual.
        most: iterations.

    Returns:
        s_1..s_T (time, n), the residual, infinite where it is not finite, and the iterations.

    Source: Lim et al. 2024; Gonzalez et al. 2024.
    """
    time = jax.tree.leaves(inputs)[0].shape[0]
    guess = jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first))
    states = jnp.broadcast_to(guess[None], (time, len(guess)))

    def going(at: Iterate) -> Array:
        return (jnp.max(at.residuals) > tolerance) & (at.iterations < most) & ~at.stuck

    def iterate(at: Iterate) -> Iterate:
        return _iterate(flat, method, params, first, inputs, at)

    stepped = flat.steps(params, delayed(first, states), inputs)
    start = Iterate(
        states=states,
        stepped=stepped,
        residuals=_residuals(first, states, stepped),
        damping=jnp.asarray(method.damping, first.dtype),
        iterations=jnp.zeros((), jnp.int32),
        stuck=jnp.zeros((), bool),
    )
    end = jax.lax.while_loop(going, iterate, start)
    return end.states, jnp.max(end.residuals), end.iterations


def _iterate(flat: FlatCell, method: Method, params: Params, first: Array, inputs: At, at: Iterate) -> Iterate:
    candidate = _candidate(flat, method, params, first, inputs, at)
    stepped = flat.steps(params, delayed(first, candidate), inputs)
    residuals = _residuals(first, candidate, stepped)
    stuck = jnp.all(candidate == at.states)
    if method.damping == 0:
        return Iterate(candidate, stepped, residuals, at.damping, at.iterations + 1, stuck)
    better = _merit(candidate, stepped) < _merit(at.states, at.stepped)
    damping = at.damping * jnp.where(better, SHRINK, GROW).astype(at.damping.dtype)
    damping = jnp.maximum(damping, flat.epsilon)
    kept = jnp.where(better, candidate, at.states), jnp.where(better, stepped, at.stepped)
    return Iterate(
        *kept,
        jnp.where(better, residuals, at.residuals),
        damping,
        at.iterations + 1,
        (damping > LARGEST) | (better & stuck),
    )


def _candidate(flat: FlatCell, method: Method, params: Params, first: Array, inputs: At, at: Iterate) -> Array:
    settled = jnp.cumsum(at.residuals > ROUNDING * flat.epsilon, dtype=jnp.int32) == 0
    J = flat.jacobians(method.algebra, params, delayed(first, at.states), inputs)
    J = jax.vmap(lambda done, J: jnp.where(done, jnp.zeros_like(J), J))(settled, J)
    r = jax.vmap(lambda done, r: jnp.where(done, jnp.zeros_like(r), r))(settled, at.stepped - at.states)
    d = method.change(J, r, at.damping)
    moved = at.states + d
    if method.damping == 0:  # the same, and exactly f(s_{t-1}) where the step before is settled
        moved = at.stepped + jax.vmap(method.algebra.apply)(J, delayed(jnp.zeros_like(first), d))
    return jax.vmap(_finite)(settled, moved, at.stepped, at.states)


def _finite(settled: Array, moved: Array, stepped: Array, before: Array) -> Array:
    moved = jnp.where(jnp.all(jnp.isfinite(moved)), moved, stepped)
    return jnp.where(settled | ~jnp.all(jnp.isfinite(moved)), before, moved)


def _residuals(first: Array, states: Array, stepped: Array) -> Array:
    """|f(s_{t-1}) - s_t| over the largest state until then: later states, which may be wild, do not excuse it."""
    sizes = jnp.max(jnp.abs(jnp.concatenate([first[None], stepped])), axis=1)
    sizes = jax.lax.cummax(jnp.where(jnp.isfinite(sizes), sizes, jnp.zeros_like(sizes)))[1:]
    errors = jnp.max(jnp.abs(stepped - states), axis=1)
    errors = jnp.where(errors == 0, errors, errors / jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny))
    return jnp.where(jnp.isnan(errors), jnp.full_like(errors, jnp.inf), errors)


def _merit(states: Array, stepped: Array) -> Array:
    merit = jnp.sum(jnp.square(stepped - states))
    return jnp.where(jnp.isnan(merit), jnp.full_like(merit, jnp.inf), merit)
