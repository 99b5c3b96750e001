"""Figures of Jacobians, their products, and their growth rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqjax.analysis.lyapunov import LyapunovExponents
from seqjax.analysis.singular_values import ProductSingularValues
from seqjax.analysis.spectra import MatrixSpectrum, Spectrum

from .canvas import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
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
    style,
    tell_missing,
    whole_numbers,
)


def singular_values(result: Spectrum, *, ax: Axes | None = None) -> Any:
    """Singular values of one step's Jacobian J_t: the largest, the middle and the smallest one against t.

    Where there is one time only, all of them are drawn in falling order.

    Args:
        result: `Spectrum`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes; lines are averaged in logarithms over the batch, after that at one.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 9, 2)), times=[1, 5, 9])
        >>> sj.plots.singular_values(result, ax=Figure().subplots()).lines[1].get_xdata().tolist()
        [1, 5, 9]
    """
    ax = axes(ax)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.sort(np.asarray(result.steps.singular_values, np.float64))[..., ::-1])  # (batch, times, n)
    ax.axhline(0, color=GREY, linewidth=1)
    if len(result.times) == 1:
        ranks = np.arange(1, logs.shape[-1] + 1)
        ax.plot(ranks, mean_of_finite(logs[:, 0]), label=f"t = {result.times[0]}", **style(0))
        drawn, x = [logs], "number"
    else:
        drawn, x = [logs[..., i] for i in (0, logs.shape[-1] // 2, -1)], "time t (steps)"
        for number, (name, values) in enumerate(zip(("largest", "middle", "smallest"), drawn, strict=True)):
            look = {"marker": MARKERS[number], "markersize": 4, **style(number)}
            ax.plot(result.times, mean_of_finite(values), label=name, **look)
    tell_missing(ax, *drawn)
    decades(ax.yaxis)
    legend(ax)
    return label(ax, "Singular values of J_t", x, "singular value (ratio)")


def product_singular_values(results: Mapping[int, ProductSingularValues], *, ax: Axes | None = None) -> Any:
    """Singular values of the product J_T ... J_1 against its length T.

    Args:
        results: `ProductSingularValues` by the number of steps T.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line for the i-th largest value, averaged in logarithms over the batch.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.1 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> sizes = {T: sj.analysis.product_singular_values(cell, params, jnp.zeros((1, T, 1))) for T in (1, 5, 9)}
        >>> sj.plots.product_singular_values(sizes, ax=Figure().subplots()).lines[0].get_ydata().round(3).tolist()
        [-1.0, -5.0, -9.0]
    """
    ax = axes(ax)
    lengths = sorted(results)
    logs = np.array([mean_of_finite(results[length].log_values) for length in lengths]).reshape(len(lengths), -1)
    for i, line in enumerate(base_ten(logs).T):
        names = {0: "largest", logs.shape[1] - 1: f"number {logs.shape[1]}"}
        ax.plot(lengths, line, marker=MARKERS[i % 8], markersize=3, label=names.get(i), **style(i))
    ax.axhline(0, color=GREY, linewidth=1)
    tell_missing(ax, logs)
    decades(ax.yaxis)
    legend(ax)
    return label(ax, "Singular values of products of Jacobians", "steps T in the product", "singular value (ratio)")


def eigenvalues(result: MatrixSpectrum, *, ax: Axes | None = None, title: str = "Eigenvalues") -> Any:
    """Eigenvalues in the complex plane, with the unit circle.

    Args:
        result: `MatrixSpectrum`, of one matrix or of many.
        ax: matplotlib axes to draw on; by default those of a new figure.
        title: of the figure.

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
    ax = axes(ax, (4.0, 3.8))
    values = np.asarray(result.eigenvalues).ravel()
    shown = values[np.isfinite(values)]
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=1, label="unit circle")
    inside = np.abs(shown) <= 1
    for part, colour, marker, name in ((inside, BLUE, "o", "inside"), (~inside, VERMILLION, "D", "outside")):
        if part.any():
            ax.scatter(
                np.real(shown[part]), np.imag(shown[part]), s=10, color=colour, marker=marker, alpha=0.6, label=name
            )
    ax.set_aspect("equal", adjustable="datalim")
    tell_missing(ax, np.where(np.isfinite(values), 0.0, np.nan))
    legend(ax, loc="upper right")
    return label(ax, title, "real part", "imaginary part")


