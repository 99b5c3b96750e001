"""Damped Newton steps down q(s) = |F(s) - s|^2 / 2, from many states at once.

With r = F(s) - s and A = J - I, a step solves (A^T A + damping I) d = -A^T r. Undamped this is Newton's step to the
fixed point. Damped it follows the gradient of q, and so it also ends at minima of q where r is not zero, the slow
points, at which A is singular and Newton's step does not exist. A^T A has the square of A's condition, and in float64
loses what a cell forgets more slowly than in 1e8 steps; a few undamped steps with A itself, at the end, bring it back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.analysis._flow import Driven, flat_step
from seqjax.cell import Cell

POLISH = 3  # undamped steps at the end
AT_ONCE = 2**23  # entries of the Jacobians of all starts that are descended together


class Descended(NamedTuple):
    """Where m descents ended.

    Attributes:
        points: (m, n).
        residual: (m, n), r = F(s) - s.
        speed: (m,), |r|.
        slope: (m,), |d speed / ds| = |A^T r| / |r|.
        jacobians: (m, n, n), ds_t/ds_{t-1}.
        iterations: (m,), attempted steps.
    """

    points: Float[Array, "m n"]
    residual: Float[Array, "m n"]
    speed: Float[Array, " m"]
    slope: Float[Array, " m"]
    jacobians: Float[Array, "m n n"]
    iterations: Int[Array, " m"]


class _Descent(NamedTuple):
    v: Float[Array, " n"]
    r: Float[Array, " n"]
    A: Float[Array, "n n"]
    damping: Float[Array, ""]
    growth: Float[Array, ""]  # of the damping, at the next step that does not help
    iterations: Int[Array, ""]
    moving: Bool[Array, ""]


def descend(cell: Cell, max_iterations: int, given: Driven) -> Descended:
    """Levenberg-Marquardt from every first state, under the input of the first step, to float precision.

    Args:
        cell: any cell.
        max_iterations: for each start.
        given: m sequences of one step.

    Returns:
        `Descended`.

    Source: Marquardt 1963, "An algorithm for least-squares estimation of nonlinear parameters"; the damping follows
        Nielsen 1999, "Damping parameter in Marquardt's method".
    """
    step, inputs = flat_step(cell, given.params), jax.tree.map(lambda leaf: leaf[0, 0], given.inputs)
    identity = jnp.eye(given.size, dtype=given.first.dtype)

    def linearised(v: Array) -> tuple[Array, Array]:
        r, push = jax.linearize(lambda v: step(given.params, v, inputs) - v, v)
        return r, jax.vmap(push)(identity).T

    def going(now: _Descent) -> Array:
        return now.moving & (now.iterations < max_iterations)

    def attempt(now: _Descent) -> _Descent:
        gradient = now.A.T @ now.r
        factor = jax.scipy.linalg.cho_factor(now.A.T @ now.A + now.damping * identity)
        move = -jax.scipy.linalg.cho_solve(factor, gradient)
        v = now.v + move
        r, A = linearised(v)
        gain = (now.r @ now.r - r @ r) / (move @ (now.damping * move - gradient))  # 1 where the linear model holds
        better = gain > 0  # a number that is not finite is no better
        damping = now.damping * jnp.where(better, jnp.maximum(1 / 3, 1 - (2 * gain - 1) ** 3), now.growth)
        tiny = jnp.linalg.norm(move) <= 1e-12 * _size(v)
        after = _Descent(v, r, A, damping, jnp.full_like(damping, 2), now.iterations, _above_rounding(r, v))
        stay = now._replace(damping=damping, growth=2 * now.growth, moving=~tiny & (damping < 1e30))
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), after, stay)
        return kept._replace(iterations=now.iterations + 1)

    def polish(_: Array, end: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, r, A = end
        move = -jnp.linalg.solve(A, r)
        new = (v + move, *linearised(v + move))
        return jax.tree.map(lambda a, b: jnp.where(new[1] @ new[1] < r @ r, a, b), new, end)

    def one(v: Array) -> Descended:
        r, A = linearised(v)
        damping = jnp.maximum(1e-3 * jnp.max(jnp.sum(A**2, axis=0)), 1e-12)
        moving = _above_rounding(r, v) & jnp.all(jnp.isfinite(A))
        growth, iterations = jnp.full_like(damping, 2), jnp.zeros((), jnp.int32)
        end = jax.lax.while_loop(going, attempt, _Descent(v, r, A, damping, growth, iterations, moving))
        v, r, A = jax.lax.fori_loop(0, POLISH, polish, (end.v, end.r, end.A))
        speed = jnp.linalg.norm(r)
        slope = jnp.linalg.norm(A.T @ r) / jnp.where(speed > 0, speed, 1)
        return Descended(v, r, speed, slope, A + identity, end.iterations)

    together = max(1, AT_ONCE // given.size**2)
    return jax.vmap(one)(given.first) if given.batch <= together else jax.lax.map(one, given.first, batch_size=together)


def _size(v: Array) -> Array:
    return jnp.maximum(1, jnp.linalg.norm(v))


def _above_rounding(r: Array, v: Array) -> Array:
    """Whether a residual is finite and more than the rounding of F(v) - v."""
    speed = jnp.linalg.norm(r)
    return jnp.isfinite(speed) & (speed > 2 * jnp.finfo(v.dtype).eps * _size(v))
