"""Figures of gates and states: saturation, time constants, and the path of the state in a plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from seqjax.cell import State

from .canvas import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    PURPLE,
    VERMILLION,
    Axes,
    add_legend,
    finite_or_nan,
    get_axes,
    note_missing,
    set_labels,
    set_power_ticks,
    with_styles,
)

if TYPE_CHECKING:
    from seqjax.analysis.fixed_point_search import FixedPoints
    from seqjax.analysis.gates import GateStatistics
else:  # at run time, figures do not import the analyses
    FixedPoints = GateStatistics = Any

_KINDS = {"stable": (GREEN, "o"), "unstable": (VERMILLION, "X"), "slow point": (PURPLE, "^")}


def gate_saturation(results: Mapping[str, GateStatistics], *, ax: Axes | None = None) -> Axes:
    """How often the gate of each unit is closed (horizontal axis) and how often it is open (vertical axis).

    The gate of a unit near the origin is rarely saturated. That of a unit on the diagonal always is.

    Args:
        results: `GateStatistics` by gate, from `gate_statistics`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one set of marks per gate.

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
    ax = get_axes(ax, (4.4, 4.0))
    ax.plot([0, 1], [1, 0], color=GREY, linewidth=1)
    for number, (name, result, style) in enumerate(with_styles(results)):
        marks = {"color": style["color"], "marker": MARKERS[number % 8]}
        ax.scatter(
            np.ravel(finite_or_nan(result.low)),
            np.ravel(finite_or_nan(result.high)),
            s=14,
            alpha=0.6,
            label=name,
            linewidths=0,
            **marks,
        )
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    note_missing(ax, *(part for result in results.values() for part in (result.low, result.high)))
    add_legend(ax, loc="upper right")
    return set_labels(ax, "Gate saturation, one mark per unit", "fraction of steps closed", "fraction of steps open")


def gate_histogram(results: Mapping[str, GateStatistics], *, ax: Axes | None = None) -> Axes:
    """Histograms of the gate values over all units and steps.

    A gate is between 0 and 1. A candidate, which is a new value and not a gate, is between -1 and 1.

    Args:
        results: `GateStatistics` by gate, from `gate_statistics`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one step line per gate.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3)
        >>> results = sj.analysis.gate_statistics(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)))
        >>> len(sj.plots.gate_histogram(results, ax=Figure().subplots()).patches) == len(results)
        True
    """
    ax = get_axes(ax)
    for name, result, style in with_styles(results):
        ax.stairs(np.nan_to_num(finite_or_nan(result.histogram)), np.asarray(result.edges), label=name, **style)
    note_missing(ax, *(result.histogram for result in results.values()))
    add_legend(ax)
    return set_labels(ax, "Gate values", "value (a gate is closed at 0 and open at 1)", "fraction of units and steps")


def time_constants(results: Mapping[str, GateStatistics], *, ax: Axes | None = None) -> Axes:
    """The time constant of each unit, tau = -1 / ln(mean gate) in steps, in ascending order.

    Args:
        results: `GateStatistics` by gate, for gates that multiply the old state.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line per gate.

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
    ax = get_axes(ax)
    logs = {}
    for name, result in results.items():  # a gate that is always 0 or 1 has a time constant of 0 or infinity
        with np.errstate(divide="ignore", invalid="ignore"):
            logs[name] = np.log10(np.sort(np.ravel(np.asarray(result.time_constant, np.float64))))
    for number, (name, log, style) in enumerate(with_styles(logs)):
        ranks = (np.arange(len(log)) + 0.5) / max(len(log), 1)
        ax.plot(ranks, finite_or_nan(log), marker=MARKERS[number % 8], markersize=3, label=name, **style)
    note_missing(ax, *logs.values())
    set_power_ticks(ax.yaxis)
    add_legend(ax)
    return set_labels(
        ax, "Time constants of the units", "fraction of units that forget faster", "time constant (steps)"
    )


def principal_plane(states: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The plane with the largest variance of the states.

    Args:
        states: a state whose leaves are (batch, time, ...), as `trajectory` returns.

    Returns:
        The mean state (n,), two orthonormal directions (2, n), and the share of the variance along each (2,). If there
        is no second direction, its entries are zero.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> mean, directions, share = sj.plots.principal_plane(jnp.array([[[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]]))
        >>> mean.tolist(), share.round(6).tolist()
        ([3.0, 2.0], [1.0, 0.0])
    """
    flat = flatten_states(states)
    rows = flat.reshape(-1, flat.shape[-1])
    rows = rows[np.isfinite(rows).all(1)]
    mean = rows.mean(0) if len(rows) else np.zeros(flat.shape[-1])
    _, sizes, directions = np.linalg.svd(rows - mean, full_matrices=False)
    total = max(float((sizes**2).sum()), 1e-300)  # a constant state has no variance
    shares, plane = np.zeros(2), np.zeros((2, flat.shape[-1]))
    rank = min(2, len(sizes))
    shares[:rank], plane[:rank] = sizes[:rank] ** 2 / total, directions[:rank]
    return mean, plane, shares


def flatten_states(states: State) -> np.ndarray:
    """Concatenates leaves (batch, time, ...) to (batch, time, n), in the same order as the analyses."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(states)]
    return np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=-1)


def state_portrait(
    states: State, fixed_points: FixedPoints | None = None, *, ax: Axes | None = None, most: int = 8
) -> Axes:
    """The paths of the state in the plane with its largest variance, with fixed points if they are given.

    Args:
        states: a state whose leaves are (batch, time, ...), as `trajectory` returns.
        fixed_points: `FixedPoints`.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        most: the largest number of sequences to draw.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> states = sj.trajectory(cell, cell.init(jax.random.key(0)), jnp.ones((2, 9, 2)))
        >>> ax = sj.plots.state_portrait(states, ax=Figure().subplots())
        >>> [len(line.get_xdata()) for line in ax.lines]  # two paths of ten states, and their two starts
        [10, 10, 2]
    """
    ax = get_axes(ax, (4.6, 4.0))
    mean, plane, share = principal_plane(states)
    paths = (flatten_states(states) - mean) @ plane.T
    for row in paths[:most]:
        ax.plot(*finite_or_nan(row).T, color=BLUE, alpha=0.45, linewidth=0.8)
    ax.plot(*finite_or_nan(paths[:most, 0]).T, "s", color=GREY, markersize=5, label="start")
    if fixed_points is not None:
        points = (np.asarray(fixed_points.points, np.float64).reshape(-1, len(mean)) - mean) @ plane.T
        kinds = point_kinds(fixed_points)
        for kind, (colour, marker) in _KINDS.items():
            if (kinds == kind).any():
                ax.scatter(*points[kinds == kind].T, s=45, color=colour, marker=marker, label=kind, zorder=3)
    note_missing(ax, paths[:most])
    add_legend(ax)
    names = [f"component {i + 1} ({100 * part:.0f} % of the variance)" for i, part in enumerate(share)]
    return set_labels(ax, "Paths of the state", *names)


def point_kinds(fixed_points: FixedPoints) -> np.ndarray:
    """The kind of each point as text: "stable", "unstable" or "slow point"."""
    stable = np.where(np.asarray(fixed_points.stable, bool), "stable", "unstable")
    return np.where(np.asarray(fixed_points.kind).astype(str) == "slow", "slow point", stable)
