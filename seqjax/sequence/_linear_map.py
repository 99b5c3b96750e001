"""A linear map that brings its own transpose, for derivatives whose backward pass is better written than derived.

`jax.custom_vjp` gives a backward pass and takes away `jvp`, `jacfwd` and second derivatives. Here both directions are
given: the tangent of a function is one primitive, `push(residuals, tangents)`; transposing it gives `pull(residuals,
cotangents)`, and transposing that gives `push` again. So a backward pass can be organised freely while everything
else about the function stays differentiable in every way.

Each direction comes twice: as it is run, and plainly, as a function that JAX can differentiate with respect to the
residuals. Second derivatives take the plain one, so what is run need not be differentiable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Leaves = Sequence[Any]  # of arrays; what is not traced may be one of numpy's
Map = Callable[[list[Array], list[Array]], Leaves]  # (residuals, what it is linear in) -> what comes out


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """One direction of a linear map: as it is run, and plainly."""

    run: Map
    plain: Map


def linear_map(residuals: Leaves, linear: Leaves, push: Direction, pull: Direction, like: Sequence[Any]) -> list[Array]:
    """push(residuals, linear), whose transpose with respect to `linear` is `pull(residuals, .)`.

    Args:
        residuals: arrays on which both directions may depend in any way.
        linear: arrays in which the map is linear.
        push: the map.
        pull: its transpose.
        like: what comes out has their shapes and dtypes; said, so that a direction that never runs is never traced.

    Returns:
        The arrays that `push.run` returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from seqjax.sequence._linear_map import Direction, linear_map
        >>> def scale(residuals, linear): return [residuals[0] * linear[0]]
        >>> def marked(residuals, linear): return [residuals[0] * linear[0] + 0.125]  # not the transpose, to be seen
        >>> push, pull = Direction(scale, scale), Direction(marked, scale)
        >>> double = lambda x: linear_map([jnp.array(2.0)], [x], push, pull, like=[x])[0]
        >>> double(jnp.array(3.0)).item(), jax.grad(double)(jnp.array(3.0)).item()
        (6.0, 2.125)
    """
    kinds = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in like)
    return _linear_map.bind(*residuals, *linear, push=push, pull=pull, residuals=len(residuals), like=kinds)


_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True


def _run(*args: Array, push: Direction, pull: Direction, residuals: int, like: Any) -> list[Array]:
    return list(push.run(list(args[:residuals]), list(args[residuals:])))


def _jvp(
    primals: Leaves, tangents: Sequence[Any], *, push: Direction, pull: Direction, residuals: int, like: Any
) -> Any:
    """Of a product of both kinds of argument: d(A(r) v) = A(r) dv + (dA(r)) v."""
    fixed, linear = primals[:residuals], primals[residuals:]
    out = linear_map(fixed, linear, push, pull, like)
    parts = []
    if any(type(t) is not ad.Zero for t in tangents[residuals:]):
        parts.append(linear_map(fixed, [ad.instantiate_zeros(t) for t in tangents[residuals:]], push, pull, like))
    moving = [i for i, t in enumerate(tangents[:residuals]) if type(t) is not ad.Zero]
    if moving:

        def of_moving(*values: Array) -> list[Array]:
            every = list(fixed)
            for i, value in zip(moving, values, strict=True):
                every[i] = value
            return list(push.plain(every, list(linear)))

        parts.append(jax.jvp(of_moving, [fixed[i] for i in moving], [tangents[i] for i in moving])[1])
    return out, [sum(leaves[1:], leaves[0]) for leaves in zip(*parts, strict=True)]


def _transpose(
    cotangents: Sequence[Any], *args: Any, push: Direction, pull: Direction, residuals: int, like: Any
) -> list[Any]:
    known = [ad.instantiate_zeros(ct) for ct in cotangents]
    inputs = [arg.aval if ad.is_undefined_primal(arg) else arg for arg in args[residuals:]]
    pulled = linear_map(args[:residuals], known, pull, push, inputs)
    undefined = [ad.is_undefined_primal(arg) for arg in args[residuals:]]
    return [None] * residuals + [ct if wanted else None for ct, wanted in zip(pulled, undefined, strict=True)]


def _batch(args: Leaves, axes: Sequence[Any], *, push: Direction, pull: Direction, residuals: int, like: Any) -> Any:
    """What it is linear in is batched throughout, so that no direction has to sum over the batch."""
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    linear = [
        jnp.broadcast_to(arg, (size, *jnp.shape(arg))) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args[residuals:], axes[residuals:], strict=True)
    ]
    in_axes = (list(axes[:residuals]), 0)

    def batched(direction: Direction) -> Direction:
        return Direction(jax.vmap(direction.run, in_axes), jax.vmap(direction.plain, in_axes))

    kinds = [jax.ShapeDtypeStruct((size, *kind.shape), kind.dtype) for kind in like]
    out = linear_map(args[:residuals], linear, batched(push), batched(pull), kinds)
    return out, [0] * len(out)


_linear_map.def_impl(_run)
_linear_map.def_abstract_eval(lambda *args, like, **how: [jax.typeof(kind) for kind in like])
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_run, multiple_results=True))
