"""The growth of perturbations and of gradients as pure functions, which can be jitted, vmapped and differentiated.

`lyapunov_exponents` and `gradient_by_lag` choose intervals, burn-ins and horizons from what they measure, so they need
concrete arrays. The two functions here leave these choices to the caller. They return the logarithms in the dtype of
the parameters, without confidence intervals and without a check of whether the numbers are reliable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._floating_state import merge
from seqjax.analysis._flow import (
    Sequences,
    check_arguments,
    flat_map,
    flat_trajectory,
    pad_with_masked_steps,
    random_frame,
    unflatten,
)
from seqjax.analysis._frames import check_count, log_diagonal, sweep
from seqjax.analysis._padding import valid_steps_first
from seqjax.analysis._scaled import rescale
from seqjax.analysis._spans import check_times
from seqjax.analysis.gradient_flow import EXACT, PROBES, TIMES
from seqjax.cell import Cell, Params, State
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence._masked_step import Inputs
from seqjax.sequence.unroll import unroll


class FrameGrowth(NamedTuple):
    """The growth of a frame, by blocks of steps, and what a later call continues from.

    Attributes:
        log_growth: (batch, blocks, k), ln R_ii of each block, in nats.
        steps: (batch, blocks), the number of valid steps of each block.
        state: of the cell after the last step, leaves (batch, ...).
        frame: the orthonormal perturbations after the last step, as rows, (batch, k, n).
    """

    log_growth: Float[Array, "batch blocks k"]
    steps: Int[Array, "batch blocks"]
    state: State
    frame: Float[Array, "batch k n"]

    def __str__(self) -> str:
        largest = np.asarray(self.exponents)[..., 0]
        return (
            f"{self.frame.shape[-2]} exponents of {largest.size} sequences, {self.log_growth.shape[-2]} blocks: the "
            f"largest is {largest.min():.4g} to {largest.max():.4g} nats per step, without an interval "
            f"(sj.lyapunov_exponents has one)"
        )

    @property
    def exponents(self) -> Float[Array, "*ensemble batch k"]:
        """The mean growth rates of all blocks, in nats per step, also of a result of `jax.vmap`; NaN without a step."""
        steps = self.steps.sum(-1)[..., None].astype(self.log_growth.dtype)
        return self.log_growth.sum(-2) / steps


@for_automatic_axes
def frame_growth(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    k: int | None = None,
    every: int = 1,
    frame: Float[Array, "batch k n"] | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> FrameGrowth:
    """The growth of k perturbations along driven trajectories, with a QR after every block of `every` steps.

        J_t .. J_{t-every+1} Q_{t-every} = Q_t R_t,    lambda_i = sum_t ln R_t[i, i] / T

    A pure function of arrays: it runs under `jax.jit` and `jax.vmap`, and it is differentiable with respect to
    parameters, inputs, state and frame. A derivative of a chaotic trajectory grows with the time, and is NaN if a step
    is singular in one of the k directions. The reverse mode stores all steps; `jax.jvp` does not.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`. A reset sets the state but does not change the frame.
        k: the number of perturbations; by default that of `frame`, or 8, or all of a smaller state.
        every: the number of steps between two QRs; the last block may be shorter. In a longer block the columns turn
            towards the fastest direction. Use 1 unless the growth rates are known.
        frame: orthonormal rows, (batch, k, n), such as the frame of an earlier result; by default a fixed random one.

    Returns:
        `FrameGrowth`. To continue, pass its `state` and `frame` with the inputs that follow.

    Raises:
        ValueError: `k`, `every` or the frame does not match the state, there is no step, or a shape does not match.
        TypeError: the state cannot be differentiated, or the frame has another dtype.

    Source: Benettin et al. 1980, "Lyapunov characteristic exponents for smooth dynamical systems".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell, Q = sj.VanillaRNN(1, 2, activation="identity"), jnp.array([[0.6, -0.8], [0.8, 0.6]])
        >>> def largest_exponent(g):
        ...     params = sj.VanillaParams(jnp.zeros((2, 1)), g * Q, jnp.zeros(2))
        ...     return sj.analysis.frame_growth(cell, params, jnp.zeros((1, 50, 1))).exponents[0, 0]
        >>> value, slope = jax.jit(jax.value_and_grad(largest_exponent))(1.25)  # ln g and 1/g
        >>> round(float(value), 4), round(float(slope), 4)
        (0.2231, 0.8)
    """
    every = whole_number("every", every, hint="1 does a QR after every step")
    analysed, sequences = check_arguments(cell, params, xs, state, mask, reset)
    if not sequences.time:
        raise ValueError("expected at least one step to analyse, got T = 0")
    first = _first_frames(frame, k, sequences)
    every = min(every, sequences.time)
    blocks = math.ceil(sequences.time / every)
    padded = pad_with_masked_steps(sequences, blocks * every) if sequences.time % every else sequences
    valid = jnp.ones((sequences.batch, sequences.time), bool) if padded.inputs.mask is None else padded.inputs.mask
    states, frames, log_growth = precise_jit(sweep, analysed, every, log_diagonal)(padded, padded.first, first)
    final = unflatten(analysed, params, states)
    # The sweep does not return the counters and random keys of the state, which are its inputs.
    if analysed is not cell:
        final = merge(final, unroll(cell, params, xs, state=state, mask=mask, reset=reset)[0])
    steps = valid.reshape(sequences.batch, blocks, every).sum(-1, dtype=jnp.int32)
    return FrameGrowth(log_growth, steps, final, frames)


@for_automatic_axes
def lag_growth(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    lags: int,
    times: Sequence[int] | Int[Any, " times"] | Int[Any, "batch times"] | None = None,
    frame: Float[Array, "rows n"] | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Float[Array, "batch times lags1"]:
    """ln of the expected norm of ds_t/ds_{t-k} for the lags k = 0..K, without overflow or underflow.

        ln |ds_t/ds_{t-k}|_F / sqrt(n),    ds_t/ds_{t-k} = J_t .. J_{t-k+1}

    A pure function of arrays, as `frame_growth`: `gradient_by_lag(...).table` at a fixed number of lags. Times and lags
    count valid steps. The derivative is the total one: the states depend on the parameters too.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        lags: K, the largest lag.
        times: the steps t, the same for all sequences, or (batch, times) with a row for each; by default 12 steps in
            the last three quarters of the padded time.
        frame: gradients at s_t that are pulled back, as rows of norm 1, (rows, n); the result is then the root mean
            square of their norms. By default all n unit vectors, or 64 random orthonormal ones if n is above 256.

    Returns:
        (batch, times, K + 1), in nats. NaN before the sequence begins and for times that a sequence does not have;
        minus infinity, with derivative zero, if the product is zero, as it is across a reset.

    Raises:
        ValueError: `lags`, a time or the frame does not match the sequences, or a shape does not match.
        TypeError: the state cannot be differentiated, or the frame has another dtype.

    Source: Hochreiter 1991; Pascanu, Mikolov and Bengio 2013.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> def at_lag_20(w):
        ...     params = sj.VanillaParams(jnp.ones((1, 1)), w * jnp.eye(1), jnp.zeros(1))
        ...     return sj.analysis.lag_growth(cell, params, jnp.ones((1, 40, 1)), lags=20, times=[40])[0, 0, 20]
        >>> value, slope = jax.jit(jax.value_and_grad(at_lag_20))(0.8)  # 20 ln 0.8 and 20 / 0.8
        >>> round(float(value), 4), round(float(slope), 4)
        (-4.4629, 25.0)
    """
    cell, sequences = check_arguments(cell, params, xs, state, mask, reset, backward=True)
    if not sequences.time:
        raise ValueError("expected at least one step to analyse, got T = 0")
    n, T = sequences.size, sequences.time
    lags = whole_number("lags", lags, 0, T, "use longer sequences", expected=f"lags from 0 to T = {T} steps")
    ends = _ends(times, sequences)
    if frame is not None:
        if frame.ndim != 2 or frame.shape[1] != n or not len(frame):
            raise ValueError(f"expected frame (rows, n) with n = {n}, got {frame.shape}: jnp.eye({n}) gives all")
        _check_dtype(frame, sequences)
    elif n <= EXACT:
        frame = jnp.eye(n, dtype=sequences.first.dtype)
    else:
        frame = _random_rows(PROBES, sequences)
    return precise_jit(_log_norms, cell, lags)(sequences, frame, ends)


def _random_rows(rows: int, sequences: Sequences) -> Array:
    with jax.ensure_compile_time_eval():  # under jit a new key would be traced, and numpy draws with it
        return random_frame(jax.random.key(0), rows, sequences.size, sequences.first.dtype)


def _first_frames(frame: Array | None, k: int | None, sequences: Sequences) -> Array:
    """The frame of every sequence before the first step, (batch, k, n)."""
    n = sequences.size
    if frame is None:
        rows = _random_rows(check_count(k, n), sequences)
        return jnp.broadcast_to(rows[None], (sequences.batch, *rows.shape))
    k = check_count(frame.shape[1] if k is None and frame.ndim == 3 else k, n)
    if frame.shape != (sequences.batch, k, n):
        raise ValueError(
            f"expected frame (batch, k, n) = {(sequences.batch, k, n)}, got {frame.shape}: pass the frame that an "
            f"earlier call returned"
        )
    _check_dtype(frame, sequences)
    return frame


def _check_dtype(frame: Array, sequences: Sequences) -> None:
    dtype = sequences.first.dtype
    if frame.dtype != dtype:
        raise TypeError(f"expected a frame of the dtype of the analysis, {dtype}, got {frame.dtype}: frame.astype(...)")


def _ends(times: Any, sequences: Sequences) -> Array:
    """The times t of each sequence, (batch, times)."""
    batch, T = sequences.batch, sequences.time
    if getattr(times, "ndim", 1) == 2:  # may be traced, so a time out of range is NaN and not an error
        if times.shape[0] != batch:
            raise ValueError(f"expected times (times,), or (batch, times) with batch = {batch}, got {times.shape}")
        return jnp.asarray(times, jnp.int32)
    if times is None:
        times = np.unique(np.linspace(max(T // 4, 1), T, TIMES).round()).astype(int)
    chosen = check_times(times, 1, T)
    return jnp.asarray(np.tile(chosen, (batch, 1)), jnp.int32)


def _log_norms(cell: Cell, lags: int, sequences: Sequences, frame: Array, ends: Array) -> Array:
    """ln of the root mean square norm of the rows of a frame (rows, n), pulled back by 0..lags steps from s_t."""
    inputs, lengths = valid_steps_first(sequences.inputs)
    sequences = sequences._replace(inputs=inputs)
    flat, params, T = flat_map(cell, sequences.params), sequences.params, sequences.time

    def one_time(states: Array, inputs: Inputs, length: Array, end: Array) -> Array:
        def back(pulled: tuple[Array, Array], lag: Array) -> tuple[tuple[Array, Array], Array]:
            rows, exponent = pulled
            t = end - lag  # rows are gradients at s_t
            log_norm = jnp.where((t >= 0) & (end >= 1) & (end <= length), _log_norm(rows, exponent), jnp.nan)
            before = jnp.clip(t - 1, 0, T - 1)  # other indices are those of lags that are NaN
            at = jax.tree.map(lambda leaf: leaf[before], inputs)
            rows, shift = rescale(flat.pull(params, states[before], rows, at))
            return (rows, exponent + shift), log_norm

        return jax.lax.scan(back, rescale(frame), jnp.arange(lags + 1, dtype=jnp.int32))[1]

    over_times = jax.vmap(one_time, in_axes=(None, None, None, 0))
    return jax.vmap(over_times)(flat_trajectory(cell, sequences), inputs, lengths, ends)


def _log_norm(rows: Array, exponent: Array) -> Array:
    """ln of 2^exponent |rows|_F / sqrt(count), with derivative zero where it is minus infinity."""
    square = jnp.mean(jnp.sum(rows**2, axis=1))
    some = square > 0
    scale = exponent.astype(rows.dtype) * math.log(2)
    # Zero is replaced before the logarithm too, whose derivative there would be NaN.
    return jnp.where(some, 0.5 * jnp.log(jnp.where(some, square, 1)) + scale, -jnp.inf)
