"""The loss of a batch and its gradient: all rows at once, or a part of them at a time, on one device or several."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import State
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective
from seqjax.sequence.gradients import detach
from seqjax.sequence.unroll import unroll
from seqjax.training._devices import BATCH

Data = tuple[PyTree, PyTree, Any, Any]  # xs, targets, mask, reset


@dataclasses.dataclass(frozen=True)
class Means:
    """How a gradient is computed; none of it changes the gradient, except `compute_dtype` in its last digits.

    Attributes:
        accumulate: the number of parts into which the rows are divided. Their gradients are computed one after another.
        checkpoint_every: as for `unroll`.
        compute_dtype: of the cell's parameters, inputs and states in the unroll; None for their own.
        mesh: the devices that share the rows.
    """

    accumulate: int = 1
    checkpoint_every: int | None = None
    compute_dtype: str | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"expected accumulate of at least 1, got {self.accumulate}")
        if self.compute_dtype is not None and not jnp.issubdtype(self.compute_dtype, jnp.floating):
            raise ValueError(
                f'expected a compute_dtype of floating-point numbers, got {self.compute_dtype}: "bfloat16"'
            )

    @classmethod
    def of(
        cls, accumulate: int, checkpoint_every: int | None, compute_dtype: DTypeLike | None, mesh: Mesh | None
    ) -> Means:
        """From the options of a training."""
        dtype = None if compute_dtype is None else jnp.dtype(compute_dtype).name
        return cls(int(accumulate), checkpoint_every, dtype, mesh)


AT_ONCE = Means()


def loss_and_gradient(
    model: Model, loss: Objective, means: Means, params: ModelParams, carried: State, data: Data, key: Array | None
) -> tuple[Array, State, ModelParams]:
    """The loss of a batch, the state at its end, and the gradient by the parameters.

    Raises:
        ValueError: `accumulate` does not divide the rows evenly.
    """
    run = partial(_of_rows, model, loss, means)
    rows, shares = jax.tree.leaves(data[0])[0].shape[0], means.accumulate * (means.mesh.size if means.mesh else 1)
    if rows % shares and means.accumulate > 1:
        raise ValueError(
            f"expected a batch that divides evenly into {shares} parts, accumulate={means.accumulate} on each device, "
            f"got {rows} rows"
        )
    if means.accumulate == 1 and (means.checkpoint_every is None or means.mesh is None or rows % shares):
        return run(params, carried, data, key)
    sums = partial(_sums, run, means.accumulate, getattr(loss, "per_sequence", False))
    if means.mesh is None:
        return _mean(sums(params, carried, data, key))

    def on_device(params: ModelParams, carried: State, data: Data, key: Array | None) -> Any:
        key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(BATCH))
        return _mean(sums(params, carried, data, key), BATCH)

    # Each device adds up the gradients of its own rows, so they are added over the devices once, after all loops.
    whole, of_rows = PartitionSpec(), PartitionSpec(BATCH)
    in_specs, out_specs = (whole, of_rows, of_rows, whole), (whole, of_rows, whole)
    # Without types of manual axes, a gradient inside the function is that of the device alone.
    on_devices = jax.shard_map(on_device, mesh=means.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return on_devices(params, carried, data, key)


def _of_rows(
    model: Model, loss: Objective, means: Means, params: ModelParams, carried: State, data: Data, key: Array | None
) -> tuple[Array, State, ModelParams]:
    xs, targets, mask, reset = data
    short = partial(_cast, means.compute_dtype)

    def batch_loss(params: ModelParams) -> tuple[Array, State]:
        state = short(detach(carried))  # for a gradient of the user's through several updates
        final, outputs = unroll(
            model.cell, short(params.cell), short(xs), state=state, mask=mask, reset=reset, key=key, save="gates",
            checkpoint_every=means.checkpoint_every,
        )  # fmt: skip
        if means.compute_dtype is not None:  # the head, its loss and what is carried are in the dtype of the parameters
            final, outputs = (_cast(_dtype(params), tree) for tree in (final, outputs))
        return loss(model.head, model.head_params(params), outputs, targets, mask), final

    (value, final), gradient = jax.value_and_grad(batch_loss, has_aux=True)(params)
    return value, final, gradient


def _sums(
    run: Any, count: int, per_sequence: bool, params: ModelParams, carried: State, data: Data, key: Array | None
) -> tuple[tuple[Array, Array, ModelParams], State]:
    """The weight of the rows, the weighted loss and gradient, summed over `count` parts, and the last states."""

    def of_part(carried: State, data: Data, key: Array | None) -> tuple[tuple[Array, Array, ModelParams], State]:
        rows, time = jax.tree.leaves(data[0])[0].shape[:2]
        value, final, gradient = run(params, carried, data, key)
        steps = jnp.asarray(rows * time) if data[2] is None else jnp.sum(data[2])
        weight = (jnp.asarray(rows) if per_sequence else steps).astype(value.dtype)
        value, gradient = jax.tree.map(lambda leaf: weight.astype(leaf.dtype) * leaf, (value, gradient))
        return (weight, value, gradient), final

    def cut(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0)

    def join(leaf: Array) -> Array:
        return jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

    def add(sums: PyTree, part: tuple[State, Data, Array]) -> tuple[PyTree, State]:
        drawn = None if key is None else jax.random.fold_in(key, part[2])
        more, final = of_part(*part[:2], drawn)
        return jax.tree.map(jnp.add, sums, more), final

    if count == 1:
        return of_part(carried, data, key)
    parts = (*jax.tree.map(cut, (carried, data)), jnp.arange(count))
    one = jax.eval_shape(of_part, *jax.tree.map(lambda leaf: leaf[0], parts[:2]), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one[0])
    sums, final = jax.lax.scan(add, zeros, parts)
    return sums, jax.tree.map(join, final)


def _mean(
    found: tuple[tuple[Array, Array, ModelParams], State], axis: str | None = None
) -> tuple[Array, State, ModelParams]:
    """The weighted means, over the devices of an axis too."""
    sums, final = found
    weight, value, gradient = sums if axis is None else jax.lax.psum(sums, axis)
    weight = jnp.maximum(weight, 1)
    value, gradient = jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), (value, gradient))
    return value, final, gradient


def _cast(dtype: Any, tree: PyTree) -> PyTree:
    """The tree with its floating-point arrays in another dtype; None leaves them as they are."""

    def cast(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return tree if dtype is None else jax.tree.map(cast, tree)


def _dtype(params: PyTree) -> Any:
    """The dtype of the floating-point parameters."""
    return next(leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))
