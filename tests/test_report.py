"""The report: one page that needs nothing else, tells every number, leaves out with a reason, and survives failures."""

from __future__ import annotations

import math
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import D, N
from plot_results import gate, lag_result
from report_pages import (
    CELLS,
    HISTORY,
    SECTIONS,
    Made,
    Page,
    assert_accessible,
    assert_self_contained,
    given,
    made_by_hand,
    sentences,
)
from report_pages import page_of as page_of

import seqjax as sj
from seqjax.analysis.verdicts import verdict
from seqjax.reports import measure as measuring
from seqjax.reports.cell_page import memory_gates, report
from seqjax.reports.html import factor, text
from seqjax.reports.names import Names

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
    for sentence in (*found.evidence, *found.advice):
        assert sentence[0].upper() + sentence[1:] + "." in page.text
    for sentence in ("It is said to be so, most in the cell state of layer 1.", "the evidence says what"):
        assert sentence in page.text
    logs = [*found.exponents.mean, *found.by_lag.log_expected, *found.by_lag.log_worst]
    for number in (found.regime, "layer 1, cell state", "not known", text(found.lag), *map(factor, map(float, logs))):
        assert number in page.words
    assert "Memory of a typical gradient: 38 steps." in page.text
    assert "0 chaotic not known no none 59 stable 10% none" in page.text  # the first of the rows by sequence
    assert "1.034, is not below one: it says nothing" in page.text


def test_the_page_is_the_cells_own(page_of):
    page, (cell, params, xs) = read(page_of("user")), given("user")
    found = verdict(cell, params, xs)
    assert found.summary in page.text
    assert all(factor(float(number)) in page.words for number in found.exponents.mean)


def test_what_a_cell_lacks_is_left_out_with_a_reason(page_of):
    page = read(page_of("user"))
    assert "Left out, gate statistics: Leaky does not name its gates" in page.text
    assert "Left out, cell path: expected a cell with a state field c" in page.text
    assert "W_hh" not in page.text
    assert page.count("svg", "figure") == 12  # all but the cell path and three of gates
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
    xs = jnp.tile(xs, (3, 10, 1))
    mask, state = sj.length_mask([400, 30, 20] * 3, 400), sj.unroll(cell, params, xs)[0]
    options = {"path": tmp_path / "page.html", "state": state, "mask": mask}
    page = read(report(cell, params, xs, **options))
    (read_xs, read_options), *_ = seen
    np.testing.assert_array_equal(read_xs, xs[:8, :384])
    np.testing.assert_array_equal(read_options["mask"], mask[:8, :384])
    np.testing.assert_array_equal(read_options["state"].c, state.c[:8])
    assert read_options["reset"] is None
    assert "8 of 9 sequences, 384 of 400 steps each" in page.words
    page = read(report(cell, params, xs, full=True, **options))
    np.testing.assert_array_equal(seen[1][0], xs)
    assert "9 of 9 sequences, 400 of 400 steps each" in page.words


@pytest.mark.parametrize("full", [False, True])
def test_costly_analyses_of_a_large_state_are_run_when_asked_for(full, failing, tmp_path):
    cell = sj.VanillaRNN(D, 129)
    page = read(report(cell, cell.init(jax.random.key(0)), given("lstm")[2], path=tmp_path / "page.html", full=full))
    left = "it takes long for a state of 129 numbers; it is measured with full=True, or --full"
    assert (f"Left out, spectrum and product singular values: {left}" in page.text) == (not full)
    assert ("spectrum and product singular values: it failed" in page.text) == full


def test_a_failing_analysis_is_told_and_takes_no_other_along(failing, tmp_path):
    page = read(report(*given("lstm"), path=tmp_path / "page.html", history=HISTORY))
    assert_self_contained(page)
    groups = re.findall(r"Left out, ([a-z ]*): it failed with RuntimeError, boom <b>\.", page.text)
    told = [name for group in groups for name in group.split(" and ")]
    assert sorted(told) == sorted(name.replace("_", " ") for name in ANALYSES)
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
    for name, of_gate in found.items():
        mean = 1 - of_gate.unit_mean if kept[name] == 1 else of_gate.unit_mean
        np.testing.assert_allclose(of_gate.time_constant, -1 / np.log(mean))


