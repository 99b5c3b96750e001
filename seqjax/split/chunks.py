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

from seqjax.cell import Params, State, same_state_type
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
        return hasattr(self.cell, "recalled") and mask is None and self.emit is not new_state

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
    wanted = min(time, max(16, -(-256 // max(batch, 1)), time // 64))
    return next((n for n in range(wanted, min(2 * wanted, time) + 1) if time % n == 0), wanted)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """`time` steps in chunks of `length`, and a shorter one at the end where it does not divide the time."""

    time: int
    length: int
    reverse: bool

    def scan(self, body: Callable[[Any, Array, int], tuple[Any, PyTree]], carry: Any, back: bool = False) -> Any:
        """`lax.scan` of `body(carry, start, length)` over the chunks, in the direction of time or back.

        What it returns beside the carry is joined along the first axis, in the order of time.
        """
        reverse = self.reverse != back
        count, rest = divmod(self.time, self.length)

        def whole(carry: Any) -> tuple[Any, Any]:
            if count == 1:
                return body(carry, jnp.asarray(0), self.length)
            starts = jnp.arange(count) * self.length
            carry, out = scan_once(lambda c, start: body(c, start, self.length), carry, starts, reverse)
            return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

        def tail(carry: Any) -> tuple[Any, Any]:
            return body(carry, jnp.asarray(count * self.length), rest)

        if not rest:
            return whole(carry)
        carry, one = (tail if reverse else whole)(carry)
        carry, other = (whole if reverse else tail)(carry)
        first, last = (other, one) if reverse else (one, other)
        return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


def scan_once(body: Callable[[Any, Any], tuple[Any, PyTree]], carry: Any, xs: Any, reverse: bool) -> tuple[Any, PyTree]:
    """`lax.scan` that stacks a value once, however often it stands in the outputs: an output is often the state."""
    structure: Any = None
    place: list[int] = []

    def distinct(carry: Any, x: Any) -> tuple[Any, list[Array]]:
        nonlocal structure, place
        carry, out = body(carry, x)
        leaves, structure = jax.tree.flatten(out)
        unique = list({id(leaf): leaf for leaf in leaves}.values())
        place = [next(i for i, other in enumerate(unique) if other is leaf) for leaf in leaves]
        return carry, unique

    carry, stacked = lax.scan(distinct, carry, xs, reverse=reverse)
    return carry, jax.tree.unflatten(structure, [stacked[i] for i in place])


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
