"""Where in a sequence, and in which sequences, a model is good: its score by position and by length, S(T).

A mean over everything hides what a recurrent network is about. A model that forgets scores as well as any on short
sequences and on the steps that need the last few inputs alone; it is told apart by the long ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from seqjax.cell import State
from seqjax.data.batch import Batch, check_batch
from seqjax.models.model import Model, ModelParams, head_log_probs
from seqjax.models.objectives import ManyToOne, Objective, every_step
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence.unroll import unroll

Score = Literal["loss", "accuracy"]


class ScoreByLength(NamedTuple):
    """Mean scores, with how much each is a mean of.

    Attributes:
        position: t = 1..T, the place of a valid step in its sequence (T,); empty for one target a sequence.
        by_position: the mean score at this place (T,).
        position_count: sequences that reach this place (T,).
        length: the lengths that occur, in valid steps, ascending (L,).
        by_length: S(T), the mean score of the sequences of this length (L,).
        length_count: sequences of this length (L,).
        short: the mean score of sequences of up to `split` steps.
        long: that of the longer ones; nan where there is none.
        split: a length in steps.
        unit: "nats", or "correct" for a share of right answers.
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

    A sequence is a row of a batch. It ends where a `reset` begins another and goes on where a batch `continues`; steps
    whose mask is False are not part of it. Where there is one target a sequence, it is the row, whatever its resets.

    Args:
        model, params: what is scored.
        stream: finite; the state is carried where batches continue.
        score: "loss", -log p in nats; or "accuracy", the share of targets that are the head's likeliest answer.
        loss: `every_step` for one target a step, `ManyToOne(pool)` for one a sequence. Of any other objective the
            "loss" of each sequence on its own is taken.
        split: sequences of up to so many steps are short; by default the median length, or the next shorter one where
            nothing is longer.

    Returns:
        `ScoreByLength`. Means are over valid steps, as those of `evaluate`, or over sequences where each has one score.

    Raises:
        ValueError: the stream holds no valid step, an option is unknown, or a batch does not fit.
        TypeError: accuracy is asked for targets that are not whole numbers, or of an objective without a pool.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.VanillaRNN(1, 1, activation="identity"), sj.Gaussian(1, 1, std=1.0))
        >>> one, zero = jnp.ones((1, 1)), jnp.zeros(1)
        >>> params = sj.ModelParams(sj.VanillaParams(one, one, zero), sj.ReadoutParams(one, zero))  # answers sum_t x_t
        >>> batch = sj.Batch(jnp.ones((2, 3, 1)), jnp.zeros((2, 3, 1)), sj.length_mask([1, 3], 3))
        >>> result = sj.analysis.score_by_length(model, params, [batch])
        >>> (result.by_position - result.by_position[0]).round(4).tolist()  # (t^2 - 1) / 2
        [0.0, 1.5, 4.0]
        >>> result.length.tolist(), round(result.long - result.short, 4)  # (1 + 4 + 9) / 6 - 1 / 2
        ([1, 3], 1.8333)
    """
    if score not in ("loss", "accuracy"):
        raise ValueError(f'expected score "loss" or "accuracy", got {score!r}')
    if score == "accuracy" and loss is not every_step and not isinstance(loss, ManyToOne):
        raise TypeError(f"expected loss every_step or ManyToOne to count right answers, got {loss!r}")
    sequences = [(values, length) for values, length in _sequences(model, params, stream, score, loss) if length]
    if not sequences:
        raise ValueError("expected at least one valid step to score, got none: is the stream already used up?")
    lengths = np.array([length for _, length in sequences])
    split = _usual_split(lengths) if split is None else split
    scores = np.concatenate([values for values, _ in sequences]).astype(np.float64)
    of = np.repeat(np.arange(len(sequences)), [len(values) for values, _ in sequences])
    places = np.concatenate([np.arange(len(values)) for values, _ in sequences]) if loss is every_step else of[:0]
    known, which = np.unique(lengths, return_inverse=True)
    position_count = np.bincount(places)
    return ScoreByLength(
        position=np.arange(1, len(position_count) + 1),
        by_position=np.bincount(places, scores[: len(places)]) / position_count,
        position_count=position_count,
        length=known,
        by_length=np.bincount(which[of], scores) / np.bincount(which[of]),
        length_count=np.bincount(which),
        short=_mean(scores[lengths[of] <= split]),
        long=_mean(scores[lengths[of] > split]),
        split=int(split),
        unit="nats" if score == "loss" else "correct",
    )


def _usual_split(lengths: np.ndarray) -> int:
    different = np.unique(lengths)
    return int(min(np.median(lengths), different[-2] if len(different) > 1 else different[-1]))


def _mean(scores: np.ndarray) -> float:
    return float(scores.mean()) if scores.size else float("nan")


def _sequences(
    model: Model, params: ModelParams, stream: Iterable[Batch], score: Score, loss: Objective
) -> Iterator[tuple[np.ndarray, int]]:
    """The scores and the length of each sequence."""
    run = compiled(_scores, model, score, loss)
    carried, rows = None, []  # of each row the scores, valid steps and resets since a batch began afresh
    for batch in stream:
        state = check_batch(batch, carried)
        carried, values = run(params, state, (batch.xs, batch.targets, batch.mask, batch.reset))
        shape, values = jax.tree.leaves(batch.xs)[0].shape[:2], np.asarray(values)
        mask = np.ones(shape, bool) if batch.mask is None else np.asarray(batch.mask)
        reset = np.zeros(shape, bool) if batch.reset is None else np.asarray(batch.reset)
        if loss is not every_step:
            yield from ((value[None], int(valid.sum())) for value, valid in zip(values, mask, strict=True))
            continue
        if not batch.continues:
            yield from _cut(rows)
            rows = []
        rows = rows or [[] for _ in mask]
        for row, *window in zip(rows, values, mask, reset, strict=True):
            row.append(window)
    yield from _cut(rows)


def _cut(rows: list[list[list[np.ndarray]]]) -> Iterator[tuple[np.ndarray, int]]:
    for row in rows:
        values, mask, reset = (np.concatenate(parts) for parts in zip(*row, strict=True))
        begins = np.flatnonzero(reset)
        for part, valid in zip(np.split(values, begins), np.split(mask, begins), strict=True):
            yield part[valid], int(valid.sum())


def _scores(
    model: Model, score: Score, loss: Objective, params: ModelParams, carried: State, data: tuple[PyTree, ...]
) -> tuple[State, Array]:
    """Of every step (batch, time), or of every row (batch,)."""
    xs, targets, mask, reset = data
    targets = jax.tree.map(jnp.asarray, targets)
    final, outputs = unroll(model.cell, params.cell, xs, state=carried, mask=mask, reset=reset)
    head, theta = model.head, params.head

    def correct(h: PyTree, y: PyTree) -> Array:
        return _correct(head, theta, h, y)

    def alone(*row: PyTree) -> Array:
        return loss(head, theta, *jax.tree.map(lambda leaf: leaf[None], row))

    if loss is every_step:
        log_p = head_log_probs(head, theta, outputs, targets, mask)  # also where unused: it checks the targets
        return final, -log_p if score == "loss" else jax.vmap(jax.vmap(correct))(outputs, targets)
    if score == "accuracy" and isinstance(loss, ManyToOne):
        return final, jax.vmap(correct)(loss.pool(outputs, mask), targets)
    return final, jax.vmap(alone)(outputs, targets, mask)


def _correct(head: Any, params: PyTree, h: PyTree, y: PyTree) -> Array:
    """Whether y is the head's likeliest answer."""
    if not all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(y)):
        kinds = ", ".join(str(leaf.dtype) for leaf in jax.tree.leaves(y))
        raise TypeError(f'expected whole-number targets to count right answers, got {kinds}: score="loss"')
    answer = head.sample(params, h, jax.random.key(0), temperature=0.0)  # greedy, so the key decides nothing
    right = jax.tree.map(lambda a, b: jnp.all(a == b.astype(a.dtype)), answer, y)
    return jnp.stack(jax.tree.leaves(right)).all()
