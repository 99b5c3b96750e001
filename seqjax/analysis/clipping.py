"""How often and how strongly gradient clipping acted in a run, and which parameters had the large gradients.

Clipping that acts rarely only shortens the few steps that would be too long. Clipping that acts at nearly every step
changes the learning rate: every step then has the same length, and only the direction of the gradient matters.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from seqjax.data.history import LEAF_PREFIX

# Columns by name: a dict of columns, or a pandas table, which has the same `in` and `[]` but is no Mapping.
History = Any


class ClippingStatistics(NamedTuple):
    """The effect of clipping on the updates of a run, in their order.

    Attributes:
        clip_norm: c, the threshold.
        fraction: the share of updates whose gradient was clipped.
        mean_factor: the mean factor of the gradients over all updates; 1 if none was clipped.
        mean_cut: the mean factor over the clipped updates; 1 if there is none.
        smallest_factor: the smallest factor of any update.
        longest_run: the largest number of consecutive clipped updates.
        factors: min(1, c / |g|) for each update (steps,).
        clipped: whether each update was clipped (steps,).
        grad_norm: |g| before clipping (steps,).
        by_leaf: the norm of each parameter's gradient (steps,), by its path, such as "cell.W_hh". The sum of their
            squares is the square of `grad_norm`. Empty if the history has no such columns; metrics.csv has none.
    """

    clip_norm: float
    fraction: float
    mean_factor: float
    mean_cut: float
    smallest_factor: float
    longest_run: int
    factors: Float[np.ndarray, " steps"]
    clipped: Bool[np.ndarray, " steps"]
    grad_norm: Float[np.ndarray, " steps"]
    by_leaf: dict[str, Float[np.ndarray, " steps"]]

    def __str__(self) -> str:
        return (
            f"{self.fraction:.1%} of {len(self.clipped)} updates clipped at a gradient norm of {self.clip_norm:g}: "
            f"mean factor {self.mean_factor:.3g}, {self.mean_cut:.3g} where clipped, smallest "
            f"{self.smallest_factor:.3g}; at most {self.longest_run} clipped updates in a row"
        )


def clipping_statistics(history: History, clip_norm: float | None) -> ClippingStatistics:
    """Statistics of clipping, g <- g min(1, c / |g|), over the updates of a run.

    Args:
        history: columns by name: `Fitted.history`, or metrics.csv as a pandas table or a dict of columns. The column
            "grad_norm", the norm before clipping, is required.
        clip_norm: c, the threshold of the run, or another threshold to compute its effect on the same gradients; None
            for a run without clipping.

    Returns:
        `ClippingStatistics`.

    Raises:
        ValueError: the column "grad_norm" is missing, empty or not finite, or `clip_norm` is not positive.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1.

    Example:
        >>> import seqjax as sj
        >>> statistics = sj.analysis.clipping_statistics({"grad_norm": [0.5, 2.0, 4.0, 1.0]}, 1.0)
        >>> statistics.factors.tolist(), statistics.fraction, statistics.longest_run
        ([1.0, 0.5, 0.25, 1.0], 0.5, 2)
    """
    limit = np.inf if clip_norm is None else float(clip_norm)
    if not limit > 0:
        raise ValueError(f"expected clip_norm to be positive, got {clip_norm}: None for a run without clipping")
    norms = _column(history, "grad_norm")
    clipped = norms > limit
    cut = limit / norms[clipped]
    factors = np.ones_like(norms)  # c / |g| only where it clips, because |g| may be zero elsewhere
    factors[clipped] = cut
    return ClippingStatistics(
        clip_norm=limit,
        fraction=float(clipped.mean()),
        mean_factor=float(factors.mean()),
        mean_cut=float(cut.mean()) if cut.size else 1.0,
        smallest_factor=float(factors.min()),
        longest_run=max((len(list(run)) for is_clipped, run in itertools.groupby(clipped) if is_clipped), default=0),
        factors=factors,
        clipped=clipped,
        grad_norm=norms,
        by_leaf={
            name.removeprefix(LEAF_PREFIX): _column(history, name)
            for name in map(str, history)
            if name.startswith(LEAF_PREFIX)
        },
    )


def _column(history: History, name: str) -> np.ndarray:
    if name not in history:
        raise ValueError(
            f"expected a history with a column {name!r}, got {', '.join(map(repr, history)) or 'none'}: "
            f"pass Fitted.history, or pandas.read_csv of a run's metrics.csv"
        )
    column = np.asarray(history[name], dtype=float)
    if column.ndim != 1 or not column.size:
        raise ValueError(f"expected one {name} an update, got the shape {column.shape}: was there no update?")
    if not np.isfinite(column).all():
        raise ValueError(
            f"expected finite norms in {name}, got {column[~np.isfinite(column)][0]} in row "
            f"{np.argmin(np.isfinite(column))}: remove the updates from the row at which training stopped"
        )
    return column