def lyapunov_spectrum(result: LyapunovExponents, *, ax: Axes | None = None) -> Any:
    """Lyapunov exponents in falling order with their 95 % intervals: above zero what grows, below what is lost.

    Args:
        result: `LyapunovExponents`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes; dots are single sequences, the line is their mean, bars are the mean interval of one sequence.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 60, 2)))
        >>> sj.plots.lyapunov_spectrum(result, ax=Figure().subplots()).get_ylabel()
        'exponent (nats per step)'
    """
    ax = axes(ax)
    rows = finite(result.exponents)
    number, mean = np.arange(1, rows.shape[1] + 1), finite(result.mean)
    low, high = mean_of_finite(result.low), mean_of_finite(result.high)
    ax.axhline(0, color=GREY, linewidth=1)
    for row in rows:
        ax.plot(number, row, ".", color=GREY, alpha=0.5, markersize=4)
    ax.vlines(number, low, high, color=VERMILLION, linewidth=1.5, label="95 % interval")
    ax.plot(number, mean, color=BLUE, marker="o", markersize=4, label="mean over sequences")
    tell_missing(ax, result.mean)
    whole_numbers(ax.xaxis)
    legend(ax)
    return label(ax, "Lyapunov exponents", "number", "exponent (nats per step)")


def lyapunov_spectra(results: Mapping[str, LyapunovExponents], *, ax: Axes | None = None) -> Any:
    """Mean Lyapunov exponents of several cells on the same axes.

    Args:
        results: `LyapunovExponents` by name.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with one line a name in the same order, after that of zero.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell, xs = sj.GRU(2, 3), jnp.zeros((1, 60, 2))
        >>> runs = {str(n): sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(n)), xs) for n in range(2)}
        >>> [line.get_label() for line in sj.plots.lyapunov_spectra(runs, ax=Figure().subplots()).lines][1:]
        ['0', '1']
    """
    ax = axes(ax)
    ax.axhline(0, color=GREY, linewidth=1)
    for place, (name, result, look) in enumerate(named(results)):
        mean = finite(result.mean)
        ax.plot(np.arange(1, len(mean) + 1), mean, marker=MARKERS[place % 8], markersize=4, label=name, **look)
    tell_missing(ax, *(result.mean for result in results.values()))
    whole_numbers(ax.xaxis)
    legend(ax)
    return label(ax, "Lyapunov exponents", "number", "exponent (nats per step)")


def lyapunov_convergence(result: LyapunovExponents, *, ax: Axes | None = None, most: int = 4) -> Any:
    """The running estimate of the largest exponents as more steps are counted, with the first one's final interval.

    Args:
        result: `LyapunovExponents`.
        ax: matplotlib axes to draw on; by default those of a new figure.
        most: exponents to draw.

    Returns:
        The axes; the lines are averaged over the batch.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> cell = sj.GRU(2, 3)
        >>> result = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 60, 2)))
        >>> len(sj.plots.lyapunov_convergence(result, ax=Figure().subplots(), most=2).lines)
        2
    """
    ax = axes(ax)
    history = mean_of_finite(result.history)[:, :most]  # (blocks, exponents)
    for i, line in enumerate(history.T):
        ax.plot(result.history_steps, line, label=f"number {i + 1}", **style(i))
    low, high = mean_of_finite(result.low), mean_of_finite(result.high)
    if len(low) and np.isfinite([low[0], high[0]]).all():
        ax.axhspan(low[0], high[0], color=COLOURS[0], alpha=0.15, linewidth=0, label="95 % interval of number 1")
    tell_missing(ax, np.asarray(result.history)[..., :most])
    legend(ax)
    return label(ax, "Lyapunov exponents as steps are counted", "steps counted", "exponent (nats per step)")
