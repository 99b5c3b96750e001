"""Frames of perturbations that are pushed along a trajectory: the interval between two QRs, and what is lost there.

Between two QRs all columns turn towards the fastest direction. With eps the rounding error of the dtype, a column that
has shrunk by 1/eps relative to the fastest one is lost: its values are rounding errors that look like a result. So the
interval is chosen from growth rates that were measured with a QR at every step, and every block is checked afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.analysis._flow import Sequences, flat_map, flat_trajectory, orthonormal, pad_with_masked_steps
from seqjax.cell import Cell
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._masked_step import Inputs
from seqjax.sequence._partition.tracing import shapes_of_one

LONGEST = 100  # steps between two QRs; longer intervals save no more time, because a QR is then cheap


def check_count(k: int | None, size: int) -> int:
    """Returns the number of directions, 1 to the size of the state; None means 8, or all of a smaller state.

    Raises:
        ValueError: `k` is not a whole number in this range.
    """
    if k is None:
        return min(8, size)
    return whole_number("k", k, 1, size, f"k={size} gives all", expected=f"k from 1 to the {size} numbers of the state")


def log_diagonal(R: Array) -> Array:
    """Summarizes a block by ln R_ii, (k,), which Lyapunov exponents need."""
    return jnp.log(jnp.diagonal(R))


def triangular_factor(R: Array) -> Array:
    """Summarizes a block by R itself, (k, k), which the singular values of the product need."""
    return R


def final_states(cell: Cell, sequences: Sequences) -> Array:
    """The states after the last step, (batch, n)."""
    flat, params = flat_map(cell, sequences.params), sequences.params

    def one_sequence(v: Array, inputs: Inputs) -> Array:
        return jax.lax.scan(lambda v, at: (flat.step(params, v, at), None), v, inputs)[0]

    return jax.vmap(one_sequence)(sequences.first, sequences.inputs)


def sweep(
    cell: Cell, every: int, summarize: Callable[[Array], Array], sequences: Sequences, states: Array, frames: Array
) -> tuple[Array, Array, Array]:
    """Pushes frames through blocks of `every` steps, with V^T = Q R after each block.

    A reset sets the state to the initial one but does not change the frame. So the growth rates are those of the steps.

    Args:
        cell: any cell.
        every: the number of steps in a block; it divides the time.
        summarize: computes what is returned of each block from its R.
        sequences: parameters and inputs; `first` is not used.
        states: before the first step, (batch, n).
        frames: orthonormal rows, (batch, k, n).

    Returns:
        The states and the frames at the end, and the summaries, (batch, blocks, ...).
    """
    flat, params = flat_map(cell, sequences.params), sequences.params
    initial = flat.start(params)
    push = flat.pusher(params, frames.shape[1], shapes_of_one(sequences.inputs._replace(reset=None), 2))

    def one_sequence(v: Array, frame: Array, inputs: Inputs) -> tuple[Array, Array, Array]:
        def one_step(carry: tuple[Array, Array], at: Inputs) -> tuple[tuple[Array, Array], None]:
            v, frame = carry
            # The reset is applied outside the step, whose Jacobian would be zero and end the frame.
            if at.reset is not None:
                v = jnp.where(at.reset, initial, v)
            return push(v, frame, at._replace(reset=None)), None

        def one_block(carry: tuple[Array, Array], inputs: Inputs) -> tuple[tuple[Array, Array], Array]:
            (v, frame), _ = jax.lax.scan(one_step, carry, inputs)
            frame, R = orthonormal(frame)
            return (v, frame), summarize(R)

        blocks = jax.tree.map(lambda leaf: leaf.reshape(len(leaf) // every, every, *leaf.shape[1:]), inputs)
        (v, frame), summaries = jax.lax.scan(one_block, (v, frame), blocks)
        return v, frame, summaries

    return jax.vmap(one_sequence)(states, frames, sequences.inputs)


def divided(sequences: Sequences, every: int) -> PyTree:
    """The inputs in chunks of about sqrt(time * every) steps, (chunks, batch, steps, ...), padded with masked steps.

    A backward pass stores only the states before each chunk, so its memory grows with the square root of the time.
    """
    blocks = math.isqrt(math.ceil(sequences.time / every) - 1) + 1 if sequences.time > every else 1
    steps = every * blocks
    count = math.ceil(sequences.time / steps)
    inputs = pad_with_masked_steps(sequences, count * steps).inputs

    def split(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(sequences.batch, count, steps, *leaf.shape[2:]), 0, 1)

    return jax.tree.map(split, inputs)


class Pushed(NamedTuple):
    """M V^T = Q R_m ... R_1, by chunks.

    Attributes:
        starts: the states before each chunk, (chunks, batch, n).
        frames: the frames before each chunk, rows (chunks, batch, k, n).
        last: the frames after the last chunk, (batch, k, n).
        factors: R of every block, (batch, blocks, k, k).
    """

    starts: Array
    frames: Array
    last: Array
    factors: Array


def push_frames(cell: Cell, every: int, sequences: Sequences, frames: Array) -> Pushed:
    """Pushes frames through all steps, with a QR after every block of `every` steps."""

    def chunk(carry: tuple[Array, Array], inputs: PyTree) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        states, frames = carry
        part = sequences._replace(inputs=inputs)
        after, pushed, factors = sweep(cell, every, triangular_factor, part, states, frames)
        return (after, pushed), (states, frames, factors)

    (_, last), (starts, before, factors) = jax.lax.scan(chunk, (sequences.first, frames), divided(sequences, every))
    chunks, batch, blocks, k, _ = factors.shape
    return Pushed(starts, before, last, jnp.swapaxes(factors, 0, 1).reshape(batch, chunks * blocks, k, k))


def pull_frames(cell: Cell, every: int, sequences: Sequences, starts: Array, frames: Array) -> Array:
    """Pulls frames back through all steps, Q_0 = qr(M^T Q); each chunk's states are recomputed from its start.

    As in `sweep`, a reset sets the state but does not change the frame.

    Returns:
        The frames before each chunk, rows (chunks, batch, k, n).
    """
    flat, params = flat_map(cell, sequences.params), sequences.params
    initial = flat.start(params)

    def one_sequence(frame: Array, before: Array, inputs: PyTree) -> Array:
        def one_step(frame: Array, at: tuple[Array, Inputs]) -> tuple[Array, None]:
            v, inputs = at
            if inputs.reset is not None:
                v = jnp.where(inputs.reset, initial, v)
            return flat.pull(params, v, frame, inputs._replace(reset=None)), None

        def one_block(frame: Array, at: PyTree) -> tuple[Array, None]:
            return orthonormal(jax.lax.scan(one_step, frame, at, reverse=True)[0])[0], None

        blocks = jax.tree.map(lambda leaf: leaf.reshape(len(leaf) // every, every, *leaf.shape[1:]), (before, inputs))
        return jax.lax.scan(one_block, frame, blocks, reverse=True)[0]

    def chunk(frames: Array, at: tuple[Array, PyTree]) -> tuple[Array, Array]:
        first, inputs = at
        before = flat_trajectory(cell, Sequences(params, first, inputs))[:, :-1]
        frames = jax.vmap(one_sequence)(frames, before, inputs)
        return frames, frames

    return jax.lax.scan(chunk, frames, (starts, divided(sequences, every)), reverse=True)[1]


def probed_interval(cell: Cell, sequences: Sequences, frames: Array) -> int:
    """The safe number of steps between two QRs, from the growth rates of the first 32 steps."""
    _, _, logs = precise_jit(sweep, cell, 1, log_diagonal)(
        sequences.until(min(sequences.time, 32)), sequences.first, frames
    )
    return safe_interval(np.asarray(logs, np.float64), sequences.first.dtype)


def safe_interval(logs: np.ndarray, dtype: DTypeLike) -> int:
    """The number of steps between two QRs in which columns keep three quarters of their digits and do not overflow.

    Args:
        logs: ln R_ii of single steps, (batch, steps, k). Directions that a step has lost are ignored.
        dtype: of the frame.

    Returns:
        The interval, 1 to `LONGEST` steps.
    """
    alive = ~lost_directions(logs, dtype).any(axis=(0, 1))
    rates = logs[:, :, alive].mean(axis=1)
    # Without a rate to trust, a QR at every step is always safe.
    if not rates.size or not np.isfinite(rates).all():
        return 1
    # Both terms are below the limits of `strain`, so that a block that grows faster than the mean still passes.
    per_step = np.max(np.ptp(rates, axis=1)) / (0.25 * _log_precision(dtype))
    per_step += np.max(np.abs(rates)) / (0.4 * _log_range(dtype))
    return int(np.clip(1 / max(per_step, 1e-6), 1, LONGEST))


def power_of_two(steps: int) -> int:
    """The largest power of two that is not above `steps`, so that similar networks share compiled programs."""
    return 1 << (steps.bit_length() - 1)


def strain(logs: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """The use of precision and range in each sequence's worst block, relative to what is safe, (batch,).

    A value of 1 means that columns lost 2/5 of their digits, or used 4/5 of the range; infinity means not finite.
    """
    finite = np.asarray(np.isfinite(logs).all(axis=(1, 2)))
    logs = np.where(finite[:, None, None], logs, 0.0)
    lost_digits = np.ptp(logs, axis=-1).max(axis=1) / (0.4 * _log_precision(dtype))
    used_range = np.abs(logs).max(axis=(1, 2)) / (0.8 * _log_range(dtype))
    return np.where(finite, np.maximum(lost_digits, used_range), math.inf)


def lost_directions(logs: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Whether one step shrank a direction below the rounding error of the fastest one, by ln R_ii (..., k)."""
    top = np.max(logs, axis=-1, keepdims=True)
    # The rounding errors of a QR of k columns are a small multiple of k eps.
    below = logs < top - (_log_precision(dtype) - math.log(4 * logs.shape[-1]))
    return below | np.isneginf(logs)


def _log_precision(dtype: DTypeLike) -> float:
    """ln 1/eps."""
    return -math.log(float(jnp.finfo(dtype).eps))


def _log_range(dtype: DTypeLike) -> float:
    return math.log(float(jnp.finfo(dtype).max))
