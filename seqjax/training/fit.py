"""`fit`: the training loop with a history, for a notebook; and `evaluate`, for what it has not seen."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from seqjax.cell import State
from seqjax.data.batch import Batch, check_batch
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective, every_step
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence.unroll import unroll
from seqjax.training.loop import LEAF_PREFIX, Metrics, NotFinite, TrainState, clipped, leaf_names, start, updates

ADAM = optax.adam(1e-3)  # one object, so that fits with the default optimiser compile once


def evaluate(model: Model, params: ModelParams, stream: Iterable[Batch], *, loss: Objective = every_step) -> float:
    """The mean loss over a finite stream, each batch weighted by its valid steps, or its sequences for `ManyToOne`.

    Args:
        model, params: what is evaluated.
        stream: batches; the state is carried where they continue.
        loss: as for `updates`.

    Returns:
        The mean loss, in nats for the losses of this library.

    Raises:
        ValueError: the stream is empty, its first batch continues nothing, or a batch does not fit.
        TypeError: the stream holds something else than batches.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.zeros((2, 5), int)
        >>> round(sj.evaluate(model, params, [sj.Batch(tokens, tokens)]), 4)  # ln 4
        1.3863
    """
    return _mean_loss(compiled(_evaluate, model, loss), loss, params, stream)


def _mean_loss(
    run: Callable[..., tuple[State, Array]], loss: Any, params: ModelParams, stream: Iterable[Batch]
) -> float:
    carried, total, weight = None, 0.0, 0
    for batch in stream:
        state = check_batch(batch, carried)
        carried, value = run(params, state, (batch.xs, batch.targets, batch.mask, batch.reset))
        rows, time = jax.tree.leaves(batch.xs)[0].shape[:2]
        steps = rows * time if batch.mask is None else int(np.sum(batch.mask))
        counted = rows if getattr(loss, "per_sequence", False) else steps
        total, weight = total + float(value) * counted, weight + counted
    if not weight:
        raise ValueError("expected at least one valid step to evaluate on, got none: is the stream already used up?")
    return total / weight


def _evaluate(
    model: Model, loss: Objective, params: ModelParams, carried: State, data: tuple[PyTree, ...]
) -> tuple[State, Array]:
    xs, targets, mask, reset = data
    final, outputs = unroll(model.cell, params.cell, xs, state=carried, mask=mask, reset=reset)
    return final, loss(model.head, params.head, outputs, targets, mask)


class Fitted(NamedTuple):
    """What `fit` returns.

    Attributes:
        params: the trained parameters.
        history: arrays, one entry an update, "step", "loss", "grad_norm", "clipped", "param_norm" and, for every leaf
            of the parameters, "grad_norm/cell.W_hh"; and one an evaluation, "validation_step" and "validation".
        state: to go on training from.
        reason: why it stopped: "steps", "stream" (used up), or "not finite at step N (...)"; then `params` and `state`
            are those before that step.
    """

    params: ModelParams
    history: dict[str, np.ndarray]
    state: TrainState
    reason: str


def fit(
    model: Model,
    stream: Iterable[Batch],
    *,
    steps: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    clip_norm: float | None = 1.0,
    loss: Objective = every_step,
    key: Array | None = None,
    params: ModelParams | None = None,
    state: TrainState | None = None,
    validation: Callable[[], Iterable[Batch]] | None = None,
    validate_every: int = 100,
    progress: Callable[[int, Metrics], None] | None = None,
) -> Fitted:
    """Trains a model: theta <- theta + optimizer(clip(dL/dtheta)), batch after batch.

    Args:
        model: the cell and its head.
        stream: batches of `seqjax.data`, or any iterable of `Batch`.
        steps: how many updates; by default until the stream ends.
        optimizer: an optax transformation; by default Adam at 1e-3.
        clip_norm: the largest norm of the gradient; None does not clip.
        loss: `every_step`, `ManyToOne(pool)`, or your own function of (head, params, outputs, targets, mask).
        key: draws the parameters, unless `params` or `state` is given, and the noise of a cell that has some.
        params: parameters to begin from.
        state: the `state` of an earlier `Fitted`, to go on from.
        validation: returns a fresh finite stream each time that it is called.
        validate_every: updates between two evaluations.
        progress: called with the step and its metrics after every update.

    Returns:
        `Fitted`: params, history, state, reason. A loss or gradient that is not finite stops the training and is warned
        of, since no later step can be right.

    Raises:
        ValueError, TypeError: a batch does not fit the model, or there is nothing to begin from.

    Example:
        >>> import jax, seqjax as sj
        >>> model = sj.Model(sj.GRU(2, 8), sj.Gaussian(8, 1, std=1.0))
        >>> stream = sj.data.adding_problem(jax.random.key(0), batch=16, time=10)
        >>> fitted = sj.fit(model, stream, steps=20, loss=sj.ManyToOne(), key=jax.random.key(1))
        >>> fitted.reason, len(fitted.history["loss"])
        ('steps', 20)
    """
    if steps is not None and steps < 0:
        raise ValueError(f"expected steps of at least 0, got {steps}")
    optimizer = clipped(ADAM if optimizer is None else optimizer, clip_norm)
    latest = start(model, optimizer, key, params) if state is None else state
    first, rows, validated, evaluator = int(latest.step), [], [], compiled(_evaluate, model, loss)
    batches = stream if steps is None else itertools.islice(stream, steps)
    reason = "stream"
    try:
        run = updates(model, batches, latest, optimizer=optimizer, loss=loss, clip_norm=clip_norm, key=key)
        for latest, metrics in run:
            step = first + len(rows) + 1
            rows.append({"step": step} | metrics.row())
            if progress is not None:
                progress(step, metrics)
            if validation is not None and (len(rows) % validate_every == 0 or len(rows) == steps):
                value = _mean_loss(evaluator, loss, latest.params, validation())
                validated.append({"validation_step": step, "validation": value})
        if len(rows) == steps:
            reason = "steps"
    except NotFinite as error:
        reason = str(error)
        warnings.warn(f"training stopped: {reason}; lower the learning rate or clip_norm", stacklevel=2)
    by_leaf = [f"{LEAF_PREFIX}{name}" for name in leaf_names(latest.params)]
    history = _columns(["step", *Metrics._fields[:-1], *by_leaf], rows)
    history |= _columns(["validation_step", "validation"], validated)
    return Fitted(latest.params, history, latest, reason)


def _columns(names: list[str], rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in names}
