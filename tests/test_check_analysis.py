"""`check_analysis`: the closed forms pass on a right analysis, and a wrong one fails."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from errors import raises

import seqjax as sj
from seqjax.analysis import _closed_forms


@pytest.fixture
def exponents_only(monkeypatch):
    """Leaves the cases of one analysis, because a wrong function needs no more."""
    monkeypatch.setattr(_closed_forms, "CASES", (_closed_forms.exact_exponents,))


def replace_exponents(monkeypatch, value):
    """An analysis that measures nothing."""
    answer = SimpleNamespace(exponents=np.full((1, 3), value))
    monkeypatch.setattr(sj.analysis, "lyapunov_exponents", lambda *args, **kwargs: answer)


@pytest.mark.slow
def test_every_closed_form_holds(dtype):
    result = sj.testing.check_analysis(dtype)
    assert result.ok, str(result)
    assert len(result.rows) >= 20
    assert len({row.case for row in result.rows}) == len(result.rows)
    for row in result.rows:
        assert row.ok
        assert 0 <= row.error <= row.tolerance < 0.05


def test_a_right_analysis_passes_and_prints_a_table(exponents_only):
    result = sj.testing.check_analysis()
    assert (result.ok, result.dtype, len(result.rows)) == (True, "float32", 3)
    lines = str(result).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert lines[0].split() == ["case", "expected", "got", "error", "tolerance", "ok"]
    assert "-0.223144" in lines[1]  # ln 0.8
    assert lines[-1].startswith("3 of 3 passed in float32")


def test_exponents_in_bits_instead_of_nats_fail(monkeypatch, exponents_only):
    replace_exponents(monkeypatch, math.log2(0.8))
    result = sj.testing.check_analysis()
    assert not result.ok
    assert [row.ok for row in result.rows] == [False] * 3
    assert result.rows[0].got == pytest.approx(math.log2(0.8), abs=1e-5)
    assert str(result).count("NO") == 3
    assert "0 of 3 passed" in str(result)


def test_a_value_that_is_not_a_number_fails(monkeypatch, exponents_only):
    replace_exponents(monkeypatch, math.nan)
    assert not any(row.ok for row in sj.testing.check_analysis().rows)


def test_a_wrong_word_fails(monkeypatch):
    monkeypatch.setattr(
        _closed_forms, "CASES", (lambda dtype, tolerance: iter([("regime", "stable", "chaotic", 0.0)]),)
    )
    (row,) = sj.testing.check_analysis().rows
    assert (row.ok, row.error) == (False, math.inf)


def test_a_narrow_dtype_is_an_error():
    with raises(ValueError, "float32 or float64", "bfloat16"):
        sj.testing.check_analysis("bfloat16")
