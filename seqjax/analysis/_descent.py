"""Damped Newton steps that minimize q(s) = |F(s) - s|^2 / 2, from many states at once.

With r = F(s) - s and A = J - I, a step solves (A^T A + damping I) d = -A^T r. Without damping it is Newton's step to
the fixed point. With damping it follows the gradient of q, so it also finds minima of q at which r is not zero. These
are the slow points; A is singular there, and Newton's step does not exist.

A rectified network is linear in each region of its states, and J jumps at the kinks between them. The descent can stop
at a kink that is no minimum, because no short step reduces q. Newton's whole step, which is exact within one region,
leaves the kink. If that does not help, the state is run forward, as the network itself would go on from there.

The condition of A^T A is the square of that of A. In float64 this loses all directions that decay more slowly than in
1e8 steps. A few undamped steps with A itself, at the end, recover them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqjax.analysis._flow import Sequences, flat_map
from seqjax.analysis._forward import run_forward, size
from seqjax.cell import Cell

POLISH = 3  # undamped steps at the end
# Entries of the Jacobians of the starts that are computed in one batch, 2 MB in float64, which a cache holds. A batch
# takes as long as its longest descent, so small batches are also faster because they finish at different times.
AT_ONCE = 2**18


class DescentResult(NamedTuple):
    """The ends of m descents.

    Attributes:
        points: (m, n).
        residual: (m, n), r = F(s) - s.
        speed: (m,), |r|.
        slope: (m,), |d speed / ds| = |A^T r| / |r|.
        jacobians: (m, n, n), ds_t/ds_{t-1}.
        iterations: (m,), the number of attempted steps.
        moving: (m,), whether the iterations were used up.
        last_move: (m,), the length of the last damped step that reduced q; 0 for none.
        forward_steps: (m,), the number of steps that the state was run forward.
        at_rest: (m,), whether the last of these runs came to rest.
        image: (m, n), F at the start.
        flat: (m,), whether the derivative at the start is zero, in one random direction.
        mismatch: (m,), |F(s + d) - F(s) - J d| / (|F(s + d) - F(s)| + |J d|) at the end, for one short random d.
    """

    points: Float[Array, "m n"]
    residual: Float[Array, "m n"]
    speed: Float[Array, " m"]
    slope: Float[Array, " m"]
    jacobians: Float[Array, "m n n"]
    iterations: Int[Array, " m"]
    moving: Bool[Array, " m"]
    last_move: Float[Array, " m"]
    forward_steps: Int[Array, " m"]
    at_rest: Bool[Array, " m"]
    image: Float[Array, "m n"]
    flat: Bool[Array, " m"]
    mismatch: Float[Array, " m"]


class _Descent(NamedTuple):
    v: Float[Array, " n"]
    r: Float[Array, " n"]
    A: Float[Array, "n n"]
    damping: Float[Array, ""]
    growth: Float[Array, ""]  # the factor of the damping after the next step that does not reduce q
    iterations: Int[Array, ""]
    moving: Bool[Array, ""]
    last_move: Float[Array, ""]


class _Search(NamedTuple):
    """One start between two descents."""

    v: Float[Array, " n"]
    r: Float[Array, " n"]
    A: Float[Array, "n n"]
    iterations: Int[Array, ""]
    moving: Bool[Array, ""]
    last_move: Float[Array, ""]
    forward: Bool[Array, ""]
    forward_steps: Int[Array, ""]
    at_rest: Bool[Array, ""]
    descents: Int[Array, ""]


def descend(
    cell: Cell, max_iterations: int, sequences: Sequences, forward: Bool[Any, " m"], steps: Array, tolerance: Array
) -> DescentResult:
    """Runs Levenberg-Marquardt from every first state, with the input of the first step, to float precision.

    Args:
        cell: any cell.
        max_iterations: for each start.
        sequences: m sequences of one step.
        forward: which states are run forward before the descent.
        steps: the largest number of steps of a run.
        tolerance: the relative speed of a state at rest, and of a fixed point.

    Returns:
        `DescentResult`.

    Source: Marquardt 1963, "An algorithm for least-squares estimation of nonlinear parameters"; the damping follows
        Nielsen 1999, "Damping parameter in Marquardt's method".
    """
    flat, inputs = flat_map(cell, sequences.params), jax.tree.map(lambda leaf: leaf[0, 0], sequences.inputs)
    n, dtype = sequences.size, sequences.first.dtype
    identity = jnp.eye(n, dtype=dtype)
    direction = np.random.default_rng(0).normal(size=n)
    direction = jnp.asarray(1e-4 * direction / np.linalg.norm(direction), dtype)  # enough for a step in float32

    def step(v: Array) -> Array:
        return flat.step(sequences.params, v, inputs)

    def residual_and_derivative(v: Array) -> tuple[Array, Array]:
        r, push = jax.linearize(lambda v: step(v) - v, v)
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
        length = jnp.linalg.norm(move)
        tiny = length <= 1e-12 * size(v)
        moving = _is_above_rounding(r, v)
        moved = _Descent(v, r, A, damping, jnp.full_like(damping, 2), now.iterations, moving, length)
        stayed = now._replace(damping=damping, growth=2 * now.growth, moving=~tiny & (damping < 1e30))
        after = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, stayed)
        return after._replace(iterations=now.iterations + 1)

    def polish(_: Array, end: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, r, A = end
        move = -jnp.linalg.solve(A, r)
        new = (v + move, *residual_and_derivative(v + move))
        return jax.tree.map(lambda a, b: jnp.where(new[1] @ new[1] < r @ r, a, b), new, end)

    def goes_on(now: _Search) -> Array:
        speed, slope = _speed_and_slope(now.r, now.A)
        found = (speed <= tolerance * size(now.v)) | is_minimum(speed, slope, size(now.v)) | ~jnp.isfinite(speed)
        # A start that was stuck once is run forward even if its iterations are used up.
        stuck = ~found & (now.descents < 3) & (~now.moving | (now.descents == 2))
        return stuck | (now.descents == 0)

    def search(now: _Search) -> _Search:
        """Descends: first from the start, then from Newton's whole step, at last from the end of a run forward."""
        is_last = now.descents == 2
        limit = jnp.where(is_last | ((now.descents == 0) & now.forward), steps, 0)
        jump = -jnp.linalg.solve(now.A, now.r)
        can_jump = (now.descents == 1) & jnp.all(jnp.isfinite(jump))
        run = run_forward(step, jnp.where(can_jump, now.v + jump, now.v), limit, tolerance)
        r, A = residual_and_derivative(run.v)
        # Nielsen's first damping, relative to the diagonal of A^T A; not zero, or it could not grow.
        damping = jnp.maximum(1e-3 * jnp.max(jnp.sum(A**2, axis=0)), 1e-12)
        moving = _is_above_rounding(r, run.v) & jnp.all(jnp.isfinite(A))
        start = _Descent(
            run.v, r, A, damping, jnp.full_like(damping, 2), now.iterations, moving, jnp.zeros_like(damping)
        )
        end = jax.lax.while_loop(is_unfinished, attempt, start)
        v, r, A = jax.lax.fori_loop(0, POLISH, polish, (end.v, end.r, end.A))
        return _Search(
            v=v,
            r=r,
            A=A,
            iterations=end.iterations,
            moving=end.moving,
            last_move=end.last_move,
            forward=now.forward,
            forward_steps=now.forward_steps + run.steps,
            at_rest=jnp.where(limit > 0, run.at_rest, now.at_rest),
            descents=now.descents + 1,
        )

    def from_one_start(v: Array, forward: Array) -> DescentResult:
        image, tangent = jax.jvp(step, (v,), (direction,))
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        start = _Search(v, jnp.zeros_like(v), -identity, zero, no, jnp.zeros((), dtype), forward, zero, no, zero)
        end = jax.lax.while_loop(goes_on, search, start)
        speed, slope = _speed_and_slope(end.r, end.A)
        J, d = end.A + identity, direction * size(end.v)
        difference, change = step(end.v + d) - (end.v + end.r), J @ d
        both = jnp.linalg.norm(difference) + jnp.linalg.norm(change)
        return DescentResult(
            points=end.v,
            residual=end.r,
            speed=speed,
            slope=slope,
            jacobians=J,
            iterations=end.iterations,
            moving=end.moving,
            last_move=end.last_move,
            forward_steps=end.forward_steps,
            at_rest=end.at_rest,
            image=image,
            flat=jnp.all(tangent == 0),
            mismatch=jnp.linalg.norm(difference - change) / jnp.where(both > 0, both, 1),
        )

    return _in_batches(from_one_start, max(1, AT_ONCE // n**2), sequences.first, forward)


def _in_batches(function: Callable[..., DescentResult], at_once: int, *rows: Array) -> DescentResult:
    """Maps a function over rows, about `at_once` of them together."""
    m = len(rows[0])
    batches = -(-m // at_once)
    if batches == 1:
        return jax.vmap(function)(*rows)
    # Equal batches, because `jax.lax.map` would compile the function twice for a smaller last one.
    index = jnp.arange(batches * -(-m // batches)).reshape(batches, -1) % m
    ends = jax.lax.map(lambda batch: jax.vmap(function)(*batch), tuple(row[index] for row in rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:m], ends)


def is_minimum(speed: Any, slope: Any, size: Any) -> Any:
    """Whether the slope is so small that over a distance of `size` it would change the speed by less than a tenth."""
    return (slope <= 1e-6) & (slope * size <= 0.1 * speed)


def _speed_and_slope(r: Array, A: Array) -> tuple[Array, Array]:
    speed = jnp.linalg.norm(r)
    return speed, jnp.linalg.norm(A.T @ r) / jnp.where(speed > 0, speed, 1)


def _is_above_rounding(r: Array, v: Array) -> Array:
    """Whether a residual is finite and larger than the rounding error of F(v) - v."""
    speed = jnp.linalg.norm(r)
    return jnp.isfinite(speed) & (speed > 2 * jnp.finfo(v.dtype).eps * size(v))
