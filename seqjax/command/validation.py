"""The loss of a character model on its validation text in bits per character, with a confidence interval."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from seqjax.command.character_model import Settings
from seqjax.data.text import windows
from seqjax.models.model import Model, ModelParams, log_probs

PIECES = 16  # at least so many parts of the text, whose means are compared


class Estimate(NamedTuple):
    """A mean loss in bits per character.

    Attributes:
        mean: over all characters that were read.
        low, high: the 95 % interval of the mean loss on text of this kind; NaN if too little was read.
        read: the number of characters that were predicted.
        length: the number of characters of the whole text.
        pieces: the means over contiguous pieces of what was read, from which the interval comes.
    """

    mean: float
    low: float
    high: float
    read: int
    length: int
    pieces: Float[np.ndarray, " pieces"]

    def __str__(self) -> str:
        return with_interval(self.mean, self.low, self.high)

    def minus(self, other: Estimate) -> tuple[float, float, float] | None:
        """The mean difference from another model on the same text, with its 95 % interval, from pairs of pieces.

        It is narrower than the intervals of both, because most of the variance between pieces is that of the text. None
        if the two did not read the same pieces.
        """
        if (self.read, self.pieces.shape) != (other.read, other.pieces.shape) or not self.pieces.size:
            return None
        low, high = _interval(self.pieces - other.pieces, self.mean - other.mean)
        return self.mean - other.mean, low, high


def validation_bits(
    settings: Settings,
    model: Model,
    params: ModelParams,
    tokens: np.ndarray,
    *,
    width: float = 0.05,
    seconds: float = 5.0,
) -> Estimate:
    """Reads a text until the interval of its mean loss is narrow, the time is over, or the text is read.

    The text is read in rows side by side, in the windows of the validation during the training. So the mean over the
    whole text is the validation loss of the training.

    Args:
        settings, model, params: of the run.
        tokens: the validation text (length,), of at least two characters.
        width: the largest width of the interval, in bits per character.
        seconds: the time after which no further window is read, without compilation.

    Returns:
        The mean with its 95 % interval.

    Raises:
        ValueError: the text has fewer than two characters.
    """
    if len(tokens) < 2:
        raise ValueError(f"expected a validation text of at least 2 characters, got {len(tokens)}: use a longer text")
    enough = (len(tokens) - 1) // settings.batch >= settings.window
    rows, window = (settings.batch, settings.window) if enough else (1, min(settings.window, len(tokens) - 1))
    read = jax.jit(lambda params, state, xs, ys: log_probs(model, params, xs, ys, state=state))
    state = model.cell.initial_state(params.cell)
    state = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (rows, *np.shape(leaf))), state)
    bits, start = np.zeros((rows, 0)), math.inf
    for number, batch in enumerate(windows(tokens, rows, window, passes=1)):
        state, log_p = read(params, state, batch.xs, batch.targets)
        bits = np.concatenate([bits, np.asarray(log_p, np.float64) / -math.log(2)], axis=1)
        start = min(start, time.monotonic())  # after the compilation
        _, low, high, _ = batch_means_interval(bits)
        if number >= 3 and (high - low < width or time.monotonic() - start > seconds):
            break
    mean, low, high, pieces = batch_means_interval(bits)
    return Estimate(mean, low, high, bits.size, len(tokens), pieces)


def with_interval(mean: float, low: float, high: float) -> str:
    """A number with its interval, if it is known."""
    return f"{mean:.3f} ({low:.3f} to {high:.3f})" if low < high else f"{mean:.3f}"


def batch_means_interval(
    values: Float[np.ndarray, "rows time"],
) -> tuple[float, float, float, Float[np.ndarray, " pieces"]]:
    """The mean of correlated values and its 95 % interval, from the means of contiguous pieces.

    The interval is mean +- t_{P-1} sd / sqrt(P) with the standard deviation sd of the means of P >= 16 pieces. It holds
    if the pieces are longer than the correlation.

    Args:
        values: rows of consecutive values.

    Returns:
        The mean, the ends of the interval, and the means of the pieces. If a piece would be empty, there is none, and
        the ends are NaN.

    Source: batch means; Law and Carson 1979.

    Example:
        >>> import numpy as np
        >>> from seqjax.command.validation import batch_means_interval
        >>> mean, low, high, _ = batch_means_interval(np.random.default_rng(0).normal(size=(4, 1000)))
        >>> low < 0 < high, round(high - low, 1)  # about 4 / sqrt(4000)
        (True, 0.1)
    """
    rows, length = values.shape
    per_row = math.ceil(PIECES / rows)
    if length < per_row:
        return float(values.mean()), math.nan, math.nan, np.zeros(0)
    pieces = np.array([piece.mean() for row in values for piece in np.array_split(row, per_row)])
    mean = float(values.mean())
    return mean, *_interval(pieces, mean), pieces


def _interval(pieces: Float[np.ndarray, " pieces"], mean: float) -> tuple[float, float]:
    half = float(stdtrit(len(pieces) - 1, 0.975) * pieces.std(ddof=1) / math.sqrt(len(pieces)))
    return mean - half, mean + half
