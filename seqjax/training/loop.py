"""Training any model on any stream of batches with optax, one update a turn.

A batch either starts afresh, as independent sequences do, or continues the one before it, as windows of a long text do:
then the state is carried over, detached, which is truncated backpropagation through time on chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from seqjax.cell import State
from seqjax.data.batch import Batch, check_batch
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective, every_step
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence.gradients import detach
from seqjax.sequence.unroll import unroll


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


LEAF_PREFIX = "grad_norm/"  # of the columns that hold one leaf each


def leaf_names(params: PyTree) -> list[str]:
    """The path of every leaf, such as "cell.W_hh" or "cell.1.W_hh", in the order of the leaves."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    if len(set(names)) == len(names):
        return names
    return [jax.tree_util.keystr(path) for path in paths]  # {"a": {"b": _}, "a.b": _} have one name when simple


class NotFinite(ArithmeticError):
    """The loss, the gradient or the parameters stopped being numbers at update `step`; the one before was good."""

    def __init__(self, step: int, metrics: Metrics) -> None:
        self.step = step
        found = ", ".join(f"{name} {value:g}" for name, value in zip(metrics._fields[:-1], metrics, strict=False))
        super().__init__(f"not finite at step {step} ({found})")


@functools.lru_cache
def clipped(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    """The optimiser on gradients clipped by their norm, g <- g min(1, c / |g|) (Pascanu, Mikolov and Bengio 2013).

    The same arguments give the same object, so that what was compiled for it is found again.
    """
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
    loss: Objective = every_step,
    clip_norm: float | None = None,
    key: Array | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """One update a turn: theta <- theta + optimizer(dL/dtheta), the state carried and detached where a batch continues.

    Args:
        model: the cell and its head.
        stream: batches, endless or not.
        state: from `start`, or a later one to go on.
        optimizer: an optax transformation, clipping included: `clipped(optax.adam(1e-3), 1.0)`.
        loss: `every_step`, `ManyToOne(pool)`, or your own function of (head, params, outputs, targets, mask).
        clip_norm: the threshold that `Metrics.clipped` compares with.
        key: for a cell that draws noise; update n uses `fold_in(key, n)`, so that a resumed training draws the same.

    Yields:
        The state after each update, and its `Metrics` as plain numbers. It yields one update behind the one that the
        device works on, so that looking at the numbers keeps nobody waiting.

    Raises:
        ValueError, TypeError: a batch does not fit the model, or the first batch continues nothing, or
            the cell draws noise and there is no key.
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
    if key is None and hasattr(model.cell, "noise"):
        raise ValueError("expected a key for a cell that draws noise, such as Dropout, got none: key=jax.random.key(0)")
    pending = None
    for update in _run_updates(model, stream, state, optimizer, loss, clip_norm, key):
        if pending is not None:
            yield _finite(*pending)
        pending = update
    if pending is not None:
        yield _finite(*pending)


def _finite(state: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    numbers = jax.tree.map(float, jax.device_get(metrics))  # all at once: one wait for the device, not one a number
    if not np.all(np.isfinite(jax.tree.leaves(numbers))):
        raise NotFinite(int(state.step), numbers)
    return state, numbers


def _run_updates(
    model: Model,
    stream: Iterable[Batch],
    state: TrainState,
    optimizer: Any,
    loss: Objective,
    clip_norm: float | None,
    key: Array | None,
) -> Iterator[tuple[TrainState, Metrics]]:
    limit = float("inf") if clip_norm is None else float(clip_norm)
    update = compiled(_update, model, optimizer, loss, limit)
    for batch in stream:
        carried = check_batch(batch, state.carried)
        data = (batch.xs, batch.targets, batch.mask, batch.reset)
        state, metrics = update(state._replace(carried=carried), data, key)
        yield state, metrics


def _update(
    model: Model,
    optimizer: Any,
    loss: Objective,
    limit: float,
    state: TrainState,
    data: tuple[PyTree, ...],
    key: Array | None,
) -> tuple[TrainState, Metrics]:
    xs, targets, mask, reset = data
    drawn = None if key is None else jax.random.fold_in(key, state.step)

    def batch_loss(params: ModelParams) -> tuple[Array, State]:
        carried = detach(state.carried)
        final, outputs = unroll(model.cell, params.cell, xs, state=carried, mask=mask, reset=reset, key=drawn)
        return loss(model.head, params.head, outputs, targets, mask), final

    (value, final), gradient = jax.value_and_grad(batch_loss, has_aux=True)(state.params)
    norm, leaf_norms = optax.tree.norm(gradient), map(optax.tree.norm, jax.tree.leaves(gradient))
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to its integer count
        change, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, change)
    new_state = TrainState(state.step + 1, params, optimizer_state, final)
    by_leaf = dict(zip(leaf_names(gradient), leaf_norms, strict=True))
    return new_state, Metrics(value, norm, (norm > limit).astype(norm.dtype), optax.tree.norm(params), by_leaf)
