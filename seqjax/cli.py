"""The command line: parse, call, print.

seqjax train    trains a character model and keeps it in a folder
seqjax sample   lets it write
seqjax score    lets it read
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from seqjax import character_model
from seqjax.character_model import Settings
from seqjax.data.text import Corpus, decode, encode, manual_topics, read_text, split, unigram_entropy
from seqjax.model import Model
from seqjax.runs import MetricsTable, Run, RunError
from seqjax.training import NotFinite, TrainState

MAY_CHANGE = ("steps", "minutes", "learning_rate", "clip_norm", "validate_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a character model on the Python manual, or on any text, and keep it in a folder."""

    settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)
    out: Path | None = None
    """The folder to make; by default a new one in runs/."""
    resume: Path | None = None
    """Go on with the run in this folder, with its own settings."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Let a trained model write."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    prompt: str = "The "
    """The beginning of the text."""
    length: int = 500
    """Characters to write."""
    temperature: float = 0.8
    """0 takes the likeliest character, 1 samples from the model itself."""
    top_k: int | None = None
    """Sample among this many of the likeliest characters."""
    top_p: float | None = None
    """Sample among the likeliest characters that together reach this probability."""
    seed: int = 0
    """Of the sampling."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Let a trained model read a file: log-probability, bits per character, perplexity."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    file: tyro.conf.Positional[Path]
    """A UTF-8 text."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status: 0 done, 1 not done with one sentence why, 130 interrupted."""
    try:
        command = _parse(arguments)
        return {Train: train, Sample: sample, Score: score}[type(command)](command)
    except (RunError, ValueError, NotFinite) as error:
        print(f"seqjax: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stdout = None  # whoever read the output has gone, so there is nobody to tell
    except OSError as error:
        print(f"seqjax: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
    except KeyboardInterrupt:
        print("seqjax: interrupted", file=sys.stderr)
        return 130
    return 1


def train(command: Train) -> int:
    """Trains until the last step, the last minute or an interruption, and says what came of it."""
    corpus = _read(command.settings.text)
    job = _resume(command, corpus) if command.resume else _begin(command, corpus)
    console = Console(highlight=False)
    console.print(f"{job.run.path}: {_describe(job)}", soft_wrap=True)
    try:
        interrupted = not job.finished and _train(job, console)
    except NotFinite as error:
        job.run.save(job.state)
        raise RunError(
            f"training stopped, {error}; step {int(job.state.step)}, the last good one, is kept in {job.run.path}: go on "
            f"with seqjax train --resume {job.run.path} --learning-rate {job.run.settings.learning_rate / 4:g}"
        ) from None
    if interrupted:
        console.print(
            f"interrupted at step {int(job.state.step)}, kept: seqjax train --resume {job.run.path}", soft_wrap=True
        )
        return 130
    _conclude(job, console)
    return 0


def sample(command: Sample) -> int:
    """Prints the prompt and what the model writes after it, as it writes it."""
    if command.length < 1:
        raise ValueError(f"expected --length of at least 1, got {command.length}")
    if not command.prompt:
        raise ValueError('expected a --prompt of at least one character, got none: --prompt "The "')
    run = Run.open(command.run)
    prompt = encode(command.prompt, run.corpus.vocabulary, "--prompt")
    model, state = _restore(run)
    print(command.prompt, end="", flush=True)
    options = {"temperature": command.temperature, "top_k": command.top_k, "top_p": command.top_p}
    for token in character_model.speak(model, state.params, prompt, command.length, command.seed, **options):
        print(run.corpus.vocabulary[token], end="", flush=True)
    print()
    return 0


def score(command: Score) -> int:
    """Prints how well the model predicts each character of a file from those before it."""
    run = Run.open(command.run)
    tokens = encode(read_text(command.file).text, run.corpus.vocabulary, str(command.file))
    if len(tokens) < 2:
        raise ValueError(
            f"expected at least 2 characters in {command.file}, got {len(tokens)}: the first is not predicted"
        )
    model, state = _restore(run)
    nats = character_model.log_probability(model, state.params, tokens)
    predicted = len(tokens) - 1
    print(f"characters predicted   {predicted}")
    print(f"log-probability        {nats:.4f} nats")
    print(f"bits per character     {-nats / predicted / math.log(2):.4f}")
    print(f"perplexity             {math.exp(-nats / predicted):.4f}")
    print(f"unigram entropy        {unigram_entropy(tokens):.4f} bits per character, of this file")
    return 0


@dataclasses.dataclass
class _Job:
    """A run in memory: what is trained, on what, and how far it is."""

    run: Run
    model: Model
    parts: tuple[np.ndarray, np.ndarray, np.ndarray]
    state: TrainState
    table: MetricsTable
    validation_bits: float = math.nan

    @property
    def finished(self) -> bool:
        """Whether the last step or the last minute of the settings has passed."""
        settings, step = self.run.settings, int(self.state.step)
        out_of_time = settings.minutes is not None and self.table.seconds >= 60 * settings.minutes
        return out_of_time or (settings.last_step is not None and step >= settings.last_step)

    def validate(self) -> float:
        """Bits per character on the validation text."""
        self.validation_bits = character_model.bits(self.run.settings, self.model, self.state.params, self.parts[1])
        return self.validation_bits


def _begin(command: Train, corpus: Corpus) -> _Job:
    settings = command.settings
    model, parts = character_model.build(settings, corpus.vocabulary), _parts(settings, corpus)
    path = command.out or Path("runs") / f"{settings.cell}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    run = Run.create(path, settings, corpus)
    return _Job(run, model, parts, character_model.first_state(settings, model), MetricsTable(run, 0))


def _resume(command: Train, corpus: Corpus) -> _Job:
    stored = Run.open(command.resume or Path())
    encode(corpus.text, stored.corpus.vocabulary, corpus.name)
    if corpus.sha256 != stored.corpus.sha256:
        raise RunError(
            f"expected the text that {stored.path} was trained on, {stored.corpus.name} ({stored.corpus.length} characters, "
            f"sha256 {stored.corpus.sha256[:12]}), got {corpus.name} ({len(corpus.text)} characters, "
            f"sha256 {corpus.sha256[:12]}): restore that text, or train anew"
        )
    for name in (field.name for field in dataclasses.fields(Settings)):
        given, before = getattr(command.settings, name), getattr(stored.settings, name)
        if name != "text" and given != before and name not in MAY_CHANGE:
            raise RunError(
                f"expected {name} {before}, with which {stored.path} began, got {given}: "
                f"leave it out, or train anew; a resumed run may change {', '.join(MAY_CHANGE)}"
            )
    run = dataclasses.replace(stored, settings=dataclasses.replace(command.settings, text=stored.settings.text))
    model, parts = character_model.build(run.settings, run.corpus.vocabulary), _parts(run.settings, corpus)
    state = run.restore(character_model.first_state(run.settings, model))
    if run.settings != stored.settings:
        run.write_settings()
    return _Job(run, model, parts, state, MetricsTable(run, int(state.step)))


def _restore(run: Run) -> tuple[Model, TrainState]:
    model = character_model.build(run.settings, run.corpus.vocabulary)
    return model, run.restore(character_model.first_state(run.settings, model))


def _read(text: Path | None) -> Corpus:
    return manual_topics() if text is None else read_text(text)


def _parts(settings: Settings, corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test text, all long enough to be of use."""
    parts = split(corpus.tokens)
    need = settings.batch * settings.window + 1
    if len(parts[0]) < need or min(map(len, parts)) < 2:
        raise ValueError(
            f"expected a text of at least {max(math.ceil(need / 0.9), 40)} characters, one window of {settings.window} in "
            f"{settings.batch} rows within its first 90 %, got {len(corpus.text)} in {corpus.name}: use a longer text, or a "
            f"smaller --batch or --window"
        )
    return parts


def _train(job: _Job, console: Console) -> bool:
    """Runs the updates until the job is finished; returns whether it was interrupted before.

    What is kept of an update is kept before the next one is looked at.
    """
    settings, earlier, began = job.run.settings, job.table.seconds, time.monotonic()
    with _interruptible() as interrupted, _Display(console, settings) as display:
        for job.state, metrics in character_model.train(settings, job.model, job.parts[0], job.state):
            step = int(job.state.step)
            job.table.seconds = earlier + time.monotonic() - began
            validation = job.validate() if job.finished or step % settings.validate_every == 0 else None
            job.table.add(step, metrics, validation, step * settings.batch * settings.window)
            display.show(job, metrics, validation is not None)
            if job.finished or interrupted or step % settings.checkpoint_every == 0:
                job.run.save(job.state)
            if job.finished or interrupted:
                break
    return bool(interrupted) and not job.finished


class _Display:
    """A live line on a terminal; elsewhere one plain line at each validation."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console, self.settings = console, settings
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("compiling", total=settings.last_step)
        self.shown: tuple[float, int] | None = None

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, job: _Job, metrics: Any, validated: bool) -> None:
        """Shows an update. The speed is that since the last validation, without the compilation before the first step."""
        step, now = int(job.state.step), time.monotonic()
        since, at = self.shown or (now, step)
        characters = (step - at) * self.settings.batch * self.settings.window
        speed = characters / (now - since) if now > since else math.nan
        if self.shown is None or validated:
            self.shown = (now, step)
        line = (
            f"step {step}  bits/char train {metrics.loss / math.log(2):.3f} validation {job.validation_bits:.3f}  "
            f"grad norm {metrics.grad_norm:.2f}  clipped {job.table.clipped / step:.0%}  {speed:,.0f} char/s"
        ).replace("nan", "-")
        self.progress.update(self.task, completed=step, description=line)
        if validated and not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Notes Ctrl-C and termination, so that the step at hand is finished and kept; a second one acts at once."""
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


def _describe(job: _Job) -> str:
    settings, corpus = job.run.settings, job.run.corpus
    shape = f"{settings.cell}, {settings.layers} x {settings.hidden} hidden units, embedding {settings.embedding}"
    where = f", going on after step {int(job.state.step)}" if int(job.state.step) else ""
    return f"{shape}, on {corpus.name} ({corpus.length:,} characters, {len(corpus.vocabulary)} different){where}"


def _conclude(job: _Job, console: Console) -> None:
    """What shows that it worked: the score on text that it has not seen beside that of no memory, and a sample."""
    test, vocabulary = job.parts[2], job.run.corpus.vocabulary
    bits = character_model.bits(job.run.settings, job.model, job.state.params, test)
    whole = np.concatenate(job.parts)
    if math.isnan(job.validation_bits):
        job.validate()
    console.print(f"after {int(job.state.step)} steps, {job.table.seconds:.0f} s of training", soft_wrap=True)
    console.print(f"bits per character, validation text    {job.validation_bits:.3f}")
    console.print(f"bits per character, test text          {bits:.3f}")
    console.print(f"unigram entropy of the corpus          {unigram_entropy(whole):.3f}  (a model without memory)")
    prompt = job.parts[1][:20]
    said = character_model.speak(job.model, job.state.params, prompt, 200, seed=0, temperature=0.8)
    text = decode(prompt, vocabulary) + "|" + decode(np.array(list(said)), vocabulary)
    console.print("a sample, after the bar:\n", markup=False)
    console.print("    " + text.replace("\n", "\n    "), markup=False)
    console.print(f"\nmore: seqjax sample {job.run.path}", soft_wrap=True, markup=False)


def _parse(arguments: Sequence[str]) -> Train | Sample | Score:
    command = _parse_with(arguments, Train())
    if isinstance(command, Train) and command.resume is not None:
        # Read again, so that what is not said is as the run began.
        command = _parse_with(arguments, Train(settings=Run.open(command.resume).settings))
    return command


def _parse_with(arguments: Sequence[str], defaults: Train) -> Any:
    kinds: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Score, tyro.conf.subcommand("score")]
    )
    return tyro.cli(
        kinds, args=list(arguments), prog="seqjax", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )
