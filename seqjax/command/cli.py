"""The command line: parse, call, print.

seqjax train    trains a character model and keeps it in a folder
seqjax sample   lets it write
seqjax score    lets it read
seqjax report   writes a page on how information and gradients move through it
seqjax compare  writes a page that lays runs side by side
seqjax info     says what is installed, and which loops run
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seqjax.command import character_model
from seqjax.command.character_model import Settings
from seqjax.command.job import Job, begin, resume, work
from seqjax.command.processes import OptionError, Places, end_worker, is_first, is_worker, start_worker, watch
from seqjax.command.run_folder import Run, RunError, restore, versions_of_packages
from seqjax.data.text import Corpus, decode, encode, manual_topics, unigram_entropy
from seqjax.data.text_files import read_text
from seqjax.kernels import installation
from seqjax.training._devices import on_one_device
from seqjax.training._memory import MemoryWarning
from seqjax.training.loop import Metrics, NotFinite


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a character model on the Python manual, or on any text, and keep it in a folder."""

    settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)
    out: Path | None = None
    """The folder to make; by default a new one in runs/."""
    resume: Path | None = None
    """Go on with the run in this folder, with its own settings."""
    report: bool = True
    """Write RUN/report.html at the end."""
    places: Annotated[Places, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Places)


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


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a page on how information and gradients move through a trained model."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    out: Path | None = None
    """The file to write; by default report.html in that folder."""
    full: bool = False
    """Run the costly analyses too: Jacobians, singular values, fixed points."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Write a page that lays runs side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of two runs or more."""
    out: Path = Path("comparison.html")
    """The file to write."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Say what is installed: versions, devices, and whether the compiled kernel runs."""


