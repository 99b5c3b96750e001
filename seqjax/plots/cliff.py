"""The figure of the cliff in the loss, after Pascanu, Mikolov and Bengio 2013."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import VERMILLION, Axes, add_legend, add_note, get_axes, note_missing, set_labels

if TYPE_CHECKING:
    from seqjax.analysis.cliff import LossCliff
else:  # at run time, figures do not import the analyses
    LossCliff = Any


def loss_cliff(result: LossCliff, *, ax: Axes | None = None) -> Axes:
    """The loss of a one-unit network over its two parameters, with the paths of gradient descent.

    One path is with clipping and one is without.

    Args:
        result: `LossCliff`.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes. If the path without clipping leaves the figure, a note gives its end.

    Source: Pascanu, Mikolov and Bengio 2013, figure 6.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> ax = sj.plots.loss_cliff(sj.analysis.loss_cliff(resolution=8), ax=Figure().subplots())
        >>> [line.get_label() for line in ax.lines]
        ['without clipping', 'clipped at 0.2']
    """
    ax = get_axes(ax, (5.0, 3.8))
    loss = np.ma.masked_invalid(result.loss)
    if loss.count():  # matplotlib warns if it has no value to scale the colours by
        image = ax.pcolormesh(result.w, result.b, loss, cmap="cividis", shading="gouraud", rasterized=True)
        bar = ax.figure.colorbar(image, ax=ax)
        bar.set_label(f"loss after {result.time} steps")
        bar.outline.set_visible(False)
    note_missing(ax, result.loss)
    for path, name, colour, marker in (
        (result.plain, "without clipping", VERMILLION, "X"),
        (result.clipped, f"clipped at {result.clip_norm:g}", "#ffffff", "o"),
    ):
        edge = {"markeredgecolor": "#000000", "markeredgewidth": 0.4}
        ax.plot(*path.T, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=name, **edge)
    # The limits are those of the grid, because the path without clipping can end far outside it.
    limits = [(float(side.min()), float(side.max())) for side in (result.w, result.b)]
    ax.set(xlim=limits[0], ylim=limits[1])
    outside = [not low <= value <= high for value, (low, high) in zip(result.plain[-1], limits, strict=True)]
    if any(outside):
        w, b = result.plain[-1]
        add_note(ax, f"without clipping, the end is at w = {w:.1f}, b = {b:.1f}", color="#000000")
    add_legend(ax, labelcolor="#ffffff", framealpha=0)
    ax = set_labels(ax, "A cliff in the loss", "recurrent weight w", "bias b")
    ax.grid(False)
    return ax
