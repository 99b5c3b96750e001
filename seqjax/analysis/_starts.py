"""The input and the initial states of a search for fixed points, checked, or drawn by default."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.analysis._flow import flat_map
from seqjax.cell import Cell, Params, State, optional, strong_type


class Starts(NamedTuple):
    """The initial states of a search as vectors.

    Attributes:
        states: (m, n).
        forward: (m,), whether the state is run forward before the descent.
        words: how many there are, and where they come from.
    """

    states: Float[Array, "m n"]
    forward: Bool[np.ndarray, " m"]
    words: str


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


def flat_starts(
    cell: Cell, params: Params, starts: State | None, count: int, key: Array, scale: float, steps: int
) -> Starts:
    """The initial states of a search.

    Args:
        cell, params: any cell and its parameters.
        starts: leaves (m, ...); or a trajectory, leaves (batch, time + 1, ...), of which `count` states are drawn; or
            None for states around the initial one.
        count: the number of drawn states.
        key: for drawing them.
        scale: the standard deviation of states around the initial one.
        steps: the largest number of steps that a drawn state is run forward; 0 for none.

    Raises:
        ValueError: the starts are not states of the cell, or there is none.
    """
    initial = strong_type(cell.initial_state(params))
    flat = flat_map(cell, params).ravel(initial)
    if starts is None:
        forward = (np.arange(count) < (count + 1) // 2) & (steps > 0)
        return Starts(_around(flat, forward, key, scale), forward, _words(int(forward.sum()), count, steps))
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
    words = f"{count} of {len(states)} given states" if is_long_trajectory else f"{len(states)} given states"
    if is_long_trajectory:
        states = jax.random.choice(key, states, (count,), replace=False)
    return Starts(states, np.zeros(len(states), bool), words)


def _around(initial: Array, forward: np.ndarray, key: Array, scale: float) -> Array:
    """The initial state, and normally distributed states around it of several magnitudes, (count, n).

    The largest standard deviation is scale sqrt(n). Only then is the component of a random state in a given direction
    about as large as that of an attractor, whose n units act together. Only states that are run forward are so large,
    because Newton's method fails where gates are saturated: from states of scale n^(1/4) in a GRU of 64 units, half of
    the descents used up 200 iterations.
    """
    noise = jax.random.normal(key, (len(forward), initial.size), initial.dtype)
    power = np.where(forward, np.resize([0, 1 / 4, 0, 1 / 2], len(forward)), 0)
    magnitude = scale * initial.size**power
    magnitude[0] = 0
    return initial[None] + jnp.asarray(magnitude, initial.dtype)[:, None] * noise


def _words(forward: int, count: int, steps: int) -> str:
    run = f"{forward} {_states(forward)} run forward for up to {steps} steps"
    drawn = f"{count - forward} random {'state' if count - forward == 1 else 'states'}"
    return " and ".join([drawn] * (count > forward) + [run] * (forward > 0))


def _states(count: int) -> str:
    return "state that was" if count == 1 else "states that were"
