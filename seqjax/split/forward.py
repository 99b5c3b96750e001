"""Forward: a matrix product of all inputs of a chunk, then its loop with one product a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State, strong_type
from seqjax.guarded import last_output
from seqjax.native import run_forward, takes
from seqjax.split.chunks import Recurrence, choose_rows, cut_inputs, over_chunk, scan_once


def forward(
    how: Recurrence, params: Params, state: State, xs: PyTree, mask: Any, reset: Any
) -> tuple[tuple[State, PyTree], PyTree]:
    """Runs the sequence.

    Returns:
        (final state, what is kept (batch, time, ...)); and for the way back every state, (batch, time, ...), or where
        `how.recalls` the outputs and the state before each chunk, (chunks, batch, ...).
    """
    initial = initial_states(how.cell, params, state)
    in_loop = turned(params, state)
    recalls = how.recalls(mask)

    def chunk(state: State, start: Array, length: int) -> tuple[State, Any, Any]:
        x, valid, restart = cut_inputs(xs, mask, reset, start, length)
        drives = over_chunk(how.cell.drive)(params, x)
        after, (states, kept) = run_chunk(how, params, in_loop, initial, state, drives, valid, restart)
        return after, (None if recalls else states, kept), state if recalls else None

    final, (states, kept), first = how.chunks(xs).scan(chunk, state)
    return (final, kept), (first, kept) if recalls else (states, None)


def run_chunk(
    how: Recurrence,
    params: Params,
    in_loop: Params,
    initial: State,
    state: State,
    drives: PyTree,
    valid: Any,
    restart: Any,
) -> tuple[State, tuple[State, PyTree]]:
    """The loop over one chunk: the state after it; and every state with what is kept of it, (time, batch, ...).

    `in_loop` is `params` as `turned` lays them for XLA's loop, once for all chunks.
    """

    if takes(how.cell, params, state, drives, (valid, restart)):
        states = run_forward(how.cell, params, state, drives, how.reverse)
        last = jax.tree.map(lambda leaf: leaf[0 if how.reverse else -1], states)
        return last, (states, jax.tree.leaves(states)[0] if how.emit is last_output else states)

    def step(state: State, at: tuple[PyTree, Any, Any]) -> tuple[State, Any]:
        drive, valid, restart = at
        if restart is not None:
            state = choose_rows(restart, initial, state)
        recurrent = jax.vmap(how.recurrent, (None, 0, 0))(turned(in_loop, state), state, drive)
        after, kept = jax.vmap(how.guarded_advance)(state, drive, recurrent, valid)
        return after, (after, kept)

    return scan_once(step, state, (drives, valid, restart), how.reverse)


def initial_states(cell: Any, params: Params, state: State) -> State:
    """The state that a reset starts from, for every row of `state`."""
    own = strong_type(cell.initial_state(params))
    return jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf, like.shape), own, state)


def turned(params: Params, state: State) -> Params:
    """Every matrix transposed where `state` has several rows; turned again, the step sees W itself, a view of W^T.

    Their product with W^T is faster where W^T lies in memory, and a loop keeps what it is given: XLA on a CPU would
    turn W around at every step. Of one row the opposite is true.
    """
    if jax.tree.leaves(state)[0].shape[0] == 1:
        return params
    return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, params)