Command = Train | Sample | Score | Report | Compare | Info


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 done; 1 not done, with one sentence on stderr that says why; 2 for options that are wrong;
        130 interrupted.
    """
    try:
        command = _parse(arguments)
        if isinstance(command, Train) and command.places.processes > 1 and not is_worker():
            return _watch(command, arguments)
        return FUNCTIONS[type(command)](command)
    except OptionError as error:
        print(f"seqjax: {error}", file=sys.stderr)
        return 2
    except (RunError, ValueError, ModuleNotFoundError) as error:
        print(f"seqjax: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stdout = None  # the reader of the output is gone, and flushing at exit would raise again
    except OSError as error:
        print(f"seqjax: {_unreadable(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("seqjax: interrupted", file=sys.stderr)
        return 130
    return 1


def _unreadable(error: OSError) -> str:
    where = f"got {error.filename}" if error.filename else "got none"
    return f"expected a file to read, {where}: {error.strerror or error}; check the path"


def _watch(command: Train, arguments: Sequence[str]) -> int:
    """`train` as one of several processes."""
    path = command.resume or command.out
    if path is None:
        raise OptionError("expected --out or --resume with --processes, got neither: give all the same shared folder")
    command.places.check_batch(command.settings.batch, command.settings.accumulate)
    return watch(command.places, arguments, lambda: _told(command), f"seqjax train --resume {path}")


def _told(command: Train) -> dict[str, Any]:
    """What must be equal in all processes that train together."""
    values = dataclasses.asdict(command.settings) | {"devices": command.places.devices}
    values |= {"out": str(command.out), "resume": str(command.resume)}
    options = {f"--{name.replace('_', '-')}": value for name, value in values.items() if name != "text"}
    versions = {f"version of {name}": version for name, version in versions_of_packages().items()}
    try:
        text = _corpus(command.settings).sha256[:12]
    except OSError as error:
        raise RunError(_unreadable(error)) from None
    return options | versions | {"text (sha256)": text}


def _corpus(settings: Settings) -> Corpus:
    return manual_topics() if settings.text is None else read_text(settings.text)


def train(command: Train) -> int:
    """Trains until the last step, the last minute or an interruption, and prints the result."""
    settings, places = command.settings, command.places
    places.check_batch(settings.batch, settings.accumulate)
    corpus = _corpus(settings)
    if is_worker():
        start_worker(places)
    devices = places.mesh_devices()
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not is_first())
    if command.resume is not None:
        job = resume(settings, corpus, command.resume, devices)
        if job.other_loops:
            console.print(job.other_loops)
    else:
        new = Path("runs") / f"{settings.cell}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        job = begin(settings, corpus, command.out or new, devices)
    path = job.run.path
    console.print(f"{path}: {_describe(job)}")
    try:
        with _Display(console, settings) as display, warnings.catch_warnings():
            warnings.simplefilter("always", MemoryWarning)
            warnings.showwarning = lambda message, *_: console.print(f"warning: {message}")
            interrupted = work(job, display.show)
    except NotFinite as error:
        job.run.save(job.state)
        raise RunError(
            f"training stopped, {error}: step {job.step}, the last good one, is kept in {path}; go on with "
            f"seqjax train --resume {path} --learning-rate {settings.learning_rate / 4:g}"
        ) from None
    if interrupted:
        end_worker()
        console.print(f"interrupted at step {job.step}, which is kept: seqjax train --resume {path}")
        return 130
    _conclude(job, console)
    end_worker()
    if command.report and places.processes > 1:
        console.print(f"the report: seqjax report {path}")
    elif command.report:
        _add_report(path, console)
    return 0


def sample(command: Sample) -> int:
    """Prints the prompt and the characters that the model adds, each as soon as it is drawn."""
    if command.length < 1:
        raise ValueError(f"expected --length of at least 1, got {command.length}")
    if not command.prompt:
        raise ValueError('expected a --prompt of at least one character, got none: --prompt "The "')
    run = Run.open(command.run)
    prompt = encode(command.prompt, run.corpus.vocabulary, "--prompt")
    model, state = restore(run)
    options = {"temperature": command.temperature, "top_k": command.top_k, "top_p": command.top_p}
    drawn = character_model.sample(model, state.params, prompt, command.length, command.seed, **options)
    first = next(drawn)  # a wrong option raises here, before anything is printed
    print(command.prompt + run.corpus.vocabulary[first], end="", flush=True)
    for token in drawn:
        print(run.corpus.vocabulary[token], end="", flush=True)
    print()
    return 0


def score(command: Score) -> int:
    """Prints how well the model predicts each character of a file from the characters before it."""
    run = Run.open(command.run)
    tokens = encode(read_text(command.file).text, run.corpus.vocabulary, str(command.file))
    if len(tokens) < 2:
        raise ValueError(
            f"expected at least 2 characters in {command.file}, got {len(tokens)}: the first one is not predicted"
        )
    model, state = restore(run)
    nats = character_model.log_probability(model, state.params, tokens)
    predicted = len(tokens) - 1
    print(f"characters predicted   {predicted}")
    print(f"log-probability        {nats:.4f} nats")
    print(f"bits per character     {-nats / predicted / math.log(2):.4f}")
    print(f"perplexity             {math.exp(-nats / predicted):.4f}")
    print(f"unigram entropy        {unigram_entropy(tokens):.4f} bits per character, of this file")
    return 0


def report(command: Report) -> int:
    """Writes the report on a run and prints its path."""
    from seqjax.command.run_report import report_run

    with _Stages(Console(stderr=True, highlight=False), 8 + 4 * command.full) as stages:
        written = report_run(command.run, command.out, full=command.full, tell=stages.tell)
    print(written)
    return 0


def compare(command: Compare) -> int:
    """Writes the page that compares several runs and prints its path."""
    from seqjax.command.run_report import compare_runs

    with _Stages(Console(stderr=True, highlight=False), 3 * len(command.runs) + 1) as stages:
        written = compare_runs(command.runs, command.out, tell=stages.tell)
    print(written)
    return 0


def info(command: Info) -> int:
    """Prints what is installed."""
    print(installation.info())
    return 0


FUNCTIONS: dict[type, Any] = {
    Train: train,
    Sample: sample,
    Score: score,
    Report: report,
    Compare: compare,
    Info: info,
}


class _Display:
    """A live line on a terminal; otherwise one plain line per validation."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console, self.settings = console, settings
        columns = (TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("compiling", total=settings.last_step)
        self.since: tuple[float, int] | None = None

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, job: Job, metrics: Metrics, validated: bool) -> None:
        """Shows an update. The speed is measured since the last validation, without compilation and validation."""
        now = time.monotonic()
        since, at = self.since or (now, job.step)
        speed = (job.step - at) * self.settings.batch * self.settings.window / max(now - since, 1e-9)
        if self.since is None or validated:
            self.since = (now, job.step)
        validation = "-" if math.isnan(job.validation) else f"{job.validation / math.log(2):.2f}"
        line = (
            f"step {job.step}  bits/char {metrics.loss / math.log(2):.2f} valid {validation}  "
            f"grad {metrics.grad_norm:.2f}  clipped {job.table.clipped / job.step:.0%}  {speed:,.0f} char/s"
        )
        self.progress.update(self.task, completed=job.step, description=line)
        if validated and not self.console.is_terminal:
            self.console.print(line)


