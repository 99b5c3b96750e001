"""Damped Newton steps that minimize q(s) = |F(s) - s|^2 / 2, from many states at once.

With r = F(s) - s and A = J - I, a step solves (A^T A + damping I) d = -A^T r. Without damping it is Newton's step to
the fixed point. With damping it follows the gradient of q, so it also finds minima of q at which r is not zero. These
are the slow points; A is singular there, and Newton's step does not exist.

The condition of A^T A is the square of that of A. In float64 this loses all directions that decay more slowly than in
1e8 steps. A few undamped steps with A itself, at the end, recover them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.analysis._flow import Sequences, flat_map
from seqjax.cell import Cell

POLISH = 3  # undamped steps at the end
AT_ONCE = 2**23  # entries of the Jacobians of all starts that are computed in one batch, 64 MB in float64


class DescentResult(NamedTuple):
    """The ends of m descents.

    Attributes:
        points: (m, n).
        residual: (m, n), r = F(s) - s.
        speed: (m,), |r|.
        slope: (m,), |d speed / ds| = |A^T r| / |r|.
        jacobians: (m, n, n), ds_t/ds_{t-1}.
        iterations: (m,), the number of attempted steps.
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
    growth: Float[Array, ""]  # the factor of the damping after the next step that does not reduce q
    iterations: Int[Array, ""]
    moving: Bool[Array, ""]


def descend(cell: Cell, max_iterations: int, sequences: Sequences) -> DescentResult:
    """Runs Levenberg-Marquardt from every first state, with the input of the first step, to float precision.

    Args:
        cell: any cell.
        max_iterations: for each start.
        sequences: m sequences of one step.

    Returns:
        `DescentResult`.

    Source: Marquardt 1963, "An algorithm for least-squares estimation of nonlinear parameters"; the damping follows
        Nielsen 1999, "Damping parameter in Marquardt's method".
    """
    flat, inputs = flat_map(cell, sequences.params), jax.tree.map(lambda leaf: leaf[0, 0], sequences.inputs)
    identity = jnp.eye(sequences.size, dtype=sequences.first.dtype)

    def residual_and_derivative(v: Array) -> tuple[Array, Array]:
        r, push = jax.linearize(lambda v: flat.step(sequences.params, v, inputs) - v, v)
        return r, jax.vmap(push)(identity).T

    def is_unfinished(now: _Descent) -> Array:
        return now.moving & (now.iterations < max_iterations)

    def attempt(now: _Descent) -> _Descent:
        gradient = now.A.T @ now.r
        factor = jax.scipy.linalg.cho_factor(now.A.T @ now.A + now.damping * identity)
        move = -jax.scipy.linalg.cho_solve(factor, gradient)
        v = now.v + move
        r, A = residual_and_derivative(v)
        # The reduction of q over the reduction that the linear model predicts, so 1 if the model is exact.
        gain = (now.r @ now.r - r @ r) / (move @ (now.damping * move - gradient))
        better = gain > 0  # False for NaN, so a step to a state that is not finite is refused
        damping = now.damping * jnp.where(better, jnp.maximum(1 / 3, 1 - (2 * gain - 1) ** 3), now.growth)
        tiny = jnp.linalg.norm(move) <= 1e-12 * _size(v)
        moved = _Descent(v, r, A, damping, jnp.full_like(damping, 2), now.iterations, _is_above_rounding(r, v))
        stayed = now._replace(damping=damping, growth=2 * now.growth, moving=~tiny & (damping < 1e30))
        after = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, stayed)
        return after._replace(iterations=now.iterations + 1)

    def polish(_: Array, end: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, r, A = end
        move = -jnp.linalg.solve(A, r)
        new = (v + move, *residual_and_derivative(v + move))
        return jax.tree.map(lambda a, b: jnp.where(new[1] @ new[1] < r @ r, a, b), new, end)

    def from_one_start(v: Array) -> DescentResult:
        r, A = residual_and_derivative(v)
        # Nielsen's first damping, relative to the diagonal of A^T A; not zero, or it could not grow.
        damping = jnp.maximum(1e-3 * jnp.max(jnp.sum(A**2, axis=0)), 1e-12)
        moving = _is_above_rounding(r, v) & jnp.all(jnp.isfinite(A))
        growth, iterations = jnp.full_like(damping, 2), jnp.zeros((), jnp.int32)
        start = _Descent(v, r, A, damping, growth, iterations, moving)
        end = jax.lax.while_loop(is_unfinished, attempt, start)
        v, r, A = jax.lax.fori_loop(0, POLISH, polish, (end.v, end.r, end.A))
        speed = jnp.linalg.norm(r)
        slope = jnp.linalg.norm(A.T @ r) / jnp.where(speed > 0, speed, 1)
        return DescentResult(v, r, speed, slope, A + identity, end.iterations)

    batch_size = max(1, AT_ONCE // sequences.size**2)
    if sequences.batch <= batch_size:
        return jax.vmap(from_one_start)(sequences.first)
    return jax.lax.map(from_one_start, sequences.first, batch_size=batch_size)


def _size(v: Array) -> Array:
    return jnp.maximum(1, jnp.linalg.norm(v))


def _is_above_rounding(r: Array, v: Array) -> Array:
    """Whether a residual is finite and larger than the rounding error of F(v) - v."""
    speed = jnp.linalg.norm(r)
    return jnp.isfinite(speed) & (speed > 2 * jnp.finfo(v.dtype).eps * _size(v))
