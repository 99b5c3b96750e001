"""Forward: the drive of a whole chunk at once, then a loop with one product per cut and step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.sequence._execution.chunks import Chunks, chunk_length, cut, scan_once
from seqjax.sequence._execution.kernel import Kernel
from seqjax.sequence._partition.parts import Parts

Leaves = list[Any]


def over_chunk(f: Callable[..., Any], shape: tuple[int, int], *axes: int | None) -> Callable[..., Any]:
    """A function of one example at one time as a function of a chunk, (time, batch, ...)."""
    return jax.vmap(jax.vmap(f, axes, axis_size=shape[1]), axes, axis_size=shape[0])


def forward(
    parts: Parts, kernel: Kernel | None, reverse: bool, params: Leaves, state: Leaves, xs: Leaves
) -> tuple[tuple[Leaves, Leaves], tuple[Leaves, Leaves]]:
    """Runs one loop of a step over a batch of sequences.

    Args:
        parts: the loop.
        kernel: what runs it instead of XLA, if anything does.
        reverse: right to left.
        params: the parameters, what the cell closes over first.
        state: the state before the first step, (batch, ...).
        xs: the inputs, (batch, time, ...).

    Returns:
        (after, kept): the state after the last step, and what is kept of each step, (batch, time, ...); and for the
        backward pass the leaves of each state that the cuts read, and the state before each chunk.
    """
    batch, time = xs[0].shape[:2]
    hoisted = parts.hoist(params)
    products = parts.products_in_loop(hoisted, batch)

    def chunk(state: Leaves, start: Array, length: int) -> tuple[Leaves, Any, Leaves]:
        inputs = over_chunk(parts.without_biases, (length, batch), None, 0)(hoisted, cut(xs, start, length))
        return *run_chunk(parts, kernel, reverse, hoisted, products, state, inputs, length), state

    after, (seen, kept), first = Chunks(time, chunk_length(batch, time), reverse).scan(chunk, state)
    return (after, kept), (seen, first)


def run_chunk(
    parts: Parts,
    kernel: Kernel | None,
    reverse: bool,
    hoisted: Any,
    products: Callable[[int, Array], Array],
    state: Leaves,
    inputs: Leaves,
    length: int,
) -> tuple[Leaves, tuple[Leaves, Leaves]]:
    """The loop over one chunk.

    Args:
        parts, kernel, reverse: as for `forward`.
        hoisted: from `parts.hoist`.
        products: from `parts.products_in_loop`.
        state: the state before the chunk, (batch, ...).
        inputs: the passed values without their biases, (time, batch, ...).
        length: of the chunk, in steps.

    Returns:
        The state after the chunk; the leaves of each state that the cuts read, and what is kept of each step, (time,
        batch, ...).
    """

    def seen(states: Leaves) -> Leaves:
        return [leaf for leaf, is_seen in zip(states, parts.seen, strict=True) if is_seen]

    if kernel is not None:
        states = kernel.forward(hoisted[1], state, parts.with_biases(hoisted, inputs), reverse)
        kept = [states[leaf] for leaf in kernel.kept]
        return [leaf[0 if reverse else -1] for leaf in states], (seen(states), kept)

    def step(state: Leaves, at: Any) -> tuple[Leaves, Any]:
        inputs, _ = at  # the number of the step is there because there may be no inputs
        drives = parts.with_biases(hoisted, inputs)
        after, kept = jax.vmap(lambda state, drives: parts.finish(hoisted, state, drives, products))(state, drives)
        return after, (seen(after), kept)

    return scan_once(step, state, (inputs, jnp.arange(length)), reverse)
