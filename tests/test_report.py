"""The report: one page that needs nothing else, tells every number, leaves out with a reason, and survives failures."""

from __future__ import annotations

import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import D, N
from report_pages import CELLS, HISTORY, SECTIONS, Page, assert_accessible, assert_self_contained, given, made_by_hand
from report_pages import page_of as page_of

import seqjax as sj
from seqjax.analysis.verdicts import verdict
from seqjax.reports import measure as measuring
from seqjax.reports.cell_page import memory_gates, report
from seqjax.reports.html import text

slow = pytest.mark.slow
ANALYSES = (
    "verdict",
    "lyapunov_exponents",
    "gradient_by_lag",
    "gate_statistics",
    "cell_path",
    "spectrum",
    "product_singular_values",
    "trajectory",
)


def read(path):
    """The page at a path."""
    return Page(path.read_text("utf-8"))


@pytest.fixture
def failing(monkeypatch):
    """Every analysis fails, so that a page is written at once."""

    def fail(*_, **__):
        raise RuntimeError("boom <b>\nand a second line")

    for name in ANALYSES:
        monkeypatch.setattr(measuring, name, fail)


@pytest.mark.parametrize(
    "name", ["made", "lstm", "user", *(pytest.param(name, marks=slow) for name in ("tokens", "equinox"))]
)
def test_the_page_of_any_cell_is_whole_self_contained_and_accessible(name, page_of):
    page = read(page_of(name))
    assert_self_contained(page)
    assert_accessible(page)
    assert [section["id"] for section in page.all("section")] == [*SECTIONS[:-1], "clipping", "settings"]
    for failure in ("could not be drawn", "could not be written", "it failed with", "There is no verdict"):
        assert failure not in page.text


def test_every_number_of_the_verdict_is_on_the_page(page_of):
    page, found = read(page_of("made")), made_by_hand().found["verdict"]
    for sentence in (found.summary, *found.evidence, *found.advice, "the evidence says what"):
        assert sentence in page.text
    numbers = [found.lag, found.by_lag.horizon, *found.exponents.mean, *found.exponents.spread]
    numbers += [*(found.by_lag.log_expected / math.log(10)), *(found.by_lag.log_worst / math.log(10))]
    for number in (found.regime, found.block, found.contracting, *map(float, numbers)):
        assert text(number) in page.words
    assert "1.034, is not below one: it says nothing" in page.text


def test_the_page_is_the_cells_own(page_of):
    page, (cell, params, xs) = read(page_of("user")), given("user")
    found = verdict(cell, params, xs)
    assert found.summary in page.text
    assert all(text(float(number)) in page.words for number in found.exponents.mean)


def test_what_a_cell_lacks_is_left_out_with_a_reason(page_of):
    page = read(page_of("user"))
    assert "Left out: Leaky does not name its gates" in page.text
    assert "Left out: expected a cell with a state field c" in page.text
    assert "W_hh" not in page.text
    assert page.count("svg", "figure") == 11  # all but the cell path and three of gates and matrices
    assert read(page_of("made")).count("svg", "figure") == 16
    assert "Left out" not in read(page_of("made")).text


def test_settings_versions_and_what_was_read_are_told(page_of):
    page = read(page_of("user"))
    for told in ("3 of 3 sequences, 40 of 40 steps each", jax.__version__, "seed", repr(CELLS["user"]), "4"):
        assert told in page.words
    assert "0.5833" in page.words  # (1 + 1/2 + 1/4) / 3, the mean factor of the clipping


