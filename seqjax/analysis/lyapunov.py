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
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._exponent_doubts import doubt_of, finite_mean, finite_spread, has_trend, rounding_of
from seqjax.analysis._flow import random_frame
from seqjax.analysis._frames import (
    check_count,
    log_diagonal,
    lost_directions,
    power_of_two,
    probed_interval,
    pull_frames,
    push_frames,
    safe_interval,
    strain,
    sweep,
)
from seqjax.analysis._padding import spans
from seqjax.analysis._recording import Recording, by_sequence, recording
from seqjax.analysis._statistics import MIN_STEPS, mean_interval
from seqjax.cell import Cell, Params, State
from seqjax.cells.arguments import as_numbers
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes

PRINTED = 4  # sequences
MIN_BLOCKS = 32  # if the run is long enough, because the confidence intervals resample the blocks
PROBED = 32  # steps of the burn-in from which the interval between two QRs is chosen


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

    def __str__(self) -> str:
        lines = [
            f"sequence {b}: largest exponent {values[0]:.4g} nats per step ({low[0]:.4g} to {high[0]:.4g}), smallest "
            f"of {len(values)} {values[-1]:.4g}, over {steps} steps, {'reliable' if good else 'not reliable'}"
            for b, (values, low, high, steps, good) in enumerate(
                zip(self.exponents, self.low, self.high, self.steps, self.reliable, strict=True)
            )
        ]
        more = [f"and {len(lines) - PRINTED} more sequences"] if len(lines) > PRINTED else []
        return "\n".join([*lines[:PRINTED], *more, *([self.reason] if self.reason else [])])


@for_automatic_axes
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
    for name, steps in (("burn_in", burn_in), ("frame_burn_in", frame_burn_in)):
        if steps is not None:
            whole_number(name, steps, 0, expected="whole steps of burn-in")
    if qr_every is not None:
        hint, expected = "None chooses a safe interval", "qr_every of at least 1 whole step"
        qr_every = whole_number("qr_every", qr_every, hint=hint, expected=expected)
    with recording(cell, params, xs, state, mask, reset) as record:
        return exponents_of(record, k, (burn_in, frame_burn_in), qr_every, key)


def exponents_of(
    record: Recording,
    k: int | None = None,
    burn_in: tuple[int | None, int | None] = (None, None),
    qr_every: int | None = None,
    key: Array | None = None,
) -> LyapunovExponents:
    """`lyapunov_exponents` of a recording; `burn_in` is that of the state and that of the frame."""
    key = jax.random.key(0) if key is None else key
    k = check_count(k, record.sequences.size)
    starts = _first_counted(*burn_in, record.lengths)
    growth = _sweep(record, k, starts, qr_every, key)
    if None in burn_in:
        later = _settled(growth, starts)
        if (later > starts).any():
            starts = later
            growth = _sweep(record, k, starts, qr_every, key)
    return _result(record, growth, starts)


