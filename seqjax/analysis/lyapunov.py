"""Lyapunov exponents: the mean growth rates of perturbations of the state, in nats per step.

A frame of k perturbations is pushed along the trajectory, V <- J_t V, and orthonormalized by QR every few steps. The
exponents are the mean logarithms of the diagonal of R,

    lambda_i = lim (1/T) sum_t ln R_t[i, i].

The n x n Jacobian is never formed: k columns cost k passes through the linearized step.

Between two QRs all columns turn towards the fastest direction. When the slowest one has shrunk by 1/eps relative to it,
the slowest is lost, and its exponent is a rounding error that looks like a result. So the interval between QRs is
chosen from measured growth rates, checked on every block afterwards, and shortened if a block exceeds the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._flow import Sequences, check_arguments, random_frame
from seqjax.analysis._frames import (
    check_count,
    count_valid_steps,
    final_states,
    log_diagonal,
    lost_directions,
    safe_interval,
    strain,
    sweep,
    sweep_all,
)
from seqjax.analysis._statistics import bootstrap_interval
from seqjax.cell import Cell, Params, State
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import cached_jit

MIN_BLOCKS = 32  # if the run is long enough, because the confidence intervals resample the blocks


class LyapunovExponents(NamedTuple):
    """Exponents in nats per step, largest first. A reset sets the state but does not change the perturbations.

    Attributes:
        exponents: (batch, k), one spectrum for each sequence; minus infinity if a step is singular in that direction.
        mean: (k,), the mean over the sequences.
        spread: (k,), the standard deviation over the sequences; 0 for one sequence.
        low, high: (batch, k), a 95 % confidence interval by block bootstrap over time; NaN if the run is too short.
        split_half: (batch, k), the estimate from the second half of the run minus that from the first half.
        history: (batch, blocks, k), the estimate after each block.
        history_steps: (blocks,), the number of valid steps up to each block, in the first sequence.
        kaplan_yorke: (batch,), the dimension j + (lambda_1 + .. + lambda_j) / |lambda_{j+1}|; NaN if k is too small,
            and n if all n exponents are known and their sum is not negative.
        entropy_rate: (batch,), the sum of the positive exponents, in nats per step, which is Pesin's upper bound.
        singular: (batch, k), whether one step shrank the direction below the precision of the dtype: by a factor of
            about exp(12) relative to the fastest direction in float32, of about exp(32) in float64, or to zero.
        qr_every: the number of steps between two QRs.
        steps: (batch,), the number of valid steps in the mean.
        reliable: (batch,), whether all numbers of a sequence are valid.
        reason: for each sequence, why they are not, or which exponents are minus infinity; empty if there is none.
    """

    exponents: Float[np.ndarray, "batch k"]
    mean: Float[np.ndarray, " k"]
    spread: Float[np.ndarray, " k"]
    low: Float[np.ndarray, "batch k"]
    high: Float[np.ndarray, "batch k"]
    split_half: Float[np.ndarray, "batch k"]
    history: Float[np.ndarray, "batch blocks k"]
    history_steps: Int[np.ndarray, " blocks"]
    kaplan_yorke: Float[np.ndarray, " batch"]
    entropy_rate: Float[np.ndarray, " batch"]
    singular: Bool[np.ndarray, "batch k"]
    qr_every: int
    steps: Int[np.ndarray, " batch"]
    reliable: Bool[np.ndarray, " batch"]
    reason: str


def lyapunov_exponents(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    k: int | None = None,
    burn_in: int | None = None,
    frame_burn_in: int | None = None,
    qr_every: int | None = None,
    key: Array | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> LyapunovExponents:
    """The k largest Lyapunov exponents along driven trajectories, over the whole state ((h, c) for an LSTM).

        lambda_i = lim (1/T) sum_t ln R_t[i, i],    J_t Q_{t-1} = Q_t R_t

    Of the memory only the history, batch * blocks * k numbers, grows with time.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`. For a cell without inputs, xs is (batch, time, 0).
        k: the number of exponents; by default 8, or all of a smaller state.
        burn_in: the number of first steps without perturbations, in which the state reaches its attractor; by default a
            fifth of the time, at most 100.
        frame_burn_in: the number of steps after these that only align the frame and are not in the mean; by default
            the same.
        qr_every: the number of steps between two QRs; by default chosen from the measured growth rates.
        key: for drawing the first frame.

    Returns:
        `LyapunovExponents`.

    Raises:
        ValueError: k is larger than the state, the sequences are too short for the burn-in, or a shape does not match.
        TypeError: the state cannot be differentiated.

    Source: Benettin et al. 1980, "Lyapunov characteristic exponents for smooth dynamical systems"; Engelken, Wolf and
        Abbott 2023, "Lyapunov spectra of chaotic recurrent neural networks"; interval: Kuensch 1989.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> class Logistic:  # x <- 4 x (1 - x), a cell without parameters or inputs
        ...     def init(self, key): return {}
        ...     def initial_state(self, params): return jnp.full(1, 0.3)
        ...     def step(self, params, s, x): return 4 * s * (1 - s), s
        >>> result = sj.analysis.lyapunov_exponents(Logistic(), {}, jnp.zeros((1, 20_000, 0)))
        >>> round(float(result.exponents[0, 0]), 2)  # ln 2
        0.69
    """
    sequences = check_arguments(cell, params, xs, state, mask, reset)
    k = check_count(k, sequences.size)
    burn_in, frame_burn_in = _check_burn_in(sequences, burn_in, frame_burn_in)
    if qr_every is not None:
        hint, expected = "None chooses a safe interval", "qr_every of at least 1 whole step"
        qr_every = whole_number("qr_every", qr_every, hint=hint, expected=expected)
    key = jax.random.key(0) if key is None else key
    start = burn_in + frame_burn_in

    states, frames, warm_logs = cached_jit(_warm_up, cell, k, burn_in, frame_burn_in)(sequences, key)
    dtype, chosen = frames.dtype, qr_every is None
    longest = max(1, (sequences.time - start) // MIN_BLOCKS)
    every = qr_every or min(safe_interval(np.asarray(warm_logs, np.float64), dtype), longest)
    while True:
        logs = np.asarray(cached_jit(_block_logs, cell, start, every)(sequences, states, frames), np.float64)
        strains = strain(logs, dtype)
        if not chosen or every == 1 or strains.max() <= 1:
            break
        every //= 2  # growth in a later block was faster than in the steps that the interval was chosen from
    steps = count_valid_steps(sequences.between(start, sequences.time), every)
    result = _result(logs, steps, start, every, chosen, strains, dtype)
    if k < sequences.size:
        return result
    return result._replace(kaplan_yorke=np.where(result.exponents.sum(axis=1) >= 0, float(k), result.kaplan_yorke))


def _warm_up(
    cell: Cell, k: int, burn_in: int, frame_burn_in: int, sequences: Sequences, key: Array
) -> tuple[Array, Array, Array]:
    """The states and the frames after their burn-in, and ln R_ii of single steps, from which the interval is chosen."""
    states = final_states(cell, sequences.until(burn_in))
    frame = random_frame(key, k, sequences.size, sequences.first.dtype)
    frames = jnp.broadcast_to(frame, (sequences.batch, *frame.shape))
    start = burn_in + frame_burn_in
    # Without a burn-in of the frame, the first steps of the run are measured, but the run itself starts from the frame.
    probe = sequences.between(burn_in, start if frame_burn_in else min(start + 32, sequences.time))
    warm_states, warm_frames, logs = sweep(cell, 1, log_diagonal, probe, states, frames)
    return (warm_states, warm_frames, logs) if frame_burn_in else (states, frames, logs)


def _block_logs(cell: Cell, start: int, every: int, sequences: Sequences, states: Array, frames: Array) -> Array:
    """ln R_ii of every block after the burn-in."""
    return sweep_all(cell, log_diagonal, every, sequences.between(start, sequences.time), states, frames)


def _check_burn_in(sequences: Sequences, burn_in: int | None, frame_burn_in: int | None) -> tuple[int, int]:
    default = min(100, sequences.time // 5)
    burn_in = default if burn_in is None else burn_in
    frame_burn_in = default if frame_burn_in is None else frame_burn_in
    expected = "whole steps of burn-in"
    burn_in = whole_number("burn_in", burn_in, 0, expected=expected)
    frame_burn_in = whole_number("frame_burn_in", frame_burn_in, 0, expected=expected)
    if burn_in + frame_burn_in >= sequences.time:
        raise ValueError(
            f"expected sequences longer than burn_in + frame_burn_in, {burn_in} + {frame_burn_in} steps, "
            f"got {sequences.time}: use longer ones, or a shorter burn-in"
        )
    return burn_in, frame_burn_in


def _result(
    logs: np.ndarray, steps: np.ndarray, first: int, every: int, chosen: bool, strains: np.ndarray, dtype: DTypeLike
) -> LyapunovExponents:
    total = steps.sum(axis=1)
    # Within a longer block a direction may shrink that far without a single singular step.
    lost = lost_directions(logs, dtype) if every == 1 else np.isneginf(logs)
    singular = np.asarray(lost.any(axis=1))
    finite = np.isfinite(np.where(lost, 0.0, logs)).all(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(lost, -np.inf, logs)
        history = np.cumsum(logs, axis=1) / np.cumsum(steps, axis=1)[..., None]
    exponents = history[:, -1]
    split_half = np.array([_drift(*row) for row in zip(logs, steps, strict=True)])
    intervals = np.array([bootstrap_interval(*row) for row in zip(logs, steps, strict=True)])
    # QR orders the directions only in the limit of a long run, and NaN must come last.
    order = np.argsort(-np.where(np.isnan(exponents), -np.inf, exponents), axis=1, kind="stable")

    def ordered(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, axis=1)

    reasons = {}
    for b in np.flatnonzero(~finite):
        block = int(np.argmin(np.isfinite(np.where(lost[b], 0.0, logs[b])).all(axis=1)))
        subject = "the state or its derivative" + (f", over qr_every={every} steps," if every > 1 else "")
        reasons[b] = f"{subject} is not finite from about step {first + block * every + 1} on"
    for b in np.flatnonzero(total == 0):
        reasons[b] = "no valid step is left after the burn-in"
    for b in np.flatnonzero(strains > 1) if every > 1 and not chosen else ():
        reasons.setdefault(
            b,
            f"qr_every={every} is too long: in the worst block the columns lost more of their digits than is safe, "
            f"{strains[b]:.1f} times; leave qr_every out",
        )
    remarks = {
        b: f"{count} of {logs.shape[2]} exponents are minus infinity: in some step these directions shrink below the "
        f"rounding error of {np.dtype(dtype).name}"
        for b, count in enumerate(singular.sum(axis=1))
        if count and b not in reasons
    }
    exponents = ordered(exponents)
    # Equal values have no spread, also if they are minus infinity, for which numpy computes NaN.
    with np.errstate(invalid="ignore"):
        spread = np.where((exponents == exponents[0]).all(axis=0), 0.0, exponents.std(axis=0))
    return LyapunovExponents(
        exponents=exponents,
        mean=exponents.mean(axis=0),
        spread=spread,
        low=ordered(intervals[:, 0]),
        high=ordered(intervals[:, 1]),
        split_half=ordered(split_half),
        history=np.take_along_axis(history, order[:, None], axis=2),
        history_steps=np.cumsum(steps[0]),
        kaplan_yorke=np.array([kaplan_yorke_dimension(row) for row in exponents]),
        entropy_rate=np.where(exponents <= 0, 0.0, exponents).sum(axis=1),
        singular=ordered(singular),
        qr_every=every,
        steps=total,
        reliable=np.array([b not in reasons for b in range(len(logs))]),
        reason="; ".join(f"sequence {b}: {text}" for b, text in sorted((reasons | remarks).items())),
    )


def _drift(logs: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The mean over the second half of the blocks with valid steps minus that over the first; NaN for one block."""
    logs, steps = logs[steps > 0], steps[steps > 0]
    half = len(steps) // 2
    if not half:
        return np.full(logs.shape[1], np.nan)
    with np.errstate(invalid="ignore"):
        return logs[half:].sum(0) / steps[half:].sum() - logs[:half].sum(0) / steps[:half].sum()


def kaplan_yorke_dimension(exponents: Float[Any, " k"] | Sequence[float]) -> float:
    """D = j + (lambda_1 + .. + lambda_j) / |lambda_{j+1}|, with the largest j whose partial sum is not negative.

    Args:
        exponents: in descending order, (k,), in nats.

    Returns:
        The dimension; NaN if no partial sum of the k exponents is negative, so that more exponents are needed.

    Source: Kaplan and Yorke 1979, "Chaotic behavior of multidimensional difference equations".

    Example:
        >>> import seqjax as sj
        >>> round(sj.analysis.kaplan_yorke_dimension([0.41922, -1.62319]), 4)  # the Henon map
        1.2583
    """
    exponents = np.asarray(exponents, float)
    sums = np.cumsum(exponents)
    if np.isnan(sums).any():
        return math.nan
    j = int(np.sum(sums >= 0))
    if j == len(exponents):
        return math.nan
    return j + (float(sums[j - 1]) / -float(exponents[j]) if j else 0.0)
