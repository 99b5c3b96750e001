"""A linear map with a transpose of its own, for derivatives whose backward pass is faster if it is written by hand.

`jax.custom_vjp` defines a backward pass, but then `jvp`, `jacfwd` and second derivatives are no longer available. Here
the tangent of a function is one primitive, `push(residuals, tangents)`. Its transpose is `pull(residuals, cotangents)`,
and the transpose of that is `push` again. So the backward pass can be any program, and the function can still be
differentiated in every way.

Each direction has two implementations: a fast one, and a plain one that JAX can differentiate with respect to the
residuals. Second derivatives use the plain one, so the fast one need not be differentiable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

Leaves = Sequence[Any]  # arrays; those that are not traced may be numpy arrays
Map = Callable[[list[Any], list[Any]], Leaves]  # (residuals, linear arguments) -> results


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """One direction of a linear map.

    Attributes:
        fast: the implementation that runs.
        plain: an implementation that JAX can differentiate with respect to the residuals.
    """

    fast: Map
    plain: Map


def linear_map(
    residuals: Leaves,
    linear: Leaves,
    push: Direction,
    pull: Direction,
    like: Leaves,
    calls: ClosedJaxpr | None = None,
) -> list[Array]:
    """Computes push(residuals, linear), whose transpose with respect to `linear` is pull(residuals, .).

    Args:
        residuals: arrays on which both directions may depend in any way.
        linear: arrays in which the map is linear.
        push: the map.
        pull: its transpose.
        like: arrays or shapes with the shapes and dtypes of the results. With them a direction that never runs is never
            traced.
        calls: a program with the primitives of the directions whose lowering needs to know the devices. JAX searches
            for them in the parameters of an equation, before it traces a direction.

    Returns:
        The arrays that `push.fast` returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from seqjax.sequence._linear_map import Direction, linear_map
        >>> def scale(residuals, linear): return [residuals[0] * linear[0]]
        >>> def marked(residuals, linear): return [residuals[0] * linear[0] + 0.125]  # a wrong transpose
        >>> push, pull = Direction(scale, scale), Direction(marked, scale)
        >>> double = lambda x: linear_map([jnp.array(2.0)], [x], push, pull, like=[x])[0]
        >>> double(jnp.array(3.0)).item(), jax.grad(double)(jnp.array(3.0)).item()
        (6.0, 2.125)
    """
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_mesh_of(residuals, linear)) for leaf in like)
    sizes = {"residuals": len(residuals), "like": shapes}
    return _linear_map.bind(*residuals, *linear, push=push, pull=pull, calls=calls, **sizes)


def _mesh_of(residuals: Leaves, linear: Leaves) -> NamedSharding | None:
    """The mesh of the arguments, which the results have too, as every array inside `jax.shard_map`."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in (*residuals, *linear))
    return next((NamedSharding(mesh, PartitionSpec()) for mesh in meshes if not mesh.empty), None)


_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True


def _run(*args: ArrayLike, push: Direction, residuals: int, **_: Any) -> list[Array]:
    return list(push.fast(list(args[:residuals]), list(args[residuals:])))


def _jvp(
    primals: Leaves, tangents: Leaves, *, push: Direction, pull: Direction, calls: Any, residuals: int, like: Leaves
) -> tuple[list[Array], list[Any]]:
    """The product rule: d(A(r) v) = A(r) dv + dA(r) v."""
    fixed, linear = primals[:residuals], primals[residuals:]
    out = linear_map(fixed, linear, push, pull, like, calls)
    parts = []
    if any(type(t) is not ad.Zero for t in tangents[residuals:]):
        moved = [ad.instantiate_zeros(t) for t in tangents[residuals:]]
        parts.append(linear_map(fixed, moved, push, pull, like, calls))
    varied = [i for i, t in enumerate(tangents[:residuals]) if type(t) is not ad.Zero]
    if varied:

        def function(*values: Array) -> list[Array]:
            every = list(fixed)
            for i, value in zip(varied, values, strict=True):
                every[i] = value
            return list(push.plain(every, list(linear)))

        parts.append(jax.jvp(function, [fixed[i] for i in varied], [tangents[i] for i in varied])[1])
    return out, [sum(leaves[1:], leaves[0]) for leaves in zip(*parts, strict=True)]


def _transpose(
    cotangents: Leaves, *args: Any, push: Direction, pull: Direction, calls: Any, residuals: int, like: Leaves
) -> list[Any]:
    cts = [ad.instantiate_zeros(ct) for ct in cotangents]
    # Only the shapes of the linear arguments are known here, because the map is transposed with respect to them.
    inputs = [arg.aval if ad.is_undefined_primal(arg) else arg for arg in args[residuals:]]
    pulled = linear_map(args[:residuals], cts, pull, push, inputs, calls)
    undefined = [ad.is_undefined_primal(arg) for arg in args[residuals:]]
    return [None] * residuals + [ct if wanted else None for ct, wanted in zip(pulled, undefined, strict=True)]


def _batch(
    args: Leaves,
    axes: Sequence[int | None],
    *,
    push: Direction,
    pull: Direction,
    calls: Any,
    residuals: int,
    like: Leaves,
) -> tuple[list[Array], list[int]]:
    # All linear arguments get a batch axis, because the transpose of one without it would have to sum over the batch.
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    linear = [
        jnp.broadcast_to(arg, (size, *jnp.shape(arg))) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args[residuals:], axes[residuals:], strict=True)
    ]
    in_axes = (list(axes[:residuals]), 0)

    def batched(direction: Direction) -> Direction:
        return Direction(jax.vmap(direction.fast, in_axes), jax.vmap(direction.plain, in_axes))

    shapes = [jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype) for leaf in like]
    out = linear_map(args[:residuals], linear, batched(push), batched(pull), shapes, calls)
    return out, [0] * len(out)


_linear_map.def_impl(_run)
_linear_map.def_abstract_eval(lambda *args, like, **options: [jax.typeof(leaf) for leaf in like])
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_run, multiple_results=True))
