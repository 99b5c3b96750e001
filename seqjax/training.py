"""Training any model on any stream of batches with optax.

A stream is an iterable of `Batch`. A batch either starts afresh, as independent sequences do, or continues the one
before it, as windows of a long text do: then the state is carried over, detached, which is truncated backpropagation
through time on chunks.

`updates` is the loop as a generator, one update a turn; `fit` runs it and keeps the history.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from seqjax.cell import State, is_value
from seqjax.gradients import detach
from seqjax.losses import sequence_loss
from seqjax.model import Model, ModelParams, head_log_probs
from seqjax.pooling import last_valid
from seqjax.unroll import unroll


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of sequences and what is to be predicted from them.

    Args:
        xs: inputs, leaves (batch, time, ...).
        targets: y, leaves (batch, time, ...), or (batch, ...) for a loss that reads one output a sequence.
        mask: valid steps (batch, time); None where all are.
        reset: steps before which the state starts anew (batch, time); None for no such step.
        continues: whether these sequences go on where those of the batch before stopped.
    """

    xs: PyTree
    targets: PyTree
    mask: Bool[Any, "batch time"] | None = None
    reset: Bool[Any, "batch time"] | None = None
    continues: bool = False


BatchLoss = Callable[[Any, PyTree, PyTree, PyTree, Any], Array]  # (head, params, outputs, targets, mask) -> number


def every_step(head: Any, params: PyTree, outputs: PyTree, targets: PyTree, mask: Any) -> Array:
    """The mean of -log p(y_t | h_t) over valid steps: many-to-many, and language models.

    Args:
        head, params: the readout and its parameters.
        outputs: of the cell, leaves (batch, time, ...).
        targets: leaves (batch, time, ...).
        mask: valid steps, or None.

    Returns:
        One number, in nats.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> round(float(sj.every_step(head, zero, jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int), None)), 4)  # ln 4
        1.3863
    """
    return sequence_loss(-head_log_probs(head, params, outputs, targets, mask), mask)


@dataclasses.dataclass(frozen=True)
class ManyToOne:
    """The mean over sequences of -log p(y | pool(h_1..h_T)): one target a sequence.

    Args:
        pool: from outputs and mask to one vector a sequence: `last_valid`, `masked_mean` or `masked_max`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> loss = sj.ManyToOne(sj.last_valid)
        >>> round(float(loss(head, zero, jnp.ones((2, 5, 3)), jnp.zeros(2, int), None)), 4)  # ln 4
        1.3863
    """

    pool: Callable[..., PyTree] = last_valid

    def __call__(self, head: Any, params: PyTree, outputs: PyTree, targets: PyTree, mask: Any) -> Array:
        h = self.pool(outputs, mask)
        return -jnp.mean(jax.vmap(partial(head.log_prob, params))(h, jax.tree.map(jnp.asarray, targets)))


class TrainState(NamedTuple):
    """All that the next update depends on besides its batch."""

    step: Array
    params: ModelParams
    optimizer: PyTree
    carried: State  # the cell's state at the end of the last batch, leaves (batch, ...); None before the first


class Metrics(NamedTuple):
    """What is observed of one update.

    Attributes:
        loss: before the update, in nats for the losses of this library.
        grad_norm: the norm of the whole gradient before clipping.
        clipped: 1 where the norm was above the clipping threshold, else 0.
        param_norm: the norm of all parameters after the update.
    """

    loss: Any
    grad_norm: Any
    clipped: Any
    param_norm: Any


class NotFinite(ArithmeticError):
    """The loss, the gradient or the parameters stopped being numbers at update `step`; the one before was good."""

    def __init__(self, step: int, metrics: Metrics) -> None:
        self.step = step
        found = ", ".join(f"{name} {value:g}" for name, value in zip(metrics._fields, metrics, strict=True))
        super().__init__(f"not finite at step {step} ({found})")


