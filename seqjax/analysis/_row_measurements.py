"""The measurements of one sequence, by the names that the rules of the verdict use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from seqjax.analysis._memory import memory_of

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


class Row:
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
        large = self.lam > 0 and self.growth > 2 * DISTINCT and self.mean[-1] > EXPLODED
        return self.contracting is False or bool(large)

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
        """Whether a field of the state itself grows about as fast as perturbations do, or tenfold."""
        if self.lam <= self.slack:
            return False
        as_fast = self.rate > 0.5 * self.lam and self.rate * self.L > EXPLODED
        tenfold = self.rate * self.L / 2 > EXPLODED  # within the second half, which no bounded state does
        return as_fast or tenfold or not self.measured.probes.nonlinear

    @property
    def peak(self) -> int:
        """The lag of the largest expected norm."""
        return int(np.nanargmax(self.mean)) if not np.isnan(self.mean).all() else 0

    @property
    def falls_from_peak(self) -> bool:
        """Whether the expected norm grows tenfold and falls again."""
        top, end = self.mean[self.peak], self.mean[-1]
        return bool(top > EXPLODED and (end < 0 or (end < top - EXPLODED and self.memory.rate < 0)))
