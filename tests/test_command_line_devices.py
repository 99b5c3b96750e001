"""The command line on several devices, with less memory, and what it says of options that do not fit."""

from __future__ import annotations

import jax
import jaxtyping
import numpy as np
import pytest
from small_runs import assert_same_run, metrics, small, state, train
from small_runs import finished as finished
from small_runs import seqjax_run as run
from small_runs import text as text


def test_two_devices_train_what_one_trains_and_a_run_goes_on_with_another_number(finished, tmp_path):
    path = train(tmp_path, devices=2, steps=8)
    assert run("train", "--resume", path, "--steps", 12) == 0
    for name in ("step", "loss", "validation", "grad_norm", "param_norm"):
        np.testing.assert_allclose(metrics(path)[name], metrics(finished)[name], rtol=1e-4, err_msg=name)
    (_, found), (_, expected) = state(path), state(finished)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    again = train(tmp_path, "again", devices=2, steps=8)
    assert run("train", "--resume", again, "--steps", 12) == 0
    assert_same_run(again, path)


def test_parts_of_a_batch_train_what_a_whole_batch_trains(finished, tmp_path):
    path = train(tmp_path, accumulate=2, rematerialize_every=4)
    np.testing.assert_allclose(metrics(path).loss, metrics(finished).loss, rtol=1e-4)


def test_bfloat16_trains_in_short_numbers_and_keeps_long_ones(finished, tmp_path):
    path = train(tmp_path, compute_dtype="bfloat16", steps=4)
    short, full = metrics(path).loss, metrics(finished).loss[:4]
    np.testing.assert_allclose(short, full, rtol=2e-2)
    assert (short != full).all()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state(path)[1].params)} == {"float32"}


def test_more_memory_than_there_is_is_said(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("seqjax.training._memory.device_memory", lambda device: 1000)
    assert run("train", "--text", text, "--out", tmp_path / "run", *small(steps=1)) == 0
    assert "warning: an update needs " in capsys.readouterr().out


TOGETHER = ["--coordinator", "localhost:7000", "--processes", 2]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--devices", 0], ["--devices of at least 1", "got 0"]),
        (["--devices", 4], ["--devices of at most 2", "cpu", "got 4"]),
        (["--devices", 2, "--batch", 5], ["2 devices divide evenly", "got 5 rows", "--batch 4"]),
        (["--devices", 2, "--accumulate", 4], ["2 devices and --accumulate 4", "got 4 rows", "--batch 8"]),
        ([*TOGETHER, "--process", 2], ["--process from 0 to 1", "got 2"]),
        ([*TOGETHER, "--process", -1], ["--process from 0 to 1", "got -1"]),
        (["--process", 1], ["--process from 0 to 0", "got 1", "--processes"]),
        (["--processes", 2], ["--coordinator with --processes", "got none"]),
        (["--coordinator", "localhost:7000"], ["--processes with --coordinator", "got none"]),
        (["--coordinator", "localhost", "--processes", 2], ["HOST:PORT", "got localhost"]),
        ([*TOGETHER, "--batch", 5], ["2 devices divide evenly", "got 5 rows"]),
        ([*TOGETHER, "--wait", 0], ["--wait of at least 1", "got 0"]),
    ],
)
def test_options_that_do_not_fit_end_with_two_and_one_sentence(options, parts, text, tmp_path, capsys):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        arguments = ["train", "--text", text, "--out", tmp_path / "run", *small(), *options]
        assert run(*arguments) == 2
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1, complaint
    for part in ("seqjax: expected ", ", got ", *parts):
        assert part in complaint
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_folder_that_all_of_them_know(text, capsys):
    assert run("train", "--text", text, *small(), *TOGETHER) == 2
    assert "expected --out or --resume with --processes, got neither" in capsys.readouterr().err
