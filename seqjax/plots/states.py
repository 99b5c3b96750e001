"""Figures of what a cell's state and its gates do: saturation, memory in steps, and the state's path in a plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from seqjax.analysis.fixed_point_search import FixedPoints
from seqjax.analysis.gates import GateStatistics
from seqjax.cell import State

from .canvas import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    PURPLE,
    VERMILLION,
    Axes,
    axes,
    decades,
    finite,
    label,
    legend,
    named,
    tell_missing,
)

_KINDS = {"stable": (GREEN, "o"), "unstable": (VERMILLION, "X"), "slow point": (PURPLE, "^")}


def gate_saturation(results: Mapping[str, GateStatistics], *, ax: Axes | None = None) -> Any:
    """How often each unit's gate is shut and how often it is open: right-saturated against left-saturated fraction.

    A unit near the origin is in neither state; on the diagonal it is always in one of them.

    Args:
        results: `GateStatistics` by gate, from `gate_statistics`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one cloud of units a gate.

    Source: Karpathy, Johnson and Li 2015, "Visualizing and understanding recurrent networks".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3)
        >>> results = sj.analysis.gate_statistics(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)))
        >>> ax = sj.plots.gate_saturation(results, ax=Figure().subplots())
        >>> len(ax.collections) == len(results), len(ax.collections[0].get_offsets())
        (True, 3)
    """
    ax = axes(ax, (4.4, 4.0))
    ax.plot([0, 1], [1, 0], color=GREY, linewidth=1)
    for place, (name, result, look) in enumerate(named(results)):
        marks = {"color": look["color"], "marker": MARKERS[place % 8]}
        ax.scatter(
            np.ravel(finite(result.low)),
            np.ravel(finite(result.high)),
            s=14,
            alpha=0.6,
            label=name,
            linewidths=0,
            **marks,
        )
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    tell_missing(ax, *(part for result in results.values() for part in (result.low, result.high)))
    legend(ax, loc="upper right")
    return label(ax, "Gate saturation, one mark a unit", "fraction of steps shut", "fraction of steps open")


def gate_histogram(results: Mapping[str, GateStatistics], *, ax: Axes | None = None) -> Any:
    """How often each gate takes each value, over all units and steps.

    Args:
        results: `GateStatistics` by gate, from `gate_statistics`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line of steps a gate.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3)
        >>> results = sj.analysis.gate_statistics(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)))
        >>> len(sj.plots.gate_histogram(results, ax=Figure().subplots()).patches) == len(results)
        True
    """
    ax = axes(ax)
    for name, result, look in named(results):
        edges = np.asarray(result.edges, np.float64)
        place = (edges - edges[0]) / (edges[-1] - edges[0])
        ax.stairs(np.nan_to_num(finite(result.histogram)), place, label=name, **look)
    tell_missing(ax, *(result.histogram for result in results.values()))
    legend(ax)
    return label(ax, "Gate values", "place in the gate's range (0 shut, 1 open)", "fraction of units and steps")


def time_constants(results: Mapping[str, GateStatistics], *, ax: Axes | None = None) -> Any:
    """Memory of each unit in steps, tau = -1 / ln(mean gate), from the shortest to the longest.

    Args:
        results: `GateStatistics` by gate, of those gates that multiply the old state.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line a gate.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3, forget_bias=1.0)
        >>> params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        >>> results = sj.analysis.gate_statistics(cell, params, jnp.zeros((1, 9, 2)))
        >>> ax = sj.plots.time_constants({"forget": results["forget"]}, ax=Figure().subplots())
        >>> (10 ** ax.lines[0].get_ydata()).round(3).tolist()  # -1 / ln(1/2)
        [1.443, 1.443, 1.443]
    """
    ax = axes(ax)
    logs = {}
    for name, result in results.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            logs[name] = np.log10(np.sort(np.ravel(np.asarray(result.time_constant, np.float64))))
    for place, (name, log, look) in enumerate(named(logs)):
        ranks = (np.arange(len(log)) + 0.5) / max(len(log), 1)
        ax.plot(ranks, finite(log), marker=MARKERS[place % 8], markersize=3, label=name, **look)
    tell_missing(ax, *logs.values())
    decades(ax.yaxis)
    legend(ax)
    return label(ax, "Memory of the units", "fraction of units that forget faster", "time constant (steps)")


def principal_plane(states: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The plane in which states vary most.

    Args:
        states: a state whose leaves are (batch, time, ...), as `trajectory` returns.

    Returns:
        The mean state (n,), two orthonormal directions (2, n), and the share of the variance along each (2,); zeros
        for a second direction that is not there.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> mean, directions, share = sj.plots.principal_plane(jnp.array([[[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]]))
        >>> mean.tolist(), share.round(6).tolist()
        ([3.0, 2.0], [1.0, 0.0])
    """
    flat = flat_states(states)
    rows = flat.reshape(-1, flat.shape[-1])
    rows = rows[np.isfinite(rows).all(1)]
    mean = rows.mean(0) if len(rows) else np.zeros(flat.shape[-1])
    _, sizes, directions = np.linalg.svd(rows - mean, full_matrices=False)
    power, total = np.zeros(2), max(float((sizes**2).sum()), 1e-300)
    plane = np.zeros((2, flat.shape[-1]))
    here = min(2, len(sizes))
    power[:here], plane[:here] = sizes[:here] ** 2 / total, directions[:here]
    return mean, plane, power


