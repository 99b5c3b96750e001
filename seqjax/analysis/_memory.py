"""How long a gradient lasts, from its norm at every lag, and what is known of it beyond the largest lag."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from seqjax.cells.arguments import as_numbers, real_number


class Memory(NamedTuple):
    """The lag from which a norm stays below a threshold; it prints as text.

    Attributes:
        lag: in steps; inf if the norm at the largest lag is not below the threshold, NaN if a norm is NaN.
        measured: the largest lag with a value, in steps.
        log_last: ln of the norm there.
        rate: its slope over the second half of the lags, in nats per step; NaN with fewer than two lags.
        threshold: of the norm.
    """

    lag: float
    measured: int
    log_last: float
    rate: float
    threshold: float

    @property
    def expected_lag(self) -> float:
        """`lag` if it was measured; otherwise the lag at which the norm is lost if it goes on to fall at `rate`."""
        if not math.isinf(self.lag):
            return self.lag
        return self.measured + (math.log(self.threshold) - self.log_last) / self.rate if self.rate < 0 else math.inf

    def __str__(self) -> str:
        if math.isnan(self.lag):
            return "unknown: a gradient is not finite"
        if math.isfinite(self.lag):
            return f"{self.lag:.0f} steps"
        there = power(self.log_last)
        if self.rate < -1e-9 and self.log_last < -1e-3:
            return f"> {self.measured} steps ({there} there; at this rate lost at about {self.expected_lag:.4g})"
        return f"> {self.measured} steps ({there} there, not falling)"


def memory_of(log_norms: Float[np.ndarray, " lags"], threshold: float) -> Memory:
    """The memory of one curve.

    Args:
        log_norms: ln of a norm at lags 0..K.
        threshold: a positive number.
    """
    K = len(log_norms) - 1
    half = K // 2
    with np.errstate(invalid="ignore"):
        rate = float(log_norms[K] - log_norms[half]) / (K - half) if K else math.nan
    return Memory(memory_horizon(log_norms, threshold), K, float(log_norms[K]), rate, threshold)


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
    if not real_number("threshold", threshold) > 0:
        raise ValueError(f"expected a positive threshold, got {threshold}: 0.01 is a hundredth of the gradient")
    log_norms = as_numbers("log_norms", log_norms)
    if log_norms.ndim != 1:
        raise ValueError(f"expected log_norms (lags,), got {log_norms.shape}: one sequence at a time")
    if np.isnan(log_norms).any():
        return math.nan
    above = np.flatnonzero(log_norms >= math.log(threshold))
    lag = int(above[-1]) + 1 if above.size else 0
    return float(lag) if lag < len(log_norms) else math.inf


def power(log_value: float) -> str:
    """exp(log_value) in decimal, also if it is outside the range of floats."""
    if not math.isfinite(log_value):
        return "zero" if log_value < 0 else "not finite"
    if abs(log_value) < 300:
        return f"{math.exp(log_value):.3g}"
    return f"10^{log_value / math.log(10):.0f}"
