"""Pages from the command line: a run's report, runs side by side, and what is said where there can be none."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from report_pages import SECTIONS, Page, assert_accessible, assert_self_contained, made_by_hand, sentences
from small_runs import TEXT, files, metrics, refused, small, state, train, write
from small_runs import copy as copy
from small_runs import finished as finished
from small_runs import seqjax_run as run

import seqjax as sj
import seqjax.command.cli
from seqjax.data.ngram import ngram_bits
from seqjax.reports import measure as measuring
from seqjax.reports.html import text


def page_at(path):
    """The page, which is whole and needs nothing else."""
    page = Page(path.read_text("utf-8"))
    assert_self_contained(page)
    return page


@pytest.fixture
def quick(monkeypatch):
    """The analyses fail, so that a page is written at once."""

    def fail(*_, **__):
        raise RuntimeError("not now")

    for name in ("verdict", "lyapunov_exponents", "gradient_by_lag", "gate_statistics", "cell_path"):
        monkeypatch.setattr(measuring, name, fail)
    for name in ("spectrum", "product_singular_values", "fixed_points"):
        monkeypatch.setattr(measuring, name, fail)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of a GRU on the same text."""
    return train(tmp_path_factory.mktemp("other"), "other", cell="gru", hidden=8, learning_rate=0.01)


@pytest.mark.slow
def test_the_report_of_a_run_tells_its_training_and_its_cell(copy, capsys):
    before = files(copy)
    capsys.readouterr()
    assert run("report", copy) == 0
    path = copy / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert {name: content for name, content in files(copy).items() if name.name != "report.html"} == before
    page, table = page_at(path), metrics(copy)
    assert_accessible(page)
    names = [section["id"] for section in page.all("section")]
    assert names == ["learning", *SECTIONS[:-1], "clipping", "positions", "settings"]
    bits = table.validation / np.log(2)
    numbers = [table.loss.iloc[-1] / np.log(2), bits.iloc[-1], table.clipped.mean(), table.grad_norm.max()]
    for number in map(text, map(float, [*numbers, *bits.dropna()])):
        assert number in page.words
    parts = sj.data.split(sj.data.Corpus.of("text", TEXT).tokens)
    for order, name in ((5, "5-gram model"), (1, "unigram model")):
        assert f"{name} {ngram_bits(*parts[:2], order):.3f}" in page.text
    assert f"this model {bits.iloc[-1]:.3f}" in page.text
    assert "characters of the validation text were read" in page.text
    found = sentences(page)
    assert sorted(found) == sorted(set(found))
    for name, value in json.loads((copy / "run.json").read_text("utf-8"))["settings"].items():
        assert name in page.words
        assert name == "text" or text(value) in page.words
    for failure in ("could not be drawn", "could not be written", "it failed with", "There is no verdict"):
        assert failure not in page.text


