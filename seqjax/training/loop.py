"""The update of training, and `updates`, which yields one per batch, for any model, stream and optax optimizer.

`seqjax.training._validated` adds the validations, for `seqjax.training.fit` and `seqjax.command.job.work`.

A batch of independent sequences starts from the initial state. A batch that continues the one before it, such as the
next window of a long text, starts from the state at the end of that batch. No gradient flows through the carried state,
so this is truncated backpropagation through time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import State, optional
from seqjax.cells.arguments import check_key, described, real_number
from seqjax.data.batch import Batch, check_batch
from seqjax.data.history import LEAF_PREFIX, leaf_names
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective, every_step
from seqjax.sequence._cached_jit import cached_jit
from seqjax.training._devices import Devices, by_rows, everywhere, mesh_of
from seqjax.training._gradient import AT_ONCE, Means, loss_and_gradient
from seqjax.training._memory import warn_of_memory


class TrainState(NamedTuple):
    """Everything that the next update depends on besides its batch.

    Attributes:
        step: the number of updates so far.
        params: of the cell and the head.
        optimizer: the state of the optax transformation.
        carried: the cell's state at the end of the last batch, leaves (batch, ...); None before the first batch.
    """

    step: Array
    params: ModelParams
    optimizer: PyTree
    carried: State


class Metrics(NamedTuple):
    """The measurements of one update.

    Attributes:
        loss: before the update, in nats for the losses of this library.
        grad_norm: the norm of the whole gradient before clipping.
        clipped: 1 where the norm was above the clipping threshold, else 0.
        param_norm: the norm of all parameters after the update.
        grad_norm_by_leaf: the norm of each parameter's gradient before clipping, by its path: "cell.W_hh", "head.b_y".
            Their squares sum to that of `grad_norm`.
    """

    loss: Any
    grad_norm: Any
    clipped: Any
    param_norm: Any
    grad_norm_by_leaf: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """One flat row of a table: "loss", "grad_norm", "clipped", "param_norm", "grad_norm/cell.W_hh", ..."""
        row = self._asdict()
        by_leaf = row.pop("grad_norm_by_leaf")
        return row | {f"{LEAF_PREFIX}{name}": norm for name, norm in by_leaf.items()}


class NotFinite(ArithmeticError):
    """The loss, the gradient or the parameters are not finite at update `step`; the update before was finite."""

    def __init__(self, step: int, metrics: Metrics) -> None:
        self.step = step
        found = ", ".join(f"{name} {value:g}" for name, value in zip(metrics._fields[:-1], metrics, strict=False))
        super().__init__(f"not finite at step {step} ({found})")


def clipped(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    """The optimizer with gradient clipping by global norm, g <- g min(1, c / |g|) (Pascanu, Mikolov and Bengio 2013).

    The same arguments give the same object, so code that was compiled for it is reused.
    """
    # A list or an array has no hash.
    try:
        return _clipped(optimizer, clip_norm)
    except TypeError:
        return with_clipping(optimizer, clip_norm)


@functools.lru_cache
def _clipped(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    return with_clipping(optimizer, clip_norm)


def with_clipping(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    """`clipped` for an optimizer that holds traced values, which must not be kept."""
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"expected an optimizer of optax, got {described(optimizer)}: optax.adam(1e-3)")
    if clip_norm is None:
        return optimizer
    if not real_number("clip_norm", clip_norm, "None does not clip") > 0:
        raise ValueError(f"expected clip_norm to be positive, got {clip_norm}: None does not clip")
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def start(
    model: Model, optimizer: optax.GradientTransformation, key: Array | None = None, params: ModelParams | None = None
) -> TrainState:
    """The training state before the first update.

    Args:
        model: the cell and its head.
        optimizer: the optax transformation that `updates` will use, clipping included.
        key: draws the parameters.
        params: initial parameters, in place of those that the key draws.

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
    if params is None and key is None:
        raise ValueError("expected a key to draw parameters with, or params, got neither: key=jax.random.key(0)")
    key = None if key is None else check_key(key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"expected floating-point parameters to train, got {described(leaf)} in "
                f"params{jax.tree_util.keystr(path)}: convert it with astype(float)"
            )
    # As one program, because a draw compiles a dozen small ones otherwise.
    return cached_jit(_first_state, model, optimizer)(key, params)


def _first_state(
    model: Model, optimizer: optax.GradientTransformation, key: Any, params: ModelParams | None
) -> TrainState:
    params = model.init(key) if params is None else params
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)


