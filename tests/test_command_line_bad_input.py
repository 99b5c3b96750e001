"""Bad input: one sentence that says what was expected, what came and what to do; no traceback, and nothing lost."""

from __future__ import annotations

import json
import shutil

import jaxtyping
import numpy as np
import pytest
from small_runs import TEXT, assert_same_run, checkpoints, metrics, small, state, write
from small_runs import finished as finished
from small_runs import seqjax_run as run


def refused(capsys, arguments, *parts, form=("expected", ", got ")):
    """The command, run as a user has it, ends with 1 and one sentence of this form that holds every one of `parts`."""
    capsys.readouterr()
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert run(*arguments) == 1
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


@pytest.fixture
def text(tmp_path):
    """A text to train on."""
    return write(tmp_path / "text.txt")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["text in", "got none"]),
        ("naïve".encode("latin-1") * 999, ["UTF-8", "0xef at position 2", "iconv"]),
        (TEXT[:72].encode(), ["at least 73 characters", "got 72", "smaller --batch or --window"]),
    ],
    ids=["empty", "latin-1", "short"],
)
def test_a_file_that_cannot_be_learnt_is_refused_before_a_folder_is_made(content, parts, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(content)
    refused(capsys, ["train", "--text", tmp_path / "bad.txt", "--out", tmp_path / "run", *small()], "bad.txt", *parts)
    assert not (tmp_path / "run").exists()


def test_the_shortest_text_that_is_asked_for_is_enough(tmp_path):
    text = write(tmp_path / "text.txt", TEXT[:73])
    assert run("train", "--text", text, "--out", tmp_path / "run", *small(steps=1, cell="vanilla")) == 0


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_text_that_is_no_file_is_refused(name, tmp_path, capsys):
    refused(capsys, ["train", "--text", tmp_path / name, "--out", tmp_path / "run"], tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_left_as_it_is(finished, text, capsys):
    before = files(finished)
    refused(capsys, ["train", "--text", text, "--out", finished, *small()], "a new folder", finished, "--resume")
    assert files(finished) == before


def test_a_place_that_cannot_be_written_to_is_named(text, capsys):
    refused(capsys, ["train", "--text", text, "--out", text / "run", *small()], "a place to write to", text / "run")
    refused(capsys, ["train", "--text", text, "--out", text, *small()], "a new folder", "--out")


@pytest.mark.parametrize("command", ["resume", "sample", "score"])
@pytest.mark.parametrize("what", ["missing", "empty", "no checkpoints"])
def test_what_is_no_run_is_refused_by_every_command(command, what, copy, text, tmp_path, capsys):
    if what == "no checkpoints":
        shutil.rmtree(copy / "checkpoints")
    path = {"missing": tmp_path / "nowhere", "empty": tmp_path / "empty", "no checkpoints": copy}[what]
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    arguments = {"resume": ["train", "--resume", path], "sample": ["sample", path], "score": ["score", path, text]}
    prompt = ["--prompt", "the"] if command == "sample" else []
    parts = {"missing": "not there", "empty": "run.json", "no checkpoints": "a finished checkpoint"}
    refused(capsys, [*arguments[command], *prompt], path, parts[what])
    assert files(tmp_path) == before


def changed(old, new):
    """A change of the bytes of run.json."""
    return lambda content: content.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda content: content[: len(content) // 2], ["unreadable"]),
        (lambda content: b"", ["unreadable"]),
        (lambda content: b"\xff\x00" * 99, ["unreadable"]),
        (lambda content: b"[1, 2]", ["unreadable"]),
        (lambda content: b'{"format": 1}', ["unreadable"]),
        (changed(b'"hidden": 16', b'"hidden": -16'), ["unreadable", "hidden"]),
        (changed(b'"cell": "lstm"', b'"cell": "lstn"'), ["lstn"]),
        (changed(b'"format": 1', b'"format": 2'), ["format 1", "format 2", "use that version"]),
    ],
    ids=["half", "empty", "bytes", "list", "bare", "size", "cell", "version"],
)
def test_a_damaged_run_json_is_refused(damage, parts, copy, capsys):
    content = (copy / "run.json").read_bytes()
    (copy / "run.json").write_bytes(damage(content))
    assert (copy / "run.json").read_bytes() != content
    refused(capsys, ["sample", copy, "--prompt", "the"], copy / "run.json", *parts)


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


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (TEXT + "Ω", ["got 1 other", "'Ω'", f"position {len(TEXT)}"]),
        (TEXT.replace("cat", "act"), ["sha256", "restore that text"]),
    ],
    ids=["characters", "hash"],
)
def test_a_run_does_not_go_on_with_another_text(other, parts, finished, tmp_path, capsys):
    before = files(finished)
    text = write(tmp_path / "other.txt", other)
    refused(capsys, ["train", "--resume", finished, "--text", text, "--steps", 20], "other.txt", *parts)
    assert files(finished) == before


@pytest.mark.parametrize(("name", "value"), [("hidden", 32), ("cell", "gru"), ("window", 8), ("seed", 1)])
def test_a_run_does_not_go_on_with_other_settings(name, value, finished, capsys):
    before = files(finished)
    refused(capsys, ["train", "--resume", finished, f"--{name}", value], f"expected {name}", f"got {value}", "leave it")
    assert files(finished) == before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--prompt", "the Ω"], ["'Ω'", "position 4", "--prompt"]),
        (["--prompt", "the \udcff"], ["position 4", "--prompt"]),
        (["--prompt", ""], ["at least one character", "got none"]),
        (["--prompt", "the", "--temperature", "-1"], ["temperature of at least 0", "got -1"]),
        (["--prompt", "the", "--top-p", "0"], ["top_p", "got 0"]),
        (["--prompt", "the", "--top-p", "1.5"], ["top_p", "got 1.5"]),
        (["--prompt", "the", "--top-k", "0"], ["top_k of at least 1", "got 0"]),
        (["--prompt", "the", "--length", "0"], ["--length of at least 1", "got 0"]),
    ],
    ids=["unknown", "bytes", "empty", "temperature", "top-p 0", "top-p above 1", "top-k", "length"],
)
def test_a_sample_that_cannot_be_drawn_is_refused_before_a_word_is_written(options, parts, finished, capsys):
    refused(capsys, ["sample", finished, *options], *parts)
    assert run("sample", finished, *options) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "parts"),
    [("t", ["at least 2 characters", "got 1"]), ("the Ω", ["'Ω'", "position 4"]), ("", ["text in", "got none"])],
    ids=["one", "unknown", "empty"],
)
def test_a_file_that_cannot_be_scored_is_refused(content, parts, finished, tmp_path, capsys):
    refused(capsys, ["score", finished, write(tmp_path / "read.txt", content)], "read.txt", *parts)


def test_a_missing_file_to_score_is_refused(finished, tmp_path, capsys):
    refused(capsys, ["score", finished, tmp_path / "missing.txt"], "missing.txt")


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("hidden", 0), ("layers", -1), ("learning-rate", 0), ("learning-rate", "nan"), ("minutes", "inf")],
)
def test_settings_that_make_no_sense_are_refused(name, value, text, tmp_path, capsys):
    arguments = ["train", "--text", text, "--out", tmp_path / "run", f"--{name}", value]
    refused(capsys, arguments, name.replace("-", "_"), f"got {value}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["fly"], ["train", "--hiden", "3"], ["train", "--hidden", "many"], ["sample"]])
def test_what_the_parser_does_not_know_ends_with_two(arguments, capsys):
    assert run(*arguments) == 2
    complaint = capsys.readouterr().err
    assert "Traceback" not in complaint
    assert complaint


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
