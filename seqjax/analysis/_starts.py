"""Where a search for fixed points begins, and under which input: checked, and drawn where it is not given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Params, State, strong_type


def check_input(cell: Cell, x: PyTree) -> PyTree:
    """One step's input as arrays; zeros where it is not given.

    Raises:
        ValueError: its shape is not the cell's, or it is not given and the cell does not say its shape.
    """
    shape = getattr(cell, "input_shape", None)
    if x is None:
        if shape is None:
            raise ValueError(
                f"expected x, the input of every step, got None for {type(cell).__name__}, which has no input_shape "
                f"to make zeros of: pass x"
            )
        return jnp.zeros(shape)
    x = jax.tree.map(jnp.asarray, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if shape is not None and leaf.shape != shape:
            raise ValueError(
                f"expected x{jax.tree_util.keystr(path)} {shape}, the input of one step of one example, "
                f"got {leaf.shape}: search for each constant input on its own"
            )
    return x


def flat_starts(cell: Cell, params: Params, starts: State | None, count: int, key: Array, scale: float) -> Array:
    """The states to start from, flat, (m, n).

    Args:
        cell, params: any cell and its parameters.
        starts: leaves (m, ...), or a trajectory's (batch, time + 1, ...), of which `count` are drawn; None for random
            ones about the initial state.
        count, key, scale: of the drawn ones.

    Raises:
        ValueError: the starts are not states of the cell, or there is none.
    """
    own = strong_type(cell.initial_state(params))
    flat, _ = ravel_pytree(own)
    if starts is None:
        noise = jax.random.normal(key, (count, flat.size), flat.dtype)
        return flat[None] + jnp.asarray(scale, flat.dtype) * noise
    given, tree = jax.tree_util.tree_flatten_with_path(starts)
    leaves, own_tree = jax.tree.flatten(own)
    if tree != own_tree:
        raise ValueError(
            f"expected starts that are states of {type(cell).__name__}, {own_tree}, got {tree}: "
            f"stack some, leaves (starts, ...), or pass sj.trajectory(cell, params, xs)"
        )
    rows, leading = (
        [],
        {np.shape(leaf)[: np.ndim(leaf) - like.ndim] for (_, leaf), like in zip(given, leaves, strict=True)},
    )
    for (path, leaf), like in zip(given, leaves, strict=True):
        leaf = jnp.asarray(leaf)
        ahead = leaf.ndim - like.ndim
        if ahead not in (1, 2) or leaf.shape[ahead:] != like.shape or len(leading) > 1 or 0 in leaf.shape[:ahead]:
            raise ValueError(
                f"expected starts{jax.tree_util.keystr(path)} (starts, ...) or (batch, time, ...), each one a state "
                f"{like.shape}, got {leaf.shape}: add the missing axis, state[None] for a single one"
            )
        rows.append(leaf.reshape(-1, like.size).astype(like.dtype))
    states = jnp.concatenate(rows, axis=1)
    drawn = len(leading.pop()) == 2 and len(states) > count
    return jax.random.choice(key, states, (count,), replace=False) if drawn else states