def updates(
    model: Model,
    stream: Iterable[Batch],
    state: TrainState,
    *,
    optimizer: optax.GradientTransformation,
    loss: Objective = every_step,
    clip_norm: float | None = None,
    key: Array | None = None,
    devices: Devices = None,
    accumulate: int = 1,
    checkpoint_every: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Trains one batch at a time, theta <- theta + optimizer(dL/dtheta), as a generator.

    Args:
        model: the cell and its head.
        stream: batches, finite or endless.
        state: from `start`, or the state of an earlier training.
        optimizer: an optax transformation, clipping included: `clipped(optax.adam(1e-3), 1.0)`.
        loss: `every_step`, `ManyToOne(pool)`, or your own function of (head, params, outputs, targets, mask).
        clip_norm: the threshold that `Metrics.clipped` compares with. It does not clip: the optimizer does.
        key: for a cell that draws noise. Update n uses `fold_in(key, n)`, so a resumed training draws the same noise.
        devices: share the rows of every batch: `jax.devices()`. Parameters and optimizer are on each of them, and the
            gradient is added over them once per update. A batch whose rows they do not divide evenly is computed by
            each of them, with a warning. They may belong to several processes, each of which runs this call with the
            same arguments and the same batches, and reads its own rows; then every batch must divide evenly.
        accumulate: the number of parts of a batch whose gradients are computed one after another and added up, with
            the memory of one part. The update is that of the whole batch if the loss is a mean over valid steps, or
            over sequences with `per_sequence = True`.
        checkpoint_every: as for `unroll`, to save memory.
        compute_dtype: of the cell's parameters, inputs and states in the unroll, such as "bfloat16". The parameters
            themselves, the head, its loss and the optimizer keep their own dtype. The kernel runs float32 and float64.

    Yields:
        The state after each update, and its `Metrics` as Python numbers. The device already computes the next update
        when one is yielded, so reading the numbers does not make the device wait. Inside `jax.jit` or `jax.vmap` the
        metrics are arrays, and nothing checks whether they are finite.

    Raises:
        ValueError, TypeError: a batch does not fit the model or the devices, the first batch continues another one, or
            the cell draws noise and there is no key.
        NotFinite: the loss, the gradient or the parameters of an update are not finite. That update is not yielded.

    Example:
        >>> import jax, jax.numpy as jnp, optax, seqjax as sj
        >>> model, optimizer = sj.Model(sj.GRU(1, 8), sj.Gaussian(8, 1)), optax.adam(1e-2)
        >>> batch = sj.Batch(jnp.ones((4, 5, 1)), jnp.ones((4, 5, 1)))
        >>> state = sj.training.start(model, optimizer, jax.random.key(0))
        >>> for state, metrics in sj.training.updates(model, [batch] * 3, state, optimizer=optimizer): pass
        >>> int(state.step)
        3
    """
    if key is None and optional(model.cell, "noise") is not None:
        raise ValueError("expected a key for a cell that draws noise, such as Dropout, got none: key=jax.random.key(0)")
    pending = None
    mesh = mesh_of(devices)
    run = compiled_update(
        model, optimizer, loss, clip_norm, Means.of(accumulate, checkpoint_every, compute_dtype, mesh)
    )
    for update in _run_updates(run, stream, state, key, mesh):
        if pending is not None:
            yield _finite(*pending)
        pending = update
    if pending is not None:
        yield _finite(*pending)


def _finite(state: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(metrics)):
        return state, metrics
    numbers = jax.tree.map(float, jax.device_get(metrics))  # one transfer for all numbers, not one for each
    if not np.all(np.isfinite(jax.tree.leaves(numbers))):
        raise NotFinite(int(state.step), numbers)
    return state, numbers


def compiled_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Objective,
    clip_norm: float | None,
    means: Means = AT_ONCE,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function of (state, (xs, targets, mask, reset), key) that `updates` calls for each batch."""
    limit = float("inf") if clip_norm is None else float(clip_norm)
    return cached_jit(update_once, model, optimizer, loss, limit, means)


def _run_updates(
    update: Callable[..., tuple[TrainState, Metrics]],
    stream: Iterable[Batch],
    state: TrainState,
    key: Array | None,
    mesh: Mesh | None,
) -> Iterator[tuple[TrainState, Metrics]]:
    # On a CPU a call holds its temporaries from its launch on, so two calls at a time would need twice the memory.
    on_cpu = jax.default_backend() == "cpu"
    carried = by_rows(mesh, state.carried)
    state, key = everywhere(mesh, (state._replace(carried=None), key))
    state, is_first = state._replace(carried=carried), True
    for batch in stream:
        state = state._replace(carried=check_batch(batch, state.carried))
        data = by_rows(mesh, (batch.xs, batch.targets, batch.mask, batch.reset))
        if on_cpu and not isinstance(state.step, Tracer):
            jax.block_until_ready(state.step)
        if is_first:
            warn_of_memory(update, state, data, key)
            is_first = False
        state, metrics = update(state, data, key)
        yield state, metrics


def update_once(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Objective,
    limit: float,
    means: Means,
    state: TrainState,
    data: tuple[PyTree, ...],
    key: Array | None,
) -> tuple[TrainState, Metrics]:
    """One update; `limit` is the norm that `Metrics.clipped` compares with, and `data` as for `compiled_update`."""
    drawn = None if key is None else jax.random.fold_in(key, state.step)
    value, final, gradient = loss_and_gradient(model, loss, means, state.params, state.carried, data, drawn)
    norm, leaf_norms = optax.tree.norm(gradient), map(optax.tree.norm, jax.tree.leaves(gradient))
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to its integer count
        change, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, change)
    new_state = TrainState(state.step + 1, params, optimizer_state, final)
    by_leaf = dict(zip(leaf_names(gradient), leaf_norms, strict=True))
    return new_state, Metrics(value, norm, (norm > limit).astype(norm.dtype), optax.tree.norm(params), by_leaf)
