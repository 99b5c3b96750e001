"""A verdict in words on the gradients of a recurrence, sequence by sequence, with the evidence and with advice."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from seqjax.analysis._advice import advice
from seqjax.analysis._flow import AWAY, flat_trajectory, random_frame
from seqjax.analysis._probes import probe
from seqjax.analysis._recording import Recording, recording
from seqjax.analysis._row_measurements import Measurements, Regime
from seqjax.analysis._row_verdicts import RowVerdict, row_verdict
from seqjax.analysis.gradient_flow import GradientByLag, gradients_of
from seqjax.analysis.lyapunov import LyapunovExponents, exponents_of
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._checks import batch_of_states, check_sequences
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence._masked_step import Inputs

FIRST_DISTANCE = (
    0.1  # the first distance of the trajectory whose exponents are measured too, relative to the size of the states
)


class Verdict(NamedTuple):
    """The result in words, with the measurements behind it.

    Attributes:
        regime: "vanishing", "stable", "transient growth", "exploding", "chaotic", "unstable fixed point", "multistable"
            or "unknown"; "mixed" if the sequences differ.
        rows: the verdict on each sequence.
        counts: the number of sequences by regime.
        contracting: whether perturbations shrink along all trajectories, or grow along all of them; None if the
            sequences differ or it cannot be told.
        forgets: whether trajectories from other initial states met, for all sequences alike; None otherwise.
        lag: the median lag of the most frequent regime, in steps; inf if it has none.
        block: the field of the state that decides in the most sequences.
        summary: one paragraph with the result.
        evidence: the measurements, one sentence each.
        advice: what usually helps this cell in this regime, one sentence each; empty if nothing is known to help.
        reliable: whether the regime of every sequence and all gradients by lag are reliable.
        exponents, by_lag: the measurements.
    """

    regime: Regime | Literal["mixed"]
    rows: tuple[RowVerdict, ...]
    counts: dict[Regime, int]
    contracting: bool | None
    forgets: bool | None
    lag: float
    block: str
    summary: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]
    reliable: bool
    exponents: LyapunovExponents
    by_lag: GradientByLag

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"- {line}" for line in (*self.evidence, *self.advice))])


@for_automatic_axes
def verdict(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    horizon: int | None = None,
    threshold: float = 0.01,
    k: int | None = None,
    exact: bool | None = None,
    key: Array | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Verdict:
    """Describes for each sequence whether gradients vanish, stay stable, explode or are chaotic, and from which lag.

    The norm at lag k is the expected norm of ds_t/ds_{t-k}, and lambda_1 the largest Lyapunov exponent.

    - vanishing: the norm falls below `threshold` at some lag and stays below. "Stable" instead, if the best-kept
      direction is not lost.
    - transient growth: the norm grows tenfold and falls again.
    - exploding: lambda_1 is positive and the state grows too, or the step is linear; or the state overflows.
    - chaotic: lambda_1 is positive along this trajectory and along another one that left it, and the state is bounded.
    - unstable fixed point: lambda_1 is positive, but the state does not move, or a nearby trajectory leaves it for one
      with an exponent that is not positive.
    - multistable: perturbations shrink, but trajectories from other initial states with the same inputs end elsewhere.
    - unknown: the sequence has fewer than two valid steps, its state is not finite, or it is too short to tell.
    - stable: none of these.

    A masked step is as if it were not there. A sequence with resets is judged by its longest segment.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        horizon, threshold, exact: as for `gradient_by_lag`.
        k: the number of exponents, as for `lyapunov_exponents`.
        key: for drawing frames and initial states.

    Returns:
        `Verdict`, which prints as a paragraph and a list.

    Raises:
        ValueError, TypeError: as for `gradient_by_lag` and `lyapunov_exponents`.

    Source: Pascanu, Mikolov and Bengio 2013; Engelken, Wolf and Abbott 2023; Jaeger 2001, "The echo state approach",
        for the trajectories from other initial states; for parallel evaluation Gonzalez et al. 2025, "Predictability
        enables parallelization of nonlinear state space models".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(2, 8, recurrent_init=sj.Orthogonal(0.8))
        >>> xs = jax.random.normal(jax.random.key(1), (2, 60, 2))
        >>> result = sj.analysis.verdict(cell, cell.init(jax.random.key(0)), xs)
        >>> result.regime, result.contracting, result.lag < 21  # 0.8^21 < 0.01, and tanh' <= 1 reduces it further
        ('vanishing', True, True)
    """
    key = jax.random.key(0) if key is None else key
    state, mask, segments = _longest_segments(cell, params, Inputs(xs, mask, reset), state)
    with recording(cell, params, xs, state, mask, None, backward=True) as record:
        states = precise_jit(flat_trajectory, record.cell)(record.sequences)
        by_lag = gradients_of(record, states, horizon, threshold, exact=exact, key=key)
        exponents = exponents_of(record, k, key=key)
        probes = probe(record, states, key)
        nearby = None
        if probes.nonlinear and (exponents.exponents[:, 0] > 0).any():
            nearby = exponents_of(_away(record, probes.size, key), k, key=key)
    measured = Measurements(record, by_lag, exponents, probes, nearby, segments)
    rows = tuple(row_verdict(measured, b) for b in range(len(record.lengths)))
    return _of_batch(cell, params, rows, exponents, by_lag)


def _longest_segments(
    cell: Cell, params: Params, inputs: Inputs, state: State | None
) -> tuple[State | None, Any, np.ndarray]:
    """The state and the mask of each row's longest segment between two resets, and its number of segments."""
    if inputs.reset is None:
        return state, inputs.mask, np.ones(len(jax.tree.leaves(inputs.x)[0]), int)
    inputs = check_sequences(cell, inputs)
    valid = np.ones((inputs.batch, inputs.time), bool) if inputs.mask is None else np.asarray(inputs.mask)
    segment = np.cumsum(np.asarray(inputs.reset), axis=1)
    counts = np.array([np.bincount(row[ok], minlength=inputs.time + 1) for row, ok in zip(segment, valid, strict=True)])
    longest = counts.argmax(axis=1)
    initial = batch_of_states(cell, params, None, inputs.batch)
    given = batch_of_states(cell, params, state, inputs.batch)
    began = jnp.asarray(longest > 0)

    def at_start(new: Array, old: Array) -> Array:
        return jnp.where(began.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return (
        jax.tree.map(at_start, initial, given),
        jnp.asarray(valid & (segment == longest[:, None])),
        (counts > 0).sum(axis=1),
    )


def _away(record: Recording, size: np.ndarray, key: Array) -> Recording:
    """The recording with initial states that are moved by a tenth of the size of the states."""
    sequences = record.sequences
    u = np.asarray(random_frame(key, 1, sequences.size, sequences.first.dtype, AWAY))[0]
    first = np.asarray(sequences.first) + FIRST_DISTANCE * size[:, None] * u
    return record._replace(sequences=sequences._replace(first=jnp.asarray(first, sequences.first.dtype)))


def _of_batch(
    cell: Cell, params: Params, rows: tuple[RowVerdict, ...], exponents: LyapunovExponents, by_lag: GradientByLag
) -> Verdict:
    measured = [row for row in rows if row.steps] or list(rows)
    counts: Counter[Regime] = Counter(row.regime for row in measured)
    main = counts.most_common(1)[0][0]
    of_main = [row for row in measured if row.regime == main]
    lags = sorted(row.lag for row in of_main if math.isfinite(row.lag))
    lag = lags[(len(lags) - 1) // 2] if lags else math.inf
    block = Counter(row.block for row in of_main).most_common(1)[0][0]
    alike = len(counts) == 1
    rates = [float(exponents.exponents[b, 0]) for b, row in enumerate(rows) if row.regime == main]
    evidence = list(of_main[0].evidence)
    if len(rows) > 1:
        evidence = [f"sequence {b}: {line}" for b, line in _first_of_each(rows)]
    said = {line for row in rows for line in row.evidence}
    reasons = dict.fromkeys(reason for reason in (exponents.reason, by_lag.reason) if reason)
    evidence += [reason for reason in reasons if reason.partition(": ")[2] not in said]
    return Verdict(
        regime=main if alike else "mixed",
        rows=rows,
        counts=dict(Counter(row.regime for row in rows)),
        contracting=_agreed([row.contracting for row in measured]),
        forgets=_agreed([row.forgets for row in measured]),
        lag=lag,
        block=block,
        summary=_summary(rows, counts, of_main, lag),
        evidence=tuple(evidence),
        advice=advice(main, cell, params, lag, float(np.mean(rates))),
        reliable=all(row.reliable for row in measured) and by_lag.reliable,
        exponents=exponents,
        by_lag=by_lag,
    )


def _first_of_each(rows: tuple[RowVerdict, ...]) -> list[tuple[int, str]]:
    """The evidence of the first sequence of each regime."""
    seen: dict[str, int] = {}
    for b, row in enumerate(rows):
        seen.setdefault(row.regime, b)
    return [(b, line) for b in seen.values() for line in (rows[b].evidence or (rows[b].reason,))]


def _agreed(answers: list[bool | None]) -> bool | None:
    return answers[0] if len(set(answers)) == 1 else None


def _summary(rows: tuple[RowVerdict, ...], counts: Counter[Regime], of_main: list[RowVerdict], lag: float) -> str:
    if len(counts) > 1:
        shares = ", ".join(f"{count} {regime}" for regime, count in counts.most_common())
        firsts = " ".join(next(row for row in rows if row.regime == regime).summary for regime in counts)
        return f"The {sum(counts.values())} sequences differ: {shares}. {firsts}"
    typical = min(of_main, key=lambda row: abs(row.lag - lag) if math.isfinite(lag) else 0.0)
    if len(of_main) == 1:
        return typical.summary
    lags = [row.lag for row in of_main if math.isfinite(row.lag)]
    spread = f" (lags {min(lags):.0f} to {max(lags):.0f})" if lags and min(lags) < max(lags) else ""
    return f"All {len(of_main)} sequences{spread}: {typical.summary}"
