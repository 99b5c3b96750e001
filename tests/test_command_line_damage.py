"""Damage to a run: what can be saved goes on bit for bit, and what cannot is refused with one sentence."""

from __future__ import annotations

import json

import numpy as np
from small_runs import assert_same_run, checkpoints, metrics, refused, small, state
from small_runs import copy as copy
from small_runs import finished as finished
from small_runs import seqjax_run as run
from small_runs import text as text


def damage(folder):
    """Cuts every file of a checkpoint in half."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_passed_over_in_silence_for_the_one_before(copy, caplog):
    damage(copy / "checkpoints" / "12")
    assert int(state(copy)[1].step) == 8
    assert run("sample", copy, "--prompt", "the", "--length", 3) == 0
    assert not caplog.records


def test_a_run_resumed_from_behind_a_damaged_checkpoint_ends_where_it_did(copy, finished):
    damage(copy / "checkpoints" / "12")
    assert run("train", "--resume", copy) == 0
    assert_same_run(copy, finished)


def test_a_run_without_a_readable_checkpoint_is_refused(copy, capsys):
    for step in checkpoints(copy):
        damage(copy / "checkpoints" / str(step))
    refused(capsys, ["train", "--resume", copy], "a finished checkpoint", "unreadable", "step 8", "step 12")


def test_a_rate_that_explodes_stops_at_the_last_good_step_and_nothing_is_lost(text, tmp_path, finished, capsys):
    path = tmp_path / "run"
    assert run("train", "--text", text, "--out", path, *small(steps=4)) == 0
    explosion = ["train", "--resume", path, "--steps", 12, "--learning-rate", "1e38"]
    refused(capsys, explosion, "not finite at step 5", "step 4, the last good one", f"--resume {path}", form=())
    assert (checkpoints(path)[-1], metrics(path).step.max()) == (4, 4)
    assert all(np.isfinite(leaf).all() for leaf in state(path)[1].params.head)
    assert run("train", "--resume", path, "--learning-rate", "2e-3") == 0
    assert_same_run(path, finished)


def test_a_rate_that_explodes_at_once_leaves_the_first_parameters(text, tmp_path, capsys):
    arguments = ["train", "--text", text, "--out", tmp_path / "run", *small(steps=9, learning_rate="1e38")]
    refused(capsys, arguments, "not finite at step 1", "step 0, the last good one", form=())
    assert int(state(tmp_path / "run")[1].step) == 0


def test_a_table_that_cannot_be_read_stops_the_run_and_keeps_its_checkpoints(copy, capsys):
    (copy / "metrics.csv").write_text("step,seconds\nx,y\n")
    before = json.loads((copy / "run.json").read_text())
    refused(capsys, ["train", "--resume", copy, "--steps", 20], "a table of metrics", "metrics.csv")
    assert (json.loads((copy / "run.json").read_text()), checkpoints(copy)) == (before, [8, 12])


def test_a_name_with_brackets_is_refused_or_kept_and_printed_as_it_is(text, tmp_path, capsys):
    path = tmp_path / "run [bold]"
    arguments = ["train", "--text", text, "--out", path, *small(steps=2)]
    if run(*arguments) == 0:
        assert f"{path}: lstm" in capsys.readouterr().out
        assert int(state(path)[1].step) == 2
    else:
        assert not path.exists()
        refused(capsys, arguments, path)
