"""A training run as a folder, from which the training can continue.

    RUN/run.json       the settings, the versions, and the corpus: its name, length, hash and vocabulary
    RUN/metrics.csv    one row per update; losses in nats, with the names of `sj.fit(...).history` where it has them
    RUN/checkpoints/   the last two training states, written by orbax: parameters, optimizer, carried state, step
    RUN/unreadable/    damaged checkpoints, which resuming has moved aside
    RUN/report.html    the report

Every file is written under another name and then renamed, so a file is complete or absent. If several processes train
together, the first one writes the text files, and each writes its part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from seqjax import kernels
from seqjax.command.character_model import Settings, build, first_state
from seqjax.data.text import Corpus
from seqjax.models.model import Model
from seqjax.sequence.explain import explain
from seqjax.training._devices import Devices, mesh_of, places_of
from seqjax.training.loop import Metrics, TrainState

FORMAT = 2
COLUMNS = ("step", "loss", "validation", "grad_norm", "clipped", "param_norm", "characters", "seconds")


class RunError(Exception):
    """A run folder cannot be used. The message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CorpusRecord:
    """What run.json stores about the text."""

    name: str
    length: int
    sha256: str
    vocabulary: str

    @classmethod
    def of(cls, corpus: Corpus) -> CorpusRecord:
        """The record of a corpus."""
        return cls(corpus.name, len(corpus.text), corpus.sha256, corpus.vocabulary)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder and the content of its run.json."""

    path: Path
    settings: Settings
    corpus: CorpusRecord

    @classmethod
    def create(cls, path: Path, settings: Settings, corpus: Corpus) -> Run:
        """Creates the folder. Of several processes, the first one creates it.

        Raises:
            RunError: the path exists and is not an empty folder, or it cannot be written to.
        """
        run = cls(path, settings, CorpusRecord.of(corpus))
        if not _writes():
            return run
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"expected a new folder, got {path}, which holds something: "
                f"choose another --out, or go on from it with --resume {path}"
            )
        if strange := sorted(set(str(path.resolve())) & set("[]*?{}")):
            raise RunError(
                f"expected a path without any of []*?{{}}, which the checkpoints' store takes for patterns, "
                f"got {path} with {' '.join(strange)}: choose another --out"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.write_settings()
            _write(path / "metrics.csv", ",".join(COLUMNS) + "\n")
        except OSError as error:
            raise RunError(
                f"expected a place to write to, got {path}: {error.strerror}; choose another --out"
            ) from None
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Reads the folder of an earlier run.

        Raises:
            RunError: the folder is missing, incomplete, or written by another version.
        """
        file = path / "run.json"
        if not path.is_dir():
            raise RunError(f"expected the folder of a run, got {path}, which is not there: seqjax train makes one")
        if not file.is_file():
            raise RunError(
                f"expected {file}, got a folder without it: this is not a run, or it stopped while being made"
            )
        try:
            content = json.loads(file.read_text("utf-8"))
            found = content["format"]
            if found == FORMAT:
                settings = dict(content["settings"])
                settings["text"] = None if settings["text"] is None else Path(settings["text"])
                return cls(path, Settings(**settings), CorpusRecord(**content["corpus"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"expected settings in {file}, got something unreadable ({error}): restore it, or train anew"
            ) from None
        raise RunError(
            f"expected a run of format {FORMAT}, got format {found!r} in {file}, written by seqjax "
            f"{content.get('versions', {}).get('seqjax', 'of another version')}: use that version, or train anew"
        )

    def write_settings(self) -> None:
        """Writes run.json."""
        settings = dataclasses.asdict(self.settings)
        settings["text"] = None if self.settings.text is None else str(self.settings.text.resolve())
        content = {
            "format": FORMAT,
            "settings": settings,
            "corpus": dataclasses.asdict(self.corpus),
            "versions": versions_of_packages(),
            "kernels": _kernels(self.settings, self.corpus.vocabulary),
            "variant": kernels.variant(),
        }
        _write(self.path / "run.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def other_loops(self) -> str:
        """A sentence if the loops ran in another way when run.json was written; empty otherwise."""
        content = json.loads((self.path / "run.json").read_text("utf-8"))
        before, now = (_words(v) for v in (content.get("variant", kernels.variant()), kernels.variant()))
        if before == now:
            return ""
        return f"until now {before} ran the loops, from here on {now} runs them: numbers may differ in the last digits"

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint and deletes all but the last two."""
        with _manager(self.path) as manager:
            step = int(state.step)
            if step not in manager.all_steps():
                manager.save(step, args=_orbax().args.StandardSave(state._asdict()))
                manager.wait_until_finished()

    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of metrics.csv by name, with NaN for an empty field.

        Raises:
            RunError: the file is missing or damaged.
        """
        try:
            with (self.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["seconds"]]
            return {name: np.array([float(row[name] or math.nan) for row in rows]) for name in COLUMNS}
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"expected a table of metrics in {self.path / 'metrics.csv'}, got something unreadable: "
                f"restore it, or train anew"
            ) from None

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints of later steps, which could not be read, aside, so that new ones can be written."""
        if not _writes():
            return
        for folder in (self.path / "checkpoints").iterdir():
            if folder.name.isdigit() and int(folder.name) > step:
                aside = self.path / "unreadable"
                aside.mkdir(exist_ok=True)
                os.replace(folder, aside / f"{folder.name}-{time.time_ns()}")

    def restore(self, like: TrainState, devices: Devices = None) -> TrainState:
        """The newest checkpoint that can be read.

        Args:
            like: the shapes and dtypes of a training state of this run, such as those of its first state.
            devices: share the rows of the carried state, which other devices may have written.

        Raises:
            RunError: no checkpoint can be read.
        """
        abstract = jax.tree.map(_abstract, like, places_of(mesh_of(devices), like))._asdict()
        reasons = []
        if (self.path / "checkpoints").is_dir():
            with _manager(self.path) as manager:
                for step in sorted(manager.all_steps(), reverse=True):
                    try:
                        return TrainState(**manager.restore(step, args=_orbax().args.StandardRestore(abstract)))
                    except Exception as error:  # noqa: BLE001 - a damaged file fails in as many ways as it has layers
                        reasons.append(f"step {step}: {type(error).__name__}")
        found = f"only unreadable ones ({', '.join(reasons)})" if reasons else "none"
        raise RunError(
            f"expected a finished checkpoint in {self.path / 'checkpoints'}, got {found}: "
            f"the run stopped before its first one, or files were lost; train anew"
        )


def _abstract(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore(run: Run, devices: Devices = None) -> tuple[Model, TrainState]:
    """The model of a run and its last state.

    Raises:
        RunError: there is no finished checkpoint.
    """
    model = build(run.settings, run.corpus.vocabulary)
    # Only shapes and dtypes are needed, and to draw the first parameters takes seconds, most of them to compile.
    return model, run.restore(jax.eval_shape(lambda: first_state(run.settings, model)), devices)


class MetricsTable:
    """metrics.csv: one row per update, flushed to disk at once."""

    def __init__(self, run: Run, step: int) -> None:
        """Opens the table to continue after `step`. Rows of later steps are dropped, since no checkpoint has them."""
        self.path = run.path / "metrics.csv"
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["seconds"] and int(row["step"]) <= step]
        except (OSError, ValueError, KeyError):
            raise RunError(
                f"expected a table of metrics in {self.path}, got something unreadable: restore it, or train anew"
            ) from None
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.clipped = sum(float(row["clipped"]) for row in rows)
        lines = [",".join(COLUMNS), *(",".join(row[name] for name in COLUMNS) for row in rows)]
        _write(self.path, "\n".join(lines) + "\n")
        place = self.path if _writes() else Path(os.devnull)
        self.file = place.open("a", newline="", encoding="utf-8")

    def add(self, step: int, metrics: Metrics, validation: float | None, characters: int) -> None:
        """Writes the row of one update; `self.seconds` is the training time up to it."""
        score = "" if validation is None else validation
        numbers = (metrics.loss, score, metrics.grad_norm, metrics.clipped, metrics.param_norm)
        self.file.write(",".join(map(str, (step, *numbers, characters, f"{self.seconds:.3f}"))) + "\n")
        self.file.flush()
        self.clipped += metrics.clipped

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _writes() -> bool:
    """Whether this process writes the text files of the folder: the first of all processes that train together."""
    return jax.process_index() == 0


def _write(path: Path, text: str) -> None:
    if not _writes():
        return
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)


def versions_of_packages() -> dict[str, str]:
    """The versions of Python and of the packages that a training depends on."""
    import importlib.metadata
    import platform

    packages = {
        name: importlib.metadata.version(name) for name in ("seqjax", "jax", "jaxlib", "optax", "orbax-checkpoint")
    }
    return {"python": platform.python_version()} | packages


def _kernels(settings: Settings, vocabulary: str) -> list[str | None]:
    """For each loop of the model's cell, the name of the compiled kernel that runs it; None if XLA runs it."""
    cell = build(settings, vocabulary).cell
    params = jax.eval_shape(cell.init, jax.random.key(0))
    loops = explain(cell, params, jax.ShapeDtypeStruct((), "int32")).loops
    return [loop.kernel if kernels.available() else None for loop in loops if loop.carried]


def _words(variant: str | None) -> str:
    return "XLA" if variant is None else f"the compiled kernel ({variant})"


def _orbax() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # orbax warns of its own imports
        import orbax.checkpoint
    return orbax.checkpoint


@contextlib.contextmanager
def _manager(path: Path) -> Iterator[Any]:
    """Orbax's checkpoint manager, with its log switched off while it is open.

    Orbax logs every exception that it raises, and the user gets one sentence made from the exception instead.
    """
    ocp, log = _orbax(), logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager((path / "checkpoints").resolve(), options=options) as manager:
            yield manager
    finally:
        log.setLevel(level)
