"""One time step with its mask and reset, which define what these two mean for every function over a sequence.

- mask: where False, the state stays the same, the output is zero, and the input reaches neither values nor gradients.
  The input is set to zero before the step, and not only after it, because a NaN that `jnp.where` discards still has a
  NaN gradient. So a cell must be differentiable at x = 0.
- reset: where True, the initial state replaces the state before the step. It replaces the state and does not multiply
  it by zero, so a NaN in the state is gone too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State, optional, output_of, same_state_type, strong_type

# (params, s_{t-1}, x_t, s_t, o_t) -> what an unroll returns of step t
Emit = Callable[[Params, State, PyTree, State, Output], PyTree]


class Inputs(NamedTuple):
    """Everything that a step reads besides parameters and state, for whole sequences or for one step of one example.

    Attributes:
        x: the cell's input, leaves (batch, time, ...) or (...).
        mask: whether a step is valid, (batch, time) or (); None if all steps are.
        reset: whether the state starts anew before a step, (batch, time) or (); None if it never does.
        noise: what the cell's `noise` drew, leaves (batch, time, ...) or (...); None for a deterministic step.
    """

    x: PyTree
    mask: Array | None = None
    reset: Array | None = None
    noise: PyTree = None

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return jax.tree.leaves(self.x)[0].shape[0]

    @property
    def time(self) -> int:
        """The number of steps of the padded sequences."""
        return jax.tree.leaves(self.x)[0].shape[1]


def emit_output(params: Params, before: State, x: PyTree, after: State, output: Output) -> PyTree:
    """The output o_t of the step: what `unroll` returns."""
    return output


def emit_state(params: Params, before: State, x: PyTree, after: State, output: Output) -> PyTree:
    """The state s_t of the step: what `trajectory` returns."""
    return after


def emit_nothing(params: Params, before: State, x: PyTree, after: State, output: Output) -> tuple[()]:
    """Nothing: for a caller that needs only the new state."""
    return ()


def masked_step(
    cell: Cell, params: Params, state: State, inputs: Inputs, emit: Emit = emit_output
) -> tuple[State, PyTree]:
    """`cell.step` for one example at one time, with mask, reset and noise.

    Args:
        cell, params: any cell.
        state: s_{t-1}.
        inputs: of one example at one time.
        emit: selects what an unroll returns of the step.

    Returns:
        s_t, and what `emit` selects. In a step that is not valid the latter is zero, except for the state.
    """
    x, valid, restart, noise = inputs
    if restart is not None:
        state = select(restart, strong_type(cell.initial_state(params)), state)
    if valid is not None:
        x = select(valid, x, zeros_like(x))
    noisy_step: Any = cell.step  # of a cell with a method `noise`, whose step has a fourth argument
    stepped = cell.step(params, state, x) if noise is None else noisy_step(params, state, x, noise)
    after, output = output_of(cell, stepped)
    after = same_state_type(cell, after, state)
    if valid is not None:
        after = select(valid, after, state)
    emitted = emit(params, state, x, after, output)
    if valid is not None and emit is not emit_state:
        emitted = select(valid, emitted, zeros_like(emitted))
    return after, emitted


def draw_noise(cell: Cell, key: Array | None, batch: int, time: int) -> PyTree:
    """The noise of every step, leaves (batch, time, ...); None without a key or if the cell draws none."""
    draw = optional(cell, "noise")
    if key is None or draw is None:
        return None
    return jax.vmap(jax.vmap(draw))(jax.random.split(key, (batch, time)))


def select(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """One tree or the other, for one example."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def zeros_like(tree: PyTree) -> PyTree:
    """A tree of zeros."""
    return jax.tree.map(jnp.zeros_like, tree)
