"""Figures of Jacobians, of their products, and of Lyapunov exponents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .canvas import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    VERMILLION,
    Axes,
    add_legend,
    finite_mean,
    finite_or_nan,
    get_axes,
    line_style,
    note_missing,
    set_factor_ticks,
    set_integer_ticks,
    set_labels,
    set_power_ticks,
    to_log10,
    with_styles,
)

if TYPE_CHECKING:
    from seqjax.analysis.lyapunov import LyapunovExponents
    from seqjax.analysis.singular_values import ProductSingularValues
    from seqjax.analysis.spectra import MatrixSpectrum, Spectrum
else:  # at run time, figures do not import the analyses
    LyapunovExponents = ProductSingularValues = MatrixSpectrum = Spectrum = Any

Unit = Literal["nats", "factor"]


def singular_values(result: Spectrum, *, ax: Axes | None = None) -> Axes:
    """The largest, the median and the smallest singular value of the step Jacobian J_t against t.

    If the result has only one time, all singular values are drawn in descending order.

    Args:
        result: `Spectrum`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes. The first line marks the value one. The others are geometric means over the batch.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)), times=[1, 5, 9])
        >>> sj.plots.singular_values(result, ax=Figure().subplots()).lines[1].get_xdata().tolist()
        [1, 5, 9]
    """
    ax = get_axes(ax)
    with np.errstate(divide="ignore", invalid="ignore"):  # a singular Jacobian has a value of zero
        logs = np.log10(np.sort(np.asarray(result.steps.singular_values, np.float64))[..., ::-1])  # (batch, times, n)
    ax.axhline(0, color=GREY, linewidth=1)
    if len(result.times) == 1:
        ranks = np.arange(1, logs.shape[-1] + 1)
        ax.plot(ranks, finite_mean(logs[:, 0]), label=f"time step {np.ravel(result.times)[0]}", **line_style(0))
        drawn, x = [logs], "rank (1 is the largest)"
    else:
        drawn, x = [logs[..., i] for i in (0, logs.shape[-1] // 2, -1)], "time step"
        for number, (name, values) in enumerate(zip(("largest", "middle", "smallest"), drawn, strict=True)):
            style = {"marker": MARKERS[number], "markersize": 4, **line_style(number)}
            ax.plot(result.times, finite_mean(values), label=name, **style)
    note_missing(ax, *drawn)
    set_power_ticks(ax.yaxis)
    add_legend(ax)
    return set_labels(ax, "Singular values of the step Jacobian", x, "singular value (factor)")


def product_singular_values(results: Mapping[int, ProductSingularValues], *, ax: Axes | None = None) -> Axes:
    """The singular values of the product J_T ... J_1 against its length T.

    Args:
        results: `ProductSingularValues` by the number of steps T.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes. Line i is the i-th largest value, as the geometric mean over the batch.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.1 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> sizes = {T: sj.analysis.product_singular_values(cell, params, jnp.zeros((1, T, 1))) for T in (1, 5, 9)}
        >>> sj.plots.product_singular_values(sizes, ax=Figure().subplots()).lines[0].get_ydata().round(3).tolist()
        [-1.0, -5.0, -9.0]
    """
    ax = get_axes(ax)
    lengths = sorted(results)
    logs = np.array([finite_mean(results[length].log_values) for length in lengths]).reshape(len(lengths), -1)
    for i, line in enumerate(to_log10(logs).T):
        # Two labels are enough, because the lines are ordered.
        names = {0: "largest", logs.shape[1] - 1: f"number {logs.shape[1]}"}
        ax.plot(lengths, line, marker=MARKERS[i % 8], markersize=3, label=names.get(i), **line_style(i))
    ax.axhline(0, color=GREY, linewidth=1)
    note_missing(ax, logs)
    set_power_ticks(ax.yaxis)
    add_legend(ax)
    return set_labels(ax, "Singular values of Jacobian products", "steps in the product", "singular value (factor)")


def eigenvalues(result: MatrixSpectrum, *, ax: Axes | None = None, title: str = "Eigenvalues") -> Axes:
    """Eigenvalues in the complex plane, with the unit circle.

    Args:
        result: `MatrixSpectrum`, of one matrix or of many.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        title: the title of the figure.

    Returns:
        The axes.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> result = sj.analysis.matrix_spectrum(jnp.array([[0.0, -0.5], [0.5, 0.0]]))
        >>> ax = sj.plots.eigenvalues(result, ax=Figure().subplots())
        >>> sorted(ax.collections[0].get_offsets()[:, 1].round(3).tolist())
        [-0.5, 0.5]
    """
    ax = get_axes(ax, (4.0, 3.8))
    values = np.asarray(result.eigenvalues).ravel()
    shown = values[np.isfinite(values)]
    angles = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angles), np.sin(angles), color=GREY, linewidth=1, label="unit circle")
    inside = np.abs(shown) <= 1
    for part, colour, marker, name in ((inside, BLUE, "o", "inside"), (~inside, VERMILLION, "D", "outside")):
        if part.any():
            ax.scatter(
                np.real(shown[part]), np.imag(shown[part]), s=10, color=colour, marker=marker, alpha=0.6, label=name
            )
    ax.set_aspect("equal", adjustable="datalim")
    note_missing(ax, np.where(np.isfinite(values), 0.0, np.nan))  # which accepts only real numbers
    add_legend(ax, loc="upper right")
    return set_labels(ax, title, "real part", "imaginary part")


def lyapunov_spectrum(result: LyapunovExponents, *, ax: Axes | None = None, unit: Unit = "nats") -> Axes:
    """Lyapunov exponents in descending order, with their 95 % intervals.

    Perturbations grow if the exponent is positive, and shrink if it is negative.

    Args:
        result: `LyapunovExponents`.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        unit: "nats" labels an exponent in nats per step, and "factor" with the factor exp(exponent) of one step.

    Returns:
        The axes. The dots are single sequences, the line is their mean, and the bars are the mean of their intervals.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 60, 2)))
        >>> sj.plots.lyapunov_spectrum(result, ax=Figure().subplots()).get_ylabel()
        'exponent (nats per step)'
    """
    ax = get_axes(ax)
    rows = finite_or_nan(result.exponents)
    number, mean = np.arange(1, rows.shape[1] + 1), finite_or_nan(result.mean)
    low, high = finite_mean(result.low), finite_mean(result.high)
    ax.axhline(0, color=GREY, linewidth=1)
    for row in rows:
        ax.plot(number, row, ".", color=GREY, alpha=0.5, markersize=4)
    ax.vlines(number, low, high, color=VERMILLION, linewidth=1.5, label="95 % interval")
    ax.plot(number, mean, color=BLUE, marker="o", markersize=4, label="mean over sequences")
    note_missing(ax, result.mean)
    set_integer_ticks(ax.xaxis)
    add_legend(ax)
    return _label_rates(ax, "Lyapunov exponents", "rank (1 is the largest)", unit)


def lyapunov_spectra(results: Mapping[str, LyapunovExponents], *, ax: Axes | None = None, unit: Unit = "nats") -> Axes:
    """The mean Lyapunov exponents of several cells on the same axes.

    Args:
        results: `LyapunovExponents` by name.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        unit: "nats" labels an exponent in nats per step, and "factor" with the factor exp(exponent) of one step.

    Returns:
        The axes. The first line marks zero nats. Then comes one line per name, in the same order.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell, xs = sj.GRU(2, 3), jnp.zeros((1, 60, 2))
        >>> runs = {str(n): sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(n)), xs) for n in range(2)}
        >>> [line.get_label() for line in sj.plots.lyapunov_spectra(runs, ax=Figure().subplots()).lines][1:]
        ['0', '1']
    """
    ax = get_axes(ax)
    ax.axhline(0, color=GREY, linewidth=1)
    for i, (name, result, style) in enumerate(with_styles(results)):
        mean = finite_or_nan(result.mean)
        ax.plot(np.arange(1, len(mean) + 1), mean, marker=MARKERS[i % 8], markersize=4, label=name, **style)
    note_missing(ax, *(result.mean for result in results.values()))
    set_integer_ticks(ax.xaxis)
    add_legend(ax)
    return _label_rates(ax, "Lyapunov exponents", "rank (1 is the largest)", unit)


def lyapunov_convergence(
    result: LyapunovExponents, *, ax: Axes | None = None, most: int = 4, unit: Unit = "nats"
) -> Axes:
    """The running estimates of the largest exponents, with the final interval of the first one.

    Args:
        result: `LyapunovExponents`.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        most: the largest number of exponents to draw.
        unit: "nats" labels an exponent in nats per step, and "factor" with the factor exp(exponent) of one step.

    Returns:
        The axes. The lines are means over the batch.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 60, 2)))
        >>> len(sj.plots.lyapunov_convergence(result, ax=Figure().subplots(), most=2).lines)
        2
    """
    ax = get_axes(ax)
    history = finite_mean(result.history)[:, :most]  # (blocks, exponents)
    for i, line in enumerate(history.T):
        ax.plot(result.history_steps, line, label=f"number {i + 1}", **line_style(i))
    low, high = finite_mean(result.low), finite_mean(result.high)
    if len(low) and np.isfinite([low[0], high[0]]).all():
        ax.axhspan(low[0], high[0], color=COLOURS[0], alpha=0.15, linewidth=0, label="95 % interval of number 1")
    note_missing(ax, np.asarray(result.history)[..., :most])
    add_legend(ax)
    return _label_rates(ax, "Convergence of the Lyapunov exponents", "steps", unit)


def _label_rates(ax: Axes, title: str, x: str, unit: Unit) -> Axes:
    """Sets the labels of a figure whose vertical axis has exponents."""
    if unit == "nats":
        return set_labels(ax, title, x, "exponent (nats per step)")
    set_factor_ticks(ax.yaxis)
    return set_labels(ax, title, x, "growth factor per step")
