"""The verdict on one sequence, from its measurements."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from seqjax.analysis._memory import memory_of, power

if TYPE_CHECKING:
    from seqjax.analysis._probes import Probes
    from seqjax.analysis._recording import Problem, Recording
    from seqjax.analysis.gradient_flow import GradientByLag
    from seqjax.analysis.lyapunov import LyapunovExponents
else:  # needed only in annotations
    GradientByLag = LyapunovExponents = Probes = Problem = Recording = Any

Regime = Literal[
    "vanishing", "stable", "transient growth", "exploding", "chaotic", "unstable fixed point", "multistable", "unknown"
]
EXPLODED = math.log(10)  # a gradient that grew tenfold explodes
DISTINCT = math.log(100)  # the smallest growth over a sequence that distinguishes chaos from slow growth
AT_REST = 1e-7  # a smaller movement per step, relative to the size of the state, is rest


class RowVerdict(NamedTuple):
    """The verdict on one sequence.

    Attributes:
        regime: as for `Verdict`, but never "mixed".
        reliable: whether the measurements that decide the regime are reliable.
        reason: why they are not, or empty.
        contracting: whether perturbations of the state shrink along this trajectory; None if this cannot be told.
        forgets: True if trajectories from other initial states with the same inputs met this one, False if one of them
            ended elsewhere although perturbations shrink, None if neither was seen.
        lag: in steps: where a gradient is lost or has grown tenfold, or the peak of a transient growth; inf if there is
            none among the measured lags.
        steps: the number of valid steps that were measured.
        alternatives: regimes that the measurements do not exclude, with their weights, which sum to one.
        block: the field of the state that decides: the first to lose its gradient, or the one with the largest.
        summary: one or two sentences.
        evidence: the measurements, one sentence each.
    """

    regime: Regime
    reliable: bool
    reason: str
    contracting: bool | None
    forgets: bool | None
    lag: float
    steps: int
    alternatives: dict[Regime, float]
    block: str
    summary: str
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"- {line}" for line in self.evidence)])


class Measurements(NamedTuple):
    """Everything that was measured of all sequences.

    Attributes:
        record: the sequences.
        by_lag, exponents, probes: the measurements.
        nearby: the exponents along a nearby trajectory; None if none was measured.
        segments: for each row, the number of segments that resets cut it into.
    """

    record: Recording
    by_lag: GradientByLag
    exponents: LyapunovExponents
    probes: Probes
    nearby: LyapunovExponents | None
    segments: np.ndarray


class _Row:
    """The measurements of row b by the names that the rules use."""

    def __init__(self, measured: Measurements, b: int) -> None:
        by_lag, exponents, probes = measured.by_lag, measured.exponents, measured.probes
        self.b, self.measured = b, measured
        self.L = int(measured.record.lengths[b])
        self.problem: Problem | None = measured.record.problems.get(b)
        end = int(by_lag.times[b].max()) + 1
        self.mean, self.worst = by_lag.rows_expected[b, :end], by_lag.rows_worst[b, :end]
        self.parts = {name: curve[b, :end] for name, curve in by_lag.rows_parts.items()}
        self.K = len(self.mean) - 1
        self.memory, self.best = (memory_of(curve, by_lag.threshold) for curve in (self.mean, self.worst))
        self.lam = float(exponents.exponents[b, 0])
        self.low, self.high = float(exponents.low[b, 0]), float(exponents.high[b, 0])
        self.settled = bool(exponents.reliable[b]) or (self.problem is not None and not math.isnan(self.low))
        # The rounding error of the exponent of a step that preserves all lengths, such as a rotation.
        self.slack = 16 * float(np.finfo(np.float32).eps)
        self.others = probes.others[b, :, : self.L + 1]
        self.nearby = probes.nearby[b, : self.L + 1]
        self.at_rest = bool(probes.movement[b] < AT_REST)
        fields = probes.rates[b]
        self.rate, self.growing = float(fields.max()), list(by_lag.rows_parts)[int(fields.argmax())]

    @property
    def growth(self) -> float:
        """The growth of a perturbation over the whole sequence, in nats."""
        return self.lam * self.L

    @property
    def contracting(self) -> bool | None:
        """Whether perturbations shrink along the trajectory."""
        if self.lam == -math.inf:
            return True
        if self.settled and not math.isnan(self.low):
            if self.high < -self.slack:
                return True
            if self.low > self.slack:
                return False
        shrunk = self.lam < 0 and self.worst[-1] < -EXPLODED
        return True if shrunk else None

    @property
    def positive(self) -> bool:
        """Whether perturbations grow: by the interval, or by so much that its width does not matter."""
        return self.contracting is False or (self.lam > 0 and self.growth > 2 * DISTINCT and self.mean[-1] > EXPLODED)

    @property
    def forgets(self) -> bool | None:
        """What trajectories from other initial states show."""
        first, half, end = self.others[:, 0], self.others[:, self.L // 2], self.others[:, -1]
        with np.errstate(invalid="ignore"):
            if (end < 1e-3 * np.maximum(first, 1e-6)).all() or (end < 1e-6).all():
                return True
            predicted = self.lam * (self.L - self.L // 2)
            apart = (end > 0.02) & (end > 0.5 * half)
        return False if self.contracting and predicted < -2 and apart.any() else None

    @property
    def unbounded(self) -> bool:
        """Whether a field of the state itself grows about as fast as perturbations do."""
        if self.lam <= self.slack:
            return False
        state_grows = self.rate > 0.5 * self.lam and self.rate * self.L > EXPLODED
        return state_grows or not self.measured.probes.nonlinear

    @property
    def peak(self) -> int:
        """The lag of the largest expected norm."""
        return int(np.nanargmax(self.mean)) if not np.isnan(self.mean).all() else 0

    @property
    def falls_from_peak(self) -> bool:
        """Whether the expected norm grows tenfold and falls again."""
        top, end = self.mean[self.peak], self.mean[-1]
        return bool(top > EXPLODED and (end < 0 or (end < top - EXPLODED and self.memory.rate < 0)))


def row_verdict(measured: Measurements, b: int) -> RowVerdict:
    """The verdict on row b."""
    row = _Row(measured, b)
    regime, reliable, reason = _decide(row)
    lag, block = _lag_and_block(regime, row)
    return RowVerdict(
        regime=regime,
        reliable=reliable,
        reason=reason,
        contracting=None if regime == "unknown" and row.L < 2 else row.contracting,
        forgets=row.forgets if row.L else None,
        lag=lag,
        steps=row.L,
        alternatives=_alternatives(regime, row),
        block=block,
        summary=_summary(regime, row, lag, block, reason),
        evidence=tuple(_evidence(row)),
    )


def _decide(row: _Row) -> tuple[Regime, bool, str]:
    """The regime, whether it is reliable, and why not."""
    probes, b = row.measured.probes, row.b
    if row.problem is not None and row.problem.cause != "overflow":
        return "unknown", False, row.problem.text
    if row.problem is not None:
        return "exploding", True, ""
    if row.L < 2:
        return "unknown", False, f"too short to tell: it has {row.L} valid step{'s' * (row.L != 1)}"
    if probes.flat[b]:
        flat = "the derivative of the step is zero everywhere, although the step depends on the state: it is quantized"
        return "unknown", False, flat
    if np.isnan(row.mean).any():
        return "unknown", False, "the derivative of a step is not finite"
    doubt = ""
    if probes.mismatch[b]:
        doubt = (
            f"the derivative that JAX uses differs from a finite difference of the step by {probes.mismatch[b]:.0%}: "
            f"the step has a surrogate derivative or kinks"
        )
    regime, unsure = _regime(row)
    doubt = doubt or unsure
    return regime, not doubt, doubt


def _regime(row: _Row) -> tuple[Regime, str]:
    """The regime of a finite sequence, and why it is not reliable."""
    if row.positive:
        return _growing(row)
    if row.falls_from_peak:
        return "transient growth", ""
    if row.mean[-1] > EXPLODED:
        return "unknown", (
            f"cannot tell from {row.L} steps: gradients grew by a factor of {power(row.mean[-1])}, but the largest "
            f"exponent may be zero or the state has not settled; needs at least {5 * row.L} steps"
        )
    if row.forgets is False:
        return "multistable", ""
    if math.isfinite(row.memory.lag) and not _keeps_a_direction(row):
        return "vanishing", ""
    return "stable", ""


def _growing(row: _Row) -> tuple[Regime, str]:
    """The regime if perturbations grow along the trajectory."""
    if row.unbounded and not (row.at_rest and row.measured.probes.nonlinear):
        if row.growth > EXPLODED or row.mean[-1] > EXPLODED:
            return "exploding", ""
        return "stable", ""
    if row.at_rest:
        return "unstable fixed point", ""
    nearby = row.measured.nearby
    if nearby is not None and row.growth > DISTINCT:
        later, slack = float(nearby.exponents[row.b, 0]), max(row.slack, 0.1 * row.lam)
        if later < slack and float(nearby.high[row.b, 0]) < row.lam:
            return "unstable fixed point", ""
        parted = bool(np.nanmax(row.nearby) > 5 * row.nearby[0])
        if parted and later > 0:
            return "chaotic", ""
    if row.falls_from_peak:
        return "transient growth", ""
    if row.mean[-1] > EXPLODED:
        need = math.ceil(2 * DISTINCT / row.lam)
        doubt = "" if row.growth > EXPLODED else f"too short to tell chaos from growth: use at least {need} steps"
        return "exploding", doubt
    return "stable", ""


def _keeps_a_direction(row: _Row) -> bool:
    """Whether the direction that is preserved best is not lost, and its loss is not in sight either."""
    return math.isinf(row.best.lag) and row.best.expected_lag > 10 * row.K


def _lag_and_block(regime: Regime, row: _Row) -> tuple[float, str]:
    threshold = row.measured.by_lag.threshold
    last = {name: float(curve[-1]) for name, curve in row.parts.items()}
    largest = max(last, key=lambda name: last[name])
    if regime in ("vanishing", "multistable"):
        lags = {name: memory_of(curve, threshold).lag for name, curve in row.parts.items()}
        return row.memory.lag, min(last, key=lambda name: (lags[name], last[name]))
    if regime in ("exploding", "chaotic", "unstable fixed point"):
        grown = np.flatnonzero(row.mean > EXPLODED)
        lag = float(grown[0]) if grown.size else math.inf
        return lag, row.growing if regime == "exploding" and row.unbounded else largest
    return (float(row.peak) if regime == "transient growth" else math.inf), largest


def _alternatives(regime: Regime, row: _Row) -> dict[Regime, float]:
    """Weights by the probability that the largest exponent is positive, where it decides."""
    if row.L < 2 or math.isnan(row.lam) or (row.problem is not None and row.problem.cause != "overflow"):
        return {regime: 1.0}
    width = row.high - row.low
    p = 0.5 if not math.isfinite(width) else float(row.lam > 0)
    if math.isfinite(width) and width > 0 and math.isfinite(row.lam):
        p = 1 - NormalDist(row.lam, width / 3.92).cdf(0.0)
    if regime == "unknown":
        return {"exploding": round(p, 3), "stable": round(1 - p, 3)}
    if regime == "stable" and row.contracting is None and row.mean[-1] > 0:
        return {"stable": round(max(1 - p, 0.5), 3), "exploding": round(min(p, 0.5), 3)}
    if regime == "exploding" and not row.unbounded and row.problem is None and row.growth < 2 * DISTINCT:
        return {"exploding": 0.5, "chaotic": 0.5}
    return {regime: 1.0}


def _summary(regime: Regime, row: _Row, lag: float, block: str, reason: str) -> str:
    share = f"{row.measured.by_lag.threshold:.3g}"
    factor = f"{math.exp(min(row.lam, 700)):.4g}" if row.L > 1 and not math.isnan(row.lam) else ""
    several = len(row.parts) > 1
    within = f", {'first' if regime in ('vanishing', 'multistable') else 'most'} in {block}" if several else ""
    tenfold = f"tenfold from lag {lag:.0f} on" if math.isfinite(lag) else "but less than tenfold over the measured lags"
    lost = (
        f"from lag {lag:.0f} on a gradient is below {share} of what it was"
        if math.isfinite(lag)
        else f"a gradient is not lost within {row.K} steps"
    )
    first = {
        "vanishing": f"Vanishing: {lost}{within}.",
        "stable": _stable_sentence(row),
        "transient growth": _transient_sentence(row, within),
        "exploding": f"Exploding: a gradient grows without bound, {tenfold}{within}.",
        "chaotic": (
            f"Chaotic: nearby states part by a factor of {factor} per step while the state stays bounded, and "
            f"gradients grow, {tenfold}{within}."
        ),
        "unstable fixed point": (
            f"Unstable fixed point: the trajectory {'does not move' if row.at_rest else 'stays near an unstable orbit'}"
            f", and perturbations grow by a factor of {factor} per step; this is not chaos."
        ),
        "multistable": f"Multistable: other initial states end elsewhere with the same inputs; {lost}{within}.",
        "unknown": f"Unknown: {reason}.",
    }[regime]
    return f"{first} {_contraction_sentence(row)}" if regime != "unknown" else first


def _stable_sentence(row: _Row) -> str:
    if math.isfinite(row.memory.lag):
        return (
            f"Stable in some directions: a gradient is lost at lag {row.memory.lag:.0f} on average over directions, "
            f"but the best-kept direction is not: {row.best}."
        )
    text = f"Stable: over {row.K} steps a gradient is neither lost nor grows tenfold; memory {row.memory}."
    if row.settled and row.slack < row.lam and row.contracting is False:
        text += f" It grows by {math.expm1(row.lam):.2%} per step, tenfold at about lag {EXPLODED / row.lam:.0f}."
    return text


def _transient_sentence(row: _Row, within: str) -> str:
    back = _back_below_one(row)
    ending = f"and is back below one at lag {back}" if back else f"and is not back below one within {row.K} steps"
    top = power(float(row.mean[row.peak]))
    return f"Transient growth: a gradient grows {top} times by lag {row.peak}{within}, {ending}."


def _back_below_one(row: _Row) -> int | None:
    above = np.flatnonzero(row.mean >= 0)
    return int(above[-1]) + 1 if above[-1] < row.K else None


def _contraction_sentence(row: _Row) -> str:
    if row.contracting is False:
        return "Perturbations grow, so it cannot be evaluated in parallel over time in few iterations."
    if row.contracting is None:
        return "Whether perturbations shrink in the long run cannot be told from these steps."
    forgets = {
        True: " Trajectories from other initial states met it, so it forgets where it began.",
        False: " It does not forget where it began.",
        None: "",
    }[row.forgets]
    return f"Perturbations shrink along this trajectory, so it can be evaluated in parallel over time.{forgets}"


def _evidence(row: _Row) -> list[str]:
    """One sentence for each measurement."""
    lines, probes, b = [], row.measured.probes, row.b
    if row.measured.segments[b] > 1:
        lines.append(
            f"resets cut the sequence into {row.measured.segments[b]} segments, and no gradient passes a reset; the "
            f"numbers are those of its longest segment, {row.L} steps"
        )
    if row.problem is not None:
        lines.append(row.problem.text)
    if not row.L:
        return lines
    lines.append(_exponent_sentence(row))
    lines += _lag_sentences(row)
    if row.contracting is False and row.L > 1:
        lines.append(_twin_sentence(row))
    if row.forgets is not None:
        many, end = len(row.others), row.others[:, -1]
        lines.append(
            f"{many} trajectories from other initial states with the same inputs end "
            + (
                "where this one does"
                if row.forgets
                else f"up to {end.max():.2g} times the size of the state away from this one"
            )
        )
    if probes.mismatch[b]:
        lines.append(f"the derivative differs from a finite difference of the step by {probes.mismatch[b]:.0%}")
    return lines


def _exponent_sentence(row: _Row) -> str:
    if math.isinf(row.lam):
        return "every direction of the state is lost within a step, so the largest Lyapunov exponent is minus infinity"
    if math.isnan(row.lam):
        return "the sequence is too short for a Lyapunov exponent"
    steps = int(row.measured.exponents.steps[row.b])
    interval = "no interval" if math.isnan(row.low) else f"{row.low:.4g} to {row.high:.4g}"
    unsure = "" if row.settled else "; not reliable"
    return (
        f"the largest Lyapunov exponent is {row.lam:.4g} nats per step ({interval}), a factor of "
        f"{math.exp(min(row.lam, 700)):.4g} per step, over {steps} steps{unsure}"
    )


def _lag_sentences(row: _Row) -> list[str]:
    lines = [
        f"over {row.K} steps a gradient changes by a factor of {power(float(row.mean[-1]))} on average over "
        f"directions, and by {power(float(row.worst[-1]))} in the best-kept direction",
        f"memory: {row.memory} on average, {row.best} in the best-kept direction",
    ]
    top = int(np.nanargmax(row.worst)) if not np.isnan(row.worst).all() else 0
    if row.worst[top] > math.log(2) and row.worst[-1] < row.worst[top] - math.log(2):
        lines.append(
            f"it can grow before it shrinks: the best-kept gradient is largest at lag {top}, "
            f"{power(float(row.worst[top]))} times what it was"
        )
    return lines


def _twin_sentence(row: _Row) -> str:
    largest = float(np.nanmax(row.nearby))
    began = float(row.nearby[0])
    predicted = began * math.exp(min(row.growth, 600))
    bounded = largest < 0.2 * predicted
    if row.growth < DISTINCT:
        return (
            f"over the whole sequence a perturbation grows by a factor of {math.exp(min(row.growth, 600)):.3g} only, "
            f"too little to tell chaos from slow growth: use longer sequences"
        )
    return (
        f"a trajectory that begins {began:.2g} of the size of the state away is at most {largest:.2g} sizes away, "
        f"where growth without bound would make {power(min(row.growth, 600) + math.log(began))}: "
        + ("the nonlinearity bounds them" if bounded else "nothing bounds them")
    )
