"""Sequences without their padding: steps whose mask is False moved to the beginning, where they change nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from seqjax.analysis._flow import Sequences


def valid_steps_last(sequences: Sequences) -> tuple[Sequences, Int[np.ndarray, "batch time"]]:
    """Moves the valid steps of every sequence to its end, in their order, so that lag k is k valid steps.

    A reset at a step that is not valid acts before the next valid step. After the last valid step it has no effect.

    Returns:
        The sequences, and the index of each step in the former order.
    """
    inputs, shape = sequences.inputs, (sequences.batch, sequences.time)
    if inputs.mask is None:
        return sequences, np.broadcast_to(np.arange(sequences.time), shape)
    order = np.argsort(np.asarray(inputs.mask), axis=1, kind="stable")
    moved = jax.tree.map(lambda leaf: jax.vmap(lambda row, index: row[index])(leaf, jnp.asarray(order)), inputs)
    if inputs.reset is not None:
        valid = np.take_along_axis(np.asarray(inputs.mask), order, axis=1)
        resets = np.take_along_axis(np.cumsum(np.asarray(inputs.reset), axis=1), order, axis=1) * valid
        new = np.diff(resets, axis=1, prepend=0) > 0
        moved = moved._replace(reset=jnp.asarray(new & valid))
    return sequences._replace(inputs=moved), order
