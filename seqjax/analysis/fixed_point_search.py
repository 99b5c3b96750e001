"""Fixed and slow points: where a cell under a constant input stands still, s* = F(s*, x), or nearly so.

Around such a point the cell is a linear system, and the eigenvalues of its Jacobian there say what it does: what
decays, what oscillates, what grows, and what lasts. A trained network's memory usually lies in a few of them.

The search lets q(s) = |F(s) - s|^2 / 2 fall from many starts at once, by Newton steps that are damped where they do not
help (`seqjax.analysis._descent`). It is done in float64 whatever the precision around it: in float32 the speed
|F(s) - s| cannot fall much below 1e-7, and a slow point cannot be told from a fixed one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int, PyTree

from seqjax.analysis._descent import descend
from seqjax.analysis._flow import Driven, driven, unflatten
from seqjax.analysis._starts import check_input, flat_starts
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import compiled


class Search(NamedTuple):
    """What became of every one of the m starts, in their order.

    Attributes:
        outcome: (m,), "fixed", "slow", "fast" (the speed has a minimum there, above `slow_tolerance`), "unfinished"
            (no minimum within `max_iterations`), or "diverged" (not finite, or a million times farther out than where
            it began).
        residual: (m,), the speed |F(s) - s| where it ended, change of state for each step.
        slope: (m,), |d speed / ds| there; at a minimum at most 1e-6, and so small that over a distance of max(1, |s|)
            it would change the speed by less than a tenth.
        iterations: (m,), attempted Newton steps.
        converged: (m,), whether it ended at a fixed point or at a minimum of the speed.
        point: (m,), which of the points it ended at; -1 where at none.
    """

    outcome: np.ndarray
    residual: Float[np.ndarray, " m"]
    slope: Float[np.ndarray, " m"]
    iterations: Int[np.ndarray, " m"]
    converged: Bool[np.ndarray, " m"]
    point: Int[np.ndarray, " m"]


class FixedPoints(NamedTuple):
    """The k points that were found, in float64: fixed before slow, each by rising spectral radius.

    Attributes:
        points: (k, n), the states, flat; `state_parts` says where each field lies.
        states: the same as the cell's own states, leaves (k, ...).
        kind: (k,), "fixed" or "slow".
        residual: (k,), the speed |F(s) - s| there, change of state for each step.
        counts: (k,), how many starts ended there.
        jacobians: (k, n, n), ds_t/ds_{t-1} there.
        eigenvalues: (k, n), of the Jacobians, by falling modulus; -1/ln|eigenvalue| is a time constant in steps.
        spectral_radius: (k,), the largest modulus.
        stable: (k,), whether the spectral radius is below one; rounding decides where it is one.
        unstable: (k,), how many eigenvalues have a modulus above one.
        search: what became of every start.
        reason: one line: how many starts ended how.
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
) -> FixedPoints:
    """The states at which a cell under a constant input stands still, s* = F(s*, x), and those at which it is slowest.

    A fixed point has a speed |F(s) - s| below `tolerance`, and Newton's step from it, which says how far off it may
    be, is below `distance`: a state on the way to infinity, where a gate closes ever more, may be as slow. A slow point
    is a minimum of the speed below `slow_tolerance`: what is left of a pair of fixed points that has just vanished,
    where a trajectory lingers. What the starts do not lead to is not found; a line of fixed points comes back as many.

    Args:
        cell, params: any cell and its parameters; they are cast to float64.
        x: the input of every step, one example at one time, such as (features,) or a token; by default zeros.
        starts: states, leaves (m, ...), to start from all of them; or a trajectory from `sj.trajectory`, leaves
            (batch, time + 1, ...), to start from `count` of its states. By default random ones,
            s ~ N(initial state, scale^2).
        count: how many starts, where they are drawn.
        key: to draw them with; `jax.random.key(0)` by default.
        scale: of the random starts, in units of the state.
        tolerance: of a fixed point's speed, relative to max(1, |s|). A cell that computes in float32 whatever its
            parameters, such as `flax.nnx.SimpleCell`, needs 1e-6.
        slow_tolerance: of a slow point's speed, change of state for each step.
        distance: points closer than this, relative to max(1, |s|), are one.
        max_iterations: for each start.

    Returns:
        `FixedPoints`; k may be zero, and `search` then says why.

    Raises:
        ValueError: a shape does not fit, or a number is not positive.
        TypeError: a dtype does not fit, or the state cannot be differentiated.

    Source: Sussillo and Barak 2013, "Opening the black box: low-dimensional dynamics in high-dimensional recurrent
        neural networks". The damping is that of Marquardt 1963, with the rule of Nielsen 1999.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1)
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=2 * jnp.eye(1), b_h=jnp.zeros(1))  # h' = tanh(2 h + x)
        >>> found = sj.analysis.fixed_points(cell, params)
        >>> [(round(abs(float(h)), 6), str(kind)) for h, kind in zip(found.points[:, 0], found.kind)]
        [(0.957504, 'fixed'), (0.957504, 'fixed'), (0.0, 'fixed')]
        >>> found.spectral_radius.round(6).tolist(), found.unstable.tolist()
        ([0.166372, 0.166372, 2.0], [0, 0, 1])
    """
    limits = dict(scale=scale, tolerance=tolerance, slow_tolerance=slow_tolerance, distance=distance)
    for name, value in (limits | dict(count=count, max_iterations=max_iterations)).items():
        if not value > 0:
            raise ValueError(f"expected a positive {name}, got {value!r}: the default is a place to start")
    with jax.enable_x64(True):
        params, x = _double(params), _double(check_input(cell, x))
        first = flat_starts(cell, params, starts, count, jax.random.key(0) if key is None else key, scale)
        xs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None, None], (len(first), 1, *leaf.shape)), x)
        given = driven(cell, params, xs, unflatten(cell, params, first), None, None)
        ended = jax.tree.map(np.asarray, compiled(descend, cell, int(max_iterations))(given))
        outcome = _outcomes(np.asarray(given.first), ended, tolerance, slow_tolerance, distance)
        chosen, point = _without_duplicates(ended, outcome, distance)
        return _described(cell, given, ended, outcome, chosen, point)


