"""Confidence intervals for the mean of a time series with correlated neighbours."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Shaped

RESAMPLES = 400
MIN_STEPS = 8  # a shorter series has fewer than three independent runs, so an interval would be a guess


def mean_interval(
    sums: Float[np.ndarray, "time k"], weights: Shaped[np.ndarray, " time"]
) -> tuple[np.ndarray, np.ndarray]:
    """A 95 % interval by `bootstrap_interval`, widened if correlations are longer than its runs.

    The variance of the mean of m neighbours times m grows with m until m exceeds the correlation time. Its largest
    value, relative to that for single terms, is the number of terms that are worth one independent value.

    Args:
        sums, weights: as for `bootstrap_interval`.

    Returns:
        The lower and the upper end, (k,) each; NaN if the series is too short or not finite.

    Source: Flyvbjerg and Petersen 1989, "Error estimates on averages of correlated data".

    Example:
        >>> import numpy as np
        >>> from seqjax.analysis._statistics import mean_interval
        >>> noise = np.random.default_rng(0).normal(size=(4000, 1))
        >>> slow = np.convolve(noise[:, 0], np.ones(10) / 10, "valid")[:, None]  # ten neighbours are worth one value
        >>> low, high = mean_interval(slow, np.ones(len(slow)))
        >>> round(float(high[0] - low[0]), 2)  # that of the noise itself is 2 * 1.96 / sqrt(4000) = 0.06
        0.07
    """
    low, high = bootstrap_interval(sums, weights)
    used = np.asarray(weights) > 0
    rates = sums[used] / np.asarray(weights, float)[used, None]
    count = len(rates)
    if np.isnan(low).all():
        return low, high
    ratio, variance = np.ones(rates.shape[1]), None
    for size in 2 ** np.arange(int(math.log2(max(count // MIN_STEPS, 1))) + 1):
        batches = rates[: count - count % size].reshape(-1, size, rates.shape[1]).mean(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = batches.var(axis=0, ddof=1)
            variance = spread if variance is None else variance
            ratio = np.fmax(ratio, np.where(variance > 0, size * spread / variance, 1.0))
    middle, runs = (low + high) / 2, math.isqrt(count)
    factor = np.sqrt(np.maximum(ratio / np.minimum(runs, ratio), 1.0))
    return middle + factor * (low - middle), middle + factor * (high - middle)


def bootstrap_interval(
    sums: Float[np.ndarray, "time k"], weights: Shaped[np.ndarray, " time"], *, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """An interval for sum_t sums_t / sum_t weights_t by the circular block bootstrap.

    Each resample consists of runs of sqrt(time) neighbours, which preserves their correlation.

    Args:
        sums: (time, k), the terms of the numerator.
        weights: (time,), the number of terms in each sum; rows with weight zero are ignored.
        level: the confidence level.
        seed: of the resampling.

    Returns:
        The lower and the upper end, (k,) each; NaN if the series is too short or not finite.

    Source: Kuensch 1989, "The jackknife and the bootstrap for general stationary observations"; Politis and Romano
        1992, "A circular block-resampling procedure".

    Example:
        >>> import numpy as np
        >>> from seqjax.analysis._statistics import bootstrap_interval
        >>> noise = np.random.default_rng(0).normal(size=(10_000, 1))
        >>> low, high = bootstrap_interval(noise, np.ones(10_000))
        >>> round(float(high[0] - low[0]), 2)  # 2 * 1.96 / sqrt(10 000)
        0.04
    """
    weights = np.asarray(weights, float)
    # Rows of weight zero are removed, because a run that consists of them would divide zero by zero.
    sums, weights = sums[weights > 0], weights[weights > 0]
    time, k = sums.shape
    good = np.isfinite(sums).all(axis=0)
    low, high = np.full(k, math.nan), np.full(k, math.nan)
    if time < MIN_STEPS or not good.any():
        return low, high
    length = math.isqrt(time)
    starts = np.random.default_rng(seed).integers(time, size=(RESAMPLES, math.ceil(time / length)))

    def run_sums(values: np.ndarray) -> np.ndarray:
        """The sum of `length` neighbours from every start, continued at the beginning after the end."""
        ends = np.cumsum(np.concatenate([np.zeros_like(values[:1]), values, values[: length - 1]]), axis=0)
        return ends[length:] - ends[:-length]

    drawn_weights = run_sums(weights)[starts].sum(axis=1)
    runs = run_sums(sums[:, good])
    # Column by column, so that memory is resamples * runs and not that times k.
    estimates = np.stack([column[starts].sum(axis=1) for column in runs.T], axis=1)
    means = estimates / drawn_weights[:, None]
    tails = (50 * (1 - level), 50 * (1 + level))
    ends, middle = np.percentile(means, tails, axis=0), sums[:, good].sum(axis=0) / weights.sum()
    low[good], high[good] = middle + _small_sample_factor(time / length, level) * (ends - middle)
    return low, high


def _small_sample_factor(runs: float, level: float) -> float:
    """Student's quantile over the normal one, because resamples of few runs vary less than their mean does.

    Source: the expansion of Fisher 1925, "Expansion of Student's integral in powers of n^-1".
    """
    z, n = NormalDist().inv_cdf(0.5 + level / 2), runs - 1
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return t / z * math.sqrt(runs / n)
