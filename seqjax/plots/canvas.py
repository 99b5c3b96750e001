"""What every figure shares: axes, colours that work on white and on black, powers of ten, and what cannot be drawn.

Sizes that span hundreds of powers of ten are drawn by their logarithms, so that nothing under- or overflows on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib is imported when the first figure is drawn
    from matplotlib.axes import Axes as Axes
else:
    Axes = Any

# Okabe and Ito's colours for every kind of colour vision, those with a contrast of 3 to both white and black.
BLUE, VERMILLION, GREEN, PURPLE = COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#808080"
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.4)) -> Axes:
    """The axes given, or those of a new figure of `size` inches.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
    """
    if ax is not None:
        return ax
    need_matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def need_matplotlib() -> None:
    """Raises a ModuleNotFoundError that says what to install where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'expected matplotlib for figures, got no {error.name}: pip install "seqjax[plots]"', name=error.name
        ) from None


def label(ax: Axes, title: str, x: str, y: str) -> Axes:
    """Title and axes in words; returns the axes."""
    ax.set_title(title, loc="left", fontsize="medium")
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def legend(ax: Axes, **options: Any) -> None:
    """A legend of what has a name, where anything has."""
    handles, names = ax.get_legend_handles_labels()
    if names:
        look = {"framealpha": 0.75, "edgecolor": "none", "fontsize": "small", "borderpad": 0.2}
        ax.legend(handles, names, **(look | options))


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of the line with this number; both change, so that neither alone has to be told apart."""
    return {"color": COLOURS[number % 4], "linestyle": DASHES[(number + number // 4) % 4]}


def decades(axis: Any) -> None:
    """Ticks of an axis that holds logarithms to the base ten, as the numbers themselves. After all is drawn on it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = axis.get_view_interval()
    if high - low < 2.2:
        fine = high - low < 0.6
        digits = np.log10(np.arange(10, 100, 2) / 10 if fine else [1, 2, 5])
        ticks = np.add.outer(np.arange(math.floor(low), math.ceil(high) + 1), digits).ravel()
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high], nbins=7))
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def power(value: float | int) -> str:
    """10^value in words.

    Example:
        >>> from seqjax.plots.canvas import power
        >>> power(-7), power(-2), power(0.5)
        ('10⁻⁷', '0.01', '3.16')
    """
    if abs(value) < 3.5:
        return f"{10**value:.3g}".replace("1e+03", "1000")
    return "10" + f"{round(value):d}".translate(_SUPERSCRIPTS)


def base_ten(log: Any) -> np.ndarray:
    """Natural logarithms to the base ten."""
    return np.asarray(log, np.float64) / math.log(10)


def mean_of_finite(values: Any, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """The mean of the finite values along an axis; NaN where there is none."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis)
    return np.where(count > 0, np.where(finite, values, 0).sum(axis) / np.maximum(count, 1), np.nan)


def finite(values: Any) -> np.ndarray:
    """Values with NaN for what is not finite, which matplotlib leaves out."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def tell_missing(ax: Axes, *drawn: Any) -> None:
    """Says on the figure how many of the values are not finite and so are not drawn; nothing where all are."""
    values = np.concatenate([np.zeros(0), *(np.ravel(np.asarray(part, np.float64)) for part in drawn)])
    missing = int(np.sum(~np.isfinite(values)))
    if not values.size:
        remark(ax, "there is nothing to draw")
    elif missing == values.size:
        remark(ax, f"none of the {values.size} values is finite")
    elif missing:
        remark(ax, f"{missing} of {values.size} values not finite, not drawn")


def remark(ax: Axes, text: str, **options: Any) -> None:
    """A remark in the lower left corner."""
    ax.text(0.02, 0.03, text, transform=ax.transAxes, fontsize="small", style="italic", va="bottom", **options)


def named(results: Mapping[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Each result with its name and its line's look."""
    return [(name, result, style(number)) for number, (name, result) in enumerate(results.items())]
