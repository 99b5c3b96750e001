"""A frame of perturbations carried along a trajectory: how often it must be made orthonormal, and what is lost if not.

Between two QRs the columns lean towards the fastest direction. With eps the rounding error of the dtype, a column that
has shrunk by 1/eps beside the fastest one is lost, and what stands in its place is rounding error that looks like a
number. So the interval is chosen from rates that were measured with a QR at every step, and every block is looked at
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.analysis._flow import Driven, flat_initial, flat_step, orthonormal, push
from seqjax.cell import Cell

LONGEST = 100  # steps between two QRs, where the columns hardly lean at all


def check_count(k: int | None, size: int) -> int:
    """How many directions, 1 to the size of the state; by default 8, or all of a smaller state.

    Raises:
        ValueError: there are not so many.
    """
    if k is None:
        return min(8, size)
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= size:
        raise ValueError(f"expected k from 1 to the {size} numbers of the state, got {k!r}: k={size} gives all")
    return int(k)


def log_diagonal(R: Array) -> Array:
    """Keeps ln R_ii of a block, (k,): what exponents need."""
    return jnp.log(jnp.diagonal(R))


def whole_factor(R: Array) -> Array:
    """Keeps R of a block, (k, k): what the singular values of the product need."""
    return R


def advance(cell: Cell, given: Driven) -> Array:
    """The states after the given steps, (batch, n)."""
    step = flat_step(cell, given.params)

    def one(v: Array, inputs: PyTree) -> Array:
        return jax.lax.scan(lambda v, at: (step(given.params, v, at), None), v, inputs)[0]

    return jax.vmap(one)(given.first, given.inputs)


def sweep(
    cell: Cell, every: int, keep: Callable[[Array], Array], given: Driven, states: Array, frames: Array
) -> tuple[Array, Array, Array]:
    """Pushes frames through blocks of `every` steps, V^T = Q R after each.

    A reset moves the state to the initial one and leaves the frame as it is, so that rates are those of the steps.

    Args:
        cell: any cell.
        every: steps of a block; it divides the time.
        keep: what is kept of each block's R.
        given: the inputs; its `first` is not used.
        states: before the first step, (batch, n).
        frames: orthonormal rows, (batch, k, n).

    Returns:
        The states and the frames at the end, and what was kept, (batch, blocks, ...).
    """
    step = flat_step(cell, given.params)
    fresh = flat_initial(cell, given.params)

    def one(v: Array, frame: Array, inputs: PyTree) -> tuple[Array, Array, Array]:
        def pushed(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], None]:
            (v, frame), (x, valid, restart) = carry, at
            if restart is not None:
                v = jnp.where(restart, fresh, v)
            return push(step, given.params, v, frame, (x, valid, None)), None

        def block(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], Array]:
            (v, frame), _ = jax.lax.scan(pushed, carry, at)
            frame, R = orthonormal(frame)
            return (v, frame), keep(R)

        blocks = jax.tree.map(lambda leaf: leaf.reshape(len(leaf) // every, every, *leaf.shape[1:]), inputs)
        (v, frame), kept = jax.lax.scan(block, (v, frame), blocks)
        return v, frame, kept

    return jax.vmap(one)(states, frames, given.inputs)


def sweep_all(
    cell: Cell, keep: Callable[[Array], Array], every: int, given: Driven, states: Array, frames: Array
) -> Array:
    """What `sweep` keeps over any number of steps, (batch, blocks, ...): the last block holds what is left over."""
    whole = given.time - given.time % every
    kept = []
    for start, stop, each in ((0, whole, every), (whole, given.time, given.time - whole)):
        if start < stop:
            states, frames, more = sweep(cell, each, keep, given.between(start, stop), states, frames)
            kept.append(more)
    return jnp.concatenate(kept, axis=1)


def counted_steps(given: Driven, every: int) -> np.ndarray:
    """Valid steps in each block of `sweep_all`, (batch, blocks)."""
    mask = given.inputs[1]
    valid = np.ones((given.batch, given.time), bool) if mask is None else np.asarray(mask)
    ends = [*range(every, given.time + 1, every)]
    if given.time % every:
        ends.append(given.time)
    return np.diff(np.cumsum(valid, axis=1)[:, np.array(ends) - 1], axis=1, prepend=0)


def safe_interval(logs: np.ndarray, dtype: DTypeLike) -> int:
    """Steps between two QRs within which columns keep three quarters of their digits and overflow nowhere.

    Args:
        logs: ln R_ii of single steps, (batch, steps, k). Directions that some step has lost are not looked at.
        dtype: of the frame.

    Returns:
        The interval, 1 to `LONGEST` steps.
    """
    alive = ~lost_directions(logs, dtype).any(axis=(0, 1))
    rates = logs[:, :, alive].mean(axis=1)
    if not rates.size or not np.isfinite(rates).all():
        return 1
    per_step = np.max(np.ptp(rates, axis=1)) / (0.25 * _digits(dtype)) + np.max(np.abs(rates)) / (0.4 * _range(dtype))
    return int(np.clip(1 / max(per_step, 1e-6), 1, LONGEST))


def strain(logs: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """How far each sequence's worst block went, 1 for as far as is safe: 2/5 of the digits, 4/5 of the range."""
    finite = np.asarray(np.isfinite(logs).all(axis=(1, 2)))
    logs = np.where(finite[:, None, None], logs, 0.0)
    leant = np.ptp(logs, axis=-1).max(axis=1) / (0.4 * _digits(dtype))
    return np.where(finite, np.maximum(leant, np.abs(logs).max(axis=(1, 2)) / (0.8 * _range(dtype))), math.inf)


def lost_directions(logs: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Where a single step shrank a direction below the rounding error of the fastest one."""
    top = np.max(logs, axis=-1, keepdims=True)
    below = logs < top - (_digits(dtype) - math.log(4 * logs.shape[-1]))
    return below | np.isneginf(logs)


def _digits(dtype: DTypeLike) -> float:
    return -math.log(float(jnp.finfo(dtype).eps))


def _range(dtype: DTypeLike) -> float:
    return math.log(float(jnp.finfo(dtype).max))
