"""Several processes train one run: what one process trains, and nothing is lost when one of them is killed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time

import numpy as np
import pytest
from small_runs import SEQJAX, checkpoints, metrics, small, state, write

import seqjax as sj

VANILLA = {"cell": "vanilla", "steps": 12}
ENDLESS = {"cell": "vanilla", "steps": 99999, "validate_every": 99999}


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def started(count, *arguments, port=None, devices=1, own=lambda i: (), which=None):
    """The processes of one training; `own` gives the arguments of each."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_PLATFORMS="cpu")
    port = port or free_port()
    together = ("--coordinator", f"127.0.0.1:{port}", "--processes", count) if count > 1 else ()
    commands = [
        [
            *SEQJAX,
            "train",
            *arguments,
            "--devices",
            devices,
            *together,
            *(("--process", i) if together else ()),
            *own(i),
        ]
        for i in range(count)
    ]
    return [
        subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in (commands if which is None else [commands[which]])
    ]


def ended(processes, timeout=120):
    """The exit status, the output and the complaint of each process."""
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *result) for process, result in zip(processes, results, strict=True)]


def complaints(processes, status=1):
    """The sentence with which each process ends."""
    found = ended(processes)
    assert [code for code, _, _ in found] == [status] * len(found), found
    for _, _, complaint in found:
        assert complaint.count("\n") == 1, complaint
        assert complaint.startswith("seqjax: "), complaint
        assert "expected " in complaint
        assert ", got " in complaint
    return [complaint for _, _, complaint in found]


def wait_for_rows(path, count, processes):
    """Waits until metrics.csv has so many rows."""
    deadline = time.monotonic() + 120
    while not ((path / "metrics.csv").exists() and (path / "metrics.csv").read_text().count("\n") > count):
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def text(tmp_path):
    return write(tmp_path / "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_several_processes_train_what_one_trains(count, devices, text, tmp_path):
    options = ("--text", text, "--no-report", *small(**VANILLA))
    alone = ended(started(1, *options, "--out", tmp_path / "one"))
    found = ended(started(count, *options, "--out", tmp_path / "run", devices=devices))
    assert [status for status, _, _ in [*alone, *found]] == [0] * (count + 1), found
    assert "bits per character, test text" in found[0][1]
    assert all("bits per character" not in printed for _, printed, _ in found[1:])
    tables = [metrics(tmp_path / name) for name in ("one", "run")]
    for name in ("step", "loss", "validation", "grad_norm", "param_norm", "characters"):
        np.testing.assert_allclose(tables[1][name], tables[0][name], rtol=1e-4, err_msg=name)
    (_, expected), (_, trained) = (state(tmp_path / name) for name in ("one", "run"))
    np.testing.assert_allclose(trained.params.cell[1].W_hh, expected.params.cell[1].W_hh, atol=1e-5)
    assert sj.load_run(tmp_path / "run").history["step"].tolist() == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim", "rest"), [(2, 0, 1), (2, 1, 2), (4, 2, 2)])
def test_when_a_process_is_killed_the_others_say_so_and_the_run_goes_on_with_any_number(
    count, victim, rest, text, tmp_path
):
    path = tmp_path / "run"
    processes = started(count, "--text", text, "--out", path, *small(**ENDLESS))
    wait_for_rows(path, 6, processes)
    killed = processes.pop(victim)
    killed.kill()
    killed.communicate()
    at = time.monotonic()
    for complaint in complaints(processes):
        assert re.search(rf"process ({victim}|0), which has ended: seqjax train --resume {path}", complaint)
    assert time.monotonic() - at < 20
    names = [folder.name for folder in (path / "checkpoints").iterdir()]
    kept = max(int(name) for name in names if name.isdigit())  # one that was being written has a longer name
    assert kept >= 4
    found = ended(started(rest, "--resume", path, "--steps", kept + 3, "--no-report"))
    assert [status for status, _, _ in found] == [0] * rest, found
    assert f"going on after step {kept}" in found[0][1]
    assert metrics(path).step.tolist() == list(range(1, kept + 4))


@pytest.mark.slow
def test_an_interrupted_process_stops_all_of_them_after_the_same_step(text, tmp_path):
    path = tmp_path / "run"
    processes = started(2, "--text", text, "--out", path, *small(**ENDLESS | {"checkpoint_every": 99999}))
    wait_for_rows(path, 3, processes)
    processes[1].terminate()
    found = ended(processes)
    assert [status for status, _, _ in found] == [130, 130], found
    (kept,) = checkpoints(path)
    assert f"interrupted at step {kept}" in found[0][1]
    assert metrics(path).step.tolist() == list(range(1, kept + 1))


@pytest.mark.slow
def test_processes_with_other_settings_or_another_text_are_refused_by_each_of_them(text, tmp_path):
    other = write(tmp_path / "other.txt", text.read_text().replace("cat", "act"))
    common = ("--out", tmp_path / "run", *small(**VANILLA))
    found = complaints(started(2, *common, "--text", text, own=lambda i: ("--hidden", 16 + i)))
    assert len({*found}) == 1
    assert "the same --hidden in all processes, got 16 in process 0 and 17 in process 1" in found[0]
    for complaint in complaints(started(2, *common, own=lambda i: ("--text", (text, other)[i]))):
        assert "the same text (sha256) in all processes" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_process_cannot_do_all_of_them_say(text, tmp_path):
    missing = tmp_path / "missing.txt"
    found = complaints(
        started(2, "--out", tmp_path / "run", *small(**VANILLA), own=lambda i: ("--text", (text, missing)[i]))
    )
    assert all("missing.txt" in complaint for complaint in found)
    write(text.parent / "file")
    found = complaints(started(2, "--out", text.parent / "file", "--text", text, *small(**VANILLA)))
    assert all("a new folder" in complaint for complaint in found)


@pytest.mark.slow
def test_a_process_that_does_not_come_or_comes_twice_is_said(text, tmp_path):
    common = ("--text", text, "--out", tmp_path / "run", "--wait", 3, *small(**VANILLA))
    port = free_port()
    (alone,) = complaints(started(2, *common, port=port, which=1))
    assert f"process 0 at 127.0.0.1:{port} within 3 s" in alone
    (first,) = complaints(started(2, *common, which=0))
    assert "2 processes within 3 s, got no process 1" in first
    found = complaints(started(3, *common, "--batch", 6, own=lambda i: ("--process", min(i, 1))))
    assert all("each --process from 0 to 2 once, got 1 twice" in complaint for complaint in found)
