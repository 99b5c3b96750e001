"""Statistics of gate activations: means, histograms, and the share of steps at which each unit is saturated.

A gate near 0 or 1 acts as a switch: its derivative vanishes, and it passes nothing or everything. A gate near the
middle scales its operand at every step. If the gate multiplies the old value of a unit, its mean is a rate of decay,
which corresponds to a time constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, PyTree

from seqjax.cell import Cell, Params, State
from seqjax.sequence._declared import declared
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence.unroll import gates

BINS = 20


class GateStatistics(NamedTuple):
    """One gate over all valid steps of all sequences; its units have the shape that the cell returns, usually (n,).

    Attributes:
        mean: over steps and units.
        unit_mean: of each unit (n,).
        histogram: the share of activations in each of 20 bins; values outside the edges count in the outermost bins.
        edges: of the bins (21,), from 0 to 1, or from -1 to 1 for a signed gate.
        low: the share of steps at which each unit is below 0.1, or below -0.9 for a signed gate, (n,).
        high: the share of steps at which each unit is above 0.9, (n,).
        saturated_low: the mean of `low` over all units.
        saturated_high: the mean of `high` over all units.
        time_constant: -1 / ln(unit_mean), in steps, (n,): the decay time of a value that the gate multiplies at every
            step. Infinite for a gate that is always 1, and NaN for a signed gate.
    """

    mean: float
    unit_mean: Float[np.ndarray, "*n"]
    histogram: Float[np.ndarray, " bins"]
    edges: Float[np.ndarray, " edges"]
    low: Float[np.ndarray, "*n"]
    high: Float[np.ndarray, "*n"]
    saturated_low: float
    saturated_high: float
    time_constant: Float[np.ndarray, "*n"]

    def __str__(self) -> str:
        low = 0.1 if self.edges[0] == 0 else -0.9
        tau = self.time_constant[~np.isnan(self.time_constant)]
        memory = f"; if it keeps the old value, for {np.median(tau):.4g} steps (median)" if tau.size else ""
        return (
            f"mean {self.mean:.3f}, below {low:.1f} at {self.saturated_low:.1%} and above 0.9 at "
            f"{self.saturated_high:.1%} of the steps{memory}"
        )

    def __repr__(self) -> str:
        # One line, because `gate_statistics` returns a dictionary, which prints its values by `repr`.
        return f"GateStatistics({self})"


@for_automatic_axes
def gate_statistics(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> dict[str, GateStatistics]:
    """The saturation of every gate, P(g < 0.1) and P(g > 0.9), and its time constant, tau = -1 / ln E[g].

    The time constant describes the memory if the gate multiplies the old value of the unit: the forget gate of an LSTM,
    or the update gate of a GRU with update="keeps". With update="writes", the time constant of the memory is
    -1 / ln(1 - E[z]). Since E[ln g] <= ln E[g], a gate that varies forgets faster than its time constant suggests.

    Args:
        cell: any cell with a method `gates(params, state, x)`, such as `LSTM` and `GRU`, or a stack with such a layer.
        params, xs, state, mask, reset: as for `unroll`; steps whose mask is False are ignored.

    Returns:
        `GateStatistics` by the name of the gate: "forget", or "1/forget" in a stack. A gate is signed, in (-1, 1), if
        the cell's `gate_roles` declare it a "candidate", or if any value is negative. So for a cell without
        `gate_roles`, only the values decide. All other gates are in (0, 1).

    Raises:
        TypeError: the cell has no method `gates`.
        ValueError: a shape does not match, no step is valid, or a gate is not finite.

    Source: Karpathy, Johnson and Li 2015, "Visualizing and understanding recurrent networks", section 4.2; the time
        constant as in Tallec and Ollivier 2018, "Can recurrent neural networks warp time?".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(2, 3, forget_bias=5.0)
        >>> statistics = sj.analysis.gate_statistics(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 4, 2)))
        >>> forget = statistics["forget"]  # sigma(5) = 0.9933 at a zero state and input
        >>> forget.saturated_high, round(float(forget.time_constant[0]), 1)
        (1.0, 148.9)
    """
    activations = gates(cell, params, xs, state=state, mask=mask, reset=reset)
    statistics, roles = {}, declared(cell, "gate_roles") or {}
    for name, gate in activations.items():
        valid = np.ones(gate.shape[:2], bool) if mask is None else np.asarray(mask)
        if not valid.any():
            raise ValueError("expected at least one valid step, got none: is the mask False throughout?")
        # float64, because the mean of many values near 1 would round to 1, with an infinite time constant.
        values = np.asarray(gate)[valid].astype(np.float64)
        _check_finite(name, np.isfinite(values), valid)
        signed = roles.get(name) == "candidate" or bool((values < 0).any())
        statistics[name] = _statistics(values, signed)
    return statistics


def _check_finite(name: str, finite: np.ndarray, valid: np.ndarray) -> None:
    if not finite.all():
        first = np.argwhere(valid)[np.argmin(finite.reshape(len(finite), -1).all(axis=1))]
        raise ValueError(
            f"expected finite gates, got NaN or infinity in {name!r}, first in sequence {first[0]} at step {first[1]}: "
            f"look for it in params and in xs"
        )


def _statistics(values: Float[np.ndarray, "steps *n"], signed: bool) -> GateStatistics:
    lowest, closed = (-1.0, -0.9) if signed else (0.0, 0.1)
    edges = np.linspace(lowest, 1, BINS + 1)
    counts, _ = np.histogram(np.clip(values, lowest, 1), edges)
    unit_mean, low, high = (part.mean(axis=0) for part in (values, values < closed, values > 0.9))
    return GateStatistics(
        mean=float(values.mean()),
        unit_mean=unit_mean,
        histogram=counts / values.size,
        edges=edges,
        low=low,
        high=high,
        saturated_low=float(low.mean()),
        saturated_high=float(high.mean()),
        time_constant=np.full_like(unit_mean, np.nan) if signed else _time_constant(unit_mean),
    )


def _time_constant(mean: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        steps = -1 / np.log(mean)
    # ln 1 = 0 divides to minus infinity, and a user's gate above 1 has no decay time.
    return np.where(mean < 1, steps, np.where(mean == 1, np.inf, np.nan))
