"""Lyapunov exponents: the mean rate, in nats a step, at which a perturbation of the state grows in each direction.

A frame of k perturbations is pushed along the trajectory, V <- J_t V, and made orthonormal again by QR every few steps;
the exponents are the mean logarithms of the diagonal of R,

    lambda_i = lim (1/T) sum_t ln R_t[i, i].

The n x n Jacobian is never formed: k columns cost k passes through the linearised step.

Between two QRs the columns lean towards the fastest direction. When the slowest has shrunk beside it by 1/eps it is
lost, and its exponent is rounding error that looks like a number. So the interval is chosen from the measured spread,
checked on every block afterwards, and shortened where a block went too far.
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

from seqjax.analysis._flow import Driven, driven, random_frame
from seqjax.analysis._frames import (
    advance,
    check_count,
    counted_steps,
    log_diagonal,
    lost_directions,
    safe_interval,
    strain,
    sweep,
    sweep_all,
)
from seqjax.analysis._statistics import bootstrap_interval
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import compiled

BLOCKS = 32  # at least, where the run is that long, so that an interval can be had from them


class LyapunovExponents(NamedTuple):
    """Exponents in nats a step, largest first. A reset moves the state and leaves the perturbations as they are.

    Attributes:
        exponents: (batch, k), one spectrum for each sequence; minus infinity where steps are singular.
        mean: (k,), over the sequences.
        spread: (k,), the standard deviation over the sequences; 0 for one.
        low, high: (batch, k), a 95 % interval by block bootstrap over time; NaN for too short a run.
        split_half: (batch, k), second half of the run less the first: how far it still drifts.
        history: (batch, blocks, k), the estimate after each block.
        history_steps: (blocks,), steps counted by then, of the first sequence.
        kaplan_yorke: (batch,), the dimension j + (lambda_1 + .. + lambda_j) / |lambda_{j+1}|; NaN where k is too small,
            and n where all n exponents add up to no contraction.
        entropy_rate: (batch,), the sum of positive exponents, in nats a step: Pesin's upper bound.
        singular: (batch, k), where a step's Jacobian has lost the direction to the precision of the dtype: it shrank
            beside the fastest one by exp(12) or so in float32, by exp(32) in float64, or to nothing at all.
        qr_every: steps between two QRs.
        steps: (batch,), valid steps that were averaged over.
        reliable: (batch,), False where a number is wrong; `reason` then says of this sequence what is.
        reason: what is wrong, in words, and where exponents are minus infinity; empty where there is nothing to say.
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

    Memory grows with time only by the history, batch * blocks * k numbers.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`; a cell without inputs takes xs (batch, time, 0).
        k: how many; by default 8, or all of a smaller state.
        burn_in: steps before the perturbations start, for the state to reach its attractor; by default a fifth of the
            time, at most 100.
        frame_burn_in: steps after that which turn the frame and are not counted; by default the same.
        qr_every: steps between two QRs; by default chosen from the measured spread and never unsafe.
        key: draws the first frame.

    Returns:
        `LyapunovExponents`.

    Raises:
        ValueError: k is larger than the state, the sequences are shorter than the burn-in, or a shape does not fit.
        TypeError: the state cannot be differentiated.

    Source: Benettin et al. 1980, "Lyapunov characteristic exponents for smooth dynamical systems"; Engelken, Wolf and
        Abbott 2023, "Lyapunov spectra of chaotic recurrent neural networks"; interval: Kuensch 1989.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> class Logistic:  # x <- 4 x (1 - x), a cell without parameters or inputs
        ...     def init(self, key): return {}
        ...     def initial_state(self, params): return jnp.full(1, 0.3)
        ...     def step(self, params, s, x): return 4 * s * (1 - s), s
        >>> found = sj.analysis.lyapunov_exponents(Logistic(), {}, jnp.zeros((1, 20_000, 0)))
        >>> round(float(found.exponents[0, 0]), 2)  # ln 2
        0.69
    """
    given = driven(cell, params, xs, state, mask, reset)
    k = check_count(k, given.size)
    burn_in, frame_burn_in = _check_burn_in(given, burn_in, frame_burn_in)
    if qr_every is not None and not (_is_whole(qr_every) and qr_every >= 1):
        raise ValueError(
            f"expected qr_every of at least 1 whole step, got {qr_every!r}: leave it out to have it chosen"
        )
    key = jax.random.key(0) if key is None else key
    start = burn_in + frame_burn_in

    states, frames, warm_logs = compiled(_warm_up, cell, k, burn_in, frame_burn_in)(given, key)
    dtype, chosen = frames.dtype, qr_every is None
    enough = max(1, (given.time - start) // BLOCKS)
    every = qr_every or min(safe_interval(np.asarray(warm_logs, np.float64), dtype), enough)
    while True:
        logs = np.asarray(compiled(_count, cell, start, every)(given, states, frames), np.float64)
        strained = strain(logs, dtype)
        if not chosen or every == 1 or strained.max() <= 1:
            break
        every //= 2
    steps = counted_steps(given.between(start, given.time), every)
    found = _result(logs, steps, start, every, chosen, strained, dtype)
    if k < given.size:
        return found
    return found._replace(kaplan_yorke=np.where(found.exponents.sum(axis=1) >= 0, float(k), found.kaplan_yorke))


def _warm_up(
    cell: Cell, k: int, burn_in: int, frame_burn_in: int, given: Driven, key: Array
) -> tuple[Array, Array, Array]:
    """The states and the frames after their burn-in, and ln R_ii of single steps, to choose the interval from."""
    states = advance(cell, given.until(burn_in))
    frame = random_frame(key, k, given.size, given.first.dtype)
    frames = jnp.broadcast_to(frame, (given.batch, *frame.shape))
    start = burn_in + frame_burn_in
    probe = given.between(burn_in, start if frame_burn_in else min(start + 32, given.time))
    warm_states, warm_frames, logs = sweep(cell, 1, log_diagonal, probe, states, frames)
    return (warm_states, warm_frames, logs) if frame_burn_in else (states, frames, logs)


def _count(cell: Cell, start: int, every: int, given: Driven, states: Array, frames: Array) -> Array:
    """ln R_ii of every block after the burn-in."""
    return sweep_all(cell, log_diagonal, every, given.between(start, given.time), states, frames)


def _check_burn_in(given: Driven, burn_in: int | None, frame_burn_in: int | None) -> tuple[int, int]:
    usual = min(100, given.time // 5)
    burn_in = usual if burn_in is None else burn_in
    frame_burn_in = usual if frame_burn_in is None else frame_burn_in
    if not (_is_whole(burn_in) and _is_whole(frame_burn_in)):
        raise ValueError(f"expected whole steps of burn-in, got {burn_in!r} and {frame_burn_in!r}")
    if burn_in < 0 or frame_burn_in < 0 or burn_in + frame_burn_in >= given.time:
        raise ValueError(
            f"expected sequences longer than burn_in + frame_burn_in, {burn_in} + {frame_burn_in} steps, "
            f"got {given.time}: use longer ones, or a shorter burn-in"
        )
    return int(burn_in), int(frame_burn_in)


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _result(
    logs: np.ndarray, steps: np.ndarray, first: int, every: int, chosen: bool, strained: np.ndarray, dtype: DTypeLike
) -> LyapunovExponents:
    total = steps.sum(axis=1)
    lost = lost_directions(logs, dtype) if every == 1 else np.isneginf(logs)
    singular = lost.any(axis=1)
    finite = np.isfinite(np.where(lost, 0.0, logs)).all(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(lost, -np.inf, logs)
        history = np.cumsum(logs, axis=1) / np.cumsum(steps, axis=1)[..., None]
    exponents = history[:, -1]
    split_half = np.array([_drift(*row) for row in zip(logs, steps, strict=True)])
    intervals = np.array([bootstrap_interval(*row) for row in zip(logs, steps, strict=True)])
    order = np.argsort(-np.where(np.isnan(exponents), -np.inf, exponents), axis=1, kind="stable")

    def ordered(values: Any) -> np.ndarray:
        return np.take_along_axis(np.asarray(values), order, axis=1)

    reasons = {}
    for b in np.flatnonzero(~finite):
        block = int(np.argmin(np.isfinite(np.where(lost[b], 0.0, logs[b])).all(axis=1)))
        what = "the state or its derivative" + (f", over qr_every={every} steps," if every > 1 else "")
        reasons[b] = f"{what} is not finite from about step {first + block * every + 1} on"
    for b in np.flatnonzero(total == 0):
        reasons[b] = "no valid step is left after the burn-in"
    for b in np.flatnonzero(strained > 1) if every > 1 and not chosen else ():
        reasons.setdefault(
            b,
            f"qr_every={every} is too long: in the worst block the columns lost more of their digits than is safe, "
            f"{strained[b]:.1f} times; leave qr_every out",
        )
    remarks = {
        b: f"{count} of {logs.shape[2]} exponents are minus infinity: in some step these directions shrink below the "
        f"rounding error of {np.dtype(dtype).name}"
        for b, count in enumerate(singular.sum(axis=1))
        if count and b not in reasons
    }
    exponents = ordered(exponents)
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
    """The mean over the second half of the blocks that count, less that over the first; NaN where there is only one."""
    logs, steps = logs[steps > 0], steps[steps > 0]
    half = len(steps) // 2
    if not half:
        return np.full(logs.shape[1], np.nan)
    with np.errstate(invalid="ignore"):
        return logs[half:].sum(0) / steps[half:].sum() - logs[:half].sum(0) / steps[:half].sum()


def kaplan_yorke_dimension(exponents: Float[Any, " k"] | Sequence[float]) -> float:
    """D = j + (lambda_1 + .. + lambda_j) / |lambda_{j+1}|, j the largest number whose partial sum is not negative.

    Args:
        exponents: in descending order, (k,), in nats.

    Returns:
        The dimension; NaN where all partial sums of the k exponents are positive, so that more of them are needed.

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
