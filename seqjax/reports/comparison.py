"""The parts of a page that lays runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqjax import plots
from seqjax.analysis.clipping import clipping_statistics

from .cell_page import versions
from .html import card, figures, pairs, paragraph, section, table
from .sections import drawn
from .training_sections import clipping_numbers


def parts(studies: Sequence[Any]) -> list[str]:
    """Every section, of two studies of runs or more."""
    return [
        verdicts(studies),
        differences(studies),
        learning(studies),
        gradients(studies),
        exponents(studies),
        clipping(studies),
        section("versions", "Versions", pairs("Versions", versions())),
    ]


def verdicts(studies: Sequence[Any]) -> str:
    """What can be said of each run, and the best of them."""
    best = [(_last_validation(study), study.name) for study in studies]
    best = sorted(pair for pair in best if np.isfinite(pair[0]))
    said = f"{best[0][1]} reads its validation text best, at {best[0][0]:.3f} bits per character." if best else ""
    cards = []
    for study in studies:
        verdict = study.measured.found.get("verdict")
        text = study.measured.why("verdict") if verdict is None else verdict.summary
        cards.append(card(paragraph(study.name), paragraph(text), paragraph(study.remark)))
    fields = {
        "regime": lambda v: v.regime,
        "lag at which the gradient is lost (steps)": lambda v: float(v.lag),
        "field in which it shows most": lambda v: v.block,
        "reliable": lambda v: v.reliable,
    }
    found = [study.measured.found.get("verdict") for study in studies]
    rows = [(name, *("none" if v is None else get(v) for v in found)) for name, get in fields.items()]
    rows += [("validation (bits per character)", *map(_last_validation, studies))]
    return section("verdict", "Verdicts", paragraph(said), *cards, _side_by_side("Verdicts in numbers", studies, rows))


def differences(studies: Sequence[Any]) -> str:
    """The settings that differ, and those that do not."""
    rows = [(name, *(study.settings[name] for study in studies)) for name in studies[0].settings]
    same = [row for row in rows if all(value == row[1] for value in row[1:])]
    differ = [row for row in rows if row not in same]
    return section(
        "settings",
        "Settings that differ",
        _side_by_side("Settings that differ", studies, differ) if differ else paragraph("None does."),
        _side_by_side("Settings that are the same", studies, same, folded=True) if same else "",
    )


def learning(studies: Sequence[Any]) -> str:
    """Validation curves on the same axes."""
    curves = {}
    for study in studies:
        read = np.isfinite(study.history["validation_bits"])
        curves[study.name] = (study.history["step"][read], study.history["validation_bits"][read])
    caption = "Bits per character on the validation text over the training: lower is better, steeper is faster."
    rows = [
        ("updates", *(len(study.history["step"]) for study in studies)),
        ("last validation (bits)", *map(_last_validation, studies)),
        ("unigram entropy (bits)", *(study.entropy for study in studies)),
        ("seconds of training", *(float(np.max(study.history["seconds"], initial=0)) for study in studies)),
    ]
    shown = drawn("learning", plots.learning_curves, curves, caption=caption)
    return section("learning", "Learning", figures([shown]), _side_by_side("Learning in numbers", studies, rows))


def gradients(studies: Sequence[Any]) -> str:
    """Gradient by lag on the same axes."""
    found = _found(studies, "gradient_by_lag")
    caption = "How much of a gradient is left after k steps back: the line that falls last remembers longest."
    shown = [drawn("by-lag", plots.gradients_by_lag, found, caption=caption)] if found else []
    rows = [
        ("horizon (steps)", *(float(r.horizon) if r else float("nan") for r in _each(studies, "gradient_by_lag"))),
        ("exact", *(r.exact if r else "none" for r in _each(studies, "gradient_by_lag"))),
    ]
    why = _why(studies, "gradient_by_lag")
    return section(
        "gradients", "Gradients through time", *why, figures(shown), _side_by_side("Horizons", studies, rows)
    )


def exponents(studies: Sequence[Any]) -> str:
    """Lyapunov exponents on the same axes."""
    found = _found(studies, "lyapunov_exponents")
    caption = "Rates per step at which perturbations grow or fade: above zero is chaos, near zero is long memory."
    shown = [drawn("exponents", plots.lyapunov_spectra, found, caption=caption)] if found else []
    most = max((len(result.mean) for result in found.values()), default=0)
    means = [np.zeros(0) if r is None else np.asarray(r.mean) for r in _each(studies, "lyapunov_exponents")]
    rows = [(i + 1, *(float(m[i]) if i < len(m) else float("nan") for m in means)) for i in range(most)]
    numbers = _side_by_side("Mean exponents (nats per step)", studies, rows, first="number")
    why = _why(studies, "lyapunov_exponents")
    return section("exponents", "Lyapunov exponents", *why, figures(shown), numbers)


def clipping(studies: Sequence[Any]) -> str:
    """How clipping acted in each run."""
    shown, columns = [], []
    for place, study in enumerate(studies):
        try:
            result = clipping_statistics(study.history, study.run.settings.clip_norm)
        except ValueError:
            columns.append({})
            continue
        columns.append(clipping_numbers(result))
        caption = f"{study.name}: the gradient's norm at every update; what lies above the threshold was scaled down."
        shown.append(drawn(f"clipping-{place}", plots.clipping, result, caption=caption))
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "none") for column in columns)) for name in names]
    return section("clipping", "Clipping", figures(shown), _side_by_side("Clipping in numbers", studies, rows))


def _side_by_side(
    caption: str, studies: Sequence[Any], rows: Sequence[Sequence[Any]], *, first: str = "name", folded: bool = False
) -> str:
    return table(caption, (first, *(study.name for study in studies)), rows, folded=folded)


def _each(studies: Sequence[Any], name: str) -> list[Any]:
    return [study.measured.found.get(name) for study in studies]


def _found(studies: Sequence[Any], name: str) -> dict[str, Any]:
    return {s.name: s.measured.found[name] for s in studies if name in s.measured.found}


def _why(studies: Sequence[Any], name: str) -> list[str]:
    return [
        paragraph(f"{study.name}. {study.measured.why(name)}", "soft") for study in studies if study.measured.why(name)
    ]


def _last_validation(study: Any) -> float:
    read = study.history["validation_bits"]
    read = read[np.isfinite(read)]
    return float(read[-1]) if read.size else float("nan")
