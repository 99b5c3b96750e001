"""Whether the interval of a Lyapunov exponent can be trusted, and means over sequences with infinite exponents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from seqjax.analysis._statistics import MIN_STEPS

TREND = 0.8  # a correlation of the size of the state with time above which the state has not settled


def doubt_of(steps: int, finite: bool, largest: tuple[float, float, float, float], trend: bool) -> str:
    """Why the interval of the largest exponent should not be trusted; empty if it should.

    Args:
        steps: in the mean.
        finite: whether all growth rates are finite.
        largest: the ends of the interval of the largest exponent, the difference between the halves of the run, and
            the part of the interval that comes from the alignment of the frame.
        trend: whether the state has not settled.
    """
    if not steps:
        return "no valid step is left after the burn-in"
    if not finite:
        return "the derivative of a step is not finite"
    low, high, drift, bias = largest
    if np.isneginf(low):
        return ""
    width = high - low
    if not math.isfinite(width) or math.isnan(drift):
        return f"{steps} steps after the burn-in are too few for an interval: use at least {8 * MIN_STEPS} more"
    rounding = rounding_of(low)
    if abs(drift) > width + rounding:
        need = steps * max(2, math.ceil(abs(drift) / max(width, rounding)))
        return f"the halves of the {steps} steps differ by more than the interval: use {min(need, 10**9)} steps or more"
    if 2 * bias > width and bias > rounding:
        need = math.ceil(2 * steps * bias / max(width - bias, bias / 2))
        return f"the frame is not aligned after the burn-in: use at least {need} steps"
    if trend and width > rounding:
        return (
            f"the size of the state still changes in one direction over the {steps} steps after the burn-in, so it has "
            f"not settled: use at least {5 * steps} steps"
        )
    return ""


def rounding_of(exponent: Any) -> Any:
    """A width of an interval that is only rounding."""
    return 1e-9 + 1e-6 * np.abs(exponent)


def has_trend(rms: np.ndarray, largest: np.ndarray) -> bool:
    """Whether a field's size over time (time, fields) rises or falls steadily, by more than 1 % of its largest size."""
    if len(rms) < MIN_STEPS:
        return False
    time = np.arange(len(rms)) - (len(rms) - 1) / 2
    rms = rms - rms.mean(axis=0)
    spread = np.sqrt((rms**2).mean(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (time[:, None] * rms).mean(axis=0) / (spread * time.std())
    return bool(((np.abs(correlation) > TREND) & (spread > 0.01 * largest)).any())


def finite_mean(exponents: np.ndarray) -> np.ndarray:
    """The mean over the sequences with a finite value; minus infinity if there is none, and NaN if one is NaN."""
    infinite = np.isneginf(exponents)
    with np.errstate(invalid="ignore"):
        mean = np.where(infinite, 0.0, exponents).sum(axis=0) / (~infinite).sum(axis=0)
    return np.where(infinite.all(axis=0), -np.inf, mean)


def finite_spread(exponents: np.ndarray) -> np.ndarray:
    """The standard deviation over the same sequences."""
    infinite = np.isneginf(exponents)
    with np.errstate(invalid="ignore"):
        squares = np.where(infinite, 0.0, (exponents - finite_mean(exponents)) ** 2).sum(axis=0) / (~infinite).sum(
            axis=0
        )
    return np.where(infinite.all(axis=0), 0.0, np.sqrt(squares))
