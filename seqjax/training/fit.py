"""`fit`, the training loop with a history, and `evaluate`, the mean loss over a stream."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import State
from seqjax.cells.whole_numbers import whole_number
from seqjax.data.batch import Batch, as_stream, check_batch
from seqjax.data.history import LEAF_PREFIX, leaf_names
from seqjax.models.model import Model, ModelParams, check_model
from seqjax.models.objectives import Objective, every_step
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence.unroll import unroll
from seqjax.training._devices import Devices, by_rows, everywhere, mesh_of
from seqjax.training._validated import validated
from seqjax.training.loop import Metrics, NotFinite, TrainState, clipped, start, updates

ADAM = optax.adam(1e-3)  # one object, because optax.adam(1e-3) != optax.adam(1e-3) and each would compile again


def evaluate(
    model: Model,
    params: ModelParams,
    stream: Iterable[Batch],
    *,
    loss: Objective = every_step,
    devices: Devices = None,
) -> float:
    """The mean loss over a finite stream. Each batch is weighted by its valid steps, or sequences for `ManyToOne`.

    Args:
        model, params: the model and its parameters.
        stream: batches. The state is carried from one batch to the next if the latter continues the former.
        loss, devices: as for `updates`.

    Returns:
        The mean loss, in nats for the losses of this library.

    Raises:
        ValueError: the stream is empty, its first batch continues another one, or a batch does not fit.
        TypeError: the stream yields something that is not a `Batch`.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.zeros((2, 5), int)
        >>> round(sj.evaluate(model, params, [sj.Batch(tokens, tokens)]), 4)  # ln 4
        1.3863
    """
    check_model(model, params)
    return evaluator_of(model, loss, devices)(params, stream)


def evaluator_of(
    model: Model, loss: Objective, devices: Devices = None
) -> Callable[[ModelParams, Iterable[Batch]], Any]:
    """`evaluate` as a function that compiles once, even for objects that compare by identity."""
    return partial(_mean_loss, cached_jit(_batch_loss, model, loss), loss, mesh_of(devices))


def _mean_loss(
    run: Callable[..., tuple[State, Array]],
    loss: Objective,
    mesh: Mesh | None,
    params: ModelParams,
    stream: Iterable[Batch],
) -> Any:
    carried, total, weight, params = None, 0.0, 0, everywhere(mesh, params)
    for batch in as_stream(stream):
        state = check_batch(batch, carried)
        carried, value = run(params, state, by_rows(mesh, (batch.xs, batch.targets, batch.mask, batch.reset)))
        rows, time = jax.tree.leaves(batch.xs)[0].shape[:2]
        steps = rows * time if batch.mask is None else int(np.sum(batch.mask))
        counted = rows if getattr(loss, "per_sequence", False) else steps
        value = value if isinstance(value, Tracer) else float(value)
        total, weight = total + value * counted, weight + counted
    if not weight:
        raise ValueError("expected at least one valid step to evaluate on, got none: is the stream already used up?")
    return total / weight


def _batch_loss(
    model: Model, loss: Objective, params: ModelParams, carried: State, data: tuple[PyTree, ...]
) -> tuple[State, Array]:
    xs, targets, mask, reset = data
    final, outputs = unroll(model.cell, params.cell, xs, state=carried, mask=mask, reset=reset)
    return final, loss(model.head, model.head_params(params), outputs, targets, mask)


@partial(jax.tree_util.register_dataclass, data_fields=("params", "history", "state"), meta_fields=("reason",))
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` returns; a pytree. Under `jax.vmap` each array has a leading axis; printing shows means over it.

    Attributes:
        params: the trained parameters.
        history: arrays by name. One entry per update: "step", "loss", "grad_norm", "clipped", "param_norm", and
            "grad_norm/cell.W_hh" and the like for every leaf of the parameters. One entry per evaluation:
            "validation_step" and "validation".
        state: the training state, from which another `fit` can continue.
        reason: why training stopped: "steps", "stream" (no batch was left), or "not finite at step N (...)"; in the
            last case `params` and `state` are those before that step.
    """

    params: ModelParams
    history: dict[str, Any]
    state: TrainState
    reason: str

    def __str__(self) -> str:
        loss, validation = np.asarray(self.history["loss"]), np.asarray(self.history["validation"])
        lines = [f"{loss.shape[-1]} updates, stopped by: {self.reason}"]
        if loss.shape[-1]:
            lines.append(
                f"  loss {loss[..., 0].mean():.4g} at the first update, {loss[..., -1].mean():.4g} at the last"
            )
        if validation.shape[-1]:
            best = validation.min(axis=-1).mean()
            lines.append(f"  validation {validation[..., -1].mean():.4g} at the end, {best:.4g} at best")
        return "\n".join(lines)


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
    devices: Devices = None,
    accumulate: int = 1,
    checkpoint_every: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> Fitted:
    """Trains a model: theta <- theta + optimizer(clip(dL/dtheta)) for each batch.

    It can run under `jax.vmap`, for instance over seeds: `jax.vmap(lambda key: sj.fit(model, batches, key=key))(keys)`.
    Then the history holds arrays, and a loss that is not finite stays in the history instead of stopping the training.

    Args:
        model: the cell and its head.
        stream: batches of `seqjax.data`, or any iterable of `Batch`.
        steps: the number of updates; by default until the stream ends.
        optimizer: an optax transformation; by default Adam with learning rate 1e-3.
        clip_norm: the largest norm of the gradient; None does not clip.
        loss: `every_step`, `ManyToOne(pool)`, or your own function of (head, params, outputs, targets, mask).
        key: draws the parameters, unless `params` or `state` is given, and the noise of a cell that draws some.
        params: initial parameters.
        state: the `state` of an earlier `Fitted`, from which to continue.
        validation: returns a fresh finite stream at every call.
        validate_every: updates between two evaluations.
        progress: called with the step and its metrics after every update.
        devices: share the rows of every batch, also in the evaluations, as for `sj.training.updates`:
            `jax.devices()`. By default one device computes everything.
        accumulate, checkpoint_every, compute_dtype: as for `sj.training.updates`: the first two save memory, and
            compute_dtype="bfloat16" is faster on a GPU. An evaluation uses the dtype of the parameters. A warning says
            if an update needs more memory than the device has.

    Returns:
        `Fitted`: params, history, state, reason. A loss or gradient that is not finite stops the training with a
        warning, because no later step can be right.

    Raises:
        ValueError, TypeError: a batch does not fit the model, or neither a key, parameters nor a state is given.

    Example:
        >>> import jax, seqjax as sj
        >>> model = sj.Model(sj.GRU(2, 8), sj.Gaussian(8, 1, std=1.0))
        >>> stream = sj.data.adding_problem(jax.random.key(0), batch=16, time=10)
        >>> fitted = sj.fit(model, stream, steps=20, loss=sj.ManyToOne(), key=jax.random.key(1))
        >>> fitted.reason, len(fitted.history["loss"])
        ('steps', 20)
    """
    if steps is not None:
        steps = whole_number("steps", steps, 0)
    validate_every = whole_number("validate_every", validate_every)
    if params is not None:
        check_model(model, params)
    stream = as_stream(stream)
    optimizer = clipped(ADAM if optimizer is None else optimizer, clip_norm)
    latest = start(model, optimizer, key, params) if state is None else state
    first: Any = latest.step if isinstance(latest.step, Tracer) else int(latest.step)
    rows, validations, evaluator = [], [], evaluator_of(model, loss, devices)
    batches = stream if steps is None else itertools.islice(stream, steps)
    reason = "stream"
    try:
        run = validated(
            updates(
                model,
                batches,
                latest,
                optimizer=optimizer,
                loss=loss,
                clip_norm=clip_norm,
                key=key,
                devices=devices,
                accumulate=accumulate,
                checkpoint_every=checkpoint_every,
                compute_dtype=compute_dtype,
            ),
            is_last=lambda number, _: number == steps,
            validate=None if validation is None else lambda params: evaluator(params, validation()),
            validate_every=validate_every,
        )
        for update in run:
            latest, step = update.state, first + update.number
            rows.append({"step": step} | update.metrics.row())
            if update.validation is not None:
                validations.append({"validation_step": step, "validation": update.validation})
            if progress is not None:
                progress(step, update.metrics)
        if len(rows) == steps:
            reason = "steps"
    except NotFinite as error:
        reason = str(error)
        warnings.warn(f"training stopped: {reason}; lower the learning rate or clip_norm", stacklevel=2)
    by_leaf = [f"{LEAF_PREFIX}{name}" for name in leaf_names(latest.params)]
    history = _columns(["step", *Metrics._fields[:-1], *by_leaf], rows)
    history |= _columns(["validation_step", "validation"], validations)
    return Fitted(latest.params, history, latest, reason)


def _columns(names: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as one array per name; arrays of JAX if the rows hold traced values."""
    traced = any(isinstance(value, Tracer) for row in rows for value in row.values())
    array: Any = jnp.stack if traced else np.array
    return {name: array([jnp.asarray(row[name]) if traced else row[name] for row in rows]) for name in names}
