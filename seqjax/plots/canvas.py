"""Helpers of all figures: axes, colours for light and dark backgrounds, powers of ten, and notes on missing values.

Values that span hundreds of powers of ten are plotted as logarithms on a linear axis. A logarithmic axis of matplotlib
would need the values themselves, which underflow or overflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

# matplotlib is imported when the first figure is drawn. NumPy's ArrayLike includes lists, unlike that of JAX.
if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.axis import Axis
    from numpy.typing import ArrayLike as ArrayLike
else:
    Axes = Axis = ArrayLike = Any

Result = TypeVar("Result")

# From Okabe and Ito's palette for colour-blind readers: the colours with a contrast of 3 to both white and black.
BLUE, VERMILLION, GREEN, PURPLE = COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#808080"
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def get_axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.4)) -> Axes:
    """Returns `ax`, or the axes of a new figure of `size` inches if it is None.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def require_matplotlib() -> None:
    """Raises a ModuleNotFoundError with the command that installs matplotlib, if it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'expected matplotlib for figures, got no {error.name}: pip install "seqjax[plots]"', name=error.name
        ) from None


def set_labels(ax: Axes, title: str, x: str, y: str) -> Axes:
    """Sets the title, the labels of both axes, and the common style. Returns the axes."""
    ax.set_title(title, loc="left", fontsize="medium")
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def add_legend(ax: Axes, **options: Any) -> None:
    """Adds a legend, unless nothing on the axes has a label."""
    handles, names = ax.get_legend_handles_labels()
    if names:  # matplotlib warns about an empty legend
        style = {"framealpha": 0.75, "edgecolor": "none", "fontsize": "small", "borderpad": 0.2}
        ax.legend(handles, names, **(style | options))


def line_style(number: int) -> dict[str, Any]:
    """The colour and the dashes of the line with this number, distinct for the numbers 0 to 15."""
    # Both change from line to line, so that neighbours differ in black and white too.
    return {"color": COLOURS[number % 4], "linestyle": DASHES[(number + number // 4) % 4]}


def set_power_ticks(axis: Axis) -> None:
    """Labels an axis of logarithms to the base ten with powers of ten. Call it after everything is drawn."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = axis.get_view_interval()
    if high - low < 2.2:  # so few powers of ten that ticks between them are needed
        axis.set_major_locator(FixedLocator(_ticks_between_powers(low, high).tolist()))
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))


def set_factor_ticks(axis: Axis) -> None:
    """Labels an axis of natural logarithms with factors e^value. Call it after everything is drawn."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    low, high = to_log10(axis.get_view_interval())
    powers = np.arange(math.ceil(low), math.floor(high) + 1, max(1, math.ceil((high - low) / 6)))
    ticks = powers if high - low >= 2.2 else _ticks_between_powers(low, high)
    axis.set_major_locator(FixedLocator((ticks * math.log(10)).tolist()))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value / math.log(10))))


def _ticks_between_powers(low: float, high: float) -> np.ndarray:
    """Logarithms of round numbers between two logarithms to the base ten."""
    from matplotlib.ticker import MaxNLocator

    if high - low < 0.6:
        ticks = np.log10(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(10**low, 10**high))
    else:
        ticks = np.add.outer(np.arange(math.floor(low), math.ceil(high) + 1), np.log10([1, 2, 5])).ravel()
    return ticks[(ticks >= low) & (ticks <= high)]


def set_integer_ticks(axis: Axis) -> None:
    """Restricts the ticks to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def format_power(value: float | int) -> str:
    """10^value as text.

    Example:
        >>> from seqjax.plots.canvas import format_power
        >>> format_power(-7), format_power(-2), format_power(0.5)
        ('10⁻⁷', '0.01', '3.16')
    """
    if abs(value) < 3.5:
        return f"{10**value:.3g}".replace("1e+03", "1000")
    return "10" + f"{round(value):d}".translate(_SUPERSCRIPTS)


def to_log10(log: ArrayLike) -> np.ndarray:
    """Converts natural logarithms to logarithms to the base ten."""
    return np.asarray(log, np.float64) / math.log(10)


def finite_mean(values: ArrayLike, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """The mean of the finite values along an axis; NaN if there is none."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis)
    return np.where(count > 0, np.where(finite, values, 0).sum(axis) / np.maximum(count, 1), np.nan)


def finite_or_nan(values: ArrayLike) -> np.ndarray:
    """The values with NaN in place of infinities. matplotlib leaves gaps at NaN, but infinities break its limits."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def note_missing(ax: Axes, *drawn: ArrayLike) -> None:
    """Writes on the figure how many of its values are not finite and therefore not drawn, if there are any."""
    values = np.concatenate([np.zeros(0), *(np.ravel(np.asarray(part, np.float64)) for part in drawn)])
    missing = int(np.sum(~np.isfinite(values)))
    if not values.size:
        add_note(ax, "there is nothing to draw")
    elif missing == values.size:
        add_note(ax, f"none of the {values.size} values is finite")
    elif missing:
        add_note(ax, f"{missing} of {values.size} values are not finite and not drawn")


def add_note(ax: Axes, text: str, **options: Any) -> None:
    """Writes a note in the lower left corner."""
    ax.text(0.02, 0.03, text, transform=ax.transAxes, fontsize="small", style="italic", va="bottom", **options)


def with_styles(results: Mapping[str, Result]) -> list[tuple[str, Result, dict[str, Any]]]:
    """The name, the result and the line style of each entry."""
    return [(name, result, line_style(number)) for number, (name, result) in enumerate(results.items())]
