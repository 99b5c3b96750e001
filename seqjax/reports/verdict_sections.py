"""The verdict on a cell: what the first screen shows of it, and its details."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .html import card, heading, paragraph, points, section, table
from .sections import lag_figure, missing

if TYPE_CHECKING:
    from .measure import Measured
else:  # needed only in annotations
    Measured = Any


def verdict_card(measured: Measured) -> str:
    """The verdict with its evidence."""
    verdict = measured.found.get("verdict")
    if verdict is None:
        return card(paragraph("There is no verdict.", "answer"), *missing(measured, "verdict"))
    doubt = "" if verdict.reliable else "Some measurements are not reliable; the evidence says what is wrong."
    sentences = [_sentence(measured.names.in_text(line)) for line in verdict.evidence]
    answer = paragraph(measured.names.in_text(verdict.summary), "answer")
    return card(answer, points(sentences), paragraph(doubt))


def first_figure(measured: Measured) -> str:
    """The figure beside the verdict."""
    result = measured.found.get("gradient_by_lag")
    return "" if result is None else lag_figure(result)


def verdict_section(measured: Measured) -> str:
    """The advice, the properties of the verdict, and its rows by sequence."""
    verdict = measured.found.get("verdict")
    if verdict is None:
        return section("verdict", "Verdict in detail", gist="Not measured.")
    lag = verdict.lag if np.isfinite(verdict.lag) else f"none up to {verdict.by_lag.lags[-1]}"
    numbers = [
        ("regime", verdict.regime),
        ("contracting", _known(verdict.contracting)),
        ("forgets its initial state", _known(verdict.forgets)),
        ("lag at which a gradient is lost or has exploded (steps)", lag),
        ("field of the state with the strongest effect", measured.names.field(verdict.block)),
        ("reliable", verdict.reliable),
    ]
    advice = [heading("What helps"), points(_sentence(line) for line in verdict.advice)] if verdict.advice else []
    return section(
        "verdict",
        "Verdict in detail",
        *advice,
        table("The verdict in numbers", ("name", "value"), numbers),
        _by_sequence(verdict.rows),
        gist="Advice, and the verdict on every sequence.",
    )


def _by_sequence(rows: Sequence[Any]) -> str:
    """One line per sequence."""
    head = ("sequence", "regime", "contracting", "forgets its start", "lag (steps)", "steps", "also possible", "remark")
    lines = []
    for number, row in enumerate(rows):
        others = {regime: weight for regime, weight in row.alternatives.items() if regime != row.regime and weight > 0}
        possible = ", ".join(f"{regime} {weight:.0%}" for regime, weight in others.items()) or "none"
        lag = float(row.lag) if np.isfinite(row.lag) else "none"
        known = _known(row.contracting), _known(row.forgets)
        lines.append((number, row.regime, *known, lag, row.steps, possible, row.reason or "none"))
    return table("The verdict by sequence", head, lines, folded=True)


def _known(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"


def _sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