class _Stages:
    """A bar on a terminal that names what is done; otherwise one plain line per stage."""

    def __init__(self, console: Console, count: int) -> None:
        """Expects `count` stages; the bar becomes longer if there are more."""
        self.console, self.count, self.done = console, count, -1
        columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.progress.add_task("reading the run", total=count)

    def __enter__(self) -> _Stages:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self, stage: str) -> None:
        """Begins a stage."""
        self.done += 1
        total = max(self.count, self.done + 1)
        self.progress.update(self.task, completed=self.done, total=total, description=stage)
        if not self.console.is_terminal:
            self.console.print(stage, markup=False)


def _describe(job: Job) -> str:
    settings, corpus = job.run.settings, job.run.corpus
    shape = f"{settings.cell}, {settings.layers} x {settings.hidden} hidden units, embedding {settings.embedding}"
    where = f", going on after step {job.step}" if job.step else ""
    return f"{shape}, on {corpus.name} ({corpus.length:,} characters, {len(corpus.vocabulary)} different){where}"


def _conclude(job: Job, console: Console) -> None:
    """Prints the score on unseen text beside the score of a model without memory, and a sample."""
    _, validation, test = job.parts
    validation_loss = job.mean_loss(validation) if math.isnan(job.validation) else job.validation
    console.print(f"after {job.step} steps, {job.table.seconds:.0f} s of training")
    test_loss = job.mean_loss(test)
    if not is_first():
        return
    console.print(f"bits per character, validation text    {validation_loss / math.log(2):.3f}")
    console.print(f"bits per character, test text          {test_loss / math.log(2):.3f}")
    entropy = unigram_entropy(np.concatenate(job.parts))
    console.print(f"unigram entropy of the corpus          {entropy:.3f}  (a model without memory)")
    prompt, vocabulary = validation[:20], job.run.corpus.vocabulary
    drawn = character_model.sample(job.model, on_one_device(job.state.params), prompt, 200, seed=0, temperature=0.8)
    text = f"{decode(prompt, vocabulary)}|{decode(np.array(list(drawn)), vocabulary)}"
    console.print("a sample, after the bar:\n")
    console.print("    " + text.replace("\n", "\n    "))
    console.print(f"\nmore: seqjax sample {job.run.path}")


def _add_report(path: Path, console: Console) -> None:
    from seqjax.command.run_report import report_run
    from seqjax.reports.measure import silent

    try:
        with _Stages(console, 8) as stages:
            written = report_run(path, tell=stages.tell if console.is_terminal else silent)
        console.print(f"report: {written}")
    except Exception as error:  # noqa: BLE001 - a report that fails must not hide that the training is saved
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        console.print(f"no report ({reason}); the run is kept: seqjax report {path}")


def _parse(arguments: Sequence[str]) -> Command:
    command = _parse_with(arguments, Train())
    if isinstance(command, Train) and command.resume is not None:
        # Parsed again with the settings of the run as defaults, so that an option that is left out does not change.
        command = _parse_with(arguments, Train(settings=Run.open(command.resume).settings))
    return command


def _parse_with(arguments: Sequence[str], defaults: Train) -> Any:
    kinds: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    options = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kinds, args=list(arguments), prog="seqjax", description=__doc__, config=options)
