"""Compiled backward passes through a trajectory: the gradient of a loss, and gradients from chosen times by lag.

A gradient is stored as 2^exponent times numbers near one, and its norm is returned as a logarithm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from seqjax.analysis._flow import Sequences, flat_map, orthonormal, random_frame
from seqjax.analysis._scaled import rescale, rescale_rows, to_common_scale
from seqjax.cell import Cell

# Block iteration for the largest singular value: columns, QRs, and products before each QR. At every lag it starts from
# the columns of the previous lag, so a few products are enough.
RITZ, RITZ_ROUNDS, RITZ_POWER = 8, 3, 4


def log_loss_gradients(cell: Cell, sequences: Sequences, states: Array, arriving: Array) -> tuple[Array, list[Array]]:
    """ln |dL/ds_t| for t = 0..T, for the whole state and for each field, from one backward pass.

    Args:
        cell: any cell.
        sequences: parameters and inputs.
        states: s_0..s_T, (batch, T + 1, n).
        arriving: dl_t/ds_t, the direct gradient of the loss at each step, (batch, T, n).

    Returns:
        (batch, T + 1), and the same for each field.
    """
    flat, params = flat_map(cell, sequences.params), sequences.params
    parts = flat.parts.values()

    def logs(g: Array, exponent: Array) -> Array:
        sizes = [_norm(g), *(_norm(g[part]) for part in parts)]
        return jnp.log(jnp.stack(sizes)) + exponent.astype(g.dtype) * math.log(2)

    def one_sequence(states: Array, inputs: PyTree, arriving: Array) -> Array:
        def back(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], Array]:
            (g, exponent), (v, x, direct) = carry, at
            g, direct, exponent = to_common_scale(g, exponent, *rescale_rows(direct, jnp.zeros((), jnp.int32)))
            g = g + direct
            log_norm = logs(g, exponent)
            return rescale_rows(flat.pull(params, v, g[None], x)[0], exponent), log_norm

        start = (jnp.zeros_like(states[0]), jnp.zeros((), jnp.int32))
        first, rest = jax.lax.scan(back, start, (states[:-1], inputs, arriving), reverse=True)
        return jnp.concatenate([logs(*first)[None], rest])

    log_norms = jax.vmap(one_sequence)(states, sequences.inputs, arriving)
    return log_norms[..., 0], [log_norms[..., i + 1] for i in range(len(parts))]


class Pulled(NamedTuple):
    """Gradients at s_t that were pulled back to s_{t-k}, for every sequence and every time t.

    Attributes:
        rows: (batch, times, rows, n), scaled.
        exponent: (batch, times), of the power of two that scales them.
        best: (batch, times, columns, rows), approximate left singular vectors of `rows`.
    """

    rows: Array
    exponent: Array
    best: Array


def pulled_by_zero(frame: Array, batch: int, times: int) -> Pulled:
    """The rows of a frame (rows, n) as the gradients at every time."""
    best = random_frame(jax.random.key(0), min(RITZ, len(frame)), len(frame), frame.dtype)

    def for_all(leaf: ArrayLike) -> Array:
        return jnp.asarray(np.broadcast_to(np.asarray(leaf), (batch, times, *np.shape(leaf))))

    return Pulled(for_all(frame), for_all(np.zeros((), np.int32)), for_all(best))


def norms_by_lag(
    cell: Cell, count: int, sequences: Sequences, states: Array, ends: Array, first_lag: Array, pulled: Pulled
) -> tuple[Pulled, tuple[Array, Array, Array]]:
    """ln of the expected and of the worst norm of ds_t/ds_{t-k} at `count` lags, and the expected one by field.

    Args:
        cell: any cell.
        count: the number of lags k.
        sequences: parameters and inputs.
        states: s_0..s_T, (batch, T + 1, n).
        ends: the times t, (batch, times).
        first_lag: the smallest of the lags.
        pulled: the gradients at s_{t-k} for the first lag.

    Returns:
        The gradients for the next lag, and three arrays (batch, times, count), the last one (batch, times, fields,
        count); values before the beginning of the sequence are NaN.
    """
    flat, params = flat_map(cell, sequences.params), sequences.params
    parts = flat.parts.values()

    def norms(rows: Array, exponent: Array, best: Array) -> tuple[PyTree, Array]:
        scale, root = exponent.astype(rows.dtype) * math.log(2), math.sqrt(rows.shape[0])

        def iterate(_: ArrayLike, best: Array) -> Array:
            for _ in range(RITZ_POWER):
                best = best @ rows @ rows.T
            return orthonormal(best)[0]

        best = jax.lax.fori_loop(0, RITZ_ROUNDS, iterate, best)
        largest = jnp.linalg.norm(best @ rows, 2)
        by_part = jnp.stack([jnp.log(_norm(rows[:, part]) / root) for part in parts])
        return (jnp.log(_norm(rows) / root) + scale, jnp.log(largest) + scale, by_part + scale), best

    def one_time(states: Array, inputs: PyTree, end: Array, pulled: Pulled) -> tuple[Pulled, PyTree]:
        def back(pulled: Pulled, lag: Array) -> tuple[Pulled, PyTree]:
            rows, exponent, best = pulled
            t = end - lag  # rows are gradients at s_t
            at_lag, best = norms(rows, exponent, best)
            before = jnp.maximum(t - 1, 0)  # negative indices would wrap around; these lags become NaN below
            x = jax.tree.map(lambda leaf: leaf[before], inputs)
            rows, shift = rescale(flat.pull(params, states[before], rows, x))
            at_lag = jax.tree.map(lambda leaf: jnp.where(t >= 0, leaf, jnp.nan), at_lag)
            return Pulled(rows, exponent + shift, best), at_lag

        return jax.lax.scan(back, pulled, first_lag + jnp.arange(count))

    over_times = jax.vmap(one_time, in_axes=(None, None, 0, 0))
    pulled, (expected, worst, by_part) = jax.vmap(over_times)(states, sequences.inputs, ends, pulled)
    return pulled, (expected, worst, jnp.moveaxis(by_part, -1, 2))


def _norm(values: Array) -> Array:
    """The Euclidean norm, scaled so that no square underflows or overflows."""
    largest = jnp.max(jnp.abs(values))
    # A scale of zero or infinity would turn a zero or infinite norm into NaN.
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum((values / scale) ** 2))


def is_nonlinear(cell: Cell, sequences: Sequences, states: Array) -> Array:
    """Whether the derivative of the step depends on the state.

    If it does not, as in a linear cell, rounding errors of the state grow but do not change any gradient.
    """
    flat, params = flat_map(cell, sequences.params), sequences.params
    first = jax.tree.map(lambda leaf: leaf[0, 0], sequences.inputs)
    frame = jnp.ones((1, sequences.size), sequences.first.dtype) / math.sqrt(sequences.size)
    early, late = (flat.push(params, v, frame, first)[1] for v in (states[0, 0], states[0, -1]))
    return jnp.any(jnp.abs(early - late) > 1e-3 * jnp.max(jnp.abs(early)))
