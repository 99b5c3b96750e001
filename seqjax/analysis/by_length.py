"""The score of a model by the position in a sequence and by the length of the sequence, S(T).

A mean over all steps hides the memory of a recurrent network. A model that forgets has a good score on short sequences
and on steps that need only the last few inputs. Only long sequences show the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from seqjax.cell import State
from seqjax.cells.arguments import check_choice
from seqjax.data.batch import Batch, as_stream, check_batch
from seqjax.models.heads import Head, head_log_probs
from seqjax.models.model import Model, ModelParams, check_model
from seqjax.models.objectives import ManyToOne, Objective, every_step
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence.unroll import unroll

Score = Literal["loss", "accuracy"]


class ScoreByLength(NamedTuple):
    """Mean scores, with the number of terms in each mean.

    Attributes:
        position: t = 1..T, the position of a valid step in its sequence (T,); empty if each sequence has one target.
        by_position: the mean score at this position (T,).
        position_count: the number of sequences with this position (T,).
        length: the different lengths, in valid steps, ascending (L,).
        by_length: S(T), the mean score of the sequences of this length (L,).
        length_count: the number of sequences of this length (L,).
        short: the mean score of sequences of up to `split` steps.
        long: the mean score of longer sequences; NaN if there is none.
        split: a length in steps.
        unit: "nats", or "correct" for a share of correct answers.
    """

    position: Int[np.ndarray, " T"]
    by_position: Float[np.ndarray, " T"]
    position_count: Int[np.ndarray, " T"]
    length: Int[np.ndarray, " L"]
    by_length: Float[np.ndarray, " L"]
    length_count: Int[np.ndarray, " L"]
    short: float
    long: float
    split: int
    unit: str

    def __str__(self) -> str:
        unit = " nats" if self.unit == "nats" else " correct"
        lines = [
            f"score by length of {self.length_count.sum()} sequences, {self.length.min()} to {self.length.max()} steps",
            f"  up to {self.split} steps: {self.short:.4g}{unit}",
        ]
        lines.append(
            "  no sequence is longer"
            if np.isnan(self.long)
            else f"  more than {self.split} steps: {self.long:.4g}{unit}"
        )
        return "\n".join(lines)


@for_automatic_axes
def score_by_length(
    model: Model,
    params: ModelParams,
    stream: Iterable[Batch],
    *,
    score: Score = "loss",
    loss: Objective = every_step,
    split: int | None = None,
) -> ScoreByLength:
    """S(t) = E[l_t] by position and S(T) = E[l | length T] by length, over a finite stream.

    A sequence is a row of a batch. A `reset` ends it and begins the next one; a batch that `continues` extends it.
    Steps whose mask is False are not part of it. If each sequence has one target, it is the whole row, and resets do
    not divide it.

    Args:
        model, params: the model to score.
        stream: finite; batches that continue start from the final state of the batch before.
        score: "loss", -log p in nats; or "accuracy", the share of targets that are the head's most likely answer.
        loss: `every_step` for one target per step, or `ManyToOne(pool)` for one target per sequence. For any other
            objective, the "loss" is the objective of each sequence.
        split: the largest length of a short sequence; by default the median length, or the next shorter length if no
            sequence is longer than the median.

    Returns:
        `ScoreByLength`. Means are over valid steps, as in `evaluate`, or over sequences if each has one score.

    Raises:
        ValueError: the stream has no valid step, an option is unknown, or a batch does not match.
        TypeError: `score` is "accuracy", and the targets are not whole numbers or the objective has no pool.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.VanillaRNN(1, 1, activation="identity"), sj.Gaussian(1, 1, std=1.0))
        >>> one, zero = jnp.ones((1, 1)), jnp.zeros(1)
        >>> params = sj.ModelParams(sj.VanillaParams(one, one, zero), sj.ReadoutParams(one, zero))  # predicts sum_t x_t
        >>> batch = sj.Batch(jnp.ones((2, 3, 1)), jnp.zeros((2, 3, 1)), sj.length_mask([1, 3], 3))
        >>> result = sj.analysis.score_by_length(model, params, [batch])
        >>> (result.by_position - result.by_position[0]).round(4).tolist()  # (t^2 - 1) / 2
        [0.0, 1.5, 4.0]
        >>> result.length.tolist(), round(result.long - result.short, 4)  # (1 + 4 + 9) / 6 - 1 / 2
        ([1, 3], 1.8333)
    """
    check_model(model, params)
    check_choice("score", score, ("loss", "accuracy"))
    if score == "accuracy" and loss is not every_step and not isinstance(loss, ManyToOne):
        raise TypeError(f"expected loss every_step or ManyToOne to count right answers, got {loss!r}")
    sequences = [(values, length) for values, length in _sequences(model, params, stream, score, loss) if length]
    if not sequences:
        raise ValueError("expected at least one valid step to score, got none: is the stream already used up?")
    lengths = np.array([length for _, length in sequences])
    split = _default_split(lengths) if split is None else split
    scores = np.concatenate([values for values, _ in sequences]).astype(np.float64)
    owner = np.repeat(np.arange(len(sequences)), [len(values) for values, _ in sequences])  # the sequence of each score
    positions = np.concatenate([np.arange(len(values)) for values, _ in sequences]) if loss is every_step else owner[:0]
    distinct, which = np.unique(lengths, return_inverse=True)
    position_count = np.bincount(positions)
    return ScoreByLength(
        position=np.arange(1, len(position_count) + 1),
        by_position=np.bincount(positions, scores[: len(positions)]) / position_count,
        position_count=position_count,
        length=distinct,
        by_length=np.bincount(which[owner], scores) / np.bincount(which[owner]),
        length_count=np.bincount(which),
        short=_mean(scores[lengths[owner] <= split]),
        long=_mean(scores[lengths[owner] > split]),
        split=int(split),
        unit="nats" if score == "loss" else "correct",
    )


def _default_split(lengths: np.ndarray) -> int:
    distinct = np.unique(lengths)
    return int(min(np.median(lengths), distinct[-2] if len(distinct) > 1 else distinct[-1]))


def _mean(scores: np.ndarray) -> float:
    return float(scores.mean()) if scores.size else float("nan")


def _sequences(
    model: Model, params: ModelParams, stream: Iterable[Batch], score: Score, loss: Objective
) -> Iterator[tuple[np.ndarray, int]]:
    """The scores and the length of each sequence."""
    run = cached_jit(_scores, model, score, loss)
    # For each row (scores, mask, reset) of all batches since the last one that does not continue.
    final, rows = None, []
    for batch in as_stream(stream):
        state = check_batch(batch, final)
        final, values = run(params, state, (batch.xs, batch.targets, batch.mask, batch.reset))
        shape, values = jax.tree.leaves(batch.xs)[0].shape[:2], np.asarray(values)
        mask = np.ones(shape, bool) if batch.mask is None else np.asarray(batch.mask)
        reset = np.zeros(shape, bool) if batch.reset is None else np.asarray(batch.reset)
        if loss is not every_step:
            yield from ((value[None], int(valid.sum())) for value, valid in zip(values, mask, strict=True))
            continue
        if not batch.continues:
            yield from _split_at_resets(rows)
            rows = []
        rows = rows or [[] for _ in mask]
        for row, *window in zip(rows, values, mask, reset, strict=True):
            row.append(window)
    yield from _split_at_resets(rows)


def _split_at_resets(rows: list[list[list[np.ndarray]]]) -> Iterator[tuple[np.ndarray, int]]:
    for row in rows:
        values, mask, reset = (np.concatenate(parts) for parts in zip(*row, strict=True))
        begins = np.flatnonzero(reset)
        for part, valid in zip(np.split(values, begins), np.split(mask, begins), strict=True):
            yield part[valid], int(valid.sum())


def _scores(
    model: Model, score: Score, loss: Objective, params: ModelParams, state: State, data: tuple[PyTree, ...]
) -> tuple[State, Array]:
    """The final state, and the score of every step (batch, time) or of every row (batch,)."""
    xs, targets, mask, reset = data
    targets = jax.tree.map(jnp.asarray, targets)
    final, outputs = unroll(model.cell, params.cell, xs, state=state, mask=mask, reset=reset)
    head, theta = model.head, model.head_params(params)

    def correct(h: PyTree, y: PyTree) -> Array:
        return _correct(head, theta, h, y)

    def loss_of_row(*row: PyTree) -> Array:
        return loss(head, theta, *jax.tree.map(lambda leaf: leaf[None], row))

    if loss is every_step:
        log_p = head_log_probs(head, theta, outputs, targets, mask)  # also for accuracy, because it checks the targets
        return final, -log_p if score == "loss" else jax.vmap(jax.vmap(correct))(outputs, targets)
    if score == "accuracy" and isinstance(loss, ManyToOne):
        return final, jax.vmap(correct)(loss.pool(outputs, mask), targets)
    return final, jax.vmap(loss_of_row)(outputs, targets, mask)


def _correct(head: Head, params: PyTree, h: PyTree, y: PyTree) -> Array:
    """Whether y is the head's most likely answer."""
    if not all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(y)):
        kinds = ", ".join(str(leaf.dtype) for leaf in jax.tree.leaves(y))
        raise TypeError(f'expected whole-number targets to count right answers, got {kinds}: score="loss"')
    answer = head.sample(params, h, jax.random.key(0), temperature=0.0)  # greedy, so the key has no effect
    # Some heads sample another integer dtype than that of the targets.
    right = jax.tree.map(lambda a, b: jnp.all(a == b.astype(a.dtype)), answer, y)
    return jnp.stack(jax.tree.leaves(right)).all()
