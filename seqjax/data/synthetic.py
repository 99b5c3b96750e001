"""Tasks that need memory, with the score of doing nothing known in closed form (Hochreiter and Schmidhuber 1997)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.data.batch import Batch

ADDING_BASELINE = 1 / 6  # the variance of the sum of two U[0, 1]: the mean squared error of always answering 1


def adding_problem(key: Array, batch: int, time: int) -> Iterator[Batch]:
    """The sum of the two marked numbers among `time`: one mark falls in each half of the sequence.

    Args:
        key: a random key.
        batch: sequences in a batch.
        time: steps in a sequence, at least 2.

    Yields:
        Without end, `Batch` with xs (batch, time, 2), a number in [0, 1] and its mark, and targets (batch, 1). Always
        answering 1 has a mean squared error of 1/6, `ADDING_BASELINE`.

    Raises:
        ValueError: `time` is below 2.

    Source: Hochreiter and Schmidhuber 1997; the form used here is that of Le, Jaitly and Hinton 2015.

    Example:
        >>> import jax, seqjax as sj
        >>> batch = next(sj.data.adding_problem(jax.random.key(0), batch=3, time=10))
        >>> bool(((batch.xs[..., 0] * batch.xs[..., 1]).sum(1) == batch.targets[:, 0]).all())
        True
    """
    if time < 2:
        raise ValueError(f"expected time of at least 2 for two marked numbers, got {time}")
    return _stream(partial(_adding, batch, time), key)


def copy_memory(key: Array, batch: int, delay: int, symbols: int = 8) -> Iterator[Batch]:
    """Ten symbols to be repeated after a delay: 10 symbols, `delay` - 1 blanks, a cue, 10 blanks.

    Tokens are 0 for blank, 1..symbols, and symbols + 1 for the cue; the target is blank until the cue has come and then
    the ten symbols.

    Args:
        key: a random key.
        batch: sequences in a batch.
        delay: T, steps from the last symbol to the cue, at least 1.
        symbols: how many different ones.

    Yields:
        Without end, `Batch` with xs and targets (batch, delay + 20). Remembering nothing costs `copy_baseline`.

    Raises:
        ValueError: `delay` is below 1.

    Source: Arjovsky, Shah and Bengio 2016.

    Example:
        >>> import jax, seqjax as sj
        >>> batch = next(sj.data.copy_memory(jax.random.key(0), batch=3, delay=5))
        >>> bool((batch.xs[:, :10] == batch.targets[:, -10:]).all()), batch.xs.shape
        (True, (3, 25))
    """
    if delay < 1 or symbols < 1:
        raise ValueError(f"expected delay and symbols of at least 1, got {delay} and {symbols}")
    return _stream(partial(_copy, batch, delay, symbols), key)


def copy_baseline(delay: int, symbols: int = 8) -> float:
    """10 ln(symbols) / (delay + 20): nats a step of a model that knows when to speak but remembers nothing.

    Example:
        >>> import seqjax as sj
        >>> round(sj.data.copy_baseline(100), 5), round(sj.data.copy_baseline(200), 5)
        (0.17329, 0.09452)
    """
    return 10 * math.log(symbols) / (delay + 20)


def _stream(draw, key: Array) -> Iterator[Batch]:
    draw = jax.jit(draw)
    n = 0
    while True:
        xs, targets = draw(jax.random.fold_in(key, n))
        yield Batch(xs, targets)
        n += 1


def _adding(batch: int, time: int, key: Array) -> tuple[Array, Array]:
    def one(key: Array) -> tuple[Array, Array]:
        key_numbers, key_first, key_second = jax.random.split(key, 3)
        numbers = jax.random.uniform(key_numbers, (time,))
        first = jax.random.randint(key_first, (), 0, time // 2)
        second = jax.random.randint(key_second, (), time // 2, time)
        marks = jnp.zeros(time).at[jnp.stack([first, second])].set(1.0)
        return jnp.stack([numbers, marks], axis=1), jnp.sum(numbers * marks)[None]

    return jax.vmap(one)(jax.random.split(key, batch))


def _copy(batch: int, delay: int, symbols: int, key: Array) -> tuple[Array, Array]:
    said = jax.random.randint(key, (batch, 10), 1, symbols + 1)
    blank = partial(jnp.zeros, dtype=said.dtype)
    cue = jnp.full((batch, 1), symbols + 1, said.dtype)
    xs = jnp.concatenate([said, blank((batch, delay - 1)), cue, blank((batch, 10))], axis=1)
    return xs, jnp.concatenate([blank((batch, delay + 10)), said], axis=1)
