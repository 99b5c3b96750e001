"""One step with its flags: what a mask and a reset mean, for every function over a sequence and every gradient.

- mask, where False: the state is held, the output is zero, and the input reaches neither values nor gradients. The
  input is replaced by zeros before the step and not only after it, since a NaN that is selected away still has a NaN
  gradient; so a cell must be differentiable at x = 0.
- reset, where True: the state is replaced by the initial one before the step. Replaced and not multiplied by zero, so
  a state that holds NaN is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State, output_of, same_state_type, strong_type

Emit = Callable[[Params, State, PyTree, State, Output], PyTree]  # (params, s_{t-1}, x_t, s_t, o_t) -> what is kept of t


def last_output(params: Params, before: State, x: PyTree, after: State, output: Output) -> PyTree:
    """Keeps o_t: what `unroll` keeps of each step."""
    return output


def new_state(params: Params, before: State, x: PyTree, after: State, output: Output) -> PyTree:
    """Keeps s_t: what `trajectory` keeps of each step."""
    return after


def guarded_step(
    cell: Cell,
    params: Params,
    state: State,
    x: PyTree,
    valid: Array | None,
    restart: Array | None,
    noise: PyTree = None,
    emit: Emit = last_output,
) -> tuple[State, PyTree]:
    """`cell.step` for one example at one time with its flags and noise.

    None stands for always valid, never reset, deterministic.

    Returns the new state and what `emit` keeps of the step: zero where not valid, except for the state, held there.
    """
    if restart is not None:
        state = choose(restart, strong_type(cell.initial_state(params)), state)
    if valid is not None:
        x = choose(valid, x, zeros_like(x))
    noisy_step: Any = cell.step  # of a cell with a method `noise`, whose step takes a fourth argument
    stepped = cell.step(params, state, x) if noise is None else noisy_step(params, state, x, noise)
    after, output = output_of(cell, stepped)
    after = same_state_type(cell, after, state)
    if valid is not None:
        after = choose(valid, after, state)
    kept = emit(params, state, x, after, output)
    if valid is not None and emit is not new_state:
        kept = choose(valid, kept, zeros_like(kept))
    return after, kept


def drawn_noise(cell: Cell, key: Array | None, batch: int, time: int) -> PyTree:
    """The noise of every step, (batch, time, ...), where there is a key and the cell draws some; otherwise None."""
    draw = getattr(cell, "noise", None)
    if key is None or draw is None:
        return None
    return jax.vmap(jax.vmap(draw))(jax.random.split(key, (batch, time)))


def choose(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """One tree or the other, for one example."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def zeros_like(tree: PyTree) -> PyTree:
    """A tree of zeros."""
    return jax.tree.map(jnp.zeros_like, tree)
