"""The verdict on one sequence in words: its summary, and one sentence for each measurement."""

from __future__ import annotations

import math

import numpy as np

from seqjax.analysis._memory import power
from seqjax.analysis._row_measurements import DISTINCT, EXPLODED, Regime, Row


def summary_of(regime: Regime, row: Row, lag: float, block: str, reason: str) -> str:
    """The regime in a sentence, with a second one on whether perturbations shrink."""
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


def _stable_sentence(row: Row) -> str:
    if math.isfinite(row.memory.lag):
        return (
            f"Stable in some directions: a gradient is lost at lag {row.memory.lag:.0f} on average over directions, "
            f"but the best-kept direction is not: {row.best}."
        )
    text = f"Stable: over {row.K} steps a gradient is neither lost nor grows tenfold; memory {row.memory}."
    if row.settled and row.slack < row.lam and row.contracting is False:
        text += f" It grows by {math.expm1(row.lam):.2%} per step, tenfold at about lag {EXPLODED / row.lam:.0f}."
    return text


def _transient_sentence(row: Row, within: str) -> str:
    back = _back_below_one(row)
    ending = f"and is back below one at lag {back}" if back else f"and is not back below one within {row.K} steps"
    top = power(float(row.mean[row.peak]))
    return f"Transient growth: a gradient grows {top} times by lag {row.peak}{within}, {ending}."


def _back_below_one(row: Row) -> int | None:
    above = np.flatnonzero(row.mean >= 0)
    return int(above[-1]) + 1 if above[-1] < row.K else None


def _contraction_sentence(row: Row) -> str:
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


def evidence_of(row: Row) -> list[str]:
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


def _exponent_sentence(row: Row) -> str:
    if math.isinf(row.lam):
        return "every direction of the state is lost within a step, so the largest Lyapunov exponent is minus infinity"
    if math.isnan(row.lam):
        return "the sequence is too short for a Lyapunov exponent"
    steps = int(row.measured.exponents.steps[row.b])
    interval = "no interval" if math.isnan(row.low) else f"{row.low:.4g} to {row.high:.4g}"
    unsure = "" if row.settled else "; not reliable"
    return (
        f"the largest Lyapunov exponent is {row.lam:.4g} per step ({interval}), a factor of "
        f"{math.exp(min(row.lam, 700)):.4g} per step, over {steps} steps{unsure}"
    )


def _lag_sentences(row: Row) -> list[str]:
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


def _twin_sentence(row: Row) -> str:
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
