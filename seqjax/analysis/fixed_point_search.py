"""Fixed and slow points: states that a cell with a constant input does not change, s* = F(s*, x), or hardly changes.

Near such a point the cell is a linear system. The eigenvalues of its Jacobian describe which directions decay,
oscillate, grow or persist. The memory of a trained network usually lies near a few such points.

Half of the starts are states that were run forward under the constant input (`seqjax.analysis._forward`). They lead to
what attracts the states. From there and from random states, damped Newton steps minimize q(s) = |F(s) - s|^2 / 2
(`seqjax.analysis._descent`), which also finds unstable points. The search always runs in float64. In float32 the speed
|F(s) - s| cannot fall much below 1e-7, so a slow point could not be distinguished from a fixed point.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int, PyTree

from seqjax.analysis._descent import DescentResult, descend, is_minimum
from seqjax.analysis._fixed_point_words import describe_points, doubts_of, runs_in_words
from seqjax.analysis._flow import Sequences, cast_floats, check_arguments, unflatten
from seqjax.analysis._forward import LARGE
from seqjax.analysis._starts import check_input, flat_starts
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes


class Search(NamedTuple):
    """The result of each of the m starts, in their order.

    Attributes:
        outcome: (m,), "fixed", "slow", "fast" (a minimum of the speed, above `slow_tolerance`), "stuck" (no minimum,
            but no step reduces the speed: at a kink of the step, or within its rounding errors), "unfinished" (the
            `max_iterations` were used up), or "diverged" (not finite, or a million times larger than the start).
        residual: (m,), the speed |F(s) - s| at the end, in change of state per step.
        slope: (m,), |d speed / ds| at the end. At a minimum it is at most 1e-6, and so small that over a distance of
            max(1, |s|) it would change the speed by less than a tenth.
        iterations: (m,), the number of attempted Newton steps.
        converged: (m,), whether the end is a fixed point or a minimum of the speed.
        point: (m,), the index of the point at the end; -1 for none.
        forward_steps: (m,), the number of steps that the state was run forward, at first or after it was stuck.
        at_rest: (m,), whether it came to rest in these steps; False if there were none.
    """

    outcome: np.ndarray
    residual: Float[np.ndarray, " m"]
    slope: Float[np.ndarray, " m"]
    iterations: Int[np.ndarray, " m"]
    converged: Bool[np.ndarray, " m"]
    point: Int[np.ndarray, " m"]
    forward_steps: Int[np.ndarray, " m"]
    at_rest: Bool[np.ndarray, " m"]

    def __str__(self) -> str:
        outcomes = zip(*np.unique(self.outcome, return_counts=True), strict=True)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes)
        return f"{len(self.outcome)} starts: {counts}; at most {self.iterations.max(initial=0)} Newton steps"


class FixedPoints(NamedTuple):
    """The k points, in float64: fixed points before slow points, each sorted by increasing spectral radius.

    `print` shows the first points, what the search covered, and why it may not be reliable.

    Attributes:
        points: (k, n), the flat states; `state_parts` returns the position of each field.
        states: the same as the cell's own states, leaves (k, ...).
        kind: (k,), "fixed" or "slow".
        residual: (k,), the speed |F(s) - s| at the point, in change of state per step.
        counts: (k,), the number of starts that ended at the point.
        jacobians: (k, n, n), ds_t/ds_{t-1} at the point.
        eigenvalues: (k, n), of the Jacobians, by decreasing modulus; -1/ln|eigenvalue| is a time constant in steps.
        spectral_radius: (k,), the largest modulus.
        stable: (k,), whether the spectral radius is below one; arbitrary if it is one up to rounding errors.
        unstable: (k,), the number of eigenvalues with a modulus above one.
        search: the result of each start.
        reason: one line with the number of starts for each outcome, and what makes the result unreliable.
        covered: one line with the starts of the search.
        reliable: False if the step is not finite at all starts, if its derivatives disagree with its values, or if half
            of the starts or more are stuck or unfinished. True says nothing about points that no start leads to.
    """

    points: Float[np.ndarray, "k n"]
    states: State
    kind: np.ndarray
    residual: Float[np.ndarray, " k"]
    counts: Int[np.ndarray, " k"]
    jacobians: Float[np.ndarray, "k n n"]
    eigenvalues: Complex[np.ndarray, "k n"]
    spectral_radius: Float[np.ndarray, " k"]
    stable: Bool[np.ndarray, " k"]
    unstable: Int[np.ndarray, " k"]
    search: Search
    reason: str
    covered: str = ""
    reliable: bool = True

    def __str__(self) -> str:
        return describe_points(self)


@for_automatic_axes
def fixed_points(
    cell: Cell,
    params: Params,
    x: PyTree = None,
    *,
    starts: State | None = None,
    count: int = 128,
    key: Array | None = None,
    scale: float = 0.5,
    tolerance: float = 1e-10,
    slow_tolerance: float = 1e-3,
    distance: float = 1e-4,
    max_iterations: int = 200,
    forward_steps: int = 1000,
) -> FixedPoints:
    """Searches for the fixed points s* = F(s*, x) of a cell with a constant input, and for points of minimal speed.

    A fixed point has a speed |F(s) - s| below `tolerance`. Also, Newton's step from it, which estimates its error, is
    below `distance`; otherwise a state that diverges slowly while a gate closes would count as fixed. A slow point is a
    minimum of the speed below `slow_tolerance`. It remains after a pair of fixed points has merged and disappeared, and
    trajectories stay near it for many steps. The search finds only points that the starts lead to. It returns a line
    of fixed points as many points. A limit cycle is no point: `reason` says how many states did not come to rest.

    Args:
        cell, params: any cell and its parameters; the parameters are cast to float64.
        x: the input of every step, for one example, such as (features,) or a token; by default zeros.
        starts: states, leaves (m, ...), which are all used; or a trajectory from `sj.trajectory`, leaves
            (batch, time + 1, ...), of which `count` states are used. By default `count` states around the initial one,
            which is the first of them; the first half is run forward.
        count: the number of starts that are drawn.
        key: for drawing them; `jax.random.key(0)` by default.
        scale: the standard deviation of random starts, in units of the state. Of the states that are run forward, a
            quarter has scale n^(1/4) and a quarter scale sqrt(n), so that they reach attractors far away.
        tolerance: the largest speed of a fixed point, relative to max(1, |s|). A cell that always computes in float32,
            such as `flax.nnx.SimpleCell`, needs 1e-6.
        slow_tolerance: the largest speed of a slow point, in change of state per step.
        distance: points closer than this, relative to max(1, |s|), are one point.
        max_iterations: of Newton's method, for each start.
        forward_steps: the largest number of steps that a state is run forward; 0 for no run.

    Returns:
        `FixedPoints`. If k is zero, `search` has the outcome of each start.

    Raises:
        ValueError: a shape does not match, or a number is not positive.
        TypeError: a dtype does not match, or the state cannot be differentiated.

    Source: Sussillo and Barak 2013, "Opening the black box: low-dimensional dynamics in high-dimensional recurrent
        neural networks". The damping is that of Marquardt 1963, with the rule of Nielsen 1999.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1)
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=2 * jnp.eye(1), b_h=jnp.zeros(1))  # h' = tanh(2 h + x)
        >>> result = sj.analysis.fixed_points(cell, params)
        >>> [(round(abs(float(h)), 6), str(kind)) for h, kind in zip(result.points[:, 0], result.kind)]
        [(0.957504, 'fixed'), (0.957504, 'fixed'), (0.0, 'fixed')]
        >>> result.spectral_radius.round(6).tolist(), result.unstable.tolist()
        ([0.166372, 0.166372, 2.0], [0, 0, 1])
        >>> print(result)
        3 fixed points (2 stable), 0 slow points
          1. fixed, stable, spectral radius 0.1664, slowest time constant 0.558 steps, 48 starts
          2. fixed, stable, spectral radius 0.1664, slowest time constant 0.558 steps, 41 starts
          3. fixed, unstable in 1 direction, spectral radius 2, no decaying mode, 39 starts
        covered: 64 random states and 64 states that were run forward for up to 1000 steps; a search cannot prove ...
        reliable: yes
        reason: 128 starts: 128 fixed; 3 fixed and 0 slow points
    """
    limits = dict(scale=scale, tolerance=tolerance, slow_tolerance=slow_tolerance, distance=distance)
    _check_numbers(limits, dict(count=count, max_iterations=max_iterations), forward_steps)
    # Locally, so that the user's precision does not change.
    with jax.enable_x64(True):
        params, x = cast_floats((params, check_input(cell, x)), jnp.float64)
        key = jax.random.key(0) if key is None else key
        drawn = flat_starts(cell, params, starts, int(count), key, scale, int(forward_steps))
        # Each start is one sequence of one step, so that all checks of sequences apply.
        xs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None, None], (len(drawn.states), 1, *leaf.shape)), x)
        cell, sequences = check_arguments(cell, params, xs, unflatten(cell, params, drawn.states), None, None)
        search = precise_jit(descend, cell, int(max_iterations))
        limits = jnp.asarray(forward_steps, jnp.int32), jnp.asarray(tolerance, jnp.float64)
        ends = jax.tree.map(np.asarray, search(sequences, jnp.asarray(drawn.forward), *limits))
        outcome = _outcomes(np.asarray(sequences.first), ends, tolerance, slow_tolerance, distance)
        chosen, point = _without_duplicates(ends, outcome, distance)
        points = _sorted_points(cell, sequences, ends, outcome, chosen, point)
    doubts = doubts_of(params, ends, points)
    return points._replace(
        reason="; ".join([points.reason, *doubts, *runs_in_words(ends, drawn.forward)]),
        covered=f"{drawn.words}; a search cannot prove that there are no other points",
        reliable=not doubts,
    )


def _check_numbers(limits: dict[str, float], counts: dict[str, int], forward_steps: int) -> None:
    for name, value in (limits | counts).items():
        if not 0 < value < np.inf:
            raise ValueError(f"expected a positive {name}, got {value!r}: start with the default")
    for name, value in (counts | dict(forward_steps=forward_steps)).items():
        if value != int(value) or not 0 <= value < 2**31:
            raise ValueError(f"expected a whole number for {name}, got {value!r}: start with the default")


def _size(points: np.ndarray) -> np.ndarray:
    return np.maximum(1.0, np.linalg.norm(points, axis=-1))


def _is_close(ends: DescentResult, start: int, distance: float) -> bool:
    """Whether the end of one start is closer to a fixed point than `distance`, by the undamped Newton step from it."""
    r, size = np.asarray(ends.residual[start]), float(_size(np.asarray(ends.points))[start])
    rounding = 4 * np.finfo(r.dtype).eps * size
    # Rounding errors of the residual are set to zero, because a nearly singular matrix would make a long step of them.
    r = np.where(np.abs(r) <= rounding, 0, r)
    step, _, _, values = np.linalg.lstsq(ends.jacobians[start] - np.eye(r.size), r)
    # If it makes a long step of rounding errors, the steps before tell a line of points from a state that moves away.
    is_certain = rounding <= distance * size * values[-1] or ends.last_move[start] <= distance * size
    return bool(np.linalg.norm(step) <= distance * size and is_certain)


def _outcomes(
    first: np.ndarray, ends: DescentResult, tolerance: float, slow_tolerance: float, distance: float
) -> np.ndarray:
    """`Search.outcome` of every start."""
    speed, slope, size = np.asarray(ends.speed), np.asarray(ends.slope), _size(np.asarray(ends.points))
    finite = np.isfinite(speed) & np.isfinite(size)
    # A start that diverges may stop at any large state with a small relative speed.
    near = finite & (size <= LARGE * _size(first))
    # A speed within rounding errors is no minimum: it is that of a fixed point, or of a state that moves away slowly.
    minimum = near & is_minimum(speed, slope, size) & (speed > 4 * np.finfo(speed.dtype).eps * size)
    fixed, slow = finite & (speed <= tolerance * size), minimum & (speed <= slow_tolerance)
    for start in np.flatnonzero(fixed):
        fixed[start] = _is_close(ends, int(start), distance)
    kinds = {"fixed": fixed, "slow": slow, "fast": minimum, "unfinished": near & ends.moving, "stuck": near}
    return np.select(list(kinds.values()), list(kinds), "diverged")


def _without_duplicates(ends: DescentResult, outcome: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """One start for each point, and the index of each start's point.

    Fixed points come before slow ones and small speeds first, so that the most exact start represents its point.
    """
    points, speed = np.asarray(ends.points), np.asarray(ends.speed)
    candidates = np.flatnonzero(np.isin(outcome, ["fixed", "slow"]))
    candidates = candidates[np.lexsort((speed[candidates], outcome[candidates] == "slow"))]
    chosen, point = [], np.full(len(outcome), -1)
    while candidates.size:
        here = points[candidates[0]]
        same = np.linalg.norm(points[candidates] - here, axis=1) <= distance * _size(here[None])
        point[candidates[same]] = len(chosen)
        chosen.append(candidates[0])
        candidates = candidates[~same]
    return np.array(chosen, int), point


def _sorted_points(
    cell: Cell, sequences: Sequences, ends: DescentResult, outcome: np.ndarray, chosen: np.ndarray, point: np.ndarray
) -> FixedPoints:
    """The chosen ends in the order of `FixedPoints`."""
    points, speed = np.asarray(ends.points), np.asarray(ends.speed)
    values = np.linalg.eigvals(ends.jacobians[chosen]).astype(complex)
    values = np.take_along_axis(values, np.argsort(-np.abs(values), axis=1, kind="stable"), axis=1)
    radius, slow = np.abs(values[:, 0]), outcome[chosen] == "slow"
    # The radius is rounded so that mirror images, whose radii are equal, are sorted by their first number.
    order = np.lexsort((points[chosen, 0], radius.round(9), slow))
    new_index = np.append(np.argsort(order), -1)  # -1 stays -1
    chosen, values, radius = chosen[order], values[order], radius[order]
    point = new_index[point]
    counts = np.bincount(point[point >= 0], minlength=len(chosen))
    states = jax.tree.map(np.asarray, unflatten(cell, sequences.params, jnp.asarray(points[chosen])))
    kinds = [f"{np.sum(outcome == kind)} {kind}" for kind in np.unique(outcome)]
    reason = f"{len(outcome)} starts: {', '.join(kinds)}; {np.sum(~slow)} fixed and {np.sum(slow)} slow points"
    return FixedPoints(
        points=points[chosen],
        states=states,
        kind=outcome[chosen],
        residual=speed[chosen],
        counts=counts,
        jacobians=np.asarray(ends.jacobians)[chosen],
        eigenvalues=values,
        spectral_radius=radius,
        stable=radius < 1,
        unstable=np.sum(np.abs(values) > 1, axis=1),
        search=Search(
            outcome,
            speed,
            np.asarray(ends.slope),
            np.asarray(ends.iterations),
            np.isin(outcome, ["fixed", "slow", "fast"]),
            point,
            np.asarray(ends.forward_steps),
            np.asarray(ends.at_rest),
        ),
        reason=reason,
    )
