"""Sequences in another order of their steps: without held steps, with these at the beginning, or only a span.

A held step is one whose mask is False. It changes neither the state nor a perturbation, so it is no time: burn-ins,
lags and blocks count valid steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from seqjax.sequence._masked_step import Inputs

if TYPE_CHECKING:
    from seqjax.analysis._flow import Sequences
else:  # needed only in annotations
    Sequences = Any


def without_held_steps(inputs: Inputs) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """Moves the valid steps of each sequence to its beginning, in their order, and cuts what is held in all sequences.

    A reset at a held step acts on the state before the next valid step.

    Args:
        inputs: leaves (batch, time, ...).

    Returns:
        The inputs of as many steps as the longest sequence has valid ones, with a mask if another sequence has fewer;
        the number of each step in the original sequence, from 1, (batch, steps); and the number of valid steps up to
        each original step, (batch, time + 1).
    """
    batch, time = inputs.batch, inputs.time
    if inputs.mask is None:
        steps = np.broadcast_to(np.arange(time + 1), (batch, time + 1))
        return inputs, steps[:, 1:], steps
    mask = np.asarray(inputs.mask)
    position = np.concatenate([np.zeros((batch, 1), int), np.cumsum(mask, axis=1)], axis=1)
    longest = max(1, int(position[:, -1].max()))
    order = np.argsort(~mask, axis=1, kind="stable")[:, :longest]
    moved = _in_order(inputs, order)
    if np.asarray(moved.mask).all():
        moved = moved._replace(mask=None)
    return moved, order + 1, position


def valid_steps_first(inputs: Inputs) -> tuple[Inputs, Array]:
    """`without_held_steps` for traced arrays, which keeps the padded time; and the number of valid steps, (batch,)."""
    if inputs.mask is None:
        return inputs, jnp.full(inputs.batch, inputs.time, jnp.int32)
    order = jnp.argsort(~inputs.mask, axis=1, stable=True)
    return _in_order(inputs, order), inputs.mask.sum(1, dtype=jnp.int32)


def valid_steps_last(sequences: Sequences) -> tuple[Sequences, Int[np.ndarray, "batch time"]]:
    """Moves the valid steps of every sequence to its end, in their order, so that lag k is k valid steps.

    A reset at a held step acts before the next valid step. After the last valid step it has no effect.

    Returns:
        The sequences, and the index of each step in the former order.
    """
    inputs, shape = sequences.inputs, (sequences.batch, sequences.time)
    if inputs.mask is None:
        return sequences, np.broadcast_to(np.arange(sequences.time), shape)
    order = np.argsort(np.asarray(inputs.mask), axis=1, kind="stable")
    return sequences._replace(inputs=_in_order(inputs, order)), order


def spans(sequences: Sequences, starts: np.ndarray, stops: np.ndarray) -> Sequences:
    """The steps starts[b]+1..stops[b] of each row b, moved to its beginning; `first` does not change."""
    longest = max(1, int((stops - starts).max()))
    index = np.minimum(starts[:, None] + np.arange(longest), sequences.time - 1)
    valid = np.arange(longest) < (stops - starts)[:, None]
    inputs = jax.tree.map(lambda leaf: _steps(leaf, index), sequences.inputs)
    return sequences._replace(inputs=inputs._replace(mask=None if valid.all() else jnp.asarray(valid)))


def _in_order(inputs: Inputs, order: Any) -> Inputs:
    """The steps `order` of each row, in which valid steps keep their order, with the resets before them."""
    xp: Any = jnp if isinstance(order, Tracer) else np
    x, mask = jax.tree.map(lambda leaf: _steps(leaf, order), (inputs.x, inputs.mask))
    reset = None
    if inputs.reset is not None:
        count = xp.take_along_axis(xp.cumsum(xp.asarray(inputs.reset), axis=1), order, axis=1)
        # Held steps count as zero, so that the difference at the next valid step has the resets at them.
        reset = jnp.asarray(xp.diff(xp.where(xp.asarray(mask), count, 0), axis=1, prepend=0) > 0)
    return Inputs(x, mask, reset)


def _steps(leaf: Array, order: Any) -> Array:
    """The steps `order` of each row; by numpy, which compiles nothing, unless it is traced or holds random keys."""
    if isinstance(order, Tracer) or isinstance(leaf, Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf[jnp.arange(len(leaf))[:, None], order]
    return jnp.asarray(np.asarray(leaf)[np.arange(len(leaf))[:, None], order])
