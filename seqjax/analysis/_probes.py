"""Trajectories from other initial states, and derivatives against finite differences, along recorded sequences."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqjax.analysis._flow import DIRECTION, STARTS, Sequences, flat_map, normal_numbers, random_frame
from seqjax.analysis._gradient_traces import is_nonlinear
from seqjax.analysis._recording import Recording
from seqjax.cell import Cell
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._masked_step import Inputs

NEARBY = 0.01  # the first distance of the nearby trajectory, relative to the size of the states
CHECKED = 8  # steps at which a derivative is compared with finite differences


class Probes(NamedTuple):
    """What was measured beside exponents and gradients, for each sequence.

    Attributes:
        size: (batch,), the root mean square of |s_t|; 1 if all states are zero.
        movement: (batch,), the largest |s_t - s_{t-1}| in the second half, relative to the size.
        rates: (batch, fields), the growth of each field of the state over the second half, in nats per step.
        nearby: (batch, T + 1), the distance of a trajectory that starts nearby, relative to the size.
        others: (batch, starts, T + 1), the same for other initial states.
        nonlinear: whether the derivative depends on the state.
        flat: (batch,), whether the derivative is zero at all checked steps, although the step depends on the state.
        mismatch: (batch,), the median difference between the derivative and a finite difference, relative to it.
    """

    size: Float[np.ndarray, " batch"]
    movement: Float[np.ndarray, " batch"]
    rates: Float[np.ndarray, "batch fields"]
    nearby: Float[np.ndarray, "batch time1"]
    others: Float[np.ndarray, "batch starts time1"]
    nonlinear: bool
    flat: Bool[np.ndarray, " batch"]
    mismatch: Float[np.ndarray, " batch"]


def probe(record: Recording, states: Array, key: Array) -> Probes:
    """Runs the probes of a recording.

    Args:
        record: the sequences.
        states: s_0..s_T, (batch, T + 1, n).
        key: for drawing directions and initial states.
    """
    sequences, lengths = record.sequences, record.lengths
    n, dtype = sequences.size, sequences.first.dtype
    values = np.asarray(states, np.float64)
    inside = np.arange(values.shape[1]) <= lengths[:, None]
    spread = np.sqrt(np.where(inside[..., None], values**2, 0).sum(axis=1) / inside.sum(axis=1)[:, None])
    size = np.linalg.norm(spread, axis=1)
    size = np.where(size > 0, size, 1.0)
    u = np.asarray(random_frame(key, 1, n, dtype, DIRECTION))[0]
    starts = _starts(values, lengths, np.where(spread > 0, spread, size[:, None] / math.sqrt(n)), key)
    nearby = np.asarray(sequences.first) + NEARBY * size[:, None] * np.asarray(u)
    starts = jnp.asarray(np.concatenate([nearby[:, None], starts], axis=1), dtype)
    checked = np.linspace(np.minimum(1, lengths), lengths, CHECKED).round().astype(int).T
    distances, products, small, large = precise_jit(_trajectories, record.cell)(
        sequences, states, starts, jnp.asarray(checked), u, jnp.asarray(size, dtype)
    )
    products, small, large = (np.asarray(each) for each in (products, small, large))
    relative = np.asarray(distances, np.float64).transpose(0, 2, 1) / size[:, None, None]
    with np.errstate(invalid="ignore"):
        moved = np.linalg.norm(np.diff(values, axis=1), axis=2)
    late = inside[:, 1:] & (np.arange(1, values.shape[1]) > lengths[:, None] // 2)
    return Probes(
        size=size,
        movement=np.where(late, moved, 0).max(axis=1, initial=0) / size,
        rates=_rates(record.rms, lengths),
        nearby=relative[:, 0],
        others=relative[:, 1:],
        nonlinear=_is_nonlinear(record, states, products, large),
        flat=(products == 0).all(axis=(1, 2)) & (large != 0).any(axis=(1, 2)),
        mismatch=_mismatch(products.astype(np.float64), small.astype(np.float64), dtype),
    )


def _is_nonlinear(record: Recording, states: Array, products: np.ndarray, differences: np.ndarray) -> bool:
    """Whether the derivative changes along a sequence, or differs from a difference over the size of the states."""
    J_u, differences_u = products.astype(np.float64), differences.astype(np.float64)
    size = max(float(np.abs(J_u).max(initial=0)), float(np.abs(differences_u).max(initial=0)))
    # The differences come first, because they are known already and decide almost always.
    return bool(
        np.abs(J_u - differences_u).max(initial=0) > 1e-3 * size
        or precise_jit(is_nonlinear, record.cell)(record.sequences, states)
    )


def _starts(states: np.ndarray, lengths: np.ndarray, spread: np.ndarray, key: Array) -> np.ndarray:
    """Other initial states: mirrored, the last state of the next row and of this one, and two random ones."""
    rows = np.arange(len(states))
    last = states[rows, lengths]
    noise = normal_numbers(key, (len(states), 2, states.shape[2]), STARTS)
    others = [-states[:, 0], np.roll(last, -1, axis=0), -last, *(2 * spread * noise[:, i] for i in range(2))]
    return np.stack(others, axis=1)


def _trajectories(
    cell: Cell, sequences: Sequences, states: Array, starts: Array, checked: Array, u: Array, size: Array
) -> tuple[Array, Array, Array, Array]:
    """The distances of trajectories from s_t, (batch, T + 1, starts), and J_t u with two finite differences of it."""
    flat, params = flat_map(cell, sequences.params), sequences.params
    epsilon = 1e-5 if u.dtype == jnp.float64 else 1e-2

    def distances(states: Array, starts: Array, inputs: Inputs) -> Array:
        def advance(others: Array, at: tuple[Array, Inputs]) -> tuple[Array, Array]:
            v, inputs = at
            others = jax.vmap(lambda other: flat.step(params, other, inputs))(others)
            return others, jnp.linalg.norm(others - v[None], axis=1)

        later = jax.lax.scan(advance, starts, (states[1:], inputs))[1]
        return jnp.concatenate([jnp.linalg.norm(starts - states[:1], axis=1)[None], later])

    def derivative(v: Array, at: Inputs, size: Array) -> tuple[Array, Array, Array]:
        def difference(h: Array) -> Array:
            return (flat.step(params, v + h * u, at) - flat.step(params, v - h * u, at)) / (2 * h)

        return flat.push(params, v, u[None], at)[1][0], difference(epsilon * size), difference(size)

    def of_sequence(
        states: Array, starts: Array, inputs: Inputs, checked: Array, size: Array
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        before = jnp.maximum(checked - 1, 0)
        at = jax.tree.map(lambda leaf: leaf[before], inputs)
        each = jax.vmap(derivative, in_axes=(0, 0, None))(states[before], at, size)
        return distances(states, starts, inputs), each

    d, each = jax.vmap(of_sequence)(states, starts, sequences.inputs, checked, size)
    return (d, *each)


def _mismatch(products: np.ndarray, differences: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The median over steps of |J u - difference| / max of both; zero if it is within the error of the difference."""
    size = np.maximum(np.linalg.norm(products, axis=2), np.linalg.norm(differences, axis=2))
    with np.errstate(invalid="ignore"):
        relative = np.where(size > 0, np.linalg.norm(products - differences, axis=2) / size, 0.0)
    median = np.median(relative, axis=1)
    return np.where(median > (1e-3 if dtype == np.float64 else 0.1), median, 0.0)


def _rates(rms: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """d ln(rms)/dt of each field over the second half of each row; minus infinity for a field that is zero."""
    rows, half = np.arange(len(lengths)), lengths // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log(rms[rows, lengths]) - np.log(rms[rows, half])
        return np.where(rms[rows, lengths] > 0, change / np.maximum(lengths - half, 1)[:, None], -np.inf)
