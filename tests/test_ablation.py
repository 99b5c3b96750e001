"""An ablation against the same steps by hand: each cell trained, scored and analysed by separate calls."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises

import seqjax as sj
from seqjax.analysis.by_length import score_by_length
from seqjax.analysis.clipping import clipping_statistics
from seqjax.analysis.gate_ablation import ablation
from seqjax.analysis.gates import gate_statistics
from seqjax.analysis.verdicts import verdict

MODULE = sys.modules[
    "seqjax.analysis.gate_ablation"
]  # `seqjax.analysis.gate_ablation` is a module; the package exports only the function
N, STEPS = 3, 4
HEAD, LOSS = sj.Gaussian(N, 1, std=1.0), sj.ManyToOne()
OPTIONS = {"steps": STEPS, "loss": LOSS, "clip_norm": 0.5, "key": jax.random.key(2)}


BATCHES = list(itertools.islice(sj.data.adding_problem(jax.random.key(0), batch=4, time=20), STEPS + 1))
LENGTHS = [20, 18, 20, 19]


def stream():
    return BATCHES[:STEPS]


def test():
    """One batch of sequences of different lengths."""
    xs, targets = BATCHES[STEPS].xs, BATCHES[STEPS].targets
    return iter([sj.Batch(xs, targets, np.asarray(sj.length_mask(LENGTHS, 20)))])


test.__test__ = False  # it is a stream


class Blind:
    """A cell without a state: its output is W x_t."""

    def init(self, key):
        return jax.random.normal(key, (N, 2))

    def initial_state(self, params):
        return ()

    def step(self, params, state, x):
        return state, params @ x


@pytest.fixture(scope="module")
def result():
    return ablation(
        {"lstm": sj.LSTM(2, N), "blind": Blind()}, HEAD, stream, test, lengths="loss", sequences=3, **OPTIONS
    )


def assert_same(got, expected):
    """Asserts that two trees are equal bit for bit, with NaN equal to NaN."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_entry_equals_a_direct_call_of_its_function(result):
    row, model = result.rows["lstm"], sj.Model(sj.LSTM(2, N), HEAD)
    fitted = sj.fit(model, stream(), **OPTIONS)
    params, first = fitted.params, next(test())
    assert_same(row.fitted.params, params)
    assert_same(row.fitted.history, fitted.history)
    assert row.score == sj.evaluate(model, params, test(), loss=LOSS)
    assert row.parameters == 4 * N * (2 + N + 1) + N + 1
    xs, mask = first.xs[:3], first.mask[:3]
    for got, theta in ((row.before, model.init(OPTIONS["key"])), (row.verdict, params)):
        assert_same(got, verdict(model.cell, theta.cell, xs, mask=mask))
    assert_same((row.exponents, row.by_lag), (row.verdict.exponents, row.verdict.by_lag))
    assert_same(row.gates, gate_statistics(model.cell, params.cell, xs, mask=mask))
    assert_same(row.clipping, clipping_statistics(fitted.history, 0.5))
    assert_same(row.lengths, score_by_length(model, params, test(), loss=LOSS))
    assert row.clipping.fraction > 0
    assert row.lengths.length.tolist() == [18, 19, 20]


def test_a_cell_without_a_state_has_a_score_and_no_verdict(result):
    row = result.rows["blind"]
    assert (row.before, row.verdict, row.exponents, row.by_lag, row.gates) == (None, None, None, None, {})
    assert np.isfinite(row.score)
    assert len(row.clipping.factors) == STEPS


def test_the_table_has_one_line_per_cell(result):
    head, lstm, blind, _, words, *_ = str(result).splitlines()
    row = result.rows["lstm"]
    assert len({len(head), len(lstm), len(blind)}) == 1
    assert lstm.split()[:5] == ["lstm", "76", *(f"{x:.4f}" for x in (row.score, row.lengths.short, row.lengths.long))]
    assert blind.split()[:3] == ["blind", "10", f"{result.rows['blind'].score:.4f}"]
    assert row.verdict.regime in lstm
    assert f"forget {row.gates['forget'].mean:.2f}" in lstm
    assert words == f"lstm: {row.verdict.summary}"


def test_by_default_the_vanilla_cell_the_gru_and_the_lstm_are_compared(monkeypatch):
    monkeypatch.setattr(MODULE, "_verdict", lambda *_: None)  # verdicts are slow and not needed here
    rows = ablation(None, HEAD, stream, test, **OPTIONS | {"steps": 0}).rows
    assert list(rows) == ["vanilla", "gru", "lstm"]
    of_cells = [k * N * (2 + N + 1) for k in (1, 3, 4)]
    assert [row.parameters - (N + 1) for row in rows.values()] == [of_cells[0], of_cells[1] + N, of_cells[2]]


def test_training_that_stops_at_once_is_reported():
    nan = sj.Batch(jnp.full((2, 20, 2), jnp.nan), jnp.zeros((2, 1)))
    with pytest.warns(UserWarning, match="not finite at step 1"):
        result = ablation({"blind": Blind()}, HEAD, lambda: [nan], test, **OPTIONS)
    assert result.rows["blind"].clipping is None
    assert "blind: training stopped, not finite at step 1" in str(result)


def test_bad_arguments_raise():
    with raises(ValueError, "at least one cell", "got none"):
        ablation({}, HEAD, stream, test, **OPTIONS)
    with raises(TypeError, "stream to return a new stream", "got list", "lambda"):
        ablation(None, HEAD, stream(), test, **OPTIONS)
    with raises(ValueError, "test() to give at least one batch", "got none"):
        ablation(None, HEAD, stream, lambda: [], **OPTIONS)
    with raises(ValueError, "inputs (batch, time, features)", "got [(1, 3)]"):
        ablation(None, HEAD, lambda: [sj.Batch(jnp.zeros((1, 3), int), jnp.zeros((1, 1)))], test, **OPTIONS)
    with raises(ValueError, "at least 1 of the test's sequences", "got 0"):
        ablation(None, HEAD, stream, test, sequences=0, **OPTIONS)
