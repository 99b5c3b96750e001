"""The input and the initial states of a search for fixed points, checked, or drawn by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from seqjax.analysis._flow import flat_map
from seqjax.cell import Cell, Params, State, optional, strong_type


def check_input(cell: Cell, x: PyTree) -> PyTree:
    """Returns the input of one step as arrays; zeros for None.

    Raises:
        ValueError: its shape is not the cell's, or it is None and the cell has no `input_shape`.
    """
    shape = optional(cell, "input_shape")
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
                f"got {leaf.shape}: call the search once for each constant input"
            )
    return x


def flat_starts(cell: Cell, params: Params, starts: State | None, count: int, key: Array, scale: float) -> Array:
    """The initial states of a search as vectors, (m, n).

    Args:
        cell, params: any cell and its parameters.
        starts: leaves (m, ...); or a trajectory, leaves (batch, time + 1, ...), of which `count` states are drawn; or
            None for normally distributed states around the initial one.
        count: the number of drawn states.
        key: for drawing them.
        scale: the standard deviation of states around the initial one.

    Raises:
        ValueError: the starts are not states of the cell, or there is none.
    """
    initial = strong_type(cell.initial_state(params))
    flat = flat_map(cell, params).ravel(initial)
    if starts is None:
        noise = jax.random.normal(key, (count, flat.size), flat.dtype)
        return flat[None] + jnp.asarray(scale, flat.dtype) * noise
    leaves, tree = jax.tree_util.tree_flatten_with_path(starts)
    initial_leaves, initial_tree = jax.tree.flatten(initial)
    if tree != initial_tree:
        raise ValueError(
            f"expected starts that are states of {type(cell).__name__}, {initial_tree}, got {tree}: "
            f"stack some, leaves (starts, ...), or pass sj.trajectory(cell, params, xs)"
        )
    # The axes before a state must be the same in all leaves, or rows of different states would be combined.
    pairs = list(zip(leaves, initial_leaves, strict=True))
    leading = {np.shape(leaf)[: np.ndim(leaf) - like.ndim] for (_, leaf), like in pairs}
    rows = []
    for (path, leaf), like in pairs:
        leaf = jnp.asarray(leaf)
        ahead = leaf.ndim - like.ndim
        if ahead not in (1, 2) or leaf.shape[ahead:] != like.shape or len(leading) > 1 or 0 in leaf.shape[:ahead]:
            raise ValueError(
                f"expected starts{jax.tree_util.keystr(path)} (starts, ...) or (batch, time, ...), each one a state "
                f"{like.shape}, got {leaf.shape}: add the missing axis, state[None] for a single one"
            )
        rows.append(leaf.reshape(-1, like.size).astype(like.dtype))
    states = jnp.concatenate(rows, axis=1)
    is_long_trajectory = len(leading.pop()) == 2 and len(states) > count
    return jax.random.choice(key, states, (count,), replace=False) if is_long_trajectory else states