def _double(tree: PyTree) -> PyTree:
    """Floating-point leaves in float64; tokens stay as they are."""

    def one(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def _size(points: np.ndarray) -> np.ndarray:
    return np.maximum(1.0, np.linalg.norm(points, axis=-1))


def _newton_step(ended: Any, start: int) -> float:
    """The length of the undamped step from where one start ended; what rounding leaves of a residual asks for none."""
    r = np.asarray(ended.residual[start])
    r = np.where(np.abs(r) <= 4 * np.finfo(r.dtype).eps * _size(ended.points)[start], 0, r)
    return float(np.linalg.norm(np.linalg.lstsq(ended.jacobians[start] - np.eye(r.size), r)[0]))


def _outcomes(first: np.ndarray, ended: Any, tolerance: float, slow_tolerance: float, distance: float) -> np.ndarray:
    size = _size(ended.points)
    finite = np.isfinite(ended.speed) & np.isfinite(size)
    near = finite & (size <= 1e6 * _size(first))
    minimum = near & (ended.slope <= 1e-6) & (ended.slope * size <= 0.1 * ended.speed)
    fixed, slow = finite & (ended.speed <= tolerance * size), minimum & (ended.speed <= slow_tolerance)
    for start in np.flatnonzero(fixed):
        fixed[start] = _newton_step(ended, int(start)) <= distance * size[start]
    return np.select([fixed, slow, minimum, near], ["fixed", "slow", "fast", "unfinished"], "diverged")


def _without_duplicates(ended: Any, outcome: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """The starts that stand for a point, fixed before slow and the smallest residual first; and each start's point."""
    candidates = np.flatnonzero(np.isin(outcome, ["fixed", "slow"]))
    candidates = candidates[np.lexsort((ended.speed[candidates], outcome[candidates] == "slow"))]
    chosen, point = [], np.full(len(outcome), -1)
    while candidates.size:
        here = ended.points[candidates[0]]
        same = np.linalg.norm(ended.points[candidates] - here, axis=1) <= distance * _size(here[None])
        point[candidates[same]] = len(chosen)
        chosen.append(candidates[0])
        candidates = candidates[~same]
    return np.array(chosen, int), point


def _described(
    cell: Cell, given: Driven, ended: Any, outcome: np.ndarray, chosen: np.ndarray, point: np.ndarray
) -> FixedPoints:
    values = np.linalg.eigvals(ended.jacobians[chosen]).astype(complex)
    values = np.take_along_axis(values, np.argsort(-np.abs(values), axis=1, kind="stable"), axis=1)
    radius, slow = np.abs(values[:, 0]), outcome[chosen] == "slow"
    order = np.lexsort((ended.points[chosen, 0], radius.round(9), slow))  # mirror images have one radius
    new_place = np.append(np.argsort(order), -1)
    chosen, values, radius = chosen[order], values[order], radius[order]
    point = new_place[point]
    counts = np.bincount(point[point >= 0], minlength=len(chosen))
    states = jax.tree.map(np.asarray, unflatten(cell, given.params, jnp.asarray(ended.points[chosen])))
    kinds = [f"{np.sum(outcome == kind)} {kind}" for kind in np.unique(outcome)]
    reason = f"{len(outcome)} starts: {', '.join(kinds)}; {np.sum(~slow)} fixed and {np.sum(slow)} slow points"
    return FixedPoints(
        points=ended.points[chosen],
        states=states,
        kind=outcome[chosen],
        residual=ended.speed[chosen],
        counts=counts,
        jacobians=ended.jacobians[chosen],
        eigenvalues=values,
        spectral_radius=radius,
        stable=radius < 1,
        unstable=np.sum(np.abs(values) > 1, axis=1),
        search=Search(
            outcome, ended.speed, ended.slope, ended.iterations, np.isin(outcome, ["fixed", "slow", "fast"]), point
        ),
        reason=reason,
    )
