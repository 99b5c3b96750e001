"""Runs functions over a batch of sequences on a mesh of devices.

JAX has three kinds of axes of a mesh. The sharding of an automatic axis is known to XLA only, and XLA divides the work.
That of an explicit axis is a part of the type of an array, and inside `jax.shard_map` an axis is manual: the type says
over which axes the values vary. The programs of this package are written without types of shardings, so they run with
automatic axes, and the results get their types at the end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_automatic_axes(run: Callable[..., Any], xs: PyTree, *arguments: PyTree) -> Any:
    """Runs `run(*arguments)`, whose results have the batch in front, with all explicit axes of a mesh automatic.

    Args:
        run: a function whose results are arrays (batch, ...).
        xs: arrays (batch, ...). The results are sharded over the batch like them. Without any they are not sharded.
        *arguments: trees of arrays.

    Returns:
        The results. Their other axes are not sharded.
    """
    meshes = [mesh for leaf in jax.tree.leaves((xs, arguments)) if (mesh := _sharding(leaf).mesh).explicit_axes]
    if not meshes:
        return run(*arguments)
    specs = [_sharding(leaf).spec for leaf in jax.tree.leaves(xs)]
    batch = next((spec[0] for spec in specs if len(spec) and spec[0] is not None), None)
    out = NamedSharding(meshes[0], PartitionSpec() if batch is None else PartitionSpec(batch))
    return jax.sharding.auto_axes(run, axes=meshes[0].explicit_axes, out_sharding=out)(*arguments)


@contextlib.contextmanager
def on_automatic_mesh(tree: PyTree) -> Iterator[PyTree]:
    """Gives the same arrays on the same devices, with all explicit axes of their mesh automatic.

    It is for functions that are not compiled as a whole. Inside them the mesh is also that of new arrays.
    """
    explicit = [leaf.sharding.mesh for leaf in jax.tree.leaves(tree, is_leaf=_is_stream) if _is_explicit(leaf)]
    if not explicit:
        yield tree
        return
    mesh = Mesh(explicit[0].devices, explicit[0].axis_names, axis_types=(AxisType.Auto,) * explicit[0].devices.ndim)

    def move(leaf: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec)) if _is_explicit(leaf) else leaf

    with jax.set_mesh(mesh):
        yield jax.tree.map(move, tree, is_leaf=_is_stream)


def for_automatic_axes(analysis: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with all explicit axes of the meshes of its arguments automatic. Its results are on such a mesh."""

    @functools.wraps(analysis)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with on_automatic_mesh((args, kwargs)) as (args, kwargs):
            return analysis(*args, **kwargs)

    return run


def _is_stream(part: Any) -> bool:
    """Whether a part of the arguments yields its arrays later."""
    return isinstance(part, Iterator)


def _is_explicit(leaf: Any) -> bool:
    """Whether an array with values is on a mesh with explicit axes."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return False
    return isinstance(leaf.sharding, NamedSharding) and AxisType.Explicit in leaf.sharding.mesh.axis_types


def without_manual_axes(run: Callable[..., Any], *arguments: PyTree) -> Any:
    """Runs `run(*arguments)`, a function without collectives, as if no axis of a mesh were manual.

    The results vary over all axes over which an argument varies.
    """
    arguments = with_equal_axes(arguments)
    axes = _manual_axes(arguments)
    if not axes:
        return run(*arguments)
    results = run(*_with_axes(arguments, frozenset()))
    return _with_axes(results, axes)


def on_any_mesh(run: Callable[..., Any], xs: PyTree, *arguments: PyTree) -> Any:
    """`with_automatic_axes` and `without_manual_axes` of the same function."""
    return with_automatic_axes(lambda *arguments: without_manual_axes(run, *arguments), xs, *arguments)


def with_equal_axes(tree: PyTree) -> PyTree:
    """The same arrays, declared to vary over all manual axes over which one of them varies.

    A gradient is added over the devices where this happens, so parameters go through here before all loops.
    """
    axes = _manual_axes(tree)

    def vary(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _manual_axes(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


def _sharding(leaf: Any) -> Any:
    return jax.typeof(leaf).sharding


def _manual_axes(tree: PyTree) -> frozenset[Any]:
    """The manual axes over which an array of the tree varies."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def _with_axes(tree: PyTree, axes: frozenset[Any]) -> PyTree:
    return jax.tree.map(lambda leaf: _vary.bind(leaf, axes=axes), tree)


def _transpose(ct: Array, leaf: Any, *, axes: frozenset[Any]) -> list[Array]:
    return [_with_axes(ct, leaf.aval.mat.varying)]


# Changes only the type of an array: the axes over which its values vary.
_vary = Primitive("vary")
_vary.def_impl(lambda leaf, **_: leaf)
_vary.def_abstract_eval(lambda leaf, axes: leaf.update(manual_axis_type=leaf.mat.update(varying=axes)))
ad.deflinear2(_vary, _transpose)
batching.defvectorized(_vary)
mlir.register_lowering(_vary, lambda _, leaf, **__: [leaf])
