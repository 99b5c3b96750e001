"""A verdict in words on the gradients of a recurrence, with the evidence and with advice."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from seqjax.analysis._flow import Sequences, check_arguments, flat_trajectory, random_frame
from seqjax.analysis._frames import log_diagonal, sweep
from seqjax.analysis.gradient_flow import GradientByLag, gradient_by_lag, memory_horizon
from seqjax.analysis.lyapunov import LyapunovExponents, lyapunov_exponents
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import cached_jit

Regime = Literal["vanishing", "stable", "exploding", "chaotic", "unknown"]
EXPLODED = math.log(10)  # a gradient that grew tenfold over the horizon explodes
DISTINCT = math.log(100)  # the smallest growth over a sequence that distinguishes chaos from slow growth

ADVICE: dict[str, tuple[str, ...]] = {
    "vanishing": (
        "for a memory of N steps start an LSTM with a forget bias of about ln N, or with chrono=N",
        "start the recurrent matrices orthogonal, and prefer a gated cell to a vanilla one",
        "bring distant information nearer: shorter sequences, or inputs that repeat it",
    ),
    "exploding": (
        "clip the gradient's norm (clip_norm=1.0) and look at how often clipping acts",
        "scale the recurrent matrix down: sj.SpectralRadius(0.9), or sj.Orthogonal()",
        "truncate the gradient to a shorter window",
    ),
    "chaotic": (
        "scale the recurrent matrix down until the largest exponent is near zero",
        "truncate the gradient to a window well below 1 / lambda_1 steps, and clip it",
        "give the network more informative inputs: strong drive suppresses chaos",
    ),
    "stable": ("nothing is needed at this horizon; ask again with a longer one if the task needs longer memory",),
    "unknown": ("look at the trajectory: find the first step that is not finite, and lower the scale that made it so",),
}


class Verdict(NamedTuple):
    """The result in words, with the measurements behind it.

    Attributes:
        regime: "vanishing", "stable", "exploding", "chaotic", or "unknown" if the trajectory is not finite.
        contracting: whether the largest exponent is below zero, so that the recurrence forgets its initial state and
            can be evaluated in parallel over time; None if its confidence interval contains zero.
        lag: the lag, in steps, from which a gradient is lost or has grown tenfold; inf if there is none.
        block: the field of the state that loses its gradient first if the regime is vanishing; otherwise the field with
            the largest gradient at the longest lag.
        summary: one paragraph with the result.
        evidence: the measurements, one sentence each.
        advice: what usually helps, one sentence each.
        reliable: whether all measurements are reliable; if not, the evidence contains the reason.
        exponents, by_lag: the measurements.
    """

    regime: Regime
    contracting: bool | None
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
    """Describes whether gradients vanish, stay stable, explode or are chaotic, from which lag, and what helps.

    - vanishing: at some lag up to K (the argument `horizon`) the expected norm of ds_t/ds_{t-k} falls below `threshold`
      and stays there.
    - exploding: the expected norm grows tenfold, or the largest exponent is positive and finite perturbations grow too.
    - chaotic: the largest exponent is positive, but finite perturbations stop growing, because the state is bounded.
    - stable: none of these, or the largest exponent is positive but the sequences are too short to tell chaos from slow
      growth.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        horizon, threshold, exact: as for `gradient_by_lag`.
        k: the number of exponents, as for `lyapunov_exponents`.
        key: for drawing the frames.

    Returns:
        `Verdict`, which prints as a paragraph and a list.

    Raises:
        ValueError, TypeError: as for `gradient_by_lag` and `lyapunov_exponents`.

    Source: Pascanu, Mikolov and Bengio 2013; Engelken, Wolf and Abbott 2023; for parallel evaluation Gonzalez et al.
        2025, "Predictability enables parallelization of nonlinear state space models".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(2, 8, recurrent_init=sj.Orthogonal(0.8))
        >>> xs = jax.random.normal(jax.random.key(1), (2, 60, 2))
        >>> result = sj.analysis.verdict(cell, cell.init(jax.random.key(0)), xs)
        >>> result.regime, result.contracting, result.lag < 21  # 0.8^21 < 0.01, and tanh' <= 1 reduces it further
        ('vanishing', True, True)
    """
    options: dict[str, Any] = dict(state=state, mask=mask, reset=reset, key=key)
    sequences = check_arguments(cell, params, xs, state, mask, reset)
    by_lag = gradient_by_lag(cell, params, xs, horizon=horizon, threshold=threshold, exact=exact, **options)
    exponents = lyapunov_exponents(cell, params, xs, k=k, **options)
    largest, low, high = _largest_exponent(exponents)
    # The rounding error of the exponent of a step that preserves all lengths, such as a rotation.
    slack = 16 * float(jnp.finfo(sequences.first.dtype).eps)
    contracting = True if high < -slack else False if low > slack else None
    states = np.asarray(cached_jit(flat_trajectory, cell)(sequences), np.float64)
    finite = bool(np.isfinite(states).all()) and not (math.isnan(largest) or np.isnan(by_lag.log_expected).any())
    evidence = [_exponent_sentence(exponents, largest, low, high), *_lag_sentences(by_lag)]

    growth = float(by_lag.log_expected[-1])
    regime: Regime = "stable"
    if not finite:
        regime = "unknown"
    elif contracting is False:  # a positive exponent: chaos if the nonlinearity bounds the state
        bounded, sentence = _is_bounded(cell, sequences, states, jax.random.key(1) if key is None else key)
        evidence.append(sentence)
        if bounded is not None:
            regime = "chaotic" if bounded else "exploding"
        elif growth > EXPLODED:
            regime = "exploding"
    elif growth > EXPLODED:
        regime = "exploding"
    elif math.isfinite(by_lag.horizon):
        regime = "vanishing"
    lag, block = _lag_and_field(regime, by_lag)
    reliable = finite and by_lag.reliable and bool(exponents.reliable.all())
    evidence += [reason for reason in (exponents.reason, by_lag.reason) if reason]
    summary = _summary(regime, contracting, lag, block, by_lag, largest)
    return Verdict(
        regime, contracting, lag, block, summary, tuple(evidence), ADVICE[regime], reliable, exponents, by_lag
    )


def _largest_exponent(exponents: LyapunovExponents) -> tuple[float, float, float]:
    """The mean over sequences and its interval, which comes from the drift if the run is too short for a bootstrap."""
    largest = float(exponents.exponents[:, 0].mean())
    if largest == -math.inf:
        return largest, largest, largest
    low, high = exponents.low[:, 0], exponents.high[:, 0]
    if not np.isnan(low).any():
        return largest, float(low.mean()), float(high.mean())
    drift = float(np.abs(exponents.split_half[:, 0]).mean())
    drift = drift if math.isfinite(drift) else math.inf  # one block has no drift, so nothing is known
    return largest, largest - drift, largest + drift


def _exponent_sentence(exponents: LyapunovExponents, largest: float, low: float, high: float) -> str:
    if math.isinf(largest):
        return "every direction of the state is lost within a step: the largest Lyapunov exponent is minus infinity"
    steps, sequences = int(exponents.steps.sum()), len(exponents.steps)
    return (
        f"the largest Lyapunov exponent is {largest:.4g} nats a step ({low:.4g} to {high:.4g}), a factor of "
        f"{math.exp(largest):.4g} a step, over {steps} steps of {sequences} sequence{'s' * (sequences > 1)}"
    )


def _lag_sentences(by_lag: GradientByLag) -> list[str]:
    K = int(by_lag.lags[-1])
    expected, worst = float(by_lag.log_expected[-1]), float(by_lag.log_worst[-1])
    peak = int(np.nanargmax(by_lag.log_worst)) if not np.isnan(by_lag.log_worst).all() else 0
    lines = [
        f"over {K} steps a random gradient changes by a factor of {_power(expected)} and the most favourable one by "
        f"{_power(worst)}"
    ]
    if by_lag.log_worst[peak] > math.log(2) and worst < by_lag.log_worst[peak] - math.log(2):
        lines.append(
            f"it can grow before it shrinks: the most favourable gradient is largest at lag {peak}, "
            f"{_power(float(by_lag.log_worst[peak]))} times what it was"
        )
    return lines


def _power(log_value: float) -> str:
    """exp(log_value) in decimal, also if it is outside the range of floats."""
    if not math.isfinite(log_value):
        return "zero" if log_value < 0 else str(log_value)
    if abs(log_value) < 300:
        return f"{math.exp(log_value):.3g}"
    return f"10^{log_value / math.log(10):.0f}"


def _lag_and_field(regime: Regime, by_lag: GradientByLag) -> tuple[float, str]:
    """The lag from which a regime is visible, and the field of the state with the strongest effect."""
    last = {name: float(values[-1]) for name, values in by_lag.log_parts.items()}
    if regime == "vanishing":
        horizons = {name: memory_horizon(v, by_lag.threshold) for name, v in by_lag.log_parts.items()}
        return by_lag.horizon, min(last, key=lambda name: (horizons[name], last[name]))
    if regime in ("exploding", "chaotic"):
        grown = np.flatnonzero(by_lag.log_expected > EXPLODED)
        return float(grown[0]) if grown.size else math.inf, max(last, key=lambda name: last[name])
    return math.inf, max(last, key=lambda name: last[name])


def _is_bounded(cell: Cell, sequences: Sequences, states: np.ndarray, key: Array) -> tuple[bool | None, str]:
    """Whether a finite perturbation stops growing, while an infinitesimal one in the same direction grows further.

    Returns:
        The answer and a sentence. None if the infinitesimal one grows too little over the sequence to decide.
    """
    frames = jnp.broadcast_to(
        random_frame(key, 1, sequences.size, sequences.first.dtype), (sequences.batch, 1, sequences.size)
    )
    _, _, logs = cached_jit(sweep, cell, 1, log_diagonal)(sequences, sequences.first, frames)
    growth = np.cumsum(np.asarray(logs, np.float64)[..., 0], axis=1)
    # The span ends when the infinitesimal perturbation has grown by exp(6), about 400. The finite one is chosen so that
    # without a bound it would end at ten times the size of the state. So it starts well above rounding errors.
    span = np.where((growth > 6).any(axis=1), np.argmax(growth > 6, axis=1), np.argmax(growth, axis=1))
    grown = growth[np.arange(sequences.batch), span]
    if grown.max() < DISTINCT:
        return None, (
            f"over the whole sequence a perturbation grows by a factor of {math.exp(grown.max()):.3g} only, too little "
            f"to tell chaos from slow growth: use longer sequences"
        )
    b = int(np.argmax(grown))
    t, size = int(span[b]) + 1, max(float(np.sqrt((states[b] ** 2).sum(axis=-1).mean())), 1.0)
    start = 10 * size / math.exp(grown[b])
    perturbed = sequences.first + jnp.asarray(start, sequences.first.dtype) * frames[:, 0]
    twin = np.asarray(cached_jit(flat_trajectory, cell)(sequences._replace(first=perturbed)), np.float64)
    distance = float(np.linalg.norm(twin[b, t] - states[b, t]))
    bounded = distance < 5 * size
    return bounded, (
        f"two trajectories that begin {start:.2g} apart are {distance:.2g} apart after {t} steps, where growth without "
        f"bound would make {10 * size:.2g}: {'the nonlinearity bounds them' if bounded else 'nothing bounds them'}"
    )


def _summary(
    regime: Regime, contracting: bool | None, lag: float, block: str, by_lag: GradientByLag, largest: float
) -> str:
    K, share = int(by_lag.lags[-1]), f"{by_lag.threshold:.3g}"
    several = len(by_lag.log_parts) > 1
    within = f", {'first' if regime == 'vanishing' else 'most'} in {block}" if several else ""
    from_lag = f" from lag {lag:.0f} on" if math.isfinite(lag) else ""
    sentence = {
        "vanishing": f"Vanishing: from lag {lag:.0f} on a gradient is below {share} of what it was{within}.",
        "stable": f"Stable: over {K} steps a gradient neither falls below {share} of what it was nor grows tenfold.",
        "exploding": f"Exploding: a gradient grows without bound{f', tenfold{from_lag}' if from_lag else ''}{within}.",
        "chaotic": (
            f"Chaotic: nearby states part by a factor of {math.exp(min(largest, 700)):.4g} a step while the state "
            f"stays bounded, and gradients grow{f', tenfold{from_lag}' if from_lag else ''}{within}."
        ),
        "unknown": "Unknown: the trajectory or its derivative is not finite, so nothing can be said of its gradients.",
    }[regime]
    if regime == "unknown":
        return sentence
    parallel = {
        True: "The recurrence is contracting: it forgets its initial state and can be evaluated in parallel over time.",
        False: "The recurrence is not contracting: it cannot be evaluated in parallel over time in few iterations.",
        None: "Whether the recurrence is contracting cannot be told from this run: zero lies within the interval.",
    }[contracting]
    return f"{sentence} {parallel}"
