"""The figure of the wall in the loss, after Pascanu, Mikolov and Bengio 2013."""

from __future__ import annotations

from typing import Any

import numpy as np

from seqjax.analysis.cliff import LossCliff

from .canvas import VERMILLION, Axes, axes, label, legend, remark, tell_missing


def loss_cliff(result: LossCliff, *, ax: Axes | None = None) -> Any:
    """The loss of a one-unit network over its two parameters, and gradient descent on it with clipping and without.

    Args:
        result: `LossCliff`.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes; where the path without clipping leaves the picture, a remark says where it ends.

    Source: Pascanu, Mikolov and Bengio 2013, figure 6.

    Example:
        >>> import seqjax as sj
        >>> from matplotlib.figure import Figure
        >>> ax = sj.plots.loss_cliff(sj.analysis.loss_cliff(resolution=8), ax=Figure().subplots())
        >>> [line.get_label() for line in ax.lines]
        ['without clipping', 'clipped at 0.2']
    """
    ax = axes(ax, (5.0, 3.8))
    loss = np.ma.masked_invalid(result.loss)
    if loss.count():
        image = ax.pcolormesh(result.w, result.b, loss, cmap="cividis", shading="gouraud", rasterized=True)
        bar = ax.figure.colorbar(image, ax=ax)
        bar.set_label(f"loss after {result.time} steps")
        bar.outline.set_visible(False)
    tell_missing(ax, result.loss)
    for path, name, colour, marker in (
        (result.plain, "without clipping", VERMILLION, "X"),
        (result.clipped, f"clipped at {result.clip_norm:g}", "#ffffff", "o"),
    ):
        edge = {"markeredgecolor": "#000000", "markeredgewidth": 0.4}
        ax.plot(*path.T, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=name, **edge)
    limits = [(float(side.min()), float(side.max())) for side in (result.w, result.b)]
    ax.set(xlim=limits[0], ylim=limits[1])
    outside = [not low <= value <= high for value, (low, high) in zip(result.plain[-1], limits, strict=True)]
    if any(outside):
        remark(ax, "without clipping it ends at w = {:.1f}, b = {:.1f}".format(*result.plain[-1]), color="#000000")
    legend(ax, labelcolor="#ffffff", framealpha=0)
    ax = label(ax, "A wall in the loss", "recurrent weight w", "bias b")
    ax.grid(False)
    return ax
