"""The report on a training run, and several runs side by side."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqjax.command import character_model
from seqjax.command.run_folder import Run, restore
from seqjax.command.validation import Estimate, validation_bits, with_interval
from seqjax.data.batch import Batch
from seqjax.data.ngram import ngram_bits
from seqjax.data.text import Corpus, decode, encode, manual_topics, split
from seqjax.data.text_files import read_text
from seqjax.models.model import Model, ModelParams
from seqjax.reports import comparison
from seqjax.reports import training_sections as training
from seqjax.reports import verdict_sections as verdicts
from seqjax.reports.cell_page import cell_sections, checked_place, foot, settings_section, write
from seqjax.reports.html import bars, columns, heading, page, paragraph
from seqjax.reports.html import sample as sample_of
from seqjax.reports.measure import ROWS, STEPS, Depth, Inputs, Measured, Tell, measure, silent
from seqjax.reports.sections import safely
from seqjax.sequence.unroll import unroll

ORDER = 5  # of the n-gram model
FIVE_GRAM, UNIGRAM = f"{ORDER}-gram model", "unigram model"
PROMPT, SAMPLE = 20, 280  # characters
POSITIONS = 128  # of the loss by position, and at least of each sequence of a batch


class Study(NamedTuple):
    """What a page tells of a run.

    Attributes:
        name: by which it goes.
        run: its folder.
        settings: those of the training and its text, by name.
        history: its metrics.csv, a column of numbers by name.
        measured: what was found about its cell on the validation text.
        score: its loss on the validation text, in bits per character.
        baselines: the losses of simple models, counted on the training text, on the same validation text; the best
            model first.
        remark: what is to be known of the text; empty if nothing.
        gap: its loss minus that of the best run on the page, with a 95 % interval; empty if it is the best, or if they
            did not read the same text.
    """

    name: str
    run: Run
    settings: dict[str, Any]
    history: dict[str, np.ndarray]
    measured: Measured
    score: Estimate
    baselines: dict[str, float]
    remark: str
    gap: str = ""


class Loaded(NamedTuple):
    """A run with everything that its report reads, before anything is measured.

    Attributes:
        run: its folder.
        model, params: its model.
        corpus: its text as it is now.
        parts: the tokens for training, validation and test.
        history: its metrics.csv.
    """

    run: Run
    model: Model
    params: ModelParams
    corpus: Corpus
    parts: tuple[np.ndarray, np.ndarray, np.ndarray]
    history: dict[str, np.ndarray]


def report_run(path: Path, out: Path | None = None, *, full: bool = False, tell: Tell = silent) -> Path:
    """Writes the report on a run, by default as report.html in its folder.

    Args:
        path: the folder of the run.
        out: another place for the page.
        full: whether to run the costly analyses too.
        tell: called with the name of each step of the work before it begins.

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
    loaded = _load(run)
    study = _study(loaded, path.resolve().name, "full" if full else "usual", tell)
    tell("sample")
    sample = _sample(loaded)
    tell("loss by position")
    positions = training.score_section(loaded.model, loaded.params, _fresh(loaded.parts[1]))
    tell("figures")
    parts = [
        safely("learning", "Learning", training.learning_section, study.history),
        *cell_sections(loaded.model.cell, study.measured),
        training.clipping_section(study.history, run.settings.clip_norm),
        positions,
        settings_section(study.measured, study.settings),
    ]
    lead = f"{run.settings.cell}, {run.settings.layers} x {run.settings.hidden} hidden units, on {run.corpus.name}."
    first = columns(_score_in_words(study) + sample, verdicts.first_figure(study.measured))
    first += verdicts.verdict_card(study.measured)
    return write(place, page(f"Run {study.name}", f"{lead} {study.remark}".strip(), first, parts, foot()))


def compare_runs(paths: Sequence[Path], out: Path, *, tell: Tell = silent) -> Path:
    """Writes a page that lays runs side by side: what differs in their settings, curves, verdicts and measurements.

    Args:
        paths: the folders of two runs or more.
        out: the file to write.
        tell: called with the name of each step of the work before it begins.

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
    loaded = [_load(run) for run in runs]  # all of them, so that a damaged one is told before the measuring
    names = [path.name for path in places]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    studies = [
        _study(each, name, "verdict", lambda step, name=name: tell(f"{name}: {step}"))
        for each, name in zip(loaded, names, strict=True)
    ]
    studies = _with_gaps(studies, [each.corpus.sha256 for each in loaded])
    tell("figures")
    title = f"{len(studies)} runs side by side"
    lead = f"{', '.join(names)}; each measured on its own validation text."
    first = comparison.first_screen(studies)
    return write(place, page(title, lead, first, comparison.sections(studies), foot()))


def _with_gaps(studies: list[Study], texts: list[str]) -> list[Study]:
    """The studies with their differences from the best one, if they read the same text in the same windows."""
    best = min(range(len(studies)), key=lambda i: (not np.isfinite(studies[i].score.mean), studies[i].score.mean))
    shape = [
        (text, study.run.settings.batch, study.run.settings.window) for text, study in zip(texts, studies, strict=True)
    ]
    for i, study in enumerate(studies):
        difference = study.score.minus(studies[best].score) if i != best and shape[i] == shape[best] else None
        if difference is not None:
            studies[i] = study._replace(gap=with_interval(*difference))
    return studies


def _load(run: Run) -> Loaded:
    model, state = restore(run)
    corpus = manual_topics() if run.settings.text is None else read_text(run.settings.text)
    tokens = encode(corpus.text, run.corpus.vocabulary, corpus.name)
    return Loaded(run, model, state.params, corpus, split(tokens), run.metrics())


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run with its text."""
    settings = dataclasses.asdict(run.settings) | {"text": run.corpus.name}
    return settings | {"characters": run.corpus.length, "vocabulary": len(run.corpus.vocabulary)}