def _first_counted(burn_in: int | None, frame_burn_in: int | None, lengths: np.ndarray) -> np.ndarray:
    """The number of steps of each sequence that are not in the mean."""
    default = np.minimum(100, lengths // 5)
    starts = (default if burn_in is None else burn_in) + (default if frame_burn_in is None else frame_burn_in)
    starts = np.broadcast_to(starts, lengths.shape)
    if lengths.any() and (starts >= lengths).all():
        raise ValueError(
            f"expected sequences longer than burn_in + frame_burn_in, {burn_in} + {frame_burn_in} steps, "
            f"got {int(lengths.max())}: use longer ones, or a shorter burn-in"
        )
    return starts


class _Sweep(NamedTuple):
    """The growth of all frames after the burn-in.

    Attributes:
        logs: ln R_ii of every block, (batch, blocks, k).
        steps: the number of valid steps of each block, (batch, blocks).
        every: the number of steps in a block.
        chosen: whether `every` was chosen from measured rates.
        misaligned: (batch, k), how much more the first i directions together would have grown from the best frame at
            the beginning of the mean than from the frame that was there, in nats; NaN if it is not known.
    """

    logs: np.ndarray
    steps: np.ndarray
    every: int
    chosen: bool
    misaligned: np.ndarray


def _sweep(record: Recording, k: int, starts: np.ndarray, qr_every: int | None, key: Array) -> _Sweep:
    cell, sequences = record.cell, record.sequences
    dtype, counted = sequences.first.dtype, np.maximum(record.lengths - starts, 0)
    frame = np.asarray(random_frame(key, k, sequences.size, dtype))
    frames = jnp.asarray(np.broadcast_to(frame, (sequences.batch, *frame.shape)))
    states, logs = sequences.first, np.zeros((sequences.batch, 0, k))
    if starts.any():
        burn_in = spans(sequences, np.zeros_like(starts), np.minimum(starts, record.lengths))
        states, frames, logs = precise_jit(sweep, cell, 1, log_diagonal)(burn_in, states, frames)
    sequences = spans(sequences, np.minimum(starts, record.lengths), record.lengths)._replace(first=states)
    if starts.any():
        rated = safe_interval(np.asarray(logs, np.float64)[:, -PROBED:], dtype)
    else:
        rated = probed_interval(cell, sequences, frames)
    every = qr_every or power_of_two(min(rated, max(1, int(counted.max()) // MIN_BLOCKS)))
    while True:
        pushed = precise_jit(push_frames, cell, every)(sequences, frames)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.diagonal(np.asarray(pushed.factors, np.float64), axis1=-2, axis2=-1))
        if qr_every or every == 1 or strain(logs, dtype).max() <= 1:
            break
        every //= 2  # growth in a later block was faster than in the steps that the interval was chosen from
    pulled = precise_jit(pull_frames, cell, every)(sequences, pushed.starts, pushed.last)
    steps = np.clip(counted[:, None] - every * np.arange(logs.shape[1]), 0, every)
    used = steps.any(axis=0)
    used[0] = True  # also if no sequence has a step after the burn-in; its mean is then NaN
    misaligned = np.array(
        [_misalignment(*pair) for pair in zip(np.asarray(pulled)[0], np.asarray(frames), strict=True)]
    )
    return _Sweep(logs[:, used], steps[:, used], every, qr_every is None, misaligned)


def _misalignment(P: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """-ln |det| of the leading blocks of P Q^T, (k,).

    Q is the frame at the beginning of the mean. P is the final frame, pulled back to there: it spans the directions
    that grow most until the end. An aligned frame has a determinant near one.
    """
    C = P @ Q.T
    return -np.cumsum(_log_pivots(C)) if np.isfinite(C).all() else np.full(len(C), np.nan)


def _log_pivots(C: np.ndarray) -> np.ndarray:
    """ln |pivots| of an elimination without row exchanges: sums of the first i are ln |det| of the leading blocks."""
    C, pivots = C.copy(), np.zeros(len(C))
    tiny = np.finfo(C.dtype).tiny
    for i in range(len(C)):
        pivots[i] = C[i, i] if abs(C[i, i]) > tiny else tiny
        C[i + 1 :, i:] -= np.outer(C[i + 1 :, i] / pivots[i], C[i, i:])
    return np.log(np.abs(pivots))


def _settled(sweep: _Sweep, starts: np.ndarray) -> np.ndarray:
    """Later first steps for rows whose largest exponent still drifts, from the standard error of what remains.

    Source: White 1997, "An effective truncation heuristic for bias reduction in simulation output".
    """
    later = starts.copy()
    for b, (logs, steps) in enumerate(zip(sweep.logs[..., :1], sweep.steps, strict=True)):
        logs, steps = logs[steps > 0], steps[steps > 0]
        if len(steps) < 2 * MIN_STEPS or not np.isfinite(logs).all():
            continue
        low, high = mean_interval(logs, steps)
        if abs(_drift(logs, steps)[0]) <= high[0] - low[0]:
            continue
        rates, remaining = logs[:, 0] / steps, np.arange(len(steps), 0, -1)
        sums, squares = (np.cumsum(values[::-1])[::-1] for values in (rates, rates**2))
        variance = np.maximum(squares / remaining - (sums / remaining) ** 2, 0) / remaining
        later[b] += sweep.every * int(np.argmin(variance[: len(steps) // 2]))
    return later


def _result(record: Recording, sweep: _Sweep, starts: np.ndarray) -> LyapunovExponents:
    lengths, dtype = record.lengths, record.sequences.first.dtype
    logs, steps, every = sweep.logs, sweep.steps, sweep.every
    total = steps.sum(axis=1)
    # Within a longer block a direction may shrink that far without a single singular step.
    lost = lost_directions(logs, dtype) if every == 1 else np.isneginf(logs)
    singular = np.asarray((lost & (steps > 0)[..., None]).any(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(steps[..., None] > 0, np.where(lost, -np.inf, logs), 0.0)
        history = np.cumsum(logs, axis=1) / np.cumsum(steps, axis=1)[..., None]
    exponents = history[:, -1]
    low, high = np.moveaxis(np.array([mean_interval(*row) for row in zip(logs, steps, strict=True)]), 1, 0)
    split_half = np.array([_drift(*row) for row in zip(logs, steps, strict=True)])
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = np.diff(sweep.misaligned, axis=1, prepend=0) / total[:, None]
        # A frame that still turns towards faster directions has growth rates that change.
        bias[high - low <= rounding_of(exponents)] = 0.0
        low, high = low - np.maximum(-bias, 0), high + np.maximum(bias, 0)
    # QR orders the directions only in the limit of a long run, and NaN must come last.
    order = np.argsort(-np.where(np.isnan(exponents), -np.inf, exponents), axis=1, kind="stable")

    def ordered(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, axis=1)

    reasons = record.reasons()
    strains = strain(sweep.logs, dtype)
    for b in range(len(lengths)):
        text = doubt_of(
            int(total[b]),
            bool(np.isfinite(np.where(lost[b], 0.0, logs[b])).all()),
            (ordered(low)[b, 0], ordered(high)[b, 0], ordered(split_half)[b, 0], abs(bias[b, 0])),
            has_trend(record.rms[b, starts[b] + 1 : lengths[b] + 1], record.rms[b, : lengths[b] + 1].max(axis=0)),
        )
        if every > 1 and not sweep.chosen and strains[b] > 1:
            text = (
                f"qr_every={every} is too long: in the worst block the columns lost more of their digits than is safe, "
                f"{strains[b]:.1f} times; leave qr_every out"
            )
        if text:
            reasons.setdefault(b, text)
    remarks = {
        b: f"{count} of {logs.shape[2]} exponents are minus infinity: in some step these directions shrink below the "
        f"rounding error of {np.dtype(dtype).name}"
        for b, count in enumerate(singular.sum(axis=1))
        if count and b not in reasons
    }
    exponents = ordered(exponents)
    k = logs.shape[2]
    dimension = np.array([kaplan_yorke_dimension(row) for row in exponents])
    if k == record.sequences.size:
        dimension = np.where(exponents.sum(axis=1) >= 0, float(k), dimension)
    return LyapunovExponents(
        exponents=exponents,
        mean=finite_mean(exponents),
        spread=finite_spread(exponents),
        low=ordered(low),
        high=ordered(high),
        split_half=ordered(split_half),
        history=np.take_along_axis(history, order[:, None], axis=2),
        history_steps=np.cumsum(steps[0]),
        kaplan_yorke=dimension,
        entropy_rate=np.where(exponents <= 0, 0.0, exponents).sum(axis=1),
        singular=ordered(singular),
        qr_every=every,
        steps=total,
        reliable=np.array([b not in reasons for b in range(len(logs))]),
        reason="; ".join(by_sequence(reasons | remarks)),
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
    exponents = as_numbers("exponents", exponents)
    if exponents.ndim != 1:
        raise ValueError(f"expected exponents (k,), got {exponents.shape}: one sequence at a time")
    sums = np.cumsum(exponents)
    if np.isnan(sums).any():
        return math.nan
    j = int(np.sum(sums >= 0))
    if j == len(exponents):
        return math.nan
    return j + (float(sums[j - 1]) / -float(exponents[j]) if j else 0.0)
