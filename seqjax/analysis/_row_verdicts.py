"""The verdict on one sequence, from its measurements."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from seqjax.analysis._memory import memory_of, power
from seqjax.analysis._row_measurements import DISTINCT, EXPLODED, Measurements, Regime, Row
from seqjax.analysis._verdict_words import evidence_of, summary_of


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


def row_verdict(measured: Measurements, b: int) -> RowVerdict:
    """The verdict on row b."""
    row = Row(measured, b)
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
        summary=summary_of(regime, row, lag, block, reason),
        evidence=tuple(evidence_of(row)),
    )


def _decide(row: Row) -> tuple[Regime, bool, str]:
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


def _regime(row: Row) -> tuple[Regime, str]:
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


def _growing(row: Row) -> tuple[Regime, str]:
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


def _keeps_a_direction(row: Row) -> bool:
    """Whether the direction that is preserved best is not lost, and its loss is not in sight either."""
    return math.isinf(row.best.lag) and row.best.expected_lag > 10 * row.K


def _lag_and_block(regime: Regime, row: Row) -> tuple[float, str]:
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


def _alternatives(regime: Regime, row: Row) -> dict[Regime, float]:
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
