"""Newton's method on one whole trajectory: the s_1..s_T for which r_t = f(s_{t-1}, x_t) - s_t is zero at every t.

Products of many Jacobians can overflow. Three rules make the method exact all the same.

- A step is settled if its residual and those of all steps before it are rounding errors. Settled steps do not change
  any more, and the linear scan starts after them. The first step that is not settled becomes f(s_{t-1}) exactly. So
  every iteration settles at least one more step, and T iterations are enough for any method, in floating point too.
- A state that is not finite is replaced by f(s_{t-1}), or by its former value if that is not finite either.
- A residual that is not finite counts as infinite, so a trajectory with NaN has not converged.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Params
from seqjax.parallel._flat import At, NewtonCell
from seqjax.parallel._linear_scan import previous_states
from seqjax.parallel.methods import Method

ROUNDING = 4  # the largest residual of a settled step, in rounding errors at the scale of the state
# The factors of the damping after an accepted and after a rejected iteration, and its upper limit.
SHRINK, GROW, LARGEST = 0.2, 4.0, 1e3


class Iterate(NamedTuple):
    """The trajectory after some iterations.

    Attributes:
        states: s_1..s_T (time, n).
        stepped: f(s_0)..f(s_{T-1}) (time, n).
        residuals: of each step (time,), relative to the states.
        damping: mu of the next iteration.
        iterations: the number of iterations.
        stuck: whether the last iteration changed nothing.
    """

    states: Array
    stepped: Array
    residuals: Array
    damping: Array
    iterations: Array
    stuck: Array


def newton(
    flat: NewtonCell, method: Method, params: Params, first: Array, inputs: At, tolerance: Array, max_iterations: Array
) -> tuple[Array, Array, Array]:
    """Iterates from s_t = s_0 until max_t |f(s_{t-1}) - s_t|, relative to the states, is within the tolerance.

    Args:
        flat: the cell.
        method: the Jacobians and the change per iteration.
        params: the parameters of the cell.
        first: s_0 (n,).
        inputs: the inputs of one sequence, leaves (time, ...).
        tolerance: the largest residual of a converged trajectory.
        max_iterations: the largest number of iterations.

    Returns:
        s_1..s_T (time, n), the residual, infinite if it is not finite, and the number of iterations.

    Source: Lim et al. 2024; Gonzalez et al. 2024.
    """
    time = jax.tree.leaves(inputs)[0].shape[0]
    guess = jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first))
    states = jnp.broadcast_to(guess[None], (time, len(guess)))

    def unfinished(at: Iterate) -> Array:
        return (jnp.max(at.residuals) > tolerance) & (at.iterations < max_iterations) & ~at.stuck

    def iterate(at: Iterate) -> Iterate:
        return _iterate(flat, method, params, first, inputs, at)

    stepped = flat.steps(params, previous_states(first, states), inputs)
    start = Iterate(
        states=states,
        stepped=stepped,
        residuals=_residuals(first, states, stepped),
        damping=jnp.asarray(method.damping, first.dtype),
        iterations=jnp.zeros((), jnp.int32),
        stuck=jnp.zeros((), bool),
    )
    end = jax.lax.while_loop(unfinished, iterate, start)
    return end.states, jnp.max(end.residuals), end.iterations


def _iterate(flat: NewtonCell, method: Method, params: Params, first: Array, inputs: At, at: Iterate) -> Iterate:
    def step_all(states: Array) -> Array:
        return flat.steps(params, previous_states(first, states), inputs)

    states, cautious = _candidates(flat, method, params, first, inputs, at)
    stepped, damping = step_all(states), at.damping
    if method.damping:
        better = _squared_residual(states, stepped) < _squared_residual(at.states, at.stepped)
        damping = damping * jnp.where(better, SHRINK, GROW).astype(damping.dtype)
        damping = jnp.clip(damping, flat.epsilon, LARGEST)
        states = jnp.where(better, states, cautious)
        stepped = step_all(states)
    residuals = _residuals(first, states, stepped)
    return Iterate(states, stepped, residuals, damping, at.iterations + 1, jnp.all(states == at.states))


def _candidates(
    flat: NewtonCell, method: Method, params: Params, first: Array, inputs: At, at: Iterate
) -> tuple[Array, Array]:
    """The next trajectory by the method, and one that only settles one more step, for use if the first is no better."""
    loose = at.residuals > ROUNDING * flat.epsilon
    order, head = jnp.arange(loose.shape[0]), jnp.argmax(loose)
    settled, head = (order < head) | ~jnp.any(loose), (order == head) & loose
    # With a zero Jacobian and a zero residual, the scan does not change a settled step.
    J = flat.jacobians(method.algebra, params, previous_states(first, at.states), inputs)
    J = _select(settled, jnp.zeros_like(J), J)
    d = method.change(J, _select(settled, jnp.zeros_like(at.states), at.stepped - at.states), at.damping)
    states = at.states + d
    if not method.damping:
        # Equal in exact arithmetic, but here a small d has small rounding errors, and not those of the states.
        states = at.stepped + jax.vmap(method.algebra.apply)(J, previous_states(jnp.zeros_like(first), d))
    cautious = _select(head, at.stepped, at.states)
    states = _select(head, at.stepped, states)
    states, cautious = (jax.vmap(_finite)(settled, s, at.stepped, at.states) for s in (states, cautious))
    return states, cautious


def _select(steps: Array, yes: Array, no: Array) -> Array:
    """Selects `yes` at the steps for which `steps` is True, and `no` at the others."""
    return jax.vmap(jnp.where)(steps, yes, no)


def _finite(settled: Array, state: Array, stepped: Array, before: Array) -> Array:
    """The new state of one step if it is finite; otherwise f(s_{t-1}), or its former value."""
    state = jnp.where(jnp.all(jnp.isfinite(state)), state, stepped)
    return jnp.where(settled | ~jnp.all(jnp.isfinite(state)), before, state)


def _residuals(first: Array, states: Array, stepped: Array) -> Array:
    """|f(s_{t-1}) - s_t| for each t, relative to the largest state up to t."""
    # Not relative to later states, which may be huge before convergence and would hide the residual.
    sizes = jnp.max(jnp.abs(jnp.concatenate([first[None], stepped])), axis=1)
    sizes = jax.lax.cummax(jnp.where(jnp.isfinite(sizes), sizes, jnp.zeros_like(sizes)))[1:]
    errors = jnp.max(jnp.abs(stepped - states), axis=1)
    # A zero residual of a zero state is zero, and not 0 / 0.
    errors = jnp.where(errors == 0, errors, errors / jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny))
    return jnp.where(jnp.isnan(errors), jnp.full_like(errors, jnp.inf), errors)


def _squared_residual(states: Array, stepped: Array) -> Array:
    """sum_t |r_t|^2, or infinity if it is NaN, so that comparisons reject it."""
    total = jnp.sum(jnp.square(stepped - states))
    return jnp.where(jnp.isnan(total), jnp.full_like(total, jnp.inf), total)
