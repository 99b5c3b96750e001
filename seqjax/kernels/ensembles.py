"""The calls of the kernel under `jax.vmap`: one larger batch if all share the weights, otherwise an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Call(NamedTuple):
    """A call of the kernel.

    Attributes:
        name: of the function, without the type of the numbers.
        arguments, results: the axis of the batch in each array, None if all rows share it.
    """

    name: str
    arguments: tuple[int | None, ...]
    results: tuple[int | None, ...]


def bind(
    call: Call,
    kinds: list[jax.ShapeDtypeStruct],
    arrays: tuple[Array, ...],
    numbers: Mapping[str, bool | int | np.ndarray],
    aliases: dict[int, int] | None = None,
) -> list[Array]:
    """Calls the kernel.

    Under `jax.vmap`, more rows of the batch are more work for the same product. So the mapped axis joins the batch if
    no array without a batch is mapped. Otherwise it is an axis of members, which threads share.

    Args:
        call: the call.
        kinds: the shapes and dtypes of its results.
        arrays: its arguments. An empty array stands for one that is not there.
        numbers: its attributes.
        aliases: which argument may be in the memory of which result.
    """

    @jax.custom_batching.custom_vmap
    def of_one(*arrays: Array) -> list[Array]:
        return _call(call, kinds, arrays, numbers, aliases)

    @of_one.def_vmap
    def of_many(size: int, is_mapped: list[bool], *arrays: Array) -> tuple[list[Array], list[bool]]:
        axes = [axis if array.size else None for axis, array in zip(call.arguments, arrays, strict=True)]
        shares = all(axis is not None for axis, mapped in zip(axes, is_mapped, strict=True) if mapped)
        if shares and None not in call.results:
            rows = [
                array if axis is None else _joined(array, axis, size, mapped)
                for array, axis, mapped in zip(arrays, axes, is_mapped, strict=True)
            ]
            more = [_wider(kind, axis, size) for kind, axis in zip(kinds, call.results, strict=True)]
            found = bind(call, more, tuple(rows), numbers, aliases)
            return [_divided(*each, size) for each in zip(found, kinds, call.results, strict=True)], [True] * len(kinds)
        found = _of_members(call, kinds, size, arrays, is_mapped, numbers, aliases)
        return found, [True] * len(kinds)

    return of_one(*arrays)


def _of_members(
    call: Call,
    kinds: list[jax.ShapeDtypeStruct],
    size: int,
    arrays: tuple[Array, ...],
    is_mapped: list[bool],
    numbers: Mapping[str, bool | int | np.ndarray],
    aliases: dict[int, int] | None,
) -> list[Array]:
    """The results of all members, (members, ...), of arguments that are mapped or shared by all members."""
    aliased = aliases or {}
    arrays = tuple(
        jnp.broadcast_to(array, (size, *array.shape)) if i in aliased and not mapped else array
        for i, (array, mapped) in enumerate(zip(arrays, is_mapped, strict=True))
    )
    is_mapped = [mapped or i in aliased for i, mapped in enumerate(is_mapped)]
    more = [jax.ShapeDtypeStruct((size, *kind.shape), kind.dtype) for kind in kinds]

    @jax.custom_batching.custom_vmap
    def of_members(*arrays: Array) -> list[Array]:
        return _call(call, more, arrays, numbers, aliases)

    @of_members.def_vmap
    def of_more(outer: int, is_outer: list[bool], *arrays: Array) -> tuple[list[Array], list[bool]]:
        either = [a or b for a, b in zip(is_mapped, is_outer, strict=True)]
        flat = []
        for array, by_member, by_outer in zip(arrays, is_mapped, is_outer, strict=True):
            if by_member or by_outer:
                array = array if by_outer else array[None]
                array = array if by_member else array[:, None]
                array = jnp.broadcast_to(array, (outer, size, *array.shape[2:])).reshape(outer * size, *array.shape[2:])
            flat.append(array)
        found = _of_members(call, kinds, outer * size, tuple(flat), either, numbers, aliases)
        return [leaf.reshape(outer, size, *leaf.shape[1:]) for leaf in found], [True] * len(kinds)

    return of_members(*arrays)


def _joined(array: Array, axis: int, size: int, mapped: bool) -> Array:
    """From (mapped, .., batch, ..), or (.., batch, ..) if it is not mapped, to (.., mapped * batch, ..)."""
    if mapped:
        array = jnp.moveaxis(array, 0, axis)
    else:
        array = jnp.broadcast_to(jnp.expand_dims(array, axis), (*array.shape[:axis], size, *array.shape[axis:]))
    return array.reshape(*array.shape[:axis], size * array.shape[axis + 1], *array.shape[axis + 2 :])


def _wider(kind: jax.ShapeDtypeStruct, axis: int | None, size: int) -> jax.ShapeDtypeStruct:
    """A result with `size` times as many rows; an empty one stays empty."""
    shape = list(kind.shape)
    if kind.size and axis is not None:
        shape[axis] *= size
    return jax.ShapeDtypeStruct(tuple(shape), kind.dtype)


def _divided(array: Array, kind: jax.ShapeDtypeStruct, axis: int | None, size: int) -> Array:
    """From (.., mapped * batch, ..) to (mapped, .., batch, ..)."""
    if not kind.size or axis is None:
        return jnp.zeros((size, *kind.shape), kind.dtype)
    return jnp.moveaxis(array.reshape(*kind.shape[:axis], size, *kind.shape[axis:]), axis, 0)


def _call(
    call: Call,
    kinds: list[jax.ShapeDtypeStruct],
    arrays: tuple[Array, ...],
    numbers: Mapping[str, bool | int | np.ndarray],
    aliases: dict[int, int] | None,
) -> list[Array]:
    # XLA's interface has typed attributes: the source declares int64 and bool.
    typed = {key: np.int64(value) if type(value) is int else value for key, value in numbers.items()}
    return list(
        jax.ffi.ffi_call(f"seqjax_{call.name}_{kinds[0].dtype}", kinds, input_output_aliases=aliases)(*arrays, **typed)
    )
