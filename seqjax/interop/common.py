"""What the adapters share: dtypes that follow the parameters, and words for a wrong argument."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from seqjax.cell import Params, State

Arguments = tuple[tuple[str, Any], ...]  # keyword arguments in an order, so that adapters hash and compare by value


def like_parameters(state: State, params: Params) -> State:
    """The state in the dtype of the parameters, which these libraries set apart from it."""
    floating = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not floating:
        return state
    dtype = jnp.result_type(*floating)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)


def keep_types(new_state: State, state: State) -> State:
    """The new state in the old one's dtypes: a module may compute in a dtype of its own (nnx.SimpleCell does)."""
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), new_state, state)


def floating(x: PyTree, params: Params) -> PyTree:
    """The input in the dtype of the parameters."""
    return like_parameters(jax.tree.map(jnp.asarray, x), params)


def kind_of(found: Any) -> str:
    """An object in a few words: the representation of a module takes many lines."""
    return f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"


def check_class(kind: Any, module_type: type, adapter: str, example: str) -> None:
    """Refuses what is not the class of a cell of this library, or a function that builds one.

    Raises:
        TypeError: it is a module that is already built, a module of flax-linen, or nothing that can be called.
    """
    from flax import linen

    expected = f"expected the class of the cell and its arguments, as in sj.{adapter}({example}, 8, 64)"
    if isinstance(kind, linen.Module) or (isinstance(kind, type) and issubclass(kind, linen.Module)):
        raise TypeError(f"{expected}, got {kind_of(kind)} of flax.linen: use sj.from_linen")
    if isinstance(kind, module_type):
        raise TypeError(
            f"{expected}, got {kind_of(kind)} that is already built: its weights come from cell.params_from(module)"
        )
    if not callable(kind):
        raise TypeError(f"{expected}, got {kind!r}: name the class")


def same_shapes(weights: Params, skeleton: PyTree, found: Any) -> Params:
    """Returns the weights of a module that fit the cell's own.

    Raises:
        ValueError: they have another structure or other shapes.
    """
    got, expected = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (weights, skeleton))
    if got != expected or jax.tree.structure(weights) != jax.tree.structure(skeleton):
        raise ValueError(
            f"expected a module with weights of shapes {expected}, got {kind_of(found)} with {got}: "
            f"give the adapter the class and the arguments that built it"
        )
    return weights
