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

from seqjax.analysis._flow import check_arguments, flat_trajectory, random_frame, state_parts, unflatten
from seqjax.analysis._gradient_traces import is_nonlinear, log_loss_gradients, norms_by_lag
from seqjax.analysis._spans import check_horizon, check_times
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import cached_jit

EXACT = 256  # the largest state, in numbers, for which every column is pulled back by default
PROBES = 64  # random columns for larger states


class GradientByLag(NamedTuple):
    """Gradient norms as natural logarithms.

    Attributes:
        log_gradient: (batch, T + 1), ln |dL/ds_t| for t = 0..T.
        log_gradient_parts: the same for each field of the state, by name. Minus infinity if the field underflows at the
            scale of the whole state.
        lags: (K + 1,), k = 0..K, in steps.
        times: the steps t for which ds_t/ds_{t-k} was computed.
        table: (batch, len(times), K + 1), ln of the expected norm |ds_t/ds_{t-k}|_F / sqrt(n), the root mean square of
            a random unit gradient at s_t after it was pulled back to s_{t-k}. NaN before the sequence begins.
        log_expected: (K + 1,), ln of its root mean square over times and sequences.
        log_worst: (K + 1,), ln of the largest spectral norm |ds_t/ds_{t-k}|_2 over times and sequences.
        log_parts: by field of the state, (K + 1,): ln of the expected norm of this field of the gradient at s_{t-k}.
        horizon: the memory horizon, the first lag from which the expected norm stays below `threshold`; inf if there is
            no such lag in the table.
        threshold: of the horizon.
        exact: whether all n columns were pulled back. If not, `log_expected` is an estimate from random columns, and
            `log_worst` is a lower bound.
        reliable: whether all numbers are valid.
        reason: why they are not, or empty.
    """

    log_gradient: Float[np.ndarray, "batch time1"]
    log_gradient_parts: dict[str, Float[np.ndarray, "batch time1"]]
    lags: Int[np.ndarray, " lags"]
    times: Int[np.ndarray, " times"]
    table: Float[np.ndarray, "batch times lags"]
    log_expected: Float[np.ndarray, " lags"]
    log_worst: Float[np.ndarray, " lags"]
    log_parts: dict[str, Float[np.ndarray, " lags"]]
    horizon: float
    threshold: float
    exact: bool
    reliable: bool
    reason: str


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
        horizon: K, the largest lag to compute, in steps; not the memory horizon that the result holds. By default T, at
            most 100.
        times: the steps t; by default 8 steps in the second half of the sequence, including the last one.
        threshold: memory counts as lost if the norm is below this value.
        exact: whether to pull back all n columns instead of 64 random ones; by default True up to n = 256.
        key: for drawing the random gradients.

    Returns:
        `GradientByLag`.

    Raises:
        ValueError: the horizon or a time is outside the sequence, or a shape does not match.
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
    sequences = check_arguments(cell, params, xs, state, mask, reset, backward=True)
    T, n = sequences.time, sequences.size
    if T == 0:
        raise ValueError("expected at least one step to pull a gradient back through, got T = 0")
    K = check_horizon(horizon, min(T, 100), T)
    chosen = check_times(times, max(T // 2, K), T)
    key_loss, key_frame = jax.random.split(jax.random.key(0) if key is None else key)
    dtype, exact = sequences.first.dtype, n <= EXACT if exact is None else exact

    states = cached_jit(flat_trajectory, cell)(sequences)
    if loss is None:
        arriving = jnp.zeros_like(states[:, 1:]).at[:, -1].set(random_frame(key_loss, 1, n, dtype)[0])
    else:
        arriving = jax.grad(lambda s: loss(unflatten(cell, params, s)))(states[:, 1:])
    parts = state_parts(cell, params)
    log_gradient, log_gradient_parts = cached_jit(log_loss_gradients, cell)(sequences, states, arriving)

    frame = jnp.eye(n, dtype=dtype) if exact else random_frame(key_frame, min(PROBES, n), n, dtype)
    ends = jnp.asarray(chosen)
    norms = cached_jit(norms_by_lag, cell, K)(sequences, states, ends, frame)
    table, worst, by_part = (np.asarray(values, np.float64) for values in norms)
    log_gradient = np.asarray(log_gradient, np.float64)
    log_expected = _root_mean_square(table)
    log_worst = _largest(worst)
    # Lags before the beginning of the sequence are NaN by definition, and not an error.
    inside = np.where(np.arange(K + 1) <= chosen[:, None], table, 0.0)
    reasons = [
        f"sequence {b}: {problem}"
        for b, rows in enumerate(zip(np.asarray(states), log_gradient, inside, strict=True))
        if (problem := _not_finite(*rows))
    ]
    # A rounding error of the state grows by the worst norm. From 1/eps on it is as large as the state.
    lost = np.flatnonzero(log_worst > -math.log(float(jnp.finfo(dtype).eps)))
    if not reasons and lost.size and cached_jit(is_nonlinear, cell)(sequences, states):
        reasons = [
            f"within {lost[0]} steps rounding errors of {dtype} grow as large as the state, so gradients over more "
            f"steps than that belong to no trajectory"
        ]
    reason = "; ".join(reasons)
    return GradientByLag(
        log_gradient=log_gradient,
        log_gradient_parts={name: np.asarray(log_gradient_parts[i], np.float64) for i, name in enumerate(parts)},
        lags=np.arange(K + 1),
        times=chosen,
        table=table,
        log_expected=log_expected,
        log_worst=log_worst,
        log_parts={name: _root_mean_square(by_part[:, :, i]) for i, name in enumerate(parts)},
        # Larger lags than any t have no value, and NaN would make the horizon NaN.
        horizon=memory_horizon(log_expected[: chosen.max() + 1], threshold),
        threshold=threshold,
        exact=exact,
        reliable=not reason,
        reason=reason,
    )


def _not_finite(states: np.ndarray, log_gradient: np.ndarray, table: np.ndarray) -> str:
    """Describes what is not finite in one sequence; minus infinity is valid, the logarithm of a zero gradient."""
    finite = np.isfinite(states).all(axis=1)
    if not finite.all():
        return f"the state is not finite from step {int(np.argmin(finite))} on"
    bad = np.flatnonzero(~(log_gradient < np.inf))
    if bad.size:
        return f"the gradient is not finite by the state after step {bad[-1]} and before"
    return "" if (table < np.inf).all() else "the derivative of a step is not finite"


def memory_horizon(log_norms: Float[Any, " lags"] | Sequence[float], threshold: float) -> float:
    """The first lag from which a norm stays below a threshold.

    Args:
        log_norms: ln of a norm at lags 0..K.
        threshold: a positive number.

    Returns:
        The lag in steps; inf if the last norm is not below the threshold, and NaN if a norm is NaN.

    Raises:
        ValueError: the threshold is not positive.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> sj.analysis.memory_horizon(jnp.log(jnp.array([1.0, 0.001, 0.5, 0.009, 0.001])), 0.01)
        3.0
    """
    if not threshold > 0:
        raise ValueError(f"expected a positive threshold, got {threshold}: 0.01 is a hundredth of the gradient")
    log_norms = np.asarray(log_norms, np.float64)
    if np.isnan(log_norms).any():
        return math.nan
    above = np.flatnonzero(log_norms >= math.log(threshold))
    lag = int(above[-1]) + 1 if above.size else 0
    return float(lag) if lag < len(log_norms) else math.inf


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