def _study(loaded: Loaded, name: str, depth: Depth, tell: Tell) -> Study:
    """Measures a run on its validation text."""
    run, model, params, corpus, (text, validation, _), history = loaded
    changed = corpus.sha256 != run.corpus.sha256
    remark = (
        "The text has changed since the training; everything below is measured on it as it is now." if changed else ""
    )
    tell("baselines")
    baselines = _baselines(text.tobytes(), validation.tobytes(), len(run.corpus.vocabulary))
    tell("validation text")
    score = validation_bits(run.settings, model, params, validation)
    xs, state = _read(model, params, validation)
    measured = measure(model.cell, params.cell, Inputs(xs), state, depth=depth, tell=tell)
    return Study(name, run, _settings(run), history, measured, score, baselines, remark)


@functools.lru_cache(maxsize=4)  # runs that are compared usually have the same text
def _baselines(text: bytes, validation: bytes, vocabulary: int) -> dict[str, float]:
    """The bits per character of simple models on the validation text."""
    counted, read = (np.frombuffer(part, np.int32) for part in (text, validation))
    return {name: ngram_bits(counted, read, order, vocabulary) for name, order in ((FIVE_GRAM, ORDER), (UNIGRAM, 1))}


def _score_in_words(study: Study) -> str:
    """The loss on the validation text beside the baselines."""
    score, baseline = study.score, study.baselines[FIVE_GRAM]
    known = np.isfinite([score.low, score.high]).all()
    low, high = (score.low, score.high) if known else (score.mean, score.mean)
    than = "better than" if high < baseline else "worse than" if low > baseline else "about as good as"
    interval = f"The 95 % interval is {score.low:.2f} to {score.high:.2f}. " if known else ""
    read = f"{interval}{score.read:,} of {score.length:,} characters of the validation text were read."
    rows = [("this model", f"{score.mean:.3f}", score.mean)]
    rows += [(name, f"{bits:.3f}", bits) for name, bits in study.baselines.items()]
    return (
        paragraph(f"{score.mean:.2f} bits per character on unseen text, {than} a {FIVE_GRAM}.", "answer")
        + paragraph(read, "soft")
        + bars("Bits per character, lower is better. The n-gram models count the training text.", rows)
    )


def _sample(loaded: Loaded) -> str:
    """A text that the model continues."""
    vocabulary, prompt = loaded.run.corpus.vocabulary, loaded.parts[1][:PROMPT]
    drawn = character_model.sample(loaded.model, loaded.params, prompt, SAMPLE, seed=0, temperature=0.8)
    text = decode(np.array(list(drawn)), vocabulary)
    return heading("A sample at temperature 0.8, after the grey prompt") + sample_of(decode(prompt, vocabulary), text)


def _read(model: Model, params: ModelParams, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
    """Rows of a text side by side, and the states after what stands before them, as far as there is enough of it."""
    if len(tokens) < 1:
        raise ValueError("expected a text with something to validate on, got too short a one: use a longer text")
    rows = ROWS if len(tokens) >= ROWS * POSITIONS else 1
    places = tokens[: len(tokens) // rows * rows].reshape(rows, -1)
    warm = min(STEPS, max(places.shape[1] - STEPS, 0))
    state = unroll(model.cell, params.cell, places[:, :warm])[0] if warm else None
    return places[:, warm : warm + STEPS], state


def _fresh(tokens: np.ndarray) -> list[Batch]:
    """Sequences that begin without a past, at most 256 of them."""
    steps = min(POSITIONS, len(tokens) - 1)
    if steps < 1:
        return []
    count = min((len(tokens) - 1) // steps, 256)
    ahead = tokens[1 : 1 + count * steps].reshape(count, steps)
    return [Batch(tokens[: count * steps].reshape(count, steps), ahead)]
