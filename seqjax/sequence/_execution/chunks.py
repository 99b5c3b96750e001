"""A sequence in chunks of time: slices of the inputs, and loops over the chunks.

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

from seqjax.kernels._exporting import target
from seqjax.sequence._sizes import is_known

Leaves = list[Any]  # of a tree of arrays; None for a leaf that is not there

ChunkBody = Callable[[Any, Array, int], tuple[Any, PyTree, PyTree]]


def has_launches() -> bool:
    """Whether each operation of a step is a launch, as on a GPU, so that the number of operations decides the time."""
    exported = target()
    return jax.default_backend() != "cpu" if exported is None else "cpu" not in exported.platforms


def chunk_length(batch: int, time: int) -> int:
    """A length with enough rows for a fast product and few chunks; a divisor of the time if one is near.

    An unknown time is one chunk, because the last one could be empty. An unknown batch counts as one row.
    """
    if not is_known(time):
        return time
    batch = batch if is_known(batch) else 1
    if batch * time <= 1024:  # a loop over chunks would cost more than it saves
        return time
    if has_launches():
        # A chunk costs about 30 launches, which is little beside 128 steps.
        wanted = min(time, max(128, 4096 // max(batch, 1)))
        return next((n for n in range(wanted, min(4 * wanted, time) + 1) if time % n == 0), wanted)
    # At least 16 steps and 256 rows, so that a product is large enough to be fast, and at most 64 chunks. A divisor
    # needs no second loop for a shorter chunk at the end, which would double the time to compile.
    wanted = min(time, max(16, -(-256 // max(batch, 1)), time // 64))
    return next((n for n in range(wanted, min(2 * wanted, time) + 1) if time % n == 0), wanted)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """`time` steps in chunks of `length`; the last chunk is shorter if the length does not divide the time."""

    time: int
    length: int
    reverse: bool

    def scan(self, body: ChunkBody, carry: PyTree, backward: bool = False) -> tuple[Any, PyTree, PyTree]:
        """Runs `body(carry, start, length)` over the chunks.

        The body returns the carry, its results for each step of the chunk, (length, batch, ...), and its results for
        the chunk. Those for each step are written into one array of the whole time. A result that occurs more than
        once is written once.

        Args:
            body: runs one chunk.
            carry: the carry before the first chunk.
            backward: whether the chunks run in the order of the backward pass, which is opposite to that of the cell.

        Returns:
            The carry, the results per step (batch, time, ...), and the results per chunk (chunks, ...) in the order of
            time.
        """
        reverse = self.reverse != backward
        if self.length == self.time:
            carry, steps, per_chunk = body(carry, jnp.asarray(0), self.length)
            steps = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps)
            return carry, steps, jax.tree.map(lambda leaf: leaf[None], per_chunk)
        distinct = _DistinctLeaves()
        shapes = jax.eval_shape(lambda c: distinct.take(body(c, jnp.asarray(0), self.length)[1]), carry)
        # Written in place and not stacked by `lax.scan`, because a stack (chunks, length, batch, ...) would have to be
        # copied to get (batch, time, ...).
        whole = [jnp.zeros((leaf.shape[1], self.time, *leaf.shape[2:]), leaf.dtype) for leaf in shapes]

        def run(state: tuple[Any, Leaves], start: Array, length: int) -> tuple[tuple[Any, Leaves], PyTree]:
            carry, whole = state
            carry, steps, per_chunk = body(carry, start, length)
            parts = [jnp.swapaxes(leaf, 0, 1) for leaf in distinct.take(steps)]
            whole = [lax.dynamic_update_slice_in_dim(w, p, start, 1) for w, p in zip(whole, parts, strict=True)]
            return (carry, whole), per_chunk

        (carry, whole), per_chunk = self._scan_all(run, (carry, whole), reverse)
        return carry, distinct.put(whole), per_chunk

    def _scan_all(self, run: Callable[..., tuple[Any, PyTree]], state: PyTree, reverse: bool) -> tuple[Any, PyTree]:
        """Runs the chunks of full length in a loop, and a shorter last chunk after it, or before it in reverse."""
        count, rest = divmod(self.time, self.length)

        def full(state: PyTree) -> tuple[Any, PyTree]:
            starts = jnp.arange(count) * self.length
            return lax.scan(lambda state, start: run(state, start, self.length), state, starts, reverse=reverse)

        def last(state: PyTree) -> tuple[Any, PyTree]:
            state, per_chunk = run(state, jnp.asarray(count * self.length), rest)
            return state, jax.tree.map(lambda leaf: leaf[None], per_chunk)

        parts: list[PyTree] = []
        for part in [full, last][: 1 + bool(rest)][:: -1 if reverse else 1]:
            state, per_chunk = part(state)
            parts.insert(0 if reverse else len(parts), per_chunk)
        return state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


class _DistinctLeaves:
    """The distinct leaves of a traced tree, and the tree rebuilt from other values for them."""

    def take(self, tree: PyTree) -> list[Array]:
        leaves, self.structure = jax.tree.flatten(tree)
        unique = list({id(leaf): leaf for leaf in leaves}.values())
        self.positions = [next(i for i, other in enumerate(unique) if other is leaf) for leaf in leaves]
        return unique

    def put(self, unique: list[Array]) -> PyTree:
        return jax.tree.unflatten(self.structure, [unique[i] for i in self.positions])


def scan_distinct(
    body: Callable[[Any, Any], tuple[Any, PyTree]], carry: PyTree, xs: PyTree, reverse: bool
) -> tuple[Any, PyTree]:
    """`lax.scan` that stacks each distinct output once: the output of a step is often also a leaf of its state.

    With launches it runs up to 8 steps in one iteration of the compiled loop, whose own launches they then share.
    """
    distinct = _DistinctLeaves()
    length = jax.tree.leaves(xs)[0].shape[0]
    is_many = has_launches() and is_known(length)
    unroll = max(n for n in range(1, 9) if length % n == 0) if is_many else 1

    def distinct_body(carry: PyTree, x: PyTree) -> tuple[Any, list[Array]]:
        carry, out = body(carry, x)
        return carry, distinct.take(out)

    carry, stacked = lax.scan(distinct_body, carry, xs, reverse=reverse, unroll=unroll)
    return carry, distinct.put(stacked)


def steps_of_chunk(tree: PyTree, start: Array, length: int) -> PyTree:
    """Steps start to start + length of leaves (batch, time, ...), as (time, batch, ...)."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(lax.dynamic_slice_in_dim(leaf, start, length, 1), 0, 1), tree)
