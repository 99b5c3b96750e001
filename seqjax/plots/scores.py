"""Figures of the score of a model: during training, by the position in a sequence, and by the sequence length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    BLUE,
    GREY,
    VERMILLION,
    ArrayLike,
    Axes,
    add_legend,
    finite_or_nan,
    get_axes,
    note_missing,
    set_integer_ticks,
    set_labels,
    with_styles,
)

if TYPE_CHECKING:
    from seqjax.analysis.by_length import ScoreByLength
else:  # at run time, figures do not import the analyses
    ScoreByLength = Any


def loss_by_position(result: ScoreByLength, *, ax: Axes | None = None) -> Axes:
    """The mean score at each position, over all sequences that are long enough.

    Args:
        result: `ScoreByLength`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, numpy as np, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> model = sj.Model(sj.stack([sj.Embedding(5, 2), sj.GRU(2, 3)]), sj.Categorical(3, 5))
        >>> batch = sj.Batch(np.ones((2, 9), np.int32), np.ones((2, 9), np.int32))
        >>> result = sj.analysis.score_by_length(model, model.init(jax.random.key(0)), [batch])
        >>> len(sj.plots.loss_by_position(result, ax=Figure().subplots()).lines[0].get_xdata())
        9
    """
    ax = get_axes(ax)
    ax.plot(result.position, finite_or_nan(result.by_position), color=BLUE)
    note_missing(ax, result.by_position)
    return set_labels(ax, "Score by position", "position in the sequence (steps)", _score_label(result))


def loss_by_length(result: ScoreByLength, *, ax: Axes | None = None) -> Axes:
    """The score by sequence length, with the means over the short and over the long sequences.

    Args:
        result: `ScoreByLength`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Example:
        >>> import jax, numpy as np, seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> model = sj.Model(sj.stack([sj.Embedding(5, 2), sj.GRU(2, 3)]), sj.Categorical(3, 5))
        >>> tokens = np.ones((2, 9), np.int32)
        >>> batch = sj.Batch(tokens, tokens, mask=sj.length_mask([4, 9], 9))
        >>> result = sj.analysis.score_by_length(model, model.init(jax.random.key(0)), [batch])
        >>> sj.plots.loss_by_length(result, ax=Figure().subplots()).lines[0].get_xdata().tolist()
        [4, 9]
    """
    ax = get_axes(ax)
    ax.plot(result.length, finite_or_nan(result.by_length), color=BLUE, marker="o", markersize=4)
    halves = (f"up to {result.split} steps", result.short, GREY, "--"), ("longer", result.long, VERMILLION, "-.")
    for name, value, colour, dashes in halves:
        if np.isfinite(value):  # the mean is NaN if no sequence is that short or that long
            ax.axhline(value, color=colour, linestyle=dashes, linewidth=1, label=f"{name}, mean {value:.3g}")
    note_missing(ax, result.by_length)
    add_legend(ax)
    return set_labels(ax, "Score by length", "length of the sequence (steps)", _score_label(result))


def learning_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, ax: Axes | None = None, unit: str = "bits per character"
) -> Axes:
    """Scores against the number of updates.

    Args:
        curves: (updates, scores) by name.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        unit: the unit of the scores.

    Returns:
        The axes, with one line per name.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> ax = sj.plots.learning_curves({"training": ([1, 2], [3.0, 2.5])}, ax=Figure().subplots())
        >>> ax.get_ylabel(), ax.lines[0].get_ydata().tolist()
        ('bits per character', [3.0, 2.5])
    """
    ax = get_axes(ax)
    for name, (updates, scores), style in with_styles(curves):
        # A line through one point is invisible, so short curves have markers.
        markers = {"marker": "o", "markersize": 3} if np.size(updates) < 30 else {}
        ax.plot(np.asarray(updates), finite_or_nan(scores), label=name, linewidth=1.2, **markers, **style)
    note_missing(ax, *(scores for _, scores in curves.values()))
    set_integer_ticks(ax.xaxis)
    add_legend(ax)
    return set_labels(ax, "Learning curve", "update", unit)


def _score_label(result: ScoreByLength) -> str:
    return {"correct": "share of correct answers"}.get(result.unit, f"loss ({result.unit})")
