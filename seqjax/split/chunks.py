"""A sequence in chunks of time: slices of what comes in, and loops over the chunks.

Sequences come and go as (batch, time, ...); inside a chunk everything is (time, batch, ...), as `lax.scan` reads it.
Only a chunk is ever turned around, not the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State, recalled, same_state_type
from seqjax.guarded import Emit, choose, new_state, zeros_like


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What is fixed while a sequence runs.

    Args:
        cell: a split cell.
        emit: what is kept of a step: `last_output` or `new_state`.
        reverse: right to left.
    """

    cell: Any
    emit: Emit
    reverse: bool = False

    def chunks(self, xs: PyTree) -> Chunks:
        """How the time of `xs` is cut."""
        batch, time = jax.tree.leaves(xs)[0].shape[:2]
        return Chunks(time, chunk_length(batch, time), self.reverse)

    def recalls(self, mask: Any) -> bool:
        """Whether outputs are saved instead of states, which come again from them without a product.

        So it is where the recurrent product reads no more of a state than the output; and where no mask makes the
        output zero.
        """
        return recalled(self.cell) is not None and mask is None and self.emit is not new_state

    @property
    def is_nested(self) -> bool:
        """Whether a second product stands inside the step, v = inner(s, d, r) between the two."""
        return hasattr(self.cell, "inner")

    def recurrent(self, params: Params, state: State, drive: PyTree) -> PyTree:
        """What `advance` reads of one example's state: its recurrent product, or both of them."""
        product = self.cell.recur(params, state)
        if not self.is_nested:
            return product
        return product, self.cell.recur_inner(params, self.cell.inner(state, drive, product))

    def guarded_advance(self, state: State, drive: PyTree, recurrent: PyTree, valid: Any) -> tuple[State, PyTree]:
        """`cell.advance` for one example and what is kept of it, as `seqjax.guarded` means a mask."""
        after, output = self.cell.advance(state, drive, recurrent)
        after = same_state_type(self.cell, after, state)
        if valid is not None:
            after = choose(valid, after, state)
        if self.emit is new_state:
            return after, after
        return after, output if valid is None else choose(valid, output, zeros_like(output))


def chunk_length(batch: int, time: int) -> int:
    """Enough rows for a good matrix product, few steps beside the whole time, and a divisor of it where one is near."""
    if batch * time <= 1024:  # so little that a loop over chunks would be felt
        return time
    wanted = min(time, max(16, -(-256 // max(batch, 1)), time // 64))
    return next((n for n in range(wanted, min(2 * wanted, time) + 1) if time % n == 0), wanted)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """`time` steps in chunks of `length`, and a shorter one at the end where it does not divide the time."""

    time: int
    length: int
    reverse: bool

    def scan(
        self, body: Callable[[Any, Array, int], tuple[Any, PyTree, PyTree]], carry: Any, back: bool = False
    ) -> Any:
        """Runs `body(carry, start, length)` over the chunks, in the direction of time or back.

        The body returns the carry, what it makes of every step of its chunk, (length, batch, ...), and what it notes of
        the chunk. The steps are written to where they belong in one array of the whole time, once where they stand more
        than once, so that no second copy is ever turned around.

        Returns:
            The carry, the steps (batch, time, ...), and the notes (chunks, ...) in the order of time.
        """
        reverse = self.reverse != back
        count, rest = divmod(self.time, self.length)
        if self.length == self.time:
            carry, made, notes = body(carry, jnp.asarray(0), self.length)
            turned = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), made)
            return carry, turned, jax.tree.map(lambda leaf: leaf[None], notes)
        steps = _Once()
        first = jax.eval_shape(lambda c: steps.take(body(c, jnp.asarray(0), self.length)[1]), carry)
        whole = [jnp.zeros((leaf.shape[1], self.time, *leaf.shape[2:]), leaf.dtype) for leaf in first]

        def run(state: Any, start: Array, length: int) -> tuple[Any, PyTree]:
            carry, whole = state
            carry, made, notes = body(carry, start, length)
            parts = [jnp.swapaxes(leaf, 0, 1) for leaf in steps.take(made)]
            return (
                carry,
                [lax.dynamic_update_slice_in_dim(w, p, start, 1) for w, p in zip(whole, parts, strict=True)],
            ), notes

        def loop(state: Any) -> tuple[Any, PyTree]:
            starts = jnp.arange(count) * self.length
            return lax.scan(lambda state, start: run(state, start, self.length), state, starts, reverse=reverse)

        def tail(state: Any) -> tuple[Any, PyTree]:
            state, notes = run(state, jnp.asarray(count * self.length), rest)
            return state, jax.tree.map(lambda leaf: leaf[None], notes)

        state, parts = (carry, whole), []
        for piece in [loop, tail][: 1 + bool(rest)][:: -1 if reverse else 1]:
            state, notes = piece(state)
            parts.insert(0 if reverse else len(parts), notes)
        return state[0], steps.put(state[1]), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


class _Once:
    """The leaves of a traced tree with each value once, and the tree again from others in their place."""

    def take(self, tree: PyTree) -> list[Array]:
        leaves, self.structure = jax.tree.flatten(tree)
        unique = list({id(leaf): leaf for leaf in leaves}.values())
        self.place = [next(i for i, other in enumerate(unique) if other is leaf) for leaf in leaves]
        return unique

    def put(self, unique: list[Array]) -> PyTree:
        return jax.tree.unflatten(self.structure, [unique[i] for i in self.place])


def scan_once(body: Callable[[Any, Any], tuple[Any, PyTree]], carry: Any, xs: Any, reverse: bool) -> tuple[Any, PyTree]:
    """`lax.scan` that stacks a value once, however often it stands in the outputs: an output is often the state."""
    once = _Once()

    def distinct(carry: Any, x: Any) -> tuple[Any, list[Array]]:
        carry, out = body(carry, x)
        return carry, once.take(out)

    carry, stacked = lax.scan(distinct, carry, xs, reverse=reverse)
    return carry, once.put(stacked)


def cut(tree: PyTree, start: Array, length: int) -> PyTree:
    """Steps start to start + length of leaves (batch, time, ...), as (time, batch, ...)."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(lax.dynamic_slice_in_dim(leaf, start, length, 1), 0, 1), tree)


def cut_inputs(xs: PyTree, mask: Any, reset: Any, start: Array, length: int) -> tuple[PyTree, Any, Any]:
    """A chunk of the inputs, zero where masked, and of the flags."""
    x, valid, restart = cut((xs, mask, reset), start, length)
    return (x if valid is None else choose_rows(valid, x, zeros_like(x))), valid, restart


def choose_rows(flags: Array, yes: PyTree, no: PyTree) -> PyTree:
    """`choose` where every flag stands for all of what lies behind its axes."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(flags.reshape(flags.shape + (1,) * (jnp.ndim(a) - flags.ndim)), a, b)

    return jax.tree.map(select, yes, no)


def over_chunk(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of (params, one example at one time) for a whole chunk at once."""
    return jax.vmap(jax.vmap(function, (None, 0)), (None, 0))