def test_what_is_read_is_the_beginning_of_what_is_given(failing, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(measuring, "verdict", lambda *given, **options: seen.append((given[2], options)))
    cell, params, xs = given("lstm")
    mask, state = sj.length_mask([40, 30, 20], 40), sj.unroll(cell, params, xs)[0]
    page = read(report(cell, params, xs, path=tmp_path / "page.html", state=state, mask=mask, rows=2, steps=25))
    ((read_xs, options),) = seen
    np.testing.assert_array_equal(read_xs, xs[:2, :25])
    np.testing.assert_array_equal(options["mask"], mask[:2, :25])
    np.testing.assert_array_equal(options["state"].c, state.c[:2])
    assert options["reset"] is None
    assert "2 of 3 sequences, 25 of 40 steps each" in page.words


def test_a_failing_analysis_is_told_and_takes_no_other_along(failing, tmp_path):
    page = read(report(*given("lstm"), path=tmp_path / "page.html", history=HISTORY))
    assert_self_contained(page)
    assert page.text.count("it failed with RuntimeError, boom <b>.") == len(ANALYSES)
    assert "second line" not in page.text
    assert page.count("svg", "figure") == 2  # those of the clipping


def test_a_figure_that_cannot_be_drawn_is_told(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(sj.plots, "clipping", lambda *_, **__: 1 / 0)
    page = read(report(*given("lstm"), path=tmp_path / "page.html", history=HISTORY))
    assert "A figure (clipping) could not be drawn: ZeroDivisionError" in page.text
    assert page.count("svg", "figure") == 1


def test_a_history_that_cannot_be_read_is_told(failing, tmp_path):
    page = read(report(*given("lstm"), path=tmp_path / "page.html", history={"loss": [1.0]}))
    assert "Left out: expected a history with a column 'grad_norm'" in page.text


def test_words_from_outside_are_words(failing, tmp_path):
    evil = "</title><script>alert(1)</script>&amp;\"'<table>"
    page = read(report(*given("user"), path=tmp_path / "page.html", title=evil, settings={evil: evil}))
    assert page.words.count(evil) == 4  # title, heading, name and value
    assert_self_contained(page)


@pytest.mark.slow
def test_a_cell_gone_astray_still_gets_its_page(tmp_path):
    cell, params, xs = given("lstm")
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    page = read(report(cell, broken, xs[:1, :12], path=tmp_path / "page.html"))
    assert_self_contained(page)
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"xs": jnp.zeros((3, 40))}, ["expected xs (batch, time, 3)", "got (3, 40)"]),
        ({"xs": jnp.zeros((0, 40, D))}, ["at least one sequence of one step", "(0, 40"]),
        ({"mask": jnp.ones((2, 40), bool)}, ["expected mask (batch, time) = (3, 40)", "got (2, 40)"]),
        ({"rows": 0}, ["rows and steps of at least 1", "got 0"]),
        ({"path": "missing/page.html"}, ["expected a file to write the page to", "not there"]),
        ({"path": "."}, ["expected a file to write the page to", "a folder"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell, params, xs = given("lstm")
    with pytest.raises(ValueError, match="expected") as caught:
        report(cell, params, **({"xs": xs, "path": "page.html"} | change))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not list(tmp_path.iterdir())


def test_a_page_appears_whole_or_not_at_all(failing, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"got .*page\.html: No space left on device"):
        report(*given("lstm"), path=path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "before"


def test_without_matplotlib_the_report_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "seqjax\[plots\]"'):
        report(*given("lstm"), path=tmp_path / "page.html")


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        (sj.LSTM(D, N), {"forget": "forget"}),
        (sj.GRU(D, N), {"update": "update"}),
        (sj.LearnedState(sj.stack([sj.GRU(D, N, update="writes"), sj.LSTM(N, N)])), {"0/update": 1, "1/forget": 0}),
    ],
)
def test_memory_is_that_of_the_gates_that_multiply_the_old_state(cell, kept):
    statistics = measuring.gate_statistics(cell, cell.init(jax.random.key(0)), jnp.ones((1, 5, D)))
    found = memory_gates(cell, statistics)
    assert set(found) == set(kept)
    for name, gate in found.items():
        mean = 1 - gate.unit_mean if kept[name] == 1 else gate.unit_mean
        np.testing.assert_allclose(gate.time_constant, -1 / np.log(mean))


def test_numbers_are_written_with_four_digits_and_words_for_none():
    values = [1 / 3, np.float32(2), -math.inf, math.nan, None, np.bool_(False), 12345, 1e-9]
    assert list(map(text, values)) == ["0.3333", "2", "-∞", "none", "none", "no", "12345", "1e-09"]
