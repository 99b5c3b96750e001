"""Figures of how good a model is: over its training, by the place in a sequence, and by the length of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqjax.analysis.by_length import ScoreByLength

from .canvas import BLUE, GREY, VERMILLION, Axes, axes, finite, label, legend, named, tell_missing, whole_numbers


def loss_by_position(result: ScoreByLength, *, ax: Axes | None = None) -> Any:
    """The score at each place of a sequence, over all sequences that reach it.

    Args:
        result: `ScoreByLength`.
        ax: matplotlib axes to draw on; by default those of a new figure.

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
    ax = axes(ax)
    ax.plot(result.position, finite(result.by_position), color=BLUE)
    tell_missing(ax, result.by_position)
    return label(ax, "Score by position", "position in the sequence (steps)", _unit(result))


def loss_by_length(result: ScoreByLength, *, ax: Axes | None = None) -> Any:
    """The score of sequences by their length, with the mean of the short ones and that of the long ones.

    Args:
        result: `ScoreByLength`.
        ax: matplotlib axes to draw on; by default those of a new figure.

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
    ax = axes(ax)
    ax.plot(result.length, finite(result.by_length), color=BLUE, marker="o", markersize=4)
    halves = (f"up to {result.split} steps", result.short, GREY, "--"), ("longer", result.long, VERMILLION, "-.")
    for name, value, colour, dashes in halves:
        if np.isfinite(value):
            ax.axhline(value, color=colour, linestyle=dashes, linewidth=1, label=f"{name}, mean {value:.3g}")
    tell_missing(ax, result.by_length)
    legend(ax)
    return label(ax, "Score by length", "length of the sequence (steps)", _unit(result))


def learning_curves(
    curves: Mapping[str, tuple[Any, Any]], *, ax: Axes | None = None, unit: str = "bits per character"
) -> Any:
    """Scores over a training.

    Args:
        curves: (updates, scores) by name.
        ax: matplotlib axes to draw on; by default those of a new figure.
        unit: of the scores.

    Returns:
        The axes, with one line a name.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> ax = sj.plots.learning_curves({"training": ([1, 2], [3.0, 2.5])}, ax=Figure().subplots())
        >>> ax.get_ylabel(), ax.lines[0].get_ydata().tolist()
        ('bits per character', [3.0, 2.5])
    """
    ax = axes(ax)
    for name, (updates, scores), look in named(curves):
        few = {"marker": "o", "markersize": 3} if len(updates) < 30 else {}
        ax.plot(np.asarray(updates), finite(scores), label=name, linewidth=1.2, **few, **look)
    tell_missing(ax, *(scores for _, scores in curves.values()))
    whole_numbers(ax.xaxis)
    legend(ax)
    return label(ax, "Learning curve", "update", unit)


def _unit(result: ScoreByLength) -> str:
    return {"correct": "share of right answers"}.get(result.unit, f"loss ({result.unit})")
