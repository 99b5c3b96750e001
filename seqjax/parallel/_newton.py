"""Newton's method over one whole trajectory: the s_1..s_T for which r_t = f(s_{t-1}, x_t) - s_t is zero at every t.

Three things keep it honest where products of many Jacobians leave the range of the dtype.

- The steps up to the first one whose residual is more than rounding are settled: they are not moved again, and the scan
  starts after them. The first step that is not settled becomes f(s_{t-1}) to the last bit, so that every iteration
  settles at least one more, and T of them are enough for any method, in floating point too.
- A state that is not finite is replaced by f(s_{t-1}), or else left as it was.
- A residual that is not finite counts as infinite, so that nothing with NaN has converged.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Params
from seqjax.parallel._flat import At, FlatCell
from seqjax.parallel._linear_scan import delayed
from seqjax.parallel.methods import Method

ROUNDING = 4  # rounding errors of the state's scale within which a step is settled
SHRINK, GROW, LARGEST = 0.2, 4.0, 1e3  # of the damping, after a step that was taken or refused


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
    def stepped_of(states: Array) -> Array:
        return flat.steps(params, delayed(first, states), inputs)

    states, marched = _candidates(flat, method, params, first, inputs, at)
    stepped, damping = stepped_of(states), at.damping
    if method.damping:
        better = _merit(states, stepped) < _merit(at.states, at.stepped)
        damping = damping * jnp.where(better, SHRINK, GROW).astype(damping.dtype)
        damping = jnp.clip(damping, flat.epsilon, LARGEST)
        states = jnp.where(better, states, marched)
        stepped = stepped_of(states)
    residuals = _residuals(first, states, stepped)
    return Iterate(states, stepped, residuals, damping, at.iterations + 1, jnp.all(states == at.states))


def _candidates(
    flat: FlatCell, method: Method, params: Params, first: Array, inputs: At, at: Iterate
) -> tuple[Array, Array]:
    """The method's next trajectory, and the one that only settles one more step, for where that is no better."""
    loose = at.residuals > ROUNDING * flat.epsilon
    order, head = jnp.arange(len(loose)), jnp.argmax(loose)
    settled, head = (order < head) | ~jnp.any(loose), (order == head) & loose
    J = flat.jacobians(method.algebra, params, delayed(first, at.states), inputs)
    J = _select(settled, jnp.zeros_like(J), J)
    d = method.change(J, _select(settled, jnp.zeros_like(at.states), at.stepped - at.states), at.damping)
    moved = at.states + d
    if not method.damping:  # the same in exact arithmetic; here with the rounding error of d and not of the states
        moved = at.stepped + jax.vmap(method.algebra.apply)(J, delayed(jnp.zeros_like(first), d))
    marched = _select(head, at.stepped, at.states)
    moved = _select(head, at.stepped, moved)
    moved, marched = (jax.vmap(_finite)(settled, s, at.stepped, at.states) for s in (moved, marched))
    return moved, marched


def _select(steps: Array, yes: Array, no: Array) -> Array:
    """`yes` at the steps that are True, `no` at the others."""
    return jax.vmap(jnp.where)(steps, yes, no)


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
