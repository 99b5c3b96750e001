"""Figures of how far back gradients reach, and of what clipping does to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqjax.analysis.cell_gradient_path import CellPath
from seqjax.analysis.clipping import ClippingStatistics
from seqjax.analysis.gradient_flow import GradientByLag

from .canvas import (
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    Axes,
    axes,
    base_ten,
    decades,
    finite,
    label,
    legend,
    mean_of_finite,
    named,
    remark,
    style,
    tell_missing,
)


def gradient_by_lag(result: GradientByLag, *, ax: Axes | None = None) -> Any:
    """Gradient norm by lag: the expected and the largest ||ds_t/ds_{t-k}|| against k, with threshold and horizon.

    Args:
        result: `GradientByLag`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)), horizon=8)
        >>> ax = sj.plots.gradient_by_lag(result, ax=Figure().subplots())
        >>> ax.get_xlabel(), len(ax.lines[0].get_xdata())
        ('lag k (steps)', 9)
    """
    ax = axes(ax)
    lags, expected, worst = result.lags, base_ten(result.log_expected), base_ten(result.log_worst)
    ax.plot(lags, finite(expected), color=BLUE, label="expected")
    ax.plot(lags, finite(worst), color=VERMILLION, linestyle="--", label="worst case")
    _threshold(ax, result.threshold)
    if np.isfinite(result.horizon):
        ax.axvline(result.horizon, color=GREY, linestyle="-.", linewidth=1, label=f"horizon, {result.horizon:g} steps")
    tell_missing(ax, expected, worst)
    return _by_lag(ax, "Gradient norm by lag")


def gradients_by_lag(results: Mapping[str, GradientByLag], *, ax: Axes | None = None) -> Any:
    """Expected gradient norm by lag of several cells on the same axes.

    Args:
        results: `GradientByLag` by name.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line a name in the same order, and the threshold of the first as the last.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell, xs = sj.GRU(2, 3), jnp.zeros((1, 9, 2))
        >>> runs = {str(n): sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(n)), xs) for n in range(2)}
        >>> [line.get_label() for line in sj.plots.gradients_by_lag(runs, ax=Figure().subplots()).lines][:2]
        ['0', '1']
    """
    ax = axes(ax)
    for name, result, look in named(results):
        ax.plot(result.lags, finite(base_ten(result.log_expected)), label=name, **look)
    for result in list(results.values())[:1]:
        _threshold(ax, result.threshold)
    tell_missing(ax, *(result.log_expected for result in results.values()))
    return _by_lag(ax, "Expected gradient norm by lag")


def gradient_heat_map(result: GradientByLag, *, ax: Axes | None = None) -> Any:
    """Gradient norm by time and lag: colour is the expected ||ds_t/ds_{t-k}||, averaged in logarithms over the batch.

    Args:
        result: `GradientByLag`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes; what lies before the beginning of the sequences stays empty.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)), horizon=8)
        >>> sj.plots.gradient_heat_map(result, ax=Figure().subplots()).get_xlabel()
        'time t (steps)'
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from .canvas import power

    ax = axes(ax)
    table = base_ten(mean_of_finite(result.table)).T  # (lags, times)
    if np.isfinite(table).any():
        edges = _edges(np.asarray(result.times)), _edges(np.asarray(result.lags))
        image = ax.pcolormesh(*edges, np.ma.masked_invalid(table), cmap="viridis", rasterized=True)
        bar = ax.figure.colorbar(image, ax=ax, ticks=MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        bar.set_label("gradient norm (ratio)")
        bar.outline.set_visible(False)
    else:
        tell_missing(ax, table)
    ax = label(ax, "Gradient norm by time and lag", "time t (steps)", "lag k (steps)")
    ax.grid(False)
    return ax


def loss_gradient(result: GradientByLag, *, ax: Axes | None = None) -> Any:
    """Norm of dL/ds_t against t, of the whole state and of each of its parts, averaged in logarithms over the batch.

    Args:
        result: `GradientByLag`.
        ax: matplotlib axes to draw on; by default those of a new figure.

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
    ax = axes(ax)
    parts = result.log_gradient_parts if len(result.log_gradient_parts) > 1 else {}
    lines = {name: mean_of_finite(log) for name, log in {"whole state": result.log_gradient, **parts}.items()}
    for name, line, look in named(lines):
        ax.plot(np.arange(len(line)), base_ten(line), label=name, **look)
    tell_missing(ax, lines["whole state"])
    decades(ax.yaxis)
    legend(ax)
    return label(ax, "Gradient of the loss through time", "time t (steps)", "norm of dL/ds_t")


def cell_path(result: CellPath, *, ax: Axes | None = None) -> Any:
    """The LSTM's additive path: the norm of the true dc_t/dc_{t-k} beside that of the forget gates' product.

    Args:
        result: `CellPath`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.LSTM(2, 3)
        >>> result = sj.analysis.cell_path(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)))
        >>> [line.get_label() for line in sj.plots.cell_path(result, ax=Figure().subplots()).lines]
        ['true dc_t/dc_(t-k)', 'product of forget gates']
    """
    ax = axes(ax)
    lines = {"true dc_t/dc_(t-k)": result.log_true, "product of forget gates": result.log_forget}
    for name, log, look in named({name: mean_of_finite(log) for name, log in lines.items()}):
        ax.plot(result.lags, base_ten(log), label=name, **look)
    tell_missing(ax, *lines.values())
    return _by_lag(ax, "Memory of the cell state")


def clipping(result: ClippingStatistics, *, ax: Axes | None = None) -> Any:
    """The gradient's norm before clipping at every update, and the threshold above which it is scaled down.

    Args:
        result: `ClippingStatistics`.
        ax: matplotlib axes to draw on; by default those of a new figure.

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
    ax = axes(ax)
    norm = np.asarray(result.grad_norm, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        log, updates = np.log10(norm), np.arange(1, len(norm) + 1)
    ax.plot(updates, finite(log), color=BLUE, linewidth=1, label="gradient norm")
    if np.isfinite(result.clip_norm):
        above = norm > result.clip_norm
        ax.plot(updates[above], finite(log[above]), "o", color=VERMILLION, markersize=2.5, label="clipped")
        ax.axhline(np.log10(result.clip_norm), **style(2), linewidth=1, label=f"threshold {result.clip_norm:g}")
    tell_missing(ax, log)
    decades(ax.yaxis)
    legend(ax)
    return label(ax, "Gradient norm and clipping", "update", "gradient norm before clipping")


def clipping_factor(result: ClippingStatistics, *, ax: Axes | None = None) -> Any:
    """The factor min(1, c / |g|) by which clipping scaled every gradient.

    Args:
        result: `ClippingStatistics`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> result = sj.analysis.clipping_statistics({"grad_norm": [0.5, 2.0, 4.0]}, 1.0)
        >>> sj.plots.clipping_factor(result, ax=Figure().subplots()).lines[0].get_ydata().tolist()
        [1.0, 0.5, 0.25]
    """
    ax = axes(ax)
    factors = np.asarray(result.factors, np.float64)
    ax.plot(np.arange(1, len(factors) + 1), finite(factors), color=GREEN, linewidth=1)
    ax.set_ylim(0, 1.05)
    tell_missing(ax, factors)
    return label(ax, "How hard clipping acted", "update", "factor on the gradient")


def _by_lag(ax: Axes, title: str) -> Any:
    decades(ax.yaxis)
    legend(ax)
    return label(ax, title, "lag k (steps)", "gradient norm (ratio)")


def _threshold(ax: Axes, threshold: float) -> None:
    if threshold > 0:
        ax.axhline(np.log10(threshold), color=GREY, linestyle=":", linewidth=1, label=f"threshold {threshold:g}")
    else:
        remark(ax, f"threshold {threshold:g}")


def _edges(middles: np.ndarray) -> np.ndarray:
    """The borders of cells around these places."""
    if len(middles) < 2:
        return np.array([middles[0] - 0.5, middles[0] + 0.5])
    between = (middles[1:] + middles[:-1]) / 2
    return np.array([1.5 * middles[0] - 0.5 * middles[1], *between, 1.5 * middles[-1] - 0.5 * middles[-2]])
