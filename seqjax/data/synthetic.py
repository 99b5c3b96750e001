"""Tasks that need memory. The loss without memory has a closed form (Hochreiter and Schmidhuber 1997)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cells.arguments import check_key
from seqjax.cells.whole_numbers import whole_number
from seqjax.data.batch import Batch

ADDING_BASELINE = 1 / 6  # the variance of the sum of two U[0, 1], which is the mean squared error of the constant 1


def adding_problem(key: Array, batch: int, time: int) -> Iterator[Batch]:
    """The adding problem: the target is the sum of two marked numbers, one in each half of the sequence.

    Args:
        key: a random key.
        batch: sequences per batch.
        time: steps per sequence, at least 2.

    Yields:
        `Batch`, endlessly. xs (batch, time, 2) are numbers in [0, 1] and their marks, 0 or 1; targets are (batch, 1).
        The constant prediction 1 has a mean squared error of 1/6, `ADDING_BASELINE`.

    Raises:
        ValueError: `time` is below 2.

    Source: Hochreiter and Schmidhuber 1997, in the form of Le, Jaitly and Hinton 2015.

    Example:
        >>> import jax, seqjax as sj
        >>> batch = next(sj.data.adding_problem(jax.random.key(0), batch=3, time=10))
        >>> bool(((batch.xs[..., 0] * batch.xs[..., 1]).sum(1) == batch.targets[:, 0]).all())
        True
    """
    batch = whole_number("batch", batch)
    time = whole_number("time", time, 2, expected="time of at least 2 for two marked numbers")
    return _stream(partial(_adding, batch, time), key)


def copy_memory(key: Array, batch: int, delay: int, symbols: int = 8) -> Iterator[Batch]:
    """The copy task: repeat ten symbols after a delay. The input is 10 symbols, `delay` - 1 blanks, a cue, 10 blanks.

    The token of a blank is 0, the symbols are 1..symbols, and the cue is symbols + 1. The target is blank until
    after the cue, and then the ten symbols.

    Args:
        key: a random key.
        batch: sequences per batch.
        delay: T, steps from the last symbol to the cue, at least 1.
        symbols: the number of different symbols.

    Yields:
        `Batch`, endlessly, with xs and targets (batch, delay + 20). The loss without memory is `copy_baseline`.

    Raises:
        ValueError: `delay` or `symbols` is below 1.

    Source: Arjovsky, Shah and Bengio 2016.

    Example:
        >>> import jax, seqjax as sj
        >>> batch = next(sj.data.copy_memory(jax.random.key(0), batch=3, delay=5))
        >>> bool((batch.xs[:, :10] == batch.targets[:, -10:]).all()), batch.xs.shape
        (True, (3, 25))
    """
    batch, delay = whole_number("batch", batch), whole_number("delay", delay)
    symbols = whole_number("symbols", symbols)
    return _stream(partial(_copy, batch, delay, symbols), key)


def copy_baseline(delay: int, symbols: int = 8) -> float:
    """10 ln(symbols) / (delay + 20) nats per step: the loss of a model without memory, which guesses the ten symbols.

    Example:
        >>> import seqjax as sj
        >>> round(sj.data.copy_baseline(100), 5), round(sj.data.copy_baseline(200), 5)
        (0.17329, 0.09452)
    """
    return 10 * math.log(whole_number("symbols", symbols)) / (whole_number("delay", delay) + 20)


def _stream(draw: Callable[[Array], tuple[Array, Array]], key: Array) -> Iterator[Batch]:
    draw, key = jax.jit(draw), check_key(key)

    def stream() -> Iterator[Batch]:
        # Batch n depends only on the key and on n, not on the batches before it.
        for n in itertools.count():
            yield Batch(*draw(jax.random.fold_in(key, n)))

    return stream()


def _adding(batch: int, time: int, key: Array) -> tuple[Array, Array]:
    def one(key: Array) -> tuple[Array, Array]:
        key_numbers, key_first, key_second = jax.random.split(key, 3)
        numbers = jax.random.uniform(key_numbers, (time,))
        # One mark per half, so that the two marks never coincide.
        first = jax.random.randint(key_first, (), 0, time // 2)
        second = jax.random.randint(key_second, (), time // 2, time)
        marks = jnp.zeros(time).at[jnp.stack([first, second])].set(1.0)
        return jnp.stack([numbers, marks], axis=1), jnp.sum(numbers * marks)[None]

    return jax.vmap(one)(jax.random.split(key, batch))


def _copy(batch: int, delay: int, symbols: int, key: Array) -> tuple[Array, Array]:
    message = jax.random.randint(key, (batch, 10), 1, symbols + 1)
    blank = partial(jnp.zeros, dtype=message.dtype)
    cue = jnp.full((batch, 1), symbols + 1, message.dtype)
    xs = jnp.concatenate([message, blank((batch, delay - 1)), cue, blank((batch, 10))], axis=1)
    return xs, jnp.concatenate([blank((batch, delay + 10)), message], axis=1)
