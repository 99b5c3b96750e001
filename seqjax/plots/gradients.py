"""Figures of gradient norms through time, and of the effect of clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    Axes,
    add_legend,
    add_note,
    finite_mean,
    finite_or_nan,
    format_power,
    get_axes,
    line_style,
    note_missing,
    set_labels,
    set_power_ticks,
    to_log10,
    with_styles,
)

if TYPE_CHECKING:
    from seqjax.analysis.cell_gradient_path import CellPath
    from seqjax.analysis.clipping import ClippingStatistics
    from seqjax.analysis.gradient_flow import GradientByLag
else:  # at run time, figures do not import the analyses
    CellPath = ClippingStatistics = GradientByLag = Any


def gradient_by_lag(result: GradientByLag, *, ax: Axes | None = None) -> Axes:
    """The expected and the largest norm of ds_t/ds_{t-k} against the lag k, with the threshold and the horizon.

    Args:
        result: `GradientByLag`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)), horizon=8)
        >>> ax = sj.plots.gradient_by_lag(result, ax=Figure().subplots())
        >>> ax.get_xlabel(), len(ax.lines[0].get_xdata())
        ('lag (steps)', 9)
    """
    ax = get_axes(ax)
    lags, expected, worst = result.lags, to_log10(result.log_expected), to_log10(result.log_worst)
    ax.plot(lags, finite_or_nan(expected), color=BLUE, label="expected")
    ax.plot(lags, finite_or_nan(worst), color=VERMILLION, linestyle="--", label="worst case")
    _threshold(ax, result.threshold)
    if np.isfinite(result.horizon):
        ax.axvline(result.horizon, color=GREY, linestyle="-.", linewidth=1, label=f"horizon, {result.horizon:g} steps")
    note_missing(ax, expected, worst)
    return _by_lag(ax, "Gradient norm by lag")


def gradients_by_lag(results: Mapping[str, GradientByLag], *, ax: Axes | None = None) -> Axes:
    """The expected gradient norm by lag for several cells on the same axes.

    Args:
        results: `GradientByLag` by name.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line per name in the same order. The last line is the threshold of the first result.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell, xs = sj.GRU(2, 3), jnp.zeros((1, 9, 2))
        >>> runs = {str(n): sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(n)), xs) for n in range(2)}
        >>> [line.get_label() for line in sj.plots.gradients_by_lag(runs, ax=Figure().subplots()).lines][:2]
        ['0', '1']
    """
    ax = get_axes(ax)
    for name, result, style in with_styles(results):
        ax.plot(result.lags, finite_or_nan(to_log10(result.log_expected)), label=name, **style)
    for result in list(results.values())[:1]:
        _threshold(ax, result.threshold)
    note_missing(ax, *(result.log_expected for result in results.values()))
    return _by_lag(ax, "Expected gradient norm by lag")


def gradient_heat_map(result: GradientByLag, *, ax: Axes | None = None) -> Axes:
    """The gradient norm by time and lag. The colour is the geometric mean of ||ds_t/ds_{t-k}||.

    The mean is over the sequences that have the same times as the longest one.

    Args:
        result: `GradientByLag`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes. Lags that reach before the beginning of the sequences stay empty.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)), horizon=8)
        >>> sj.plots.gradient_heat_map(result, ax=Figure().subplots()).get_xlabel()
        'time step'
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax = get_axes(ax)
    times = np.asarray(result.times)  # (batch, times); 0 means that there is none
    longest = times[times.max(axis=1).argmax()]
    of_these_times = np.asarray(result.table)[(times == longest).all(axis=1)]
    table = to_log10(finite_mean(of_these_times[:, longest > 0])).T  # (lags, times)
    if np.isfinite(table).any():  # matplotlib warns if it has no value to scale the colours by
        edges = _edges(longest[longest > 0]), _edges(np.asarray(result.lags))
        image = ax.pcolormesh(*edges, np.ma.masked_invalid(table), cmap="viridis", rasterized=True)
        bar = ax.figure.colorbar(image, ax=ax, ticks=MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
        bar.set_label("gradient norm (factor)")
        bar.outline.set_visible(False)
    else:
        note_missing(ax, table)
    ax = set_labels(ax, "Gradient norm by time step and lag", "time step", "lag (steps)")
    ax.grid(False)
    return ax


def loss_gradient(result: GradientByLag, *, ax: Axes | None = None) -> Axes:
    """The norm of dL/ds_t against t, for the whole state and for each of its fields.

    Each line is the geometric mean over the batch.

    Args:
        result: `GradientByLag`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3)
        >>> result = sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)))
        >>> [line.get_label() for line in sj.plots.loss_gradient(result, ax=Figure().subplots()).lines]
        ['whole state', 'h', 'c']
    """
    ax = get_axes(ax)
    # The only field of a state is the whole state.
    parts = result.log_gradient_parts if len(result.log_gradient_parts) > 1 else {}
    lines = {name: finite_mean(log) for name, log in {"whole state": result.log_gradient, **parts}.items()}
    for name, line, style in with_styles(lines):
        ax.plot(np.arange(len(line)), to_log10(line), label=name, **style)
    note_missing(ax, lines["whole state"])
    set_power_ticks(ax.yaxis)
    add_legend(ax)
    return set_labels(ax, "Gradient of the last step, carried back", "time step", "gradient norm (factor)")


def cell_path(result: CellPath, *, ax: Axes | None = None) -> Axes:
    """The norm of dc_t/dc_{t-k} of an LSTM, beside that of its additive path, the product of the forget gates.

    Args:
        result: `CellPath`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3)
        >>> result = sj.analysis.cell_path(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)))
        >>> [line.get_label() for line in sj.plots.cell_path(result, ax=Figure().subplots()).lines]
        ['all paths', 'forget gates only']
    """
    ax = get_axes(ax)
    lines = {"all paths": result.log_true, "forget gates only": result.log_forget}
    for name, log, style in with_styles({name: finite_mean(log) for name, log in lines.items()}):
        ax.plot(result.lags, to_log10(log), label=name, **style)
    note_missing(ax, *lines.values())
    return _by_lag(ax, "Gradient norm of the cell state")


def clipping(result: ClippingStatistics, *, ax: Axes | None = None) -> Axes:
    """The gradient norm before clipping at every update, and the threshold above which gradients are scaled down.

    Args:
        result: `ClippingStatistics`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> result = sj.analysis.clipping_statistics({"grad_norm": [0.5, 2.0, 4.0]}, 1.0)
        >>> ax = sj.plots.clipping(result, ax=Figure().subplots())
        >>> ax.lines[1].get_xdata().tolist()  # the updates that were clipped
        [2, 3]
    """
    ax = get_axes(ax)
    norm = np.asarray(result.grad_norm, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        log, updates = np.log10(norm), np.arange(1, len(norm) + 1)
    ax.plot(updates, finite_or_nan(log), color=BLUE, linewidth=1, label="gradient norm")
    if np.isfinite(result.clip_norm):
        above = norm > result.clip_norm
        ax.plot(updates[above], finite_or_nan(log[above]), "o", color=VERMILLION, markersize=2.5, label="clipped")
        ax.axhline(np.log10(result.clip_norm), **line_style(2), linewidth=1, label=f"threshold {result.clip_norm:g}")
    note_missing(ax, log)
    set_power_ticks(ax.yaxis)
    add_legend(ax)
    return set_labels(ax, "Gradient norm and clipping", "update", "gradient norm before clipping")


def clipping_factor(result: ClippingStatistics, *, ax: Axes | None = None) -> Axes:
    """The factor min(1, c / |g|) that clipping applied to each gradient.

    Args:
        result: `ClippingStatistics`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> result = sj.analysis.clipping_statistics({"grad_norm": [0.5, 2.0, 4.0]}, 1.0)
        >>> sj.plots.clipping_factor(result, ax=Figure().subplots()).lines[0].get_ydata().tolist()
        [1.0, 0.5, 0.25]
    """
    ax = get_axes(ax)
    factors = np.asarray(result.factors, np.float64)
    ax.plot(np.arange(1, len(factors) + 1), finite_or_nan(factors), color=GREEN, linewidth=1)
    ax.set_ylim(0, 1.05)
    note_missing(ax, factors)
    return set_labels(ax, "Clipping factor", "update", "factor of the gradient")


def _by_lag(ax: Axes, title: str) -> Axes:
    set_power_ticks(ax.yaxis)
    add_legend(ax)
    return set_labels(ax, title, "lag (steps)", "gradient norm (factor)")


def _threshold(ax: Axes, threshold: float) -> None:
    if threshold > 0:
        ax.axhline(np.log10(threshold), color=GREY, linestyle=":", linewidth=1, label=f"threshold {threshold:g}")
    else:  # zero has no logarithm
        add_note(ax, f"threshold {threshold:g}")


def _edges(centres: np.ndarray) -> np.ndarray:
    """The edges of the mesh cells around these centres."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    return np.array([1.5 * centres[0] - 0.5 * centres[1], *between, 1.5 * centres[-1] - 0.5 * centres[-2]])
