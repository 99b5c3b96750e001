"""A sequence in chunks of time: slices of what comes in, and loops over the chunks.

Sequences have the axes (batch, time, ...). Inside a chunk the axes are (time, batch, ...), as `lax.scan` reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree


def chunk_length(batch: int, time: int) -> int:
    """A length with enough rows for a fast product and few steps; a divisor of the time if one is near."""
    if batch * time <= 1024:  # a loop over chunks would cost more than it saves
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

        The body returns the carry, its results for each step of the chunk, (length, batch, ...), and notes on the
        chunk. The results are written to their place in one array of the whole time. A result that occurs more than
        once is written once.

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
    """The distinct leaves of a traced tree, and the tree again from other values in their place."""

    def take(self, tree: PyTree) -> list[Array]:
        leaves, self.structure = jax.tree.flatten(tree)
        unique = list({id(leaf): leaf for leaf in leaves}.values())
        self.place = [next(i for i, other in enumerate(unique) if other is leaf) for leaf in leaves]
        return unique

    def put(self, unique: list[Array]) -> PyTree:
        return jax.tree.unflatten(self.structure, [unique[i] for i in self.place])


def scan_once(body: Callable[[Any, Any], tuple[Any, PyTree]], carry: Any, xs: Any, reverse: bool) -> tuple[Any, PyTree]:
    """`lax.scan` that stacks each distinct output once: an output is often the state."""
    once = _Once()

    def distinct(carry: Any, x: Any) -> tuple[Any, list[Array]]:
        carry, out = body(carry, x)
        return carry, once.take(out)

    carry, stacked = lax.scan(distinct, carry, xs, reverse=reverse)
    return carry, once.put(stacked)


def cut(tree: PyTree, start: Array, length: int) -> PyTree:
    """Steps start to start + length of leaves (batch, time, ...), as (time, batch, ...)."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(lax.dynamic_slice_in_dim(leaf, start, length, 1), 0, 1), tree)
