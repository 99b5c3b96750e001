"""Gradient norms through time: |dL/ds_t| at every step, and the norm of ds_t/ds_{t-k} for every lag k.

Gradients are pulled back with a separate power of two as their scale, so a norm of 10^-9000 is as accurate as a norm of
1. Without it, if every step multiplies by 0.8, products in float32 leave the normal range at lag 392.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._flow import FRAME, LOSS, flat_map, flat_trajectory, random_frame, unflatten
from seqjax.analysis._gradient_traces import is_nonlinear, log_loss_gradients, norms_by_lag, pulled_by_zero
from seqjax.analysis._memory import Memory, memory_of
from seqjax.analysis._recording import Recording, by_sequence, recording
from seqjax.analysis._spans import check_horizon, check_times
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes

EXACT = 256  # the largest state, in numbers, for which every column is pulled back by default
PROBES = 32  # random columns for larger states
TIMES = 12  # steps t in the last three quarters of each sequence
FIRST_LAGS = 100  # lags of one compiled program, and of the first one whatever the norms are
LARGEST_COST = 3e11  # multiplications; about a minute


class GradientByLag(NamedTuple):
    """Gradient norms as natural logarithms. Times and lags count valid steps; T is the number of the longest sequence.

    Attributes:
        log_gradient: (batch, T + 1), ln |dL/ds_t| for t = 0..T; NaN after the end of a shorter sequence.
        log_gradient_parts: the same for each field of the state, by name. Minus infinity if the field underflows at the
            scale of the whole state.
        lags: (K + 1,), k = 0..K, in steps.
        times: (batch, times), the steps t for which ds_t/ds_{t-k} was computed; 0 fills rows with fewer of them.
        table: (batch, times, K + 1), ln of the expected norm |ds_t/ds_{t-k}|_F / sqrt(n), the root mean square of
            a random unit gradient at s_t after it was pulled back to s_{t-k}. NaN before the sequence begins.
        log_expected: (K + 1,), ln of its root mean square over times and sequences.
        log_worst: (K + 1,), ln of the largest spectral norm |ds_t/ds_{t-k}|_2 over times and sequences.
        log_parts: by field of the state, (K + 1,): ln of the expected norm of this field of the gradient at s_{t-k}.
        rows_expected, rows_worst: (batch, K + 1), the same two for each sequence.
        rows_parts: by field of the state, (batch, K + 1).
        horizon: the memory horizon, the first lag from which the expected norm stays below `threshold`; inf if there is
            no such lag in the table.
        threshold: of the horizon.
        memory: the horizon with what is known beyond the table; it prints as text.
        best_memory: the same for the worst norm, the direction that is preserved best.
        exact: whether all n columns were pulled back. If not, `log_expected` is an estimate from random columns, and
            `log_worst` is a lower bound.
        reliable: whether all numbers are valid.
        reason: why they are not, or empty.
    """

    log_gradient: Float[np.ndarray, "batch time1"]
    log_gradient_parts: dict[str, Float[np.ndarray, "batch time1"]]
    lags: Int[np.ndarray, " lags"]
    times: Int[np.ndarray, "batch times"]
    table: Float[np.ndarray, "batch times lags"]
    log_expected: Float[np.ndarray, " lags"]
    log_worst: Float[np.ndarray, " lags"]
    log_parts: dict[str, Float[np.ndarray, " lags"]]
    rows_expected: Float[np.ndarray, "batch lags"]
    rows_worst: Float[np.ndarray, "batch lags"]
    rows_parts: dict[str, Float[np.ndarray, "batch lags"]]
    horizon: float
    threshold: float
    memory: Memory
    best_memory: Memory
    exact: bool
    reliable: bool
    reason: str

    def __str__(self) -> str:
        how = "" if self.exact else f" (an estimate from {PROBES} random gradients)"
        return (
            f"a gradient is below {self.threshold:.3g} of what it was, on average over directions: {self.memory}{how}; "
            f"in the direction that is preserved best: {self.best_memory}; "
            + ("reliable" if self.reliable else f"not reliable: {self.reason}")
        )


@for_automatic_axes
def gradient_by_lag(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    loss: Callable[[State], Array] | None = None,
    horizon: int | None = None,
    times: Sequence[int] | Int[Any, " times"] | None = None,
    threshold: float = 0.01,
    exact: bool | None = None,
    key: Array | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> GradientByLag:
    """ln |dL/ds_t| for every t, and ln |ds_t/ds_{t-k}| for every lag k, without overflow or underflow.

        dL/ds_{t-1} = dl_{t-1}/ds_{t-1} + J_t^T dL/ds_t

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        loss: maps the states s_1..s_T, leaves (batch, time, ...), to one number, as for `state_gradients`; by default
            its gradient is a random unit vector at s_T and zero at all other steps.
        horizon: K, the largest lag to compute, in valid steps; not the memory horizon that the result holds. By default
            at least 100 lags, and then more until the gradient is lost or has grown by 1/eps, or the sequence ends.
        times: the steps t; by default 12 steps in the last three quarters of each sequence, with its last one.
        threshold: memory counts as lost if the norm is below this value.
        exact: whether to pull back all n columns instead of 64 random ones; by default True up to n = 256.
        key: for drawing the random gradients.

    Returns:
        `GradientByLag`.

    Raises:
        ValueError: the horizon or a time is outside the sequences, no step is valid, or a shape does not match.
        TypeError: the state cannot be differentiated.

    Source: Hochreiter 1991; Pascanu, Mikolov and Bengio 2013.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.8 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> result = sj.analysis.gradient_by_lag(cell, params, jnp.ones((1, 40, 1)))
        >>> round(float(jnp.exp(result.log_expected[20])), 4), result.horizon  # 0.8^20; 0.8^21 is below 0.01
        (0.0115, 21.0)
    """
    with recording(cell, params, xs, state, mask, reset, backward=True) as record:
        states = precise_jit(flat_trajectory, record.cell)(record.sequences)
        return gradients_of(record, states, horizon, threshold, exact=exact, key=key, times=times, loss=loss)


def gradients_of(
    record: Recording,
    states: Array,
    horizon: int | None,
    threshold: float,
    *,
    exact: bool | None = None,
    key: Array | None = None,
    times: Sequence[int] | Int[Any, " times"] | None = None,
    loss: Callable[[State], Array] | None = None,
) -> GradientByLag:
    """`gradient_by_lag` of a recording with its `flat_trajectory`."""
    K = check_horizon(horizon, record.time, record.time)
    chosen = _times(times, record)
    key = jax.random.key(0) if key is None else key
    log_gradient, log_gradient_parts = _loss_gradients(record, states, loss, key)
    n, dtype = record.sequences.size, record.sequences.first.dtype
    exact = n <= EXACT if exact is None else exact
    frame = jnp.asarray(np.eye(n, dtype=dtype)) if exact else random_frame(key, min(PROBES, n), n, dtype, FRAME)
    until = math.log(threshold) if horizon is None and threshold > 0 else None
    table, worst, by_part = _by_lag(record, states, chosen, frame, K, until)
    reasons = _reasons(record, np.asarray(states), log_gradient, table, chosen)
    log_worst = _largest(worst)
    # A rounding error of the state grows by the worst norm. From 1/eps on it is as large as the state.
    lost = np.flatnonzero(log_worst > -math.log(float(jnp.finfo(record.dtype).eps)))
    if not reasons and lost.size and precise_jit(is_nonlinear, record.cell)(record.sequences, states):
        reasons = [
            f"within {lost[0]} steps rounding errors of {record.dtype} grow as large as the state, so gradients "
            f"over more steps than that belong to no trajectory"
        ]
    parts = list(flat_map(record.cell, record.sequences.params).parts)
    reason, log_expected = "; ".join(reasons), _root_mean_square(table)
    # Larger lags than any t have no value.
    memory, best = (memory_of(curve[: chosen.max() + 1], threshold) for curve in (log_expected, log_worst))
    rows = np.stack([_root_mean_square(row[None]) for row in table])
    return GradientByLag(
        log_gradient=log_gradient,
        log_gradient_parts=dict(zip(parts, log_gradient_parts, strict=True)),
        lags=np.arange(table.shape[2]),
        times=chosen,
        table=table,
        log_expected=log_expected,
        log_worst=log_worst,
        log_parts={name: _root_mean_square(by_part[:, :, i]) for i, name in enumerate(parts)},
        rows_expected=rows,
        rows_worst=np.stack([_largest(row[None]) for row in worst]),
        rows_parts={
            name: np.stack([_root_mean_square(row[None, :, i]) for row in by_part]) for i, name in enumerate(parts)
        },
        horizon=memory.lag,
        threshold=threshold,
        memory=memory,
        best_memory=best,
        exact=exact,
        reliable=not reason,
        reason=reason,
    )


def _times(times: Sequence[int] | Int[Any, " times"] | None, record: Recording) -> np.ndarray:
    """The times t of each row; 0 for a time that the row does not have, or has twice."""
    if times is not None:
        chosen = np.tile(check_times(times, 1, record.time), (len(record.lengths), 1))
        return np.where(chosen <= record.lengths[:, None], chosen, 0)
    rows = [np.unique(np.linspace(min(max(T // 4, 1), T), T, TIMES).round()).astype(int) for T in record.lengths]
    width = max(map(len, rows))
    return np.array([np.pad(row, (width - len(row), 0)) for row in rows])


def _loss_gradients(
    record: Recording, states: Array, loss: Callable[[State], Array] | None, key: Array
) -> tuple[np.ndarray, list[np.ndarray]]:
    """ln |dL/ds_t| for the whole state and for each field, NaN after the end of a row."""
    cell, sequences, rows = record.cell, record.sequences, np.arange(len(record.lengths))
    if loss is None:
        arriving = np.zeros(states.shape, states.dtype)
        arriving[rows, record.lengths] = np.asarray(random_frame(key, 1, sequences.size, states.dtype, LOSS))[0]
    else:
        position = np.minimum(record.position[:, 1:], record.lengths[:, None])

        def of_states(states: Array) -> Array:  # the loss reads the user's steps, in the user's dtype
            return loss(unflatten(cell, sequences.params, states[rows[:, None], position].astype(record.dtype)))

        arriving = jax.grad(of_states)(states)
    log_norm, by_field = precise_jit(log_loss_gradients, cell)(sequences, states, jnp.asarray(arriving[:, 1:]))
    after = np.arange(sequences.time + 1) > record.lengths[:, None]
    return (
        np.where(after, np.nan, np.asarray(log_norm, np.float64)),
        [np.where(after, np.nan, np.asarray(each, np.float64)) for each in by_field],
    )


def _by_lag(
    record: Recording, states: Array, times: np.ndarray, frame: Array, K: int, until: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The norms at lags 0..K, from chunks of lags by one compiled program.

    Args:
        record, states: the sequences and s_0..s_T.
        times: t, (batch, times).
        frame: gradients at s_t, as rows.
        K: the largest lag.
        until: ln of a norm; if it is given, the lags end as soon as every row is decided: both norms are below it, or
            the expected one has grown so far that float32 gradients have no correct digit.

    Returns:
        `norms_by_lag` for all lags.
    """
    batch, n = len(times), frame.shape[1]
    count = min(K, FIRST_LAGS) + 1
    # One product of all gradients with a Jacobian costs about this much per lag.
    cost = batch * times.shape[1] * frame.shape[0] * n * n
    pulled, ends, chunks, lag = pulled_by_zero(frame, batch, times.shape[1]), jnp.asarray(times), [], 0
    while lag <= K:
        of_chunk = precise_jit(norms_by_lag, record.cell, count)
        pulled, norms = of_chunk(record.sequences, states, ends, jnp.asarray(lag), pulled)
        chunks.append([np.asarray(values, np.float64) for values in norms])
        lag += count
        if until is not None and (_decided(chunks[-1], until) or cost * (lag + count) > LARGEST_COST):
            break
    table, worst, by_part = (np.concatenate(values, axis=-1)[..., : K + 1] for values in zip(*chunks, strict=True))
    return table, worst, by_part


