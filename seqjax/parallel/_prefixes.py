"""Running joins x_1, x_1 x_2, x_1 x_2 x_3, .. of an associative operation, in few sweeps over the sequence.

The sequence is cut into blocks. Within them joins run one after another, in all blocks at once; the totals of the
blocks are joined in log sweeps; and then every step is joined with what came before its block. That is some two joins
a step and a depth of BLOCK + log T, where `jax.lax.associative_scan` has two joins and 2 log T. It writes the join
three times and not 2 log T times, so that the time to compile does not grow with T.

Source: Blelloch 1990, "Prefix sums and their applications"; Kogge and Stone 1973 for the totals.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

BLOCK = 16  # steps


def running_joins(
    join: Callable[[PyTree, PyTree], PyTree],
    finish: Callable[[PyTree, PyTree], PyTree],
    steps: PyTree,
    reverse: bool = False,
) -> PyTree:
    """What `finish` keeps of x_1 .. x_t, for every t.

    Args:
        join: (earlier, later) -> both as one; associative, on single steps.
        finish: what is wanted of `join`. Where nothing came before, `earlier` is zero in all its parts.
        steps: x_1..x_T, leaves (time, ...).
        reverse: x_t .. x_T instead, of which the end comes first.

    Returns:
        What `finish` returns, leaves (time, ...).

    Example:
        >>> import jax.numpy as jnp
        >>> from seqjax.parallel._prefixes import running_joins
        >>> running_joins(jnp.add, jnp.add, jnp.arange(1.0, 6.0)).tolist()
        [1.0, 3.0, 6.0, 10.0, 15.0]
    """
    if reverse:
        return _turned(running_joins(join, finish, _turned(steps)))
    time = len(jax.tree.leaves(steps)[0])
    length = min(BLOCK, time)
    blocks = jax.tree.map(lambda leaf: _cut(leaf, length), steps)  # (length, blocks, ...)
    heads, rest = jax.tree.map(lambda leaf: leaf[0], blocks), jax.tree.map(lambda leaf: leaf[1:], blocks)

    def onward(carried: PyTree, step: PyTree) -> tuple[PyTree, PyTree]:
        carried = jax.vmap(join)(carried, step)
        return carried, carried

    totals, inner = jax.lax.scan(onward, heads, rest)
    inner = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), heads, inner)
    earlier = jax.tree.map(_delayed, _joined_totals(jax.vmap(join), totals))
    found = jax.vmap(jax.vmap(finish), (None, 0))(earlier, inner)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:time], found)


def _joined_totals(join: Callable[[PyTree, PyTree], PyTree], totals: PyTree) -> PyTree:
    count = len(jax.tree.leaves(totals)[0])
    if count == 1:
        return totals

    def sweep(level: Array, totals: PyTree) -> PyTree:
        distance = jnp.left_shift(1, level)
        joined = join(jax.tree.map(lambda leaf: jnp.roll(leaf, distance, axis=0), totals), totals)
        reaches = jnp.arange(count) >= distance
        return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(reaches, a, b), joined, totals)

    return jax.lax.fori_loop(0, (count - 1).bit_length(), sweep, totals)


def _cut(leaf: Array, length: int) -> Array:
    """(time, ...) as (length, blocks, ...), filled up at the end with zeros."""
    more = -len(leaf) % length
    leaf = jnp.concatenate([leaf, jnp.zeros_like(leaf, shape=(more, *leaf.shape[1:]))])
    return jnp.swapaxes(leaf.reshape(-1, length, *leaf.shape[1:]), 0, 1)


def _delayed(leaf: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf[:-1]])


def _turned(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[::-1], tree)
