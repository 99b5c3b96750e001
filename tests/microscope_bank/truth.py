"""The regime of each row by brute force: explicit products of Jacobians, long runs, twins and other initial states.

Everything but the row's own trajectory is computed in float64. A row near a border between two regimes allows both.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import numpy as np

from .double import flat, follow, jacobians, states_before, widen
from .networks import Network

LATER = 3_000  # steps of the long run that continues each row
STARTS = 8  # other initial states of each row
ENDS = 48  # the largest number of steps t at which products of a row end
MARGIN = math.log(1.5)  # a norm this near to a threshold allows both sides
TENFOLD, LOST = math.log(10), math.log(0.01)
CLEAR, FAINT = 7.0, 2.0  # growth of a perturbation along a row that shows chaos, or that cannot show it


class Truth(NamedTuple):
    """What is true of one row.

    Attributes:
        regime: the regime.
        allowed: the regimes that a correct analysis may answer.
        lags: by allowed regime, the lag in steps that belongs to it, if there is one.
        steps: L, the number of valid steps before the state stops being finite.
        log_expected: (L + 1,), ln of the expected norm of the product of k Jacobians.
        along, later: the largest exponent along the second half of the row, and in the long run after it.
        error: the standard error of `later`.
        apart: the share of other initial states that end at another trajectory.
    """

    regime: str
    allowed: frozenset[str]
    lags: dict[str, int]
    steps: int
    log_expected: np.ndarray
    along: float = math.nan
    later: float = math.nan
    error: float = math.nan
    apart: float = math.nan


def truths(network: Network) -> list[Truth]:
    """The truth of every row of a network."""
    with jax.enable_x64(True):
        cell, params, xs = network.cell, network.params, np.asarray(network.xs, np.float64)
        rows, time = xs.shape[:2]
        mask = np.ones((rows, time), bool) if network.mask is None else np.asarray(network.mask)
        reset = np.zeros((rows, time), bool) if network.reset is None else np.asarray(network.reset)
        xs = np.where(mask[..., None], xs, 0)
        first = _first(network, rows)
        before, after = states_before(cell, params, first, xs.astype(first.dtype), mask, reset)
        before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
        wide = widen(params)
        J = np.asarray(jacobians(cell, wide, before, xs))
        runs = None if network.reset is not None else _long_run(network, wide, np.asarray(first, np.float64), xs, mask)
    result = []
    for b in range(rows):
        valid = mask[b]
        given_nan = bool(np.isnan(xs[b][valid]).any()) or _has_nan(params)
        finite = np.isfinite(after[b][valid]).all(axis=1)
        L = int(np.argmin(finite)) if not finite.all() else len(finite)
        row = Row(J[b][valid][:L], after[b][valid][:L], reset[b][valid][:L], not finite.all(), given_nan)
        result.append(_decide(row, None if runs is None else Run(*(part[b] for part in runs))))
    return result


class Row(NamedTuple):
    """One row without its padding: Jacobians (L, n, n), states (L, n), resets (L,), and how it ends."""

    J: np.ndarray
    states: np.ndarray
    reset: np.ndarray
    ends: bool
    given_nan: bool


class Run(NamedTuple):
    """One row and its long run; trajectory 0 is the row's own, 1 its twin, and the rest begin elsewhere.

    Attributes:
        at_end, later: the states at the end of the row and of the long run, (starts, n).
        along: ln of the growth at each step of the row, (starts, time), zero at masked steps.
        growth: the same for the long run.
    """

    at_end: np.ndarray
    later: np.ndarray
    along: np.ndarray
    growth: np.ndarray


def _first(network, rows):
    if network.state is None:
        return np.broadcast_to(flat(network.cell, network.params)[1], (rows, _size(network)))
    leaves = jax.tree.leaves(network.state)
    return np.concatenate([np.asarray(leaf).reshape(rows, -1) for leaf in leaves], axis=1)


def _size(network):
    return flat(network.cell, network.params)[1].size


def _has_nan(params):
    return any(np.isnan(np.asarray(leaf, np.float64)).any() for leaf in jax.tree.leaves(params))


def _long_run(network, params, first, xs, mask):
    """The fields of `Run` for every row; (rows, ...) each."""
    rng = np.random.default_rng(network.seed + 77)
    rows, n = first.shape
    others = network.starts(rng, (rows, STARTS, n))
    scale = 1e-6 * np.maximum(np.abs(first).max(axis=1), 1e-3)[:, None]
    twin = first + scale * rng.normal(size=first.shape)
    v = np.concatenate([first[:, None], twin[:, None], others], axis=1)
    tangent = rng.normal(size=v.shape)
    at_end, tangent, along = follow(network.cell, params, v, tangent, xs, mask)
    fresh = network.draw(rng, (rows, LATER, xs.shape[2]))
    later, _, growth = follow(network.cell, params, at_end, tangent, fresh, np.ones((rows, LATER), bool))
    return [np.asarray(part) for part in (at_end, later, along, growth)]


def expected_norms(J: np.ndarray, reset: np.ndarray) -> np.ndarray:
    """ln sqrt(mean over t of |J_t ... J_{t-k+1}|_F^2 / n) at lags k = 0..L, over at most `ENDS` steps t.

    A product that reaches across a reset is zero.
    """
    L, n = len(J), J.shape[1]
    ends = np.unique(np.linspace(L, 1, min(L, ENDS)).round().astype(int))[::-1]
    P, scale = np.broadcast_to(np.eye(n), (len(ends), n, n)), np.zeros(len(ends))
    result = [0.0]
    for k in range(1, L + 1):
        inside = ends >= k
        ends, P, scale = ends[inside], P[inside], scale[inside]
        step = ends - k  # J_{t-k+1} has index t - k
        P = P @ np.where(reset[step][:, None, None], 0.0, J[step])
        size = np.sqrt((P**2).sum(axis=(1, 2)))
        with np.errstate(divide="ignore", invalid="ignore"):
            P = np.where((size > 0)[:, None, None], P / size[:, None, None], 0.0)
            scale = scale + np.log(size)
        top = scale.max()
        result.append(-math.inf if np.isneginf(top) else top + 0.5 * math.log(np.exp(2 * (scale - top)).mean() / n))
    return np.array(result)


def by_norm(log_expected: np.ndarray) -> tuple[str, frozenset[str], dict[str, int]]:
    """The regime that the expected norm alone shows, those within the margin, and the lag of each."""
    end, peak = float(log_expected[-1]), int(np.argmax(log_expected))
    top, lowest = float(log_expected[peak]), float(log_expected[peak:].min())
    lags = {"transient growth": peak}
    if end < LOST + MARGIN:
        above = np.flatnonzero(log_expected >= LOST)
        lags["vanishing"] = min(int(above[-1]) + 1, len(log_expected) - 1)
    if (log_expected > TENFOLD).any():
        lags["exploding"] = int(np.argmax(log_expected > TENFOLD))

    def holds(margin):
        """The regime if every threshold moves by the margins, given in the order tenfold, one, lost."""
        tenfold, one, lost = TENFOLD + margin[0], margin[1], LOST + margin[2]
        if end > tenfold:
            return "exploding"
        if top > tenfold and lowest < one:
            return "transient growth"
        return "vanishing" if end < lost else "stable"

    margins = [(a, b, c) for a in (-MARGIN, MARGIN) for b in (-MARGIN, MARGIN) for c in (-MARGIN, MARGIN)]
    return holds((0.0, 0.0, 0.0)), frozenset(map(holds, margins)), lags


def _decide(row: Row, run: Run | None) -> Truth:
    L, none = len(row.J), np.zeros(1)
    if row.given_nan or L < 2:
        overflows = row.ends and not row.given_nan
        regimes = frozenset({"unknown", "exploding"}) if overflows else frozenset({"unknown"})
        return Truth("unknown", regimes, {}, L, none)
    if not row.J.any():
        return Truth("unknown", frozenset({"unknown"}), {}, L, none)
    log_expected = expected_norms(row.J, row.reset)
    regime, allowed, lags = by_norm(log_expected)
    if row.ends:
        return Truth("exploding", frozenset({"exploding"}), lags, L, log_expected)
    if row.reset.any():
        return _with_resets(row, log_expected)
    assert run is not None
    return _of_long_run(row, run, Truth(regime, allowed, lags, L, log_expected))


def _with_resets(row: Row, log_expected: np.ndarray) -> Truth:
    """Lags across a reset may count as zero, or not at all."""
    regime, allowed, lags = by_norm(log_expected)
    bounds = [0, *np.flatnonzero(row.reset), len(row.J)]
    longest = max(itertools.pairwise(bounds), key=lambda pair: pair[1] - pair[0])
    # A product never contains the Jacobian of the reset itself.
    J = row.J[longest[0] : longest[1]]
    within = expected_norms(J, np.zeros(len(J), bool))
    other, others, more = by_norm(within)
    return Truth(other, allowed | others | {regime}, lags | more, len(row.J), within)


def _of_long_run(row: Row, run: Run, norm: Truth) -> Truth:
    L = norm.steps
    size = max(float(np.sqrt((row.states**2).mean())), 1e-3)
    own = run.growth[0][LATER // 4 :]
    with np.errstate(invalid="ignore"):
        later, error = float(own.mean()), float(own.reshape(15, -1).mean(axis=1).std(ddof=1) / math.sqrt(15))
        twin_later = float(run.growth[1][LATER // 4 :].mean())
        valid = run.along[0] != 0
        second = run.along[0][valid][L // 2 :]
        along = float(second.mean()) if second.size else math.nan
        largest = np.abs(run.later[:2]).max()
    apart = _share_apart(run, size)
    norm = norm._replace(along=along, later=later, error=error, apart=apart)
    # Without a bound, the state itself grows at the rate of its perturbations.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        grown = np.log(np.abs(run.later[0]).max() / max(np.abs(run.at_end[0]).max(), 1e-300))
    if not largest < 1e6 * max(size, 1.0) or (later > 0 and grown > max(0.5 * later * LATER, TENFOLD)):
        if norm.regime == "exploding":
            return norm._replace(allowed=norm.allowed | ({"unstable fixed point"} if not row.states.any() else set()))
        return norm._replace(allowed=norm.allowed | {"exploding"})
    slack = 4 * error + 2e-3
    if later > slack:
        return _of_growth(row, norm, size, twin_later)
    if "exploding" in norm.allowed:  # gradients of this row have grown, but those of a longer one will not
        norm = norm._replace(allowed=norm.allowed | {"transient growth"})
    if later < -slack:
        return _of_decay(norm)
    unsure = {"multistable"} if apart > 0 else set()
    return norm._replace(allowed=norm.allowed | unsure | _left_behind(norm))


def _of_growth(row: Row, norm: Truth, size: float, twin_later: float) -> Truth:
    """A bounded trajectory with a positive exponent."""
    moves = np.abs(np.diff(row.states[len(row.states) // 2 :], axis=0)).max(initial=0.0) / size
    leaves = twin_later <= 2e-3
    kind = "unstable fixed point" if moves < 1e-6 or leaves else "chaotic"
    growth = norm.steps * min(norm.later, norm.along)
    if growth > CLEAR:
        return norm._replace(regime=kind, allowed=frozenset({kind}))
    if growth > FAINT:
        return norm._replace(regime=kind, allowed=norm.allowed | {kind})
    return norm


def _of_decay(norm: Truth) -> Truth:
    """A trajectory that contracts in the long run."""
    allowed = norm.allowed | _left_behind(norm)
    if not norm.apart:
        return norm._replace(allowed=allowed)
    clear = norm.apart >= 0.5 and norm.along * norm.steps / 2 < -4 and norm.later < 0
    if not clear:
        return norm._replace(allowed=allowed | {"multistable"})
    # Growth of gradients is as true as the several attractors.
    grown = {norm.regime} & {"exploding", "transient growth"}
    return norm._replace(regime="multistable", allowed=frozenset({"multistable"} | grown))


def _left_behind(norm: Truth) -> set[str]:
    """What the row may show although its long run does not: it leaves a fixed point, or a chaotic transient."""
    return {"unstable fixed point", "chaotic"} if norm.along * norm.steps > FAINT else set()


def _share_apart(run: Run, size: float) -> float:
    """The share of the other initial states whose trajectory differs at the end of the row and of the long run."""
    with np.errstate(invalid="ignore"):
        apart = [np.abs(states[2:] - states[0]).max(axis=1) for states in (run.at_end, run.later)]
        reached = np.isfinite(run.later[2:]).all(axis=1)
        return float(np.mean((apart[0] > 1e-2 * size) & (apart[1] > 1e-2 * size) & reached))