def test_numbers_are_written_with_four_digits_and_words_for_none():
    values = [1 / 3, np.float32(2), math.inf, -math.inf, math.nan, None, np.bool_(False), 12345, 1e-9]
    words = ["0.3333", "2", "no limit", "none", "none", "none", "no", "12345", "1e-09"]
    assert list(map(text, values)) == words


def page_on(measured, monkeypatch, tmp_path):
    """The page on results that were made by hand."""
    monkeypatch.setattr("seqjax.reports.cell_page.measure", lambda *_, **__: measured)
    return read(report(*given("lstm"), path=tmp_path / "page.html", history=HISTORY))


@pytest.mark.parametrize("name", ["made", "user"])
def test_no_sentence_is_written_twice(name, page_of):
    found = sentences(read(page_of(name)))
    assert len(found) > 15
    assert sorted(found) == sorted(set(found))


def test_nothing_infinite_is_written_as_a_number(monkeypatch, tmp_path):
    made = made_by_hand()
    by_lag = lag_result(-0.05 * np.arange(60), horizon=math.inf)
    gates = {"forget": gate([0, 0], [1, 1], [math.inf, 3.0])}
    said = Made(made.found["lyapunov_exponents"], by_lag, lag=math.inf)
    page = page_on(made_by_hand(verdict=said, gradient_by_lag=by_lag, gate_statistics=gates), monkeypatch, tmp_path)
    assert not re.search(r"∞|\binf(inity|inite)?\b|\bnan\b", page.text, re.IGNORECASE)
    assert "Memory of a typical gradient: > 59 steps (0.0523 there; at this rate lost at about" in page.text
    assert "none up to 59" in page.words


def test_the_memory_of_a_gradient_is_what_the_analysis_says(monkeypatch, tmp_path):
    by_lag = lag_result([0.0, -1.0, -2.0], horizon=12.0)
    page = page_on(made_by_hand(gradient_by_lag=by_lag), monkeypatch, tmp_path)
    assert "Memory of a typical gradient: 12 steps." in page.text
    assert "memory of the most favourable gradient > 2 steps (0.368 there" in page.text


def test_layers_fields_and_gates_have_readable_names(page_of):
    page = read(page_of("made"))
    assert "layer 1, cell state" in page.words
    assert "1.c" not in page.text
    assert {"nats", "J_t", "log10"}.isdisjoint(page.text.split())


def test_a_candidate_is_a_value_and_not_a_gate(page_of):
    page = read(page_of("made"))
    assert "forget gate" in page.words
    assert "candidate gate" not in page.words
    assert "value mean below -0.9 (share) above 0.9 (share) candidate" in page.text


def test_every_section_folds_and_has_a_line_in_the_contents(page_of):
    page = read(page_of("made"))
    names = [section["id"] for section in page.all("section")]
    assert [link["href"] for link in page.all("a")] == [f"#{name}-inside" for name in names]
    folds = [attributes for tag, attributes, around in page.elements if tag == "details" and around[-1] == "section"]
    assert len(folds) == len(names)
    assert sum("open" in attributes for attributes in folds) == 1
    eigenvalues = [
        around for tag, attributes, around in page.elements if "Eigenvalues" in attributes.get("aria-label", "")
    ]
    assert len(eigenvalues) == 2
    assert all(around.count("details") == 2 for around in eigenvalues)


def test_layers_are_numbered_by_their_states():
    cell = sj.stack([sj.Embedding(5, D), sj.VanillaRNN(D, N), sj.LSTM(N, N)])
    names = Names(tuple(sj.analysis.state_parts(cell, cell.init(jax.random.key(0)))))
    assert [names.field(path) for path in names.fields] == [
        "layer 1, hidden state",
        "layer 2, hidden state",
        "layer 2, cell state",
    ]
    assert names.gate("2/forget") == "layer 2, forget gate"  # although the first layer has no gates
    assert names.in_text("lost in 2.c at 12.5 steps, kept in 1.h") == (
        "lost in the cell state of layer 2 at 12.5 steps, kept in the hidden state of layer 1"
    )
    assert Names(("h", "c")).in_text("c falls first in c.") == "c falls first in the cell state."
    assert Names(("state",)).in_text("in state") == "in state"
