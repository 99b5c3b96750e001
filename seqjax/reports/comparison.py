"""The page that compares several training runs: one row per run in every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from seqjax import plots
from seqjax.analysis.clipping import clipping_statistics
from seqjax.plots.canvas import finite_mean

from .files import versions
from .html import card, columns, factor, figures, pairs, paragraph, section, table
from .sections import drawn, growth_in_words
from .training_sections import clipping_numbers, validation_bits

if TYPE_CHECKING:
    from .measure import Measured
else:  # needed only in annotations
    Measured = Any


@runtime_checkable
class Score(Protocol):
    """A mean loss in bits per character; it prints with its 95 % interval."""

    @property
    def mean(self) -> float:
        """The mean."""
        ...

    @property
    def low(self) -> float:
        """The lower end of the interval; NaN if it is not known."""
        ...

    @property
    def high(self) -> float:
        """The upper end of the interval; NaN if it is not known."""
        ...


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
    def score(self) -> Score:
        """Its loss on the validation text."""
        ...

    @property
    def gap(self) -> str:
        """Its loss minus that of the best run with a 95 % interval, or empty."""
        ...

    @property
    def baselines(self) -> Mapping[str, float]:
        """The losses of simple models on the same text, in bits per character."""
        ...

    @property
    def remark(self) -> str:
        """A remark on the text, or empty."""
        ...


def first_screen(studies: Sequence[Study]) -> str:
    """The best run, one row of results per run, and the validation curves."""
    return (
        card(paragraph(_ranking(studies), "answer"))
        + _results_table(studies)
        + columns(_learning_figure(studies), _lag_figure(studies))
    )


def sections(studies: Sequence[Study]) -> list[str]:
    """The sections below the first screen, for at least two runs."""
    return [
        verdicts(studies),
        differences(studies),
        exponents(studies),
        clipping(studies),
        section("versions", "Versions", pairs("Versions", versions())),
    ]


def _ranking(studies: Sequence[Study]) -> str:
    """Which run has the lowest validation loss."""
    ranked = sorted((study for study in studies if np.isfinite(study.score.mean)), key=lambda study: study.score.mean)
    if not ranked:  # NaN has no place in an order
        return "No run has a finite validation loss."
    return f"{ranked[0].name} has the lowest validation loss, {ranked[0].score.mean:.3f} bits per character."


def _results_table(studies: Sequence[Study]) -> str:
    name, bits = next(iter(studies[0].baselines.items()))  # the best one
    same = all(study.baselines == studies[0].baselines for study in studies)
    caption = "Results on the validation text"
    caption += f"; a {name} needs {bits:.3f} bits per character" if same else ""
    head = (
        "run",
        "bits per character (95 % interval)",
        "more than the best run (95 % interval)",
        *([] if same else [name]),
        "regime",
        "memory",
        "growth factor per step (95 % interval)",
        "parameters",
        "updates",
        "seconds",
    )
    rows = []
    for study in studies:
        verdict, by_lag, exponents = (
            study.measured.found.get(name) for name in ("verdict", "gradient_by_lag", "lyapunov_exponents")
        )
        rows.append(
            (
                study.name,
                str(study.score),
                study.gap,
                *([] if same else [f"{study.baselines[name]:.3f}"]),
                "none" if verdict is None else verdict.regime,
                "none" if by_lag is None else str(by_lag.memory),
                "none" if exponents is None else growth_in_words(exponents),
                study.measured.about.get("parameters"),
                len(study.history["step"]),
                f"{np.max(study.history['seconds'], initial=0):.0f}",
            )
        )
    return table(caption, head, rows)


def _learning_figure(studies: Sequence[Study]) -> str:
    curves = {study.name: validation_bits(study.history) for study in studies}
    caption = "The loss on the validation text during the training. Lower is better."
    return drawn("learning", plots.learning_curves, curves, caption=caption)


def _lag_figure(studies: Sequence[Study]) -> str:
    results = _results_by_name(studies, "gradient_by_lag")
    caption = (
        "The factor by which the norm of a gradient changes on its way back in time. The run whose line falls last has "
        "the longest memory."
    )
    return drawn("by-lag", plots.gradients_by_lag, results, caption=caption) if results else ""


def verdicts(studies: Sequence[Study]) -> str:
    """The verdicts in words, each sentence with the runs for which it holds."""
    runs: dict[str, list[str]] = {}
    for study in studies:
        verdict = study.measured.found.get("verdict")
        text = study.measured.why("verdict") if verdict is None else study.measured.names.in_text(verdict.summary)
        for sentence in f"{text} {study.remark}".replace(". ", ".\n").splitlines():
            if sentence.strip():
                runs.setdefault(sentence.strip(), []).append(study.name)
    rows = [(", ".join(names), sentence) for sentence, names in runs.items()]
    return section("verdict", "Verdicts in words", table("The verdicts", ("runs", "verdict"), rows), opened=True)


def differences(studies: Sequence[Study]) -> str:
    """The settings that differ between the runs, and those that are the same."""
    values = {name: [study.settings[name] for study in studies] for name in studies[0].settings}
    same = {name: column[0] for name, column in values.items() if all(value == column[0] for value in column)}
    differ = [name for name in values if name not in same]
    rows = [(study.name, *(study.settings[name] for name in differ)) for study in studies]
    return section(
        "settings",
        "Settings",
        table("Settings that differ", ("run", *differ), rows) if differ else paragraph("No setting differs."),
        table("Settings that are the same", ("name", "value"), same.items(), folded=True) if same else "",
        gist=f"{len(differ)} of {len(values)} differ.",
        opened=True,
    )


def exponents(studies: Sequence[Study]) -> str:
    """The Lyapunov exponents of all runs as growth factors per step."""
    results = _results_by_name(studies, "lyapunov_exponents")
    caption = "A factor above one is chaos, and one slightly below one is long memory."
    shown = []
    if results:
        shown = [drawn("exponents", plots.lyapunov_spectra, results, caption=caption, unit="factor")]
    most = max((len(result.mean) for result in results.values()), default=0)
    rows = []
    for name, result in results.items():
        factors = [factor(float(log)) for log in finite_mean(result.exponents)]
        rows.append((name, *factors, *["none"] * (most - len(factors))))  # the states may differ in size
    head = ("run", *(f"rank {i + 1}" for i in range(most)))
    numbers = table("Growth factors per step", head, rows) if rows else ""
    why = [
        paragraph(f"{study.name}. {study.measured.why('lyapunov_exponents')}", "soft")
        for study in studies
        if study.measured.why("lyapunov_exponents")
    ]
    return section("exponents", "Lyapunov exponents", *why, figures(shown), numbers)


def clipping(studies: Sequence[Study]) -> str:
    """The effect of clipping in each run."""
    shown, numbers = [], {}
    for number, study in enumerate(studies):
        try:
            result = clipping_statistics(study.history, study.settings["clip_norm"])
        except ValueError:  # for example, a run without any update
            continue
        numbers[study.name] = clipping_numbers(result)
        shown.append(drawn(f"clipping-{number}", plots.clipping, result, caption=f"Updates of {study.name}."))
    names = list(dict.fromkeys(name for column in numbers.values() for name in column))
    rows = [(study.name, *(numbers.get(study.name, {}).get(name, "none") for name in names)) for study in studies]
    text = "The gradient norm at every update. A gradient above the threshold was scaled down to it."
    numbers_table = table("Clipping in numbers", ("run", *names), rows)
    return section("clipping", "Clipping", paragraph(text, "soft"), figures(shown), numbers_table)


def _results_by_name(studies: Sequence[Study], name: str) -> dict[str, Any]:
    """The results of one analysis, by the name of the run."""
    return {s.name: s.measured.found[name] for s in studies if name in s.measured.found}
