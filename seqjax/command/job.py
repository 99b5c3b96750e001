"""A training run in progress: start or resume it, and write each update to its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seqjax.command import character_model
from seqjax.command.character_model import Settings
from seqjax.command.processes import in_any, wait_for_all
from seqjax.command.run_folder import MetricsTable, Run, RunError, restore
from seqjax.data.text import Corpus, encode, split
from seqjax.models.model import Model
from seqjax.training._devices import Devices
from seqjax.training._validated import Update, validated
from seqjax.training.loop import Metrics, TrainState

MAY_CHANGE = (
    "steps", "minutes", "learning_rate", "clip_norm", "validate_every", "checkpoint_every", "accumulate",
    "rematerialize_every",
)  # fmt: skip


@dataclasses.dataclass
class Job:
    """A training run in memory.

    Attributes:
        run: its folder.
        model: an embedding, recurrent layers and a softmax.
        parts: the tokens for training, validation and test.
        state: the training state after the last finished update.
        table: its metrics on disk.
        validation: the mean loss on the validation text at its last evaluation, in nats per character; NaN before.
        other_loops: a sentence if a resumed run goes on with other loops than it began with.
        devices: share the rows of a batch; None for the default device.
    """

    run: Run
    model: Model
    parts: tuple[np.ndarray, np.ndarray, np.ndarray]
    state: TrainState
    table: MetricsTable
    validation: float = math.nan
    other_loops: str = ""
    devices: Devices = None

    @property
    def step(self) -> int:
        """The number of finished updates."""
        return int(self.state.step)

    @property
    def finished(self) -> bool:
        """Whether the steps or the minutes of the settings are over."""
        return self.run.settings.finished(self.step, self.table.seconds)

    def mean_loss(self, tokens: np.ndarray) -> float:
        """The mean loss on a text, in nats per character."""
        return character_model.mean_loss(self.run.settings, self.model, self.state.params, tokens, self.devices)

    def updates(self, is_last: Callable[[int, float], bool]) -> Iterator[Update]:
        """The remaining updates, with their validations; `is_last` as for `validated`."""
        settings = self.run.settings
        if self.finished:
            return iter(())
        return validated(
            character_model.train(settings, self.model, self.parts[0], self.state, self.devices),
            is_last=is_last,
            validate=lambda params: character_model.mean_loss(
                settings, self.model, params, self.parts[1], self.devices
            ),
            validate_every=settings.validate_every,
            done=self.step,
            seconds=self.table.seconds,
        )


def begin(settings: Settings, corpus: Corpus, path: Path, devices: Devices = None) -> Job:
    """A new run in a new folder.

    Args:
        settings, corpus, path: of the run.
        devices: share the rows of a batch.

    Raises:
        ValueError: the text is too short.
        RunError: the folder cannot be created.
    """
    parts = _parts(settings, corpus)
    run = Run.create(path, settings, corpus)
    wait_for_all("the folder is made")
    model = character_model.build(settings, corpus.vocabulary)
    state = character_model.first_state(settings, model)
    return Job(run, model, parts, state, MetricsTable(run, 0), devices=devices)


def resume(settings: Settings, corpus: Corpus, path: Path, devices: Devices = None) -> Job:
    """An earlier run, from its last checkpoint; the arguments as for `begin`.

    Raises:
        RunError: the folder, the text or the settings are not those of that run.
        UnknownCharacter: the text holds characters that are not in the vocabulary of the run.
    """
    stored = Run.open(path)
    encode(corpus.text, stored.corpus.vocabulary, corpus.name)
    if corpus.sha256 != stored.corpus.sha256:
        raise RunError(
            f"expected the text that {path} was trained on, {stored.corpus.name} ({stored.corpus.length} characters, "
            f"sha256 {stored.corpus.sha256[:12]}), got {corpus.name} ({len(corpus.text)} characters, "
            f"sha256 {corpus.sha256[:12]}): restore that text, or train anew"
        )
    for name in (field.name for field in dataclasses.fields(Settings)):
        new, before = getattr(settings, name), getattr(stored.settings, name)
        if name != "text" and new != before and name not in MAY_CHANGE:
            raise RunError(
                f"expected {name} {before}, with which {path} began, got {new}: "
                f"leave it out, or train anew; a resumed run may change {', '.join(MAY_CHANGE)}"
            )
    run = dataclasses.replace(stored, settings=dataclasses.replace(settings, text=stored.settings.text))
    model, state = restore(run, devices)
    table, other_loops = MetricsTable(run, int(state.step)), stored.other_loops()
    job = Job(run, model, _parts(run.settings, corpus), state, table, other_loops=other_loops, devices=devices)
    run.set_aside_after(job.step)
    if run.settings != stored.settings:
        run.write_settings()
    return job


def work(job: Job, show: Callable[[Job, Metrics, bool], None]) -> bool:
    """Trains until the job is finished or interrupted.

    The row and, when one is due, the checkpoint of an update are written before the next update is read.

    Args:
        job: from `begin` or `resume`. It is changed in place.
        show: called after each update with the job, its metrics, and whether the validation text was evaluated.

    Returns:
        Whether it was interrupted before it was finished.

    Raises:
        NotFinite: an update is not finite; the job holds the state before it.
    """
    settings, interrupted = job.run.settings, False

    def is_last(number: int, seconds: float) -> bool:
        nonlocal interrupted
        # All processes stop after the same update, though each has its own clock and is interrupted for itself.
        finished, interrupted = in_any(settings.finished(number, seconds), bool(noted))
        return finished

    with _interruptible() as noted, contextlib.closing(job.table):
        for update in job.updates(is_last):
            job.state, job.table.seconds = update.state, update.seconds
            stop = update.last or interrupted
            if update.validation is not None:
                job.validation = update.validation
            characters = update.number * settings.batch * settings.window
            job.table.add(update.number, update.metrics, update.validation, characters)
            show(job, update.metrics, update.validation is not None)
            if stop or update.number % settings.checkpoint_every == 0:
                job.run.save(job.state)
            if stop:
                return not update.last
    return False


def _parts(settings: Settings, corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test text.

    Raises:
        ValueError: the text is too short for one window of each row.
    """
    parts = split(corpus.tokens)
    need = settings.batch * settings.window + 1
    if len(parts[0]) < need or min(map(len, parts)) < 2:
        raise ValueError(
            f"expected a text of at least {max(math.ceil(need / 0.9), 40)} characters, one window of "
            f"{settings.window} steps in {settings.batch} rows within its first 90 %, got {len(corpus.text)} in "
            f"{corpus.name}: use a longer text, or a smaller --batch or --window"
        )
    return parts


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Records Ctrl-C and termination, so that the current update is finished and saved; a second one acts at once."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
