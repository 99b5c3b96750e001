"""Where training keeps its arrays: the rows of a batch divided over devices, all other arrays on each of them.

XLA then divides an update by itself: each device runs the loops of its rows, and the gradient is added over the devices
once. The devices may belong to several processes (`jax.distributed`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

if TYPE_CHECKING:
    from seqjax.training.loop import TrainState
else:  # needed only in annotations
    TrainState = Any

BATCH = "batch"  # the axis of the mesh

Devices = Sequence[jax.Device] | None


def mesh_of(devices: Devices) -> Mesh | None:
    """A mesh of these devices with the axis BATCH; None leaves all arrays where they are.

    Raises:
        ValueError: there is no device, or one is named twice.
    """
    if devices is None:
        return None
    if not len(devices) or len(set(devices)) < len(devices):
        raise ValueError(f"expected one device or more, each once, got {list(devices)}: devices=jax.devices()")
    return Mesh(np.array(devices), BATCH)


def everywhere(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """The tree with every array on every device."""
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec()))


def by_rows(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """The tree of arrays (batch, ...) with their rows divided over the devices.

    If the devices do not divide the rows evenly, every device gets all rows, and a warning says so.

    Raises:
        ValueError: the devices of several processes do not divide the rows.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if mesh is None or len(sizes) != 1 or () in sizes:  # `unroll` says what is wrong with such a batch
        return everywhere(mesh, tree)
    ((rows,),) = sizes
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    if rows % mesh.size == 0:
        return _put(tree, sharding)
    if not sharding.is_fully_addressable:
        raise ValueError(f"expected a batch that {mesh.size} devices divide evenly, got {rows} rows")
    text = f"{mesh.size} devices do not divide a batch of {rows} rows, so each of them computes all rows"
    warnings.warn(f"{text}: choose a multiple of {mesh.size} rows", stacklevel=2)
    return everywhere(mesh, tree)


def on_one_device(tree: PyTree) -> PyTree:
    """The tree of arrays that every device has, on one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def places_of(mesh: Mesh | None, state: TrainState) -> TrainState:
    """For each array of a training state its sharding."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), state)
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (BATCH,)))
    places = jax.tree.map(lambda _: whole, state)
    return places._replace(carried=jax.tree.map(lambda _: rows, state.carried))


def _put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _put_own_part(leaf, sharding), tree)


def _put_own_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array of several processes. Each of them has the whole array, or it is one of several processes already."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        numbers = _put_own_part(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
