"""How often and how hard gradient clipping acted in a run, and which parameters' gradients made it act.

Clipping that acts now and then removes single steps that would have gone too far. Clipping that acts at nearly every
step is a learning rate that nobody chose: the direction alone is used, and every step has one length.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from seqjax.training.loop import LEAF_PREFIX


class ClippingStatistics(NamedTuple):
    """What clipping did to the updates of a run, in their order.

    Attributes:
        clip_norm: c, the threshold.
        fraction: the share of updates whose gradient was cut.
        mean_factor: what gradients were multiplied with, on average over all updates; 1 where none was cut.
        mean_cut: the same over the updates that were cut; 1 where none was.
        smallest_factor: at the update that was cut most.
        longest_run: the most updates on end that were cut.
        factors: min(1, c / |g|) of each update (steps,).
        clipped: whether each update was cut (steps,).
        grad_norm: |g| before clipping (steps,).
        by_leaf: the norm of each parameter's gradient (steps,), by its path, such as "cell.W_hh"; empty where the
            history does not hold them, as metrics.csv does not. Their squares sum to that of `grad_norm`.
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


def clipping_statistics(history: Any, clip_norm: float | None) -> ClippingStatistics:
    """How clipping acted, g <- g min(1, c / |g|), over the updates of a run.

    Args:
        history: columns by name: `Fitted.history`, or metrics.csv as pandas reads it or as a dict of columns. It needs
            "grad_norm", the norm before clipping.
        clip_norm: c, the threshold of the run; or another, to see what it would have done to the same gradients. None
            for a run without clipping.

    Returns:
        `ClippingStatistics`.

    Raises:
        ValueError: there is no column "grad_norm", it is empty or not finite, or `clip_norm` is not positive.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1.

    Example:
        >>> import seqjax as sj
        >>> acted = sj.analysis.clipping_statistics({"grad_norm": [0.5, 2.0, 4.0, 1.0]}, 1.0)
        >>> acted.factors.tolist(), acted.fraction, acted.longest_run
        ([1.0, 0.5, 0.25, 1.0], 0.5, 2)
    """
    limit = np.inf if clip_norm is None else float(clip_norm)
    if not limit > 0:
        raise ValueError(f"expected clip_norm to be positive, got {clip_norm}: None for a run without clipping")
    norms = _column(history, "grad_norm")
    clipped = norms > limit
    cut = limit / norms[clipped]
    factors = np.ones_like(norms)
    factors[clipped] = cut
    return ClippingStatistics(
        clip_norm=limit,
        fraction=float(clipped.mean()),
        mean_factor=float(factors.mean()),
        mean_cut=float(cut.mean()) if cut.size else 1.0,
        smallest_factor=float(factors.min()),
        longest_run=max((len(list(run)) for acted, run in itertools.groupby(clipped) if acted), default=0),
        factors=factors,
        clipped=clipped,
        grad_norm=norms,
        by_leaf={
            name.removeprefix(LEAF_PREFIX): _column(history, name)
            for name in map(str, history)
            if name.startswith(LEAF_PREFIX)
        },
    )


def _column(history: Any, name: str) -> np.ndarray:
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
            f"{np.argmin(np.isfinite(column))}: leave out the updates after which training stopped"
        )
    return column
