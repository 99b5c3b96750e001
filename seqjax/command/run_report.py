"""The report on a training run, and several runs side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqjax.command.run_folder import Run, restore
from seqjax.data.batch import Batch
from seqjax.data.text import encode, manual_topics, read_text, split, unigram_entropy
from seqjax.models.model import Model, ModelParams
from seqjax.reports import comparison
from seqjax.reports import training_sections as training
from seqjax.reports.cell_page import cell_sections, checked_place, foot, settings_section, write
from seqjax.reports.html import page
from seqjax.reports.measure import ROWS, STEPS, Measured, measure
from seqjax.reports.sections import safely
from seqjax.sequence.unroll import unroll


class Study(NamedTuple):
    """What a page tells of a run.

    Attributes:
        name: by which it goes.
        run: its folder.
        settings: those of the training and its text, by name.
        history: its metrics.csv, a column of numbers by name.
        measured: what was found about its cell on the validation text.
        entropy: the unigram entropy of the text, in bits.
        remark: what is to be known of the text; empty if nothing.
    """

    name: str
    run: Run
    settings: dict[str, Any]
    history: dict[str, np.ndarray]
    measured: Measured
    entropy: float
    remark: str


def report_run(path: Path, out: Path | None = None) -> Path:
    """Writes the report on a run, by default as report.html in its folder.

    Args:
        path: the folder of the run.
        out: another place for the page.

    Returns:
        The path of the page.

    Raises:
        RunError: the folder is no run that can be read.
        OSError: its text cannot be read.
        ValueError: its text has other characters now, or the page cannot be written.
        ModuleNotFoundError: there is no matplotlib.
    """
    run = Run.open(path)
    place = checked_place(path / "report.html" if out is None else out)
    model, params = _model(run)
    study, tokens = _study(run, path.resolve().name, model, params, everything=True)
    verdict, *rest = cell_sections(model.cell, study.measured)
    parts = [
        verdict,
        safely("learning", "Learning", training.learning_section, study.history, study.entropy),
        *rest,
        training.clipping_section(study.history, run.settings.clip_norm),
        training.score_section(model, params, _fresh(tokens)),
        settings_section(study.measured, study.settings),
    ]
    lead = f"{run.settings.cell}, {run.settings.layers} x {run.settings.hidden} hidden units, on {run.corpus.name}."
    return write(place, page(f"Run {study.name}", f"{lead} {study.remark}".strip(), parts, foot()))


def compare_runs(paths: Sequence[Path], out: Path) -> Path:
    """Writes a page that lays runs side by side: what differs in their settings, curves, verdicts and measurements.

    Args:
        paths: the folders of two runs or more.
        out: the file to write.

    Returns:
        The path of the page.

    Raises:
        RunError, OSError, ModuleNotFoundError: as for `report_run`.
        ValueError: there are fewer than two runs, or one is named twice, or as for `report_run`.
    """
    if len(paths) < 2:
        got = f"one, {paths[0]}" if paths else "none"
        raise ValueError(f"expected at least two runs to compare, got {got}: seqjax report RUN shows a single one")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"expected every run once, got {path} more often: leave the others out")
    runs = [Run.open(path) for path in paths]
    place = checked_place(out)
    models = [_model(run) for run in runs]  # all of them, so that a damaged one is told before the measuring
    names = [path.name for path in places]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    studies = [
        _study(run, name, *model, everything=False)[0] for run, name, model in zip(runs, names, models, strict=True)
    ]
    title = f"{len(studies)} runs side by side"
    lead = f"{', '.join(names)}; each measured on its own validation text."
    return write(place, page(title, lead, comparison.parts(studies), foot()))


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run with its text."""
    settings = dataclasses.asdict(run.settings) | {"text": run.corpus.name}
    return settings | {"characters": run.corpus.length, "vocabulary": len(run.corpus.vocabulary)}


def _model(run: Run) -> tuple[Model, ModelParams]:
    model, state = restore(run)
    return model, state.params


def _study(run: Run, name: str, model: Model, params: ModelParams, *, everything: bool) -> tuple[Study, np.ndarray]:
    """The study and its validation text."""
    corpus = manual_topics() if run.settings.text is None else read_text(run.settings.text)
    tokens = encode(corpus.text, run.corpus.vocabulary, corpus.name)
    changed = corpus.sha256 != run.corpus.sha256
    remark = (
        "The text has changed since the training; everything below is measured on it as it is now." if changed else ""
    )
    validation = split(tokens)[1]
    xs, state = _read(model, params, validation)
    measured = measure(model.cell, params.cell, xs, state=state, everything=everything)
    return Study(name, run, _settings(run), run.metrics(), measured, unigram_entropy(tokens), remark), validation


def _read(model: Model, params: ModelParams, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
    """Rows of a text side by side, and the states after what stands before them, as far as there is enough of it."""
    if len(tokens) < 1:
        raise ValueError("expected a text with something to validate on, got too short a one: use a longer text")
    rows = ROWS if len(tokens) >= ROWS * STEPS else 1
    places = tokens[: len(tokens) // rows * rows].reshape(rows, -1)
    warm = min(STEPS, max(places.shape[1] - STEPS, 0))
    state = unroll(model.cell, params.cell, places[:, :warm])[0] if warm else None
    return places[:, warm : warm + STEPS], state


def _fresh(tokens: np.ndarray) -> list[Batch]:
    """Sequences that begin without a past, at most 256 of them."""
    steps = min(STEPS, len(tokens) - 1)
    if steps < 1:
        return []
    count = min((len(tokens) - 1) // steps, 256)
    ahead = tokens[1 : 1 + count * steps].reshape(count, steps)
    return [Batch(tokens[: count * steps].reshape(count, steps), ahead)]
