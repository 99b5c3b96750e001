"""The inclusive scan x_1, x_1 x_2, x_1 x_2 x_3, .. of an associative operation.

The sequence is divided into chunks. First the steps of each chunk are joined one after another, in all chunks at once.
Then the totals of the chunks are joined in log(number of chunks) sweeps. At last every step is joined with the total of
all chunks before its own.

This takes about two joins per step and a depth of CHUNK + log T. `jax.lax.associative_scan` takes two joins per step
and a depth of 2 log T, but its program contains the join 2 log T times. Here the program contains it three times, so
the compilation time does not grow with T.

Source: Blelloch 1990, "Prefix sums and their applications"; Kogge and Stone 1973 for the totals.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.sequence._sizes import is_known

CHUNK = 16  # steps


def prefix_scan(
    join: Callable[[PyTree, PyTree], PyTree],
    finish: Callable[[PyTree, PyTree], PyTree],
    steps: PyTree,
    reverse: bool = False,
) -> PyTree:
    """Computes `finish` of the join of x_1 .. x_t, for every t.

    Args:
        join: the associative operation (earlier, later) -> joined, on single steps.
        finish: (earlier, later) -> the needed part of join(earlier, later). In the first chunk, all leaves of `earlier`
            are zero, which must mean that there is nothing before.
        steps: x_1..x_T, leaves (time, ...).
        reverse: whether to join x_t .. x_T instead, with the last step as the earliest.

    Returns:
        The results of `finish`, leaves (time, ...).

    Example:
        >>> import jax.numpy as jnp
        >>> from seqjax.parallel._prefixes import prefix_scan
        >>> prefix_scan(jnp.add, jnp.add, jnp.arange(1.0, 6.0)).tolist()
        [1.0, 3.0, 6.0, 10.0, 15.0]
    """
    if reverse:
        return _reversed(prefix_scan(join, finish, _reversed(steps)))
    time = jax.tree.leaves(steps)[0].shape[0]
    length = min(CHUNK, time) if is_known(time) else CHUNK
    chunks = jax.tree.map(lambda leaf: _divide(leaf, length), steps)  # (length, chunks, ...)
    heads, rest = jax.tree.map(lambda leaf: leaf[0], chunks), jax.tree.map(lambda leaf: leaf[1:], chunks)

    def advance(joined: PyTree, step: PyTree) -> tuple[PyTree, PyTree]:
        joined = jax.vmap(join)(joined, step)
        return joined, joined

    totals, within = jax.lax.scan(advance, heads, rest)
    within = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), heads, within)
    earlier = jax.tree.map(_shift, _join_totals(jax.vmap(join), totals))
    results = jax.vmap(jax.vmap(finish), (None, 0))(earlier, within)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:time], results)


def _join_totals(join: Callable[[PyTree, PyTree], PyTree], totals: PyTree) -> PyTree:
    """The inclusive scan of the totals. Sweep k joins each with the one 2^k before it."""
    count = jax.tree.leaves(totals)[0].shape[0]
    if is_known(count) and count == 1:
        return totals

    def sweep(level: Array, totals: PyTree) -> PyTree:
        distance = jnp.left_shift(1, level)
        joined = join(jax.tree.map(lambda leaf: jnp.roll(leaf, distance, axis=0), totals), totals)
        # `roll` wraps around, so the first totals would be joined with the last ones.
        valid = jnp.arange(count) >= distance
        return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(valid, a, b), joined, totals)

    if is_known(count):
        return jax.lax.fori_loop(0, (count - 1).bit_length(), sweep, totals)
    return jax.lax.fori_loop(0, 32 - jax.lax.clz(jnp.asarray(count - 1, jnp.int32)), sweep, totals)


def _divide(leaf: Array, length: int) -> Array:
    """Reshapes (time, ...) to (length, chunks, ...), padded at the end with zeros."""
    time = leaf.shape[0]
    count = -(-time // length)
    leaf = jnp.concatenate([leaf, jnp.zeros_like(leaf, shape=(count * length - time, *leaf.shape[1:]))])
    return jnp.swapaxes(leaf.reshape(count, length, *leaf.shape[1:]), 0, 1)


def _shift(leaf: Array) -> Array:
    """The total before each chunk, and zero before the first."""
    return jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf[:-1]])


def _reversed(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[::-1], tree)
