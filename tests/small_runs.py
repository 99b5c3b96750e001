"""Small runs of the command line, in this process or in one of their own, and what they leave behind."""

from __future__ import annotations

import functools
import shutil
import signal
import sys
import warnings
from unittest import mock

import jax
import jaxtyping
import numpy as np
import pandas
import pytest

import seqjax.command.cli
from seqjax.command import character_model
from seqjax.command.character_model import Settings
from seqjax.command.run_folder import MetricsTable, Run, restore

TEXT = "the cat sat on the mat; the dog did not.\n" * 10 + "what is it that the dog did? it sat.\n" * 3
WINDOWS = 7  # in one pass over the first 90 % of the text, with these settings
SETTINGS = {"hidden": 16, "embedding": 8, "batch": 4, "window": 16, "validate-every": 4, "checkpoint-every": 4}
SEQJAX = (sys.executable, "-m", "seqjax")


def small(**changes):
    """The settings of a small run as arguments."""
    settings = SETTINGS | {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def write(path, text=TEXT):
    """A text file."""
    path.write_text(text, "utf-8")
    return path


@functools.cache
def _optimizer(rate, clip_norm, make=character_model.optimizer):
    """The library's own, but one for all runs, so that the update is compiled once and not in every test."""
    return make(Settings(learning_rate=rate, clip_norm=clip_norm))


def seqjax_run(*arguments):
    """The exit status of a command; a training writes no report unless it is told to, since that takes its time."""
    if arguments[0] == "train" and "--report" not in arguments:
        arguments += ("--no-report",)
    once = mock.patch.object(character_model, "optimizer", lambda s: _optimizer(s.learning_rate, s.clip_norm))
    with once, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # orbax warns of its own code
        try:
            return seqjax.command.cli.run([str(argument) for argument in arguments])
        except SystemExit as stopped:
            return stopped.code


def train(tmp_path, name="run", **changes):
    """Trains in a new folder, which it returns; the text stays beside it."""
    text = write(tmp_path / "text.txt")
    assert seqjax_run("train", "--text", text, "--out", tmp_path / name, *small(**{"steps": 12} | changes)) == 0
    return tmp_path / name


def stop(monkeypatch, step, times=1):
    """Has SIGINT sent when the row of a step has been written; twice is what ends a process at once."""
    add = MetricsTable.add

    def add_and_stop(table, number, *rest):
        add(table, number, *rest)
        for _ in range(times if number == step else 0):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsTable, "add", add_and_stop)


def state(path):
    """The model of a run and its newest state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return restore(Run.open(path))


def metrics(path):
    """metrics.csv as pandas reads it."""
    return pandas.read_csv(path / "metrics.csv", dtype={"step": int})


def checkpoints(path):
    """The steps that were kept."""
    return sorted(int(folder.name) for folder in (path / "checkpoints").iterdir())


def assert_same_run(path, expected):
    """Every leaf of the last state and every row, all but the seconds, bit for bit."""
    (_, got), (_, wanted) = state(path), state(expected)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (where, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(where))
    rows = [metrics(folder).drop(columns="seconds") for folder in (path, expected)]
    pandas.testing.assert_frame_equal(*rows, check_exact=True)


def refused(capsys, arguments, *parts, form=("expected", ", got ")):
    """The command, run as a user has it, ends with 1 and one sentence of this form that holds every one of `parts`."""
    capsys.readouterr()
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert seqjax_run(*arguments) == 1
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1, complaint
    assert complaint.startswith("seqjax: ")
    for part in (*form, *map(str, parts)):
        assert part in complaint, complaint


def files(folder):
    """Every file with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FINISHED = []  # shared by the files that import the fixture, each of which has a session of it


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of twelve steps, which no test may change."""
    if not FINISHED:
        FINISHED.append(train(tmp_path_factory.mktemp("finished")))
    return FINISHED[0]


@pytest.fixture
def text(tmp_path):
    """A text to train on."""
    return write(tmp_path / "text.txt")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")
