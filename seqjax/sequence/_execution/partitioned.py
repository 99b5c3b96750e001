"""A loop on several devices: each device runs it for its own part of the batch.

XLA does not know what the compiled kernel computes, so it would gather the whole batch on every device. It also adds
the gradients of the parameters over the devices in every chunk, and not once after the loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.extend.core import ClosedJaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from seqjax.kernels._exporting import target

NO_BATCH = -1  # the axis of the batch of an array that has none

Names = list[str | None]  # of the axes of an array; None for an axis of which every device has all


def partitioned(run: Callable[..., PyTree], arguments: Sequence[Any], axes: Sequence[int], out: PyTree) -> Any:
    """Computes `run(*arguments)`, on every device for its part of the batch if XLA divides it over devices.

    Args:
        run: a function for any size of the batch.
        arguments: arrays.
        axes: for each of them, which axis is the batch. With NO_BATCH every device gets the whole array.
        out: the same for the results, as a prefix of their tree. With NO_BATCH a result is a sum over the batch.
    """
    # Inside `jax.shard_map` the batch is that of one device already. An exported program runs on one device, without
    # this process. In place of a random key, the function would get its numbers.
    is_whole = _runs_on_one_device() or bool(jax.sharding.get_abstract_mesh().manual_axes)
    if is_whole or any(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended) for leaf in arguments):
        return run(*arguments)
    return _with_batching(_Call(run, tuple(axes), out))(*arguments)


def partitioned_program() -> ClosedJaxpr | None:
    """A program of which JAX knows that its lowering depends on the devices, because it contains such a call.

    None if there is only one device.
    """
    return None if _runs_on_one_device() else _partitioned_program()


def _runs_on_one_device() -> bool:
    return jax.device_count() == 1 or target() is not None


@functools.cache
def _partitioned_program() -> ClosedJaxpr:
    return jax.make_jaxpr(partial(_on_each_device, _Call(lambda array: array, (NO_BATCH,), NO_BATCH)))(0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A function with the names of the axes of its arguments and results.

    Attributes:
        run: runs it on one device.
        axes, out: as for `partitioned`.
        mapped: for each `jax.vmap` around it, the innermost first, whether each argument has its axis in front.
    """

    run: Callable[..., PyTree]
    axes: tuple[int, ...]
    out: PyTree
    mapped: tuple[tuple[bool, ...], ...] = ()

    def names(self, arguments: Sequence[Any], results: Sequence[Any], tree: Any) -> tuple[list[Names], list[Names]]:
        """The names of the axes of the arguments and of the leaves of the results."""
        levels = range(len(self.mapped))
        has = [[level for level in levels if self.mapped[level][i]] for i in range(len(arguments))]
        of_arguments = [_names(*each) for each in zip(arguments, self.axes, has, strict=True)]
        return of_arguments, [_names(*each, levels) for each in zip(results, axes_of(self.out, tree), strict=True)]


def axes_of(prefix: PyTree, tree: Any) -> list[int]:
    """For each leaf of a tree structure the axis of its batch, from a prefix of the tree."""
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree.unflatten([0] * tree.num_leaves)))


def _names(leaf: Any, batch: int, levels: Sequence[int]) -> Names:
    outer = [f"mapped_{level}" for level in reversed(levels)]
    rest = range(len(leaf.shape) - len(outer))
    # An empty array stands for one that is not there.
    return [*outer, *("batch" if axis == batch and 0 not in leaf.shape else None for axis in rest)]


def _with_batching(call: _Call) -> Callable[..., PyTree]:
    """The call under `jax.vmap`, which adds an axis that may be divided over devices too."""

    @custom_vmap
    def run(*arrays: Any) -> PyTree:
        return _on_each_device(call, *arrays)

    @run.def_vmap
    def rule(_: int, is_mapped: Sequence[bool], *arrays: Any) -> tuple[PyTree, PyTree]:
        mapped_run = jax.vmap(call.run, [0 if m else None for m in is_mapped])
        outer = dataclasses.replace(call, run=mapped_run, mapped=(*call.mapped, tuple(is_mapped)))
        results = _with_batching(outer)(*arrays)
        return results, jax.tree.map(lambda _: True, results)

    return run


def _on_each_device(call: _Call, *arrays: Any) -> PyTree:
    trees: list[Any] = []  # of the results, once they are traced

    def run(*arrays: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(call.run(*arrays))
        trees.append(tree)
        return leaves

    def rule(_: Any, arguments: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        of_arguments, of_results = call.names(arguments, results, trees[0])
        whole: list[str] = []

        def factors(names: Names) -> Any:
            missing = [f"whole_{len(whole) + k}" for k in range(names.count(None))]
            whole.extend(missing)
            rest = iter(missing)
            return tuple(next(rest) if name is None else name for name in names)

        mappings = [tuple(map(factors, each)) for each in (of_arguments, of_results)]
        return SdyShardingRule(*mappings, need_replication_factors=tuple(whole))

    def partition(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        of_arguments, of_results = call.names(arguments, results, trees[0])
        devices = _devices_of_axes(mesh, [*arguments, *results], [*of_arguments, *of_results])

        def shardings(names: Sequence[Names]) -> list[NamedSharding]:
            return [NamedSharding(mesh, PartitionSpec(*map(devices.get, each))) for each in names]

        def on_one_device(*arrays: Any) -> list[Any]:
            leaves = run(*arrays)
            if "batch" not in devices:
                return leaves
            # After the loops, which `run` contains.
            return [
                leaf if "batch" in names else lax.psum(leaf, devices["batch"])
                for leaf, names in zip(leaves, of_results, strict=True)
            ]

        return mesh, on_one_device, shardings(of_results), tuple(shardings(of_arguments))

    function = custom_partitioning(run)
    function.def_partition(partition, sharding_rule=rule)
    leaves = function(*arrays)
    return trees[0].unflatten(leaves)


def _devices_of_axes(mesh: Any, arrays: Sequence[Any], names: Sequence[Names]) -> dict[str | None, tuple[str, ...]]:
    """The axes of the mesh over which XLA divides each named axis evenly.

    XLA pads an axis that it cannot divide evenly, and the gradient would be added over the padding too.
    """
    found: dict[str | None, tuple[str, ...]] = {}
    for array, of_array in zip(arrays, names, strict=True):
        for name, size, over in zip(of_array, array.shape, getattr(array.sharding, "spec", ()), strict=False):
            axes = (over,) if isinstance(over, str) else tuple(over or ())
            is_free = not any(set(axes) & set(used) for used in found.values())
            if name is not None and axes and is_free and size % math.prod(mesh.shape[axis] for axis in axes) == 0:
                found.setdefault(name, axes)
    return found
