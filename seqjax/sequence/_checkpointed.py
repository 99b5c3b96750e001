"""An unroll in chunks of time. A gradient saves only the states between the chunks and runs each chunk a second time.

With chunks of sqrt(T) steps backpropagation through time needs the memory of 2 sqrt(T) states instead of T (Chen et al.
2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import State
from seqjax.sequence._sizes import is_known


def run_checkpointed(
    run: Callable[..., tuple[State, PyTree]], every: int, reverse: bool, state: State, sequences: PyTree
) -> tuple[State, PyTree]:
    """Unrolls chunk by chunk.

    Args:
        run: from a state and sequences to the state after them and the outputs of their steps.
        every: the number of steps of one chunk. The last chunk may be shorter.
        reverse: whether to run from the last chunk to the first.
        state: the state before the first chunk, (batch, ...).
        sequences: the sequences that `run` reads, leaves (batch, time, ...).

    Returns:
        The same as one call of `run` over the whole time.

    Raises:
        ValueError: the time is unknown, and it is not known to be a multiple of `every`.
    """
    time = jax.tree.leaves(sequences)[0].shape[1]
    count = time // every
    if not is_known(time % every):
        raise ValueError(
            f"expected a time that is a multiple of checkpoint_every={every}, got the unknown time {time}: "
            f'export it for the time "{every}*n", or with checkpoint_every=None'
        )
    # Inside a scan XLA cannot merge the second run with the first, so the barrier that prevents it is not needed.
    chunk = jax.checkpoint(lambda state, part: run(state, part), prevent_cse=False)

    def cut(leaf: Array) -> Array:
        return jnp.moveaxis(leaf[:, : count * every].reshape(leaf.shape[0], count, every, *leaf.shape[2:]), 1, 0)

    def join(leaf: Array) -> Array:
        return jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])

    def full(state: State) -> tuple[State, PyTree]:
        state, outputs = jax.lax.scan(chunk, state, jax.tree.map(cut, sequences), reverse=reverse)
        return state, jax.tree.map(join, outputs)

    def last(state: State) -> tuple[State, PyTree]:
        return chunk(state, jax.tree.map(lambda leaf: leaf[:, count * every :], sequences))

    if count == 0 or time % every == 0:
        return (full if count else last)(state)
    state, first_run = (last if reverse else full)(state)
    state, second_run = (full if reverse else last)(state)
    in_order = (second_run, first_run) if reverse else (first_run, second_run)
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *in_order)
