"""An unroll in pieces of time, of which a gradient keeps only the states between them and runs each once more.

With pieces of sqrt(T) steps the memory of backpropagation through time is that of 2 sqrt(T) states instead of T (Chen
et al. 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import State


def run_checkpointed(
    run: Callable[..., tuple[State, PyTree]], every: int, reverse: bool, state: State, sequences: PyTree
) -> tuple[State, PyTree]:
    """Unrolls piece by piece.

    Args:
        run: of a state and sequences, the state after them and what is kept of them.
        every: the steps of one piece; the last one may be shorter.
        reverse: from the last piece to the first.
        state: the state before the first piece, (batch, ...).
        sequences: what `run` takes, leaves (batch, time, ...).

    Returns:
        What one call of `run` over the whole time would.
    """
    time = jax.tree.leaves(sequences)[0].shape[1]
    count = time // every
    # In a loop nothing can be merged with the first run, so the barrier against it may go.
    piece = jax.checkpoint(lambda state, part: run(state, part), prevent_cse=False)

    def cut(leaf: Array) -> Array:
        return jnp.moveaxis(leaf[:, : count * every].reshape(leaf.shape[0], count, every, *leaf.shape[2:]), 1, 0)

    def whole(state: State) -> tuple[State, PyTree]:
        state, kept = jax.lax.scan(piece, state, jax.tree.map(cut, sequences), reverse=reverse)
        return state, jax.tree.map(lambda k: jnp.moveaxis(k, 0, 1).reshape(k.shape[1], -1, *k.shape[3:]), kept)

    def rest(state: State) -> tuple[State, PyTree]:
        return piece(state, jax.tree.map(lambda leaf: leaf[:, count * every :], sequences))

    if count == 0 or time % every == 0:
        return (whole if count else rest)(state)
    state, one = (rest if reverse else whole)(state)
    state, other = (whole if reverse else rest)(state)
    first, last = (other, one) if reverse else (one, other)
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, last)
