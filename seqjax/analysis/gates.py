"""How open the gates of a cell stand: their means, their histograms, and how often each unit is shut or wide open.

A gate at 0 or 1 is a switch: its derivative vanishes, and what it multiplies is forgotten or kept whole. A gate that
stays near the middle scales what passes through it at every step. Where the gate multiplies a unit's old value, its
mean is a rate of forgetting, and so a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, PyTree

from seqjax.cell import Cell, Params, State
from seqjax.sequence.unroll import gates

BINS = 20


class GateStatistics(NamedTuple):
    """One gate over all valid steps of all sequences; its units have the shape (n,) that the cell gives them.

    Attributes:
        mean: over steps and units.
        unit_mean: of each unit (n,).
        histogram: the share of activations in each of 20 bins; what lies outside the edges counts in the outermost.
        edges: of the bins (21,), from 0 to 1, or from -1 to 1 where the gate is signed.
        low: the share of steps at which each unit is below 0.1, or -0.9 where the gate is signed, (n,).
        high: the share of steps at which each unit is above 0.9, (n,).
        saturated_low: `low` over all units.
        saturated_high: `high` over all units.
        time_constant: -1 / ln(unit_mean), in steps, (n,): how long a value lasts that the gate multiplies at every
            step. Infinite for a gate that is always 1, and nan for a signed gate.
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

    The time constant is one of memory where the gate multiplies the unit's old value: the forget gate of an LSTM, and
    the update gate of a GRU that keeps. With an update gate that writes, the memory's is -1 / ln(1 - E[z]). Since
    E[ln g] <= ln E[g], a gate that varies forgets faster than its time constant says.

    Args:
        cell: one that names its gates with a method `gates(params, state, x)`, such as `LSTM` and `GRU`, or a stack
            that holds one.
        params, xs, state, mask, reset: as for `unroll`; steps whose mask is False do not count.

    Returns:
        `GateStatistics` by the gate's name: "forget", or "1/forget" in a stack. A gate is signed, in (-1, 1), where it
        is named "candidate" or takes a negative value; every other is one in (0, 1).

    Raises:
        TypeError: the cell does not name its gates.
        ValueError: a shape does not fit, no step is valid, or a gate is not finite.

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
    statistics = {}
    for name, gate in activations.items():
        valid = np.ones(gate.shape[:2], bool) if mask is None else np.asarray(mask)
        if not valid.any():
            raise ValueError("expected at least one valid step, got none: is the mask False throughout?")
        values = np.asarray(gate)[valid].astype(np.float64)
        _check_finite(name, np.isfinite(values), valid)
        signed = name.rpartition("/")[2] == "candidate" or bool((values < 0).any())
        statistics[name] = _statistics(values, signed)
    return statistics


def _check_finite(name: str, finite: np.ndarray, valid: np.ndarray) -> None:
    if not finite.all():
        where = np.argwhere(valid)[np.argmin(finite.reshape(len(finite), -1).all(axis=1))]
        raise ValueError(
            f"expected finite gates, got NaN or infinity in {name!r}, first in sequence {where[0]} at step {where[1]}: "
            f"look for it in params and in xs"
        )


def _statistics(values: Float[np.ndarray, "steps *n"], signed: bool) -> GateStatistics:
    least, shut = (-1.0, -0.9) if signed else (0.0, 0.1)
    edges = np.linspace(least, 1, BINS + 1)
    counts, _ = np.histogram(np.clip(values, least, 1), edges)
    unit_mean, low, high = (part.mean(axis=0) for part in (values, values < shut, values > 0.9))
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
    return np.where(mean < 1, steps, np.where(mean == 1, np.inf, np.nan))
