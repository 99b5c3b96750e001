"""Compares the answers of `seqjax.verdict` with the truth, row by row, and counts what is right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

import seqjax as sj

from .networks import Network
from .truth import LOST, MARGIN, TENFOLD, Truth, truths

ORDER = (
    "vanishing",
    "stable",
    "transient growth",
    "exploding",
    "chaotic",
    "unstable fixed point",
    "multistable",
    "unknown",
)
FACTOR = 1.5  # of the lag


class Answer(NamedTuple):
    """One row: the truth beside the answer.

    Attributes:
        network, row: which row.
        truth: what is true of it.
        regime, reliable, reason, lag: the answer; the regime "error" if the verdict raised.
        kind: "right", "declined", "wrong" (but not called reliable), or "wrong and reliable".
        lag_right: whether the lag agrees; None if there is no lag to compare.
    """

    network: str
    row: int
    truth: Truth
    regime: str
    reliable: bool
    reason: str
    lag: float
    kind: str
    lag_right: bool | None


def judge(network: Network, verdict=None) -> list[Answer]:
    """Asks for the verdict on a network and compares every row. `verdict` replaces `seqjax.verdict`."""
    if network.mask is not None and not np.any(network.mask):
        return []  # an error, which has its own test
    with jax.enable_x64(np.dtype(jax.tree.leaves(network.params)[0].dtype) == np.float64):
        xs = jax.numpy.asarray(network.xs, jax.tree.leaves(network.params)[0].dtype)
        result = (verdict or sj.verdict)(
            network.cell, network.params, xs, mask=network.mask, reset=network.reset, state=network.state
        )
    return [
        _compare(network, b, truth, row)
        for b, (truth, row) in enumerate(zip(truths(network), result.rows, strict=True))
    ]


def _compare(network: Network, b: int, truth: Truth, row: Any) -> Answer:
    kind = _kind(truth, row)
    lag_right = _lag_agrees(truth, row) if kind == "right" else None
    return Answer(network.name, b, truth, row.regime, bool(row.reliable), row.reason, float(row.lag), kind, lag_right)


def _kind(truth: Truth, row: Any) -> str:
    if row.regime in truth.allowed:
        return "right"
    if row.reliable:
        return "wrong and reliable"
    cannot_tell = row.regime == "unknown" or truth.allowed & set(row.alternatives)
    return "declined" if cannot_tell else "wrong"


def _lag_agrees(truth: Truth, row: Any) -> bool | None:
    """Within a factor of 1.5 or one step, or at a lag whose norm is within this factor of what the lag stands for."""
    lag = truth.lags.get(row.regime)
    if lag is None:
        return None
    if not math.isfinite(row.lag):
        return False
    if abs(row.lag - lag) <= 1 or lag / FACTOR <= row.lag <= lag * FACTOR:
        return True
    level = {"vanishing": LOST, "exploding": TENFOLD, "transient growth": truth.log_expected.max()}[row.regime]
    norm = truth.log_expected[min(int(row.lag), truth.steps)]
    return bool(abs(norm - level) < MARGIN)


class Score(NamedTuple):
    """The counts over many rows.

    Attributes:
        rows: the number of rows.
        right: the share of rows in the right class, of those that are not declined.
        declined: the share of rows that are declined.
        lags: the share of right lags, of those that were compared.
        wrong_and_reliable: the number of rows with a wrong regime that is called reliable.
    """

    rows: int
    right: float
    declined: float
    lags: float
    wrong_and_reliable: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows: right class {self.right:.1%}, declined {self.declined:.1%}, lags within {FACTOR} "
            f"{self.lags:.1%}, wrong and reliable {self.wrong_and_reliable}"
        )


def score(answers: Iterable[Answer]) -> Score:
    """Counts the answers."""
    answers = list(answers)
    kinds = Counter(a.kind for a in answers)
    lags = [a.lag_right for a in answers if a.lag_right is not None]
    decided = len(answers) - kinds["declined"]
    return Score(
        rows=len(answers),
        right=kinds["right"] / max(decided, 1),
        declined=kinds["declined"] / max(len(answers), 1),
        lags=sum(lags) / max(len(lags), 1),
        wrong_and_reliable=kinds["wrong and reliable"],
    )


def confusion(answers: Iterable[Answer]) -> str:
    """A table of the truth (rows) by the answer (columns). An answer that the truth allows counts as the truth."""
    counts = Counter((a.regime if a.kind == "right" else a.truth.regime, _column(a)) for a in answers)
    columns = [*ORDER, "declined"]
    lines = [f"{'truth':22}" + "".join(f"{c[:10]:>11}" for c in columns)]
    for name in ORDER:
        cells = "".join(f"{counts[name, c] or '.':>11}" for c in columns)
        lines.append(f"{name:22}{cells}")
    return "\n".join(lines)


def _column(answer: Answer) -> str:
    return "declined" if answer.kind == "declined" else answer.regime


def problems(answers: Iterable[Answer]) -> list[str]:
    """One line for every row that is not right, or whose lag is not."""
    lines = []
    for a in answers:
        if a.kind == "right" and a.lag_right is not False:
            continue
        reason = a.reason[:160]
        kind = "lag" if a.kind == "right" else a.kind
        truth, allowed = a.truth, "/".join(sorted(a.truth.allowed))
        lines.append(
            f"{kind:18} {a.network}, row {a.row}: {allowed} {truth.lags.get(a.regime, '')}, got {a.regime} {a.lag:g} "
            f"(L {truth.steps}, end {truth.log_expected[-1]:.2f}, peak {truth.log_expected.max():.2f}, exponent along "
            f"{truth.along:.4f}, later {truth.later:.4f} +- {truth.error:.4f}, apart {truth.apart:.2f}) {reason}"
        )
    return sorted(lines)