def flat_states(states: State) -> np.ndarray:
    """States (batch, time, n) of a state whose leaves are (batch, time, ...), in the order of the analyses."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(states)]
    return np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=-1)


def state_portrait(
    states: State, fixed_points: FixedPoints | None = None, *, ax: Axes | None = None, most: int = 8
) -> Any:
    """The state's path in the plane in which it varies most, with fixed points where there are any.

    Args:
        states: a state whose leaves are (batch, time, ...), as `trajectory` returns.
        fixed_points: `FixedPoints`.
        ax: matplotlib axes to draw on; by default those of a new figure.
        most: sequences to draw.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> states = sj.trajectory(cell, cell.init(jax.random.key(0)), jnp.ones((2, 9, 2)))
        >>> ax = sj.plots.state_portrait(states, ax=Figure().subplots())
        >>> [len(line.get_xdata()) for line in ax.lines]  # two paths of ten states, and where they begin
        [10, 10, 2]
    """
    ax = axes(ax, (4.6, 4.0))
    mean, plane, share = principal_plane(states)
    paths = (flat_states(states) - mean) @ plane.T
    for row in paths[:most]:
        ax.plot(*finite(row).T, color=BLUE, alpha=0.45, linewidth=0.8)
    ax.plot(*finite(paths[:most, 0]).T, "s", color=GREY, markersize=5, label="start")
    if fixed_points is not None:
        points = (np.asarray(fixed_points.points, np.float64).reshape(-1, len(mean)) - mean) @ plane.T
        kinds = kinds_of(fixed_points)
        for kind, (colour, marker) in _KINDS.items():
            if (kinds == kind).any():
                ax.scatter(*points[kinds == kind].T, s=45, color=colour, marker=marker, label=kind, zorder=3)
    tell_missing(ax, paths[:most])
    legend(ax)
    names = [f"component {i + 1} ({100 * part:.0f} % of the variance)" for i, part in enumerate(share)]
    return label(ax, "Paths of the state", *names)


def kinds_of(fixed_points: FixedPoints) -> np.ndarray:
    """ "stable", "unstable" or "slow point" for each of `FixedPoints`."""
    stable = np.where(np.asarray(fixed_points.stable, bool), "stable", "unstable")
    return np.where(np.asarray(fixed_points.kind).astype(str) == "slow", "slow point", stable)
