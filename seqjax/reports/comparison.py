"""The sections of a page that compares several training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from seqjax import plots
from seqjax.analysis.clipping import clipping_statistics

from .files import versions
from .html import card, figures, pairs, paragraph, section, table
from .sections import drawn
from .training_sections import clipping_numbers, validation_bits

if TYPE_CHECKING:
    from .measure import Measured
else:  # needed only in annotations
    Measured = Any


@runtime_checkable
class Study(Protocol):
    """The data of one run."""

    @property
    def name(self) -> str:
        """The name of the run, unique on the page."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the training by name; the same names in every run."""
        ...

    @property
    def history(self) -> Mapping[str, np.ndarray]:
        """The columns of metrics.csv."""
        ...

    @property
    def measured(self) -> Measured:
        """The measurements of its cell on the validation text."""
        ...

    @property
    def entropy(self) -> float:
        """The unigram entropy of the text, in bits."""
        ...

    @property
    def remark(self) -> str:
        """A remark on the text, or empty."""
        ...


def parts(studies: Sequence[Study]) -> list[str]:
    """All sections, for at least two runs."""
    return [
        verdicts(studies),
        differences(studies),
        learning(studies),
        gradients(studies),
        exponents(studies),
        clipping(studies),
        section("versions", "Versions", pairs("Versions", versions())),
    ]


def verdicts(studies: Sequence[Study]) -> str:
    """The verdict on each run, and the run with the lowest validation loss."""
    scores = [(_last_validation(study), study.name) for study in studies]
    scores = sorted(pair for pair in scores if np.isfinite(pair[0]))  # NaN has no place in an order
    best = f"{scores[0][1]} reads its validation text best, at {scores[0][0]:.3f} bits per character." if scores else ""
    cards = []
    for study in studies:
        verdict = study.measured.found.get("verdict")
        text = study.measured.why("verdict") if verdict is None else verdict.summary
        cards.append(card(paragraph(study.name), paragraph(text), paragraph(study.remark)))
    fields = {
        "regime": lambda v: v.regime,
        "lag at which the gradient is lost or has exploded (steps)": lambda v: float(v.lag),
        "field of the state with the strongest effect": lambda v: v.block,
        "reliable": lambda v: v.reliable,
    }
    results = _results(studies, "verdict")
    rows = [(name, *("none" if v is None else get(v) for v in results)) for name, get in fields.items()]
    rows += [("validation (bits per character)", *map(_last_validation, studies))]
    return section("verdict", "Verdicts", paragraph(best), *cards, _run_table("Verdicts in numbers", studies, rows))


def differences(studies: Sequence[Study]) -> str:
    """The settings that differ between the runs, and those that are the same."""
    rows = [(name, *(study.settings[name] for study in studies)) for name in studies[0].settings]
    same = [row for row in rows if all(value == row[1] for value in row[1:])]
    differ = [row for row in rows if row not in same]
    return section(
        "settings",
        "Settings that differ",
        _run_table("Settings that differ", studies, differ) if differ else paragraph("None does."),
        _run_table("Settings that are the same", studies, same, folded=True) if same else "",
    )


def learning(studies: Sequence[Study]) -> str:
    """The validation curves of all runs on the same axes."""
    curves = {study.name: validation_bits(study.history) for study in studies}
    caption = "Bits per character on the validation text during the training. Lower is better."
    rows = [
        ("updates", *(len(study.history["step"]) for study in studies)),
        ("last validation (bits)", *map(_last_validation, studies)),
        ("unigram entropy (bits)", *(study.entropy for study in studies)),
        ("seconds of training", *(float(np.max(study.history["seconds"], initial=0)) for study in studies)),
    ]
    shown = drawn("learning", plots.learning_curves, curves, caption=caption)
    return section("learning", "Learning", figures([shown]), _run_table("Learning in numbers", studies, rows))


def gradients(studies: Sequence[Study]) -> str:
    """The gradient by lag of all runs on the same axes."""
    results = _results_by_name(studies, "gradient_by_lag")
    caption = "The norm of a gradient after k steps back in time. The run whose line falls last has the longest memory."
    shown = [drawn("by-lag", plots.gradients_by_lag, results, caption=caption)] if results else []
    rows = [
        ("horizon (steps)", *(float(r.horizon) if r else float("nan") for r in _results(studies, "gradient_by_lag"))),
        ("exact", *(r.exact if r else "none" for r in _results(studies, "gradient_by_lag"))),
    ]
    why = _reasons(studies, "gradient_by_lag")
    return section("gradients", "Gradients through time", *why, figures(shown), _run_table("Horizons", studies, rows))


def exponents(studies: Sequence[Study]) -> str:
    """The Lyapunov exponents of all runs on the same axes."""
    results = _results_by_name(studies, "lyapunov_exponents")
    caption = (
        "The rates per step at which perturbations grow or shrink. A positive rate is chaos, and a rate slightly below "
        "zero is long memory."
    )
    shown = [drawn("exponents", plots.lyapunov_spectra, results, caption=caption)] if results else []
    most = max((len(result.mean) for result in results.values()), default=0)
    means = [np.zeros(0) if r is None else np.asarray(r.mean) for r in _results(studies, "lyapunov_exponents")]
    # The states may differ in size, so a short column is filled up with NaN.
    rows = [(i + 1, *(float(m[i]) if i < len(m) else float("nan") for m in means)) for i in range(most)]
    numbers = _run_table("Mean exponents (nats per step)", studies, rows, first="number")
    why = _reasons(studies, "lyapunov_exponents")
    return section("exponents", "Lyapunov exponents", *why, figures(shown), numbers)


def clipping(studies: Sequence[Study]) -> str:
    """The effect of clipping in each run."""
    shown, columns = [], []
    for number, study in enumerate(studies):
        try:
            result = clipping_statistics(study.history, study.settings["clip_norm"])
        except ValueError:  # for example, a run without any update
            columns.append({})
            continue
        columns.append(clipping_numbers(result))
        caption = (
            f"{study.name}: the gradient norm at every update. A gradient above the threshold was scaled down to it."
        )
        shown.append(drawn(f"clipping-{number}", plots.clipping, result, caption=caption))
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "none") for column in columns)) for name in names]
    return section("clipping", "Clipping", figures(shown), _run_table("Clipping in numbers", studies, rows))


def _run_table(
    caption: str, studies: Sequence[Study], rows: Sequence[Sequence[Any]], *, first: str = "name", folded: bool = False
) -> str:
    """A table with one column per run."""
    return table(caption, (first, *(study.name for study in studies)), rows, folded=folded)


def _results(studies: Sequence[Study], name: str) -> list[Any]:
    """The result of one analysis for each run, or None."""
    return [study.measured.found.get(name) for study in studies]


def _results_by_name(studies: Sequence[Study], name: str) -> dict[str, Any]:
    """The results of one analysis, by the name of the run."""
    return {s.name: s.measured.found[name] for s in studies if name in s.measured.found}


def _reasons(studies: Sequence[Study], name: str) -> list[str]:
    """A paragraph for each run without a result of this analysis."""
    return [
        paragraph(f"{study.name}. {study.measured.why(name)}", "soft") for study in studies if study.measured.why(name)
    ]


def _last_validation(study: Study) -> float:
    """The last validation loss in bits per character; NaN if there is none."""
    bits = validation_bits(study.history)[1]
    return float(bits[-1]) if bits.size else float("nan")