def clipped(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    """The optimiser on gradients clipped by their norm, g <- g min(1, c / |g|) (Pascanu, Mikolov and Bengio 2013)."""
    if clip_norm is None:
        return optimizer
    if not clip_norm > 0:
        raise ValueError(f"expected clip_norm to be positive, got {clip_norm}: None does not clip")
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def start(
    model: Model, optimizer: optax.GradientTransformation, key: Array | None = None, params: ModelParams | None = None
) -> TrainState:
    """The state before the first update, from a key or from parameters that you have.

    Args:
        model: the cell and its head.
        optimizer: with its clipping, as `updates` will use it.
        key: draws the parameters.
        params: begins from these instead.

    Returns:
        A `TrainState` at step 0.

    Raises:
        ValueError: neither a key nor parameters are given.

    Example:
        >>> import jax, optax, seqjax as sj
        >>> model = sj.Model(sj.GRU(1, 8), sj.Gaussian(8, 1))
        >>> int(sj.training.start(model, optax.adam(1e-3), jax.random.key(0)).step)
        0
    """
    if params is None:
        if key is None:
            raise ValueError("expected a key to draw parameters with, or params, got neither: key=jax.random.key(0)")
        params = model.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)


def updates(
    model: Model,
    stream: Iterable[Batch],
    state: TrainState,
    *,
    optimizer: optax.GradientTransformation,
    loss: BatchLoss = every_step,
    clip_norm: float | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """One update a turn: theta <- theta + optimizer(dL/dtheta), the state carried and detached where a batch continues.

    Args:
        model: the cell and its head.
        stream: batches, endless or not.
        state: from `start`, or a later one to go on.
        optimizer: an optax transformation, clipping included: `clipped(optax.adam(1e-3), 1.0)`.
        loss: `every_step`, `ManyToOne(pool)`, or your own function of (head, params, outputs, targets, mask).
        clip_norm: the threshold that `Metrics.clipped` compares with.

    Yields:
        The state after each update, and its `Metrics` as plain numbers. It yields one update behind the one that the
        device works on, so that looking at the numbers keeps nobody waiting.

    Raises:
        ValueError, TypeError: a batch does not fit the model, or the first batch continues nothing.
        NotFinite: an update gave a loss, gradient or parameters that are not finite; it is not yielded.

    Example:
        >>> import jax, jax.numpy as jnp, optax, seqjax as sj
        >>> model, optimizer = sj.Model(sj.GRU(1, 8), sj.Gaussian(8, 1)), optax.adam(1e-2)
        >>> batch = sj.Batch(jnp.ones((4, 5, 1)), jnp.ones((4, 5, 1)))
        >>> state = sj.training.start(model, optimizer, jax.random.key(0))
        >>> for state, metrics in sj.training.updates(model, [batch] * 3, state, optimizer=optimizer): pass
        >>> int(state.step)
        3
    """
    pending = None
    for update in _run_updates(model, stream, state, optimizer, loss, clip_norm):
        if pending is not None:
            yield _finite(*pending)
        pending = update
    if pending is not None:
        yield _finite(*pending)


def _finite(state: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    numbers = Metrics(*map(float, metrics))
    if not np.all(np.isfinite(numbers)):
        raise NotFinite(int(state.step), numbers)
    return state, numbers


def _run_updates(
    model: Model, stream: Iterable[Batch], state: TrainState, optimizer: Any, loss: BatchLoss, clip_norm: float | None
) -> Iterator[tuple[TrainState, Metrics]]:
    update = _update_compiled if is_value(model.cell) and is_value(model.head) else _update
    limit = float("inf") if clip_norm is None else float(clip_norm)
    for batch in stream:
        if not isinstance(batch, Batch):
            raise TypeError(f"expected a stream of sj.Batch, got {type(batch).__name__}: sj.Batch(xs, targets)")
        if batch.continues and state.carried is None:
            raise ValueError("expected a batch that starts afresh first, got one that continues: continues=False")
        carried = state.carried if batch.continues else None
        data = (batch.xs, batch.targets, batch.mask, batch.reset)
        state, metrics = update(model, optimizer, loss, limit, state._replace(carried=carried), data)
        yield state, metrics


def _update(
    model: Model, optimizer: Any, loss: BatchLoss, limit: float, state: TrainState, data: tuple[PyTree, ...]
) -> tuple[TrainState, Metrics]:
    xs, targets, mask, reset = data

    def batch_loss(params: ModelParams) -> tuple[Array, State]:
        final, outputs = unroll(model.cell, params.cell, xs, state=detach(state.carried), mask=mask, reset=reset)
        return loss(model.head, params.head, outputs, targets, mask), final

    (value, final), gradient = jax.value_and_grad(batch_loss, has_aux=True)(state.params)
    norm = optax.tree.norm(gradient)
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to its integer count
        change, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, change)
    new_state = TrainState(state.step + 1, params, optimizer_state, final)
    return new_state, Metrics(value, norm, (norm > limit).astype(norm.dtype), optax.tree.norm(params))


_update_compiled = jax.jit(_update, static_argnums=(0, 1, 2, 3))


def evaluate(model: Model, params: ModelParams, stream: Iterable[Batch], *, loss: BatchLoss = every_step) -> float:
    """The mean loss over a finite stream, each batch weighted by its number of valid steps.

    Args:
        model, params: what is evaluated.
        stream: batches; the state is carried where they continue.
        loss: as for `updates`.

    Returns:
        The mean loss, in nats for the losses of this library.

    Raises:
        ValueError: the stream is empty, or a batch does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.zeros((2, 5), int)
        >>> round(sj.evaluate(model, params, [sj.Batch(tokens, tokens)]), 4)  # ln 4
        1.3863
    """
    run = _evaluate_compiled if is_value(model.cell) and is_value(model.head) else _evaluate
    carried, total, weight = None, 0.0, 0
    for batch in stream:
        state = carried if batch.continues else None
        carried, value = run(model, loss, params, state, (batch.xs, batch.targets, batch.mask, batch.reset))
        steps = int(np.prod(jax.tree.leaves(batch.xs)[0].shape[:2])) if batch.mask is None else int(np.sum(batch.mask))
        total, weight = total + float(value) * steps, weight + steps
    if not weight:
        raise ValueError("expected at least one valid step to evaluate on, got none: is the stream already used up?")
    return total / weight


def _evaluate(
    model: Model, loss: BatchLoss, params: ModelParams, carried: State, data: tuple[PyTree, ...]
) -> tuple[State, Array]:
    xs, targets, mask, reset = data
    final, outputs = unroll(model.cell, params.cell, xs, state=carried, mask=mask, reset=reset)
    return final, loss(model.head, params.head, outputs, targets, mask)


_evaluate_compiled = jax.jit(_evaluate, static_argnums=(0, 1))


class Fitted(NamedTuple):
    """What `fit` returns.

    Attributes:
        params: the trained parameters.
        history: arrays, one entry an update, "step", "loss", "grad_norm", "clipped" and "param_norm"; and one an
            evaluation, "validation_step" and "validation".
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
    loss: BatchLoss = every_step,
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
        key: draws the parameters, unless `params` or `state` is given.
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
    optimizer = clipped(optax.adam(1e-3) if optimizer is None else optimizer, clip_norm)
    state = start(model, optimizer, key, params) if state is None else state
    first, rows, validated = int(state.step), [], []
    batches = stream if steps is None else itertools.islice(stream, steps)
    reason = "stream"
    try:
        for state, metrics in updates(model, batches, state, optimizer=optimizer, loss=loss, clip_norm=clip_norm):
            rows.append((first + len(rows) + 1, *metrics))
            if progress is not None:
                progress(rows[-1][0], metrics)
            if validation is not None and (len(rows) % validate_every == 0 or len(rows) == steps):
                validated.append((rows[-1][0], evaluate(model, state.params, validation(), loss=loss)))
        if len(rows) == steps:
            reason = "steps"
    except NotFinite as error:
        reason = str(error)
        warnings.warn(f"training stopped: {reason}; lower the learning rate or clip_norm", stacklevel=2)
    history = _columns(("step", *Metrics._fields), rows) | _columns(("validation_step", "validation"), validated)
    return Fitted(state.params, history, state, reason)


def _columns(names: tuple[str, ...], rows: list[tuple[float, ...]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}