def _decided(norms: list[np.ndarray], until: float) -> bool:
    """Whether no row needs further lags, from the norms of the last chunk."""
    expected, worst = norms[0][..., -1], norms[1][..., -1]
    with np.errstate(invalid="ignore"):
        lost, grown = np.maximum(expected, worst) < until, expected > -math.log(float(jnp.finfo(jnp.float32).eps))
    return bool((lost | grown | np.isnan(expected)).all())


def _reasons(
    record: Recording, states: np.ndarray, log_gradient: np.ndarray, table: np.ndarray, times: np.ndarray
) -> list[str]:
    """What is not finite in each sequence; minus infinity is valid, the logarithm of a zero gradient."""
    reasons = record.reasons()
    # Lags before the beginning of the sequence are NaN by definition, and not an error.
    inside = np.where(np.arange(table.shape[2]) <= times[..., None], table, 0.0)
    for b, length in enumerate(record.lengths):
        bad = np.flatnonzero(~(log_gradient[b, : length + 1] < np.inf))
        if bad.size:
            reasons.setdefault(b, f"the gradient is not finite by the state after step {bad[-1]} and before")
        elif not (inside[b] < np.inf).all():
            reasons.setdefault(b, "the derivative of a step is not finite")
    return by_sequence(reasons)


def _root_mean_square(log_norms: np.ndarray) -> np.ndarray:
    """ln sqrt(mean norm^2) over the first two axes, ignoring NaN."""
    top = _largest(log_norms)  # taken out of the exponential, which would overflow
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.exp(2 * (log_norms - np.where(np.isfinite(top), top, 0)))
        counted = ~np.isnan(log_norms)
        mean = np.where(counted, squares, 0).sum(axis=(0, 1)) / counted.sum(axis=(0, 1))
        return np.where(np.isnan(top), np.nan, np.where(np.isfinite(top), top, 0) + 0.5 * np.log(mean))


def _largest(log_norms: np.ndarray) -> np.ndarray:
    """The largest value over the first two axes, ignoring NaN; NaN if all are."""
    some = ~np.isnan(log_norms).all(axis=(0, 1))
    return np.where(some, np.max(np.where(np.isnan(log_norms), -np.inf, log_norms), axis=(0, 1)), np.nan)