def test_the_state_of_a_report_is_that_after_the_text_before(quick, copy, monkeypatch):
    seen = []
    monkeypatch.setattr(measuring, "verdict", lambda *given, **options: seen.append((given, options)))
    long = (TEXT * 140)[:70_000]
    (copy / "text.txt").write_text(long, "utf-8")
    content = json.loads((copy / "run.json").read_text("utf-8"))
    content["settings"]["text"] = str(copy / "text.txt")
    (copy / "run.json").write_text(json.dumps(content), "utf-8")
    assert run("report", copy) == 0
    (((_, _, xs), options),) = seen
    model, last = state(copy)
    tokens = sj.data.split(sj.data.encode(long, content["corpus"]["vocabulary"]))[1]
    rows = tokens[: len(tokens) // 8 * 8].reshape(8, -1)
    warm = rows.shape[1] - 384
    np.testing.assert_array_equal(xs, rows[:, warm:])
    expected = sj.unroll(model.cell, last.params.cell, rows[:, :warm])[0]
    np.testing.assert_array_equal(options["state"][1].c, expected[1].c)
    assert "The text has changed since the training" in page_at(copy / "report.html").text


@pytest.mark.parametrize("report", [True, False])
def test_training_ends_with_its_report_unless_told_not_to(report, quick, tmp_path, capsys):
    words = write(tmp_path / "text.txt")
    flag = "--report" if report else "--no-report"
    assert run("train", "--text", words, "--out", tmp_path / "run", flag, *small(steps=2)) == 0
    printed, path = capsys.readouterr().out, tmp_path / "run" / "report.html"
    assert (printed.endswith(f"report: {path}\n"), path.is_file()) == (report, report)


def test_by_default_training_writes_a_report():
    assert seqjax.command.cli.Train().report


@pytest.mark.parametrize("reason", ["matplotlib", "anything"])
def test_a_report_that_fails_loses_no_run(reason, tmp_path, monkeypatch, capsys):
    if reason == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.setattr("seqjax.command.run_report.report_run", lambda *_, **__: 1 / 0)
    path = tmp_path / "run"
    words = write(tmp_path / "text.txt")
    assert run("train", "--text", words, "--out", path, "--report", *small(steps=2)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    said = 'pip install "seqjax[plots]"' if reason == "matplotlib" else "division by zero"
    assert said in last
    assert last.startswith("no report (")
    assert last.endswith(f"the run is kept: seqjax report {path}")
    assert int(state(path)[1].step) == 2


@pytest.mark.slow
def test_runs_are_compared_on_one_page(finished, other, tmp_path, capsys):
    out = tmp_path / "both.html"
    capsys.readouterr()
    assert run("compare", finished, other, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = page_at(out)
    assert_accessible(page)
    names = [section["id"] for section in page.all("section")]
    assert names == ["verdict", "settings", "exponents", "clipping", "versions"]
    for table in map(metrics, (finished, other)):
        for number in (table.clipped.mean(), table.grad_norm.max()):
            assert text(float(number)) in page.words
        assert f" {table.validation.iloc[-1] / np.log(2):.3f} (" in page.text  # with its interval
    best = min((metrics(path).validation.iloc[-1] / np.log(2), path.name) for path in (finished, other))
    assert f"{best[1]} has the lowest validation loss, {best[0]:.3f} bits per character" in page.text
    differ = page.text.split("Settings that differ")[1].split("Settings that are the same")[0]
    texts = [path.parent / "text.txt" for path in (finished, other)]
    assert f"run text cell hidden learning_rate {finished.name} {texts[0]} lstm 16 0.002" in differ
    assert f"other {texts[1]} gru 8 0.01" in differ
    assert "embedding" not in differ
    assert page.count("svg", "figure") == 5  # learning, gradients, exponents, and the clipping of each
    for failure in ("could not be drawn", "could not be written", "it failed with", "Left out"):
        assert failure not in page.text


def test_runs_of_one_name_are_told_apart_by_their_paths(quick, finished, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    copy.rename(tmp_path / "a" / finished.name)
    assert run("compare", finished, f"a/{finished.name}") == 0
    page = page_at(tmp_path / "comparison.html")
    assert {str(finished), f"a/{finished.name}"} < set(page.words)
    assert "No setting differs." in page.text


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("missing", ["the folder of a run", "not there"]),
        ("run.json", ["run.json", "stopped while being made"]),
        ("checkpoints", ["a finished checkpoint", "got none"]),
        ("metrics.csv", ["a table of metrics", "metrics.csv"]),
        ("text", ["a file to read", "gone.txt"]),
        ("letters", ["got 1 others ('Ω')", "vocabulary"]),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_no_whole_run_is_refused(command, damage, parts, copy, finished, quick, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "nowhere" if damage == "missing" else copy
    if damage == "checkpoints":
        shutil.rmtree(copy / "checkpoints")
    elif damage in ("run.json", "metrics.csv"):
        (copy / damage).unlink()
    elif damage in ("text", "letters"):
        content = json.loads((copy / "run.json").read_text("utf-8"))
        content["settings"]["text"] = str(tmp_path / "gone.txt")
        (copy / "run.json").write_text(json.dumps(content), "utf-8")
        if damage == "letters":
            write(tmp_path / "gone.txt", TEXT + "Ω")
    before = files(tmp_path)
    refused(capsys, [command, path] if command == "report" else [command, finished, path], *parts)
    assert files(tmp_path) == before


def test_what_cannot_be_compared_is_refused(finished, copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["compare", finished], "at least two runs", f"got one, {finished}", "seqjax report")
    refused(capsys, ["compare", finished, copy, finished], "every run once", f"got {finished} more often")


def test_a_place_that_cannot_be_written_to_is_refused_before_the_measuring(finished, copy, tmp_path, capsys):
    for out in (tmp_path, tmp_path / "nowhere" / "page.html"):
        refused(capsys, ["report", finished, "--out", out], "a file to write the page to", f"got {out}")
        refused(capsys, ["compare", finished, copy, "--out", out], "a file to write the page to", f"got {out}")


def test_without_matplotlib_both_commands_say_what_to_install(finished, copy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments in (["report", finished], ["compare", finished, copy]):
        refused(capsys, arguments, 'pip install "seqjax[plots]"')


@pytest.fixture
def measured_by_hand(monkeypatch):
    """The results of the analyses, without any analysis."""
    monkeypatch.setattr("seqjax.command.run_report.measure", lambda *_, **__: made_by_hand())


def test_the_first_screen_says_how_good_the_model_is(measured_by_hand, copy):
    assert run("report", copy) == 0
    source = (copy / "report.html").read_text("utf-8")
    first = Page(source[: source.index("<nav")].replace("<main>", "") + "</body></html>").text
    assert re.search(r"[0-9.]+ bits per character on unseen text, (better|worse|about as good)", first)
    assert "The 95 % interval is" in first
    for name in ("this model", "5-gram model", "unigram model", "A sample at temperature 0.8"):
        assert name in first
    assert "It is said to be so" in first
    assert "Gradient norm by lag" in first


def test_stderr_says_what_is_done_and_stdout_where_the_page_is(measured_by_hand, copy, finished, capsys):
    capsys.readouterr()
    assert run("report", copy) == 0
    told = capsys.readouterr()
    assert told.out == f"{copy / 'report.html'}\n"
    assert told.err.splitlines() == ["baselines", "validation text", "sample", "loss by position", "figures"]
    assert run("compare", copy, finished, "--out", copy / "both.html") == 0
    told = capsys.readouterr()
    assert told.out == f"{copy / 'both.html'}\n"
    steps = [f"{path.name}: {step}" for path in (copy, finished) for step in ("baselines", "validation text")]
    assert told.err.splitlines() == [*steps, "figures"]


def test_runs_on_one_text_are_compared_piece_by_piece(measured_by_hand, copy, finished):
    assert run("compare", copy, finished, "--out", copy / "both.html") == 0
    page, bits = page_at(copy / "both.html"), metrics(finished).validation.iloc[-1] / np.log(2)
    rows = page.text.split("updates seconds")[1]
    assert re.search(rf"{copy.name} {bits:.3f} \([0-9.]+ to [0-9.]+\) chaotic", rows)  # the best run has no difference
    assert re.search(rf"{finished.name} {bits:.3f} \([0-9.]+ to [0-9.]+\) 0.000 ", rows)
