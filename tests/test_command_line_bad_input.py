"""Bad input: one sentence that says what was expected, what came and what to do; no traceback, and nothing lost."""

from __future__ import annotations

import shutil

import pytest
from small_runs import TEXT, files, refused, small, write
from small_runs import copy as copy
from small_runs import finished as finished
from small_runs import seqjax_run as run
from small_runs import text as text

import seqjax as sj
from seqjax.command.character_model import Settings
from seqjax.command.job import begin


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["text in", "got none"]),
        ("naïve".encode("latin-1") * 999, ["utf-8", "xef", "at position 2", "latin-1"]),
        (TEXT[:72].encode(), ["at least 73 characters", "got 72", "smaller --batch or --window"]),
    ],
    ids=["empty", "latin-1", "short"],
)
def test_a_file_that_cannot_be_learnt_is_refused_before_a_folder_is_made(content, parts, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(content)
    refused(capsys, ["train", "--text", tmp_path / "bad.txt", "--out", tmp_path / "run", *small()], "bad.txt", *parts)
    assert not (tmp_path / "run").exists()


def test_the_shortest_text_that_is_asked_for_is_enough(tmp_path):
    settings = Settings(hidden=16, embedding=8, batch=4, window=16)
    job = begin(settings, sj.data.Corpus.of("short", TEXT[:73]), tmp_path / "run")
    job.table.close()
    assert len(list(sj.data.windows(job.parts[0], 4, 16, passes=1))) == 1


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
        (lambda content: b'{"format": 2}', ["unreadable"]),
        (changed(b'"hidden": 16', b'"hidden": -16'), ["unreadable", "hidden"]),
        (changed(b'"cell": "lstm"', b'"cell": "lstn"'), ["lstn"]),
        (changed(b'"format": 2', b'"format": 1'), ["format 2", "format 1", "use that version"]),
    ],
    ids=["half", "empty", "bytes", "list", "bare", "size", "cell", "version"],
)
def test_a_damaged_run_json_is_refused(damage, parts, copy, capsys):
    content = (copy / "run.json").read_bytes()
    (copy / "run.json").write_bytes(damage(content))
    assert (copy / "run.json").read_bytes() != content
    refused(capsys, ["sample", copy, "--prompt", "the"], copy / "run.json", *parts)


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
        (["--prompt", "the", "--top-k", "0"], ["expected top_k", "at least 1", "got 0"]),
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
