"""Helpers of the adapters: dtypes that follow the parameters, and checks of the arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from seqjax.cell import NotOffered, Params, State

Arguments = tuple[tuple[str, Any], ...]  # sorted keyword arguments, so that adapters hash and compare by value


def like_parameters(state: State, params: Params) -> State:
    """The state in the dtype of the parameters; in these libraries the two dtypes are independent."""
    floating = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not floating:
        return state
    dtype = jnp.result_type(*floating)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)


def cast_like(new_state: State, state: State) -> State:
    """The new state in the dtypes of the old one; some modules return another dtype (nnx.SimpleCell does)."""
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), new_state, state)


def as_input(x: PyTree, params: Params) -> PyTree:
    """The input in the dtype of the parameters."""
    return like_parameters(jax.tree.map(jnp.asarray, x), params)


def kind_of(value: object) -> str:
    """A short description of an object, for messages; the `repr` of a module has many lines."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def carry_names(kind: type, library: str) -> str | tuple[str, str]:
    """The names of the carry of a cell of flax: (c, h) for an LSTM cell, and h for other cells of the library.

    Raises:
        NotOffered: the class is not one of the library, so its carry is unknown.
    """
    base = next((base for base in kind.__mro__ if base.__module__.startswith(f"{library}.")), object)
    if not base.__name__.endswith("Cell"):  # such as the base class of all cells
        raise NotOffered(f"{kind.__name__} is not a cell of {library}, so the names of its state are unknown")
    return ("c", "h") if "LSTM" in base.__name__ else "h"


def check_class(kind: object, module_type: type, adapter: str, example: str) -> None:
    """Checks that `kind` is the class of a cell of this library, or a function that builds one.

    Raises:
        TypeError: `kind` is a module that is already built, a module of flax-linen, or not callable.
    """
    from flax import linen

    # Modules of linen before those of other libraries, because only linen modules have another adapter.
    expected = f"expected the class of the cell and its arguments, as in sj.{adapter}({example}, 8, 64)"
    if isinstance(kind, linen.Module) or (isinstance(kind, type) and issubclass(kind, linen.Module)):
        raise TypeError(f"{expected}, got {kind_of(kind)} of flax.linen: use sj.from_linen")
    if isinstance(kind, module_type):
        raise TypeError(
            f"{expected}, got {kind_of(kind)} that is already built: its weights come from cell.params_from(module)"
        )
    if not callable(kind):
        raise TypeError(f"{expected}, got {kind!r}: name the class")


def same_shapes(weights: Params, skeleton: PyTree, module: object) -> Params:
    """Returns the weights of a module if they have the structure and shapes of the cell's own.

    Raises:
        ValueError: the structure or a shape differs.
    """
    got, expected = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (weights, skeleton))
    if got != expected or jax.tree.structure(weights) != jax.tree.structure(skeleton):
        raise ValueError(
            f"expected a module with weights of shapes {expected}, got {kind_of(module)} with {got}: "
            f"give the adapter the class and the arguments that built it"
        )
    return weights
