"""The truths of the bank against closed forms, and the verdict against the truths."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from microscope_bank.coverage import measure
from microscope_bank.double import long_run_exponents
from microscope_bank.judge import confusion, judge, problems, score
from microscope_bank.networks import PADDINGS, groups, padding
from microscope_bank.truth import by_norm, expected_norms, truths

import seqjax as sj

FEW = (2, 3, 10, 17, 19, 20, 24, 26, 31, 34)  # of the group tanh-100: every regime but chaos


@functools.cache
def bank(name):
    """The networks of one group."""
    return groups()[name]()


def whole_bank():
    return [network for name in groups() for network in bank(name)]


def no_reset(time):
    return np.zeros(time, bool)


# The truths: closed forms.


@pytest.mark.parametrize("gain", [0.8, 0.97, 1.05])
def test_the_norm_by_lag_of_a_scaled_rotation_is_a_power(gain):
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    found = expected_norms(np.broadcast_to(gain * Q, (300, 5, 5)), no_reset(300))
    np.testing.assert_allclose(found, np.arange(301) * math.log(gain), atol=1e-9)


def test_the_norm_by_lag_is_the_mean_over_all_ends():
    J = np.random.default_rng(1).normal(size=(20, 3, 3))
    squares = []
    for t in range(7, 21):
        product = np.eye(3)
        for s in range(t, t - 7, -1):
            product = product @ J[s - 1]
        squares.append((product**2).sum() / 3)
    assert expected_norms(J, no_reset(20))[7] == pytest.approx(0.5 * math.log(np.mean(squares)), abs=1e-12)


def test_a_product_across_a_reset_is_zero():
    reset = no_reset(10)
    reset[5] = True
    found = expected_norms(np.broadcast_to(np.eye(2), (10, 2, 2)), reset)
    assert np.isneginf(found[6:]).all()
    assert np.isfinite(found[:6]).all()


@pytest.mark.parametrize(
    ("norms", "regime", "lag"),
    [
        (np.arange(60) * math.log(0.8), "vanishing", 21),
        (np.arange(60) * math.log(1.2), "exploding", 13),
        (np.zeros(60), "stable", None),
        (np.interp(np.arange(60), [0, 10, 30, 59], [0, 5, -2, -9]), "transient growth", 10),
    ],
)
def test_the_norm_by_lag_gives_the_regime_and_its_lag(norms, regime, lag):
    found, allowed, lags = by_norm(norms)
    assert (found, allowed, lags.get(regime)) == (regime, {regime}, lag)


def test_a_norm_near_a_threshold_allows_both_sides():
    assert by_norm(np.linspace(0, math.log(0.012), 50))[1] == {"stable", "vanishing"}
    assert by_norm(np.linspace(0, math.log(9), 50))[1] == {"stable", "exploding"}


def test_the_exponent_of_a_long_run_is_that_of_a_closed_form():
    cell = sj.VanillaRNN(1, 3, activation="identity", recurrent_init=sj.Orthogonal(0.9))
    value, error = long_run_exponents(cell, cell.init(jax.random.key(0)), 2, 2000)
    np.testing.assert_allclose(value, math.log(0.9), atol=1e-6)
    assert (error < 1e-6).all()


def regimes(networks, *indices):
    return [truths(networks[i])[0].regime for i in indices]


def test_the_truths_of_scalar_maps_are_those_of_the_textbook():
    found = [truths(network)[0] for network in bank("logistic-300")]
    expected = ["chaotic"] * 3 + ["vanishing"] * 3 + ["chaotic"]  # r = 4, 3.9, 3.7; 2.8, 1.5, 0.5; 4 beside 2
    assert [truth.regime for truth in found[:7]] == expected
    assert found[0].later == pytest.approx(math.log(2), abs=0.01)
    assert found[3].later == pytest.approx(math.log(0.8), abs=1e-3)  # |2 - r| at r = 2.8
    assert "unstable fixed point" in found[7].allowed


def test_the_truths_of_switches_and_of_unknown_rows():
    assert regimes(bank("leaky-100"), 6, 7, 8, 9) == ["multistable"] * 3 + ["unstable fixed point"]
    assert {truth.regime for network in bank("tanh-1") for truth in truths(network)} == {"unknown"}
    assert {truth.regime for truth in truths(bank("quantised-20")[0])} == {"unknown"}
    overflow = next(network for network in bank("linear-1000") if "overflows" in network.name)
    assert {truth.regime for truth in truths(overflow)} == {"exploding"}


# The bank as a whole.


def test_the_bank_has_every_regime_padding_and_dtype():
    networks = whole_bank()
    assert len(networks) >= 200
    assert len({network.name for network in networks}) == len({network.seed for network in networks}) == len(networks)
    for kind in PADDINGS[1:]:
        assert sum(f"padding {kind}" in network.name for network in networks) >= 10
    assert {network.xs.shape[1] for network in networks} >= {1, 20, 60, 100, 300, 1000}


def test_every_padding_masks_what_its_name_says():
    masks = {kind: padding(kind, 3, 40) for kind in PADDINGS}
    assert masks["none"].all()
    assert masks["end"][:, :30].all()
    assert not masks["end"][:, 30:].any()
    assert masks["beginning"][:, 10:].all()
    assert not masks["beginning"][:, :10].any()
    assert masks["every other"].sum(axis=1).tolist() == [20] * 3
    assert masks["ragged"].sum(axis=1).tolist() == [40, 25, 10]
    assert masks["one row"].sum(axis=1).tolist() == [40, 0, 40]


class FakeRow(NamedTuple):
    """What the judge reads of one row."""

    regime: str
    reliable: bool = True
    reason: str = ""
    lag: float = math.inf
    alternatives: tuple[str, ...] = ()


class FakeVerdict(NamedTuple):
    rows: tuple[FakeRow, ...]


def test_the_judge_accepts_the_truth_and_no_other_answer():
    network = bank("linear-100")[0]
    lag = truths(network)[0].lags["vanishing"]

    def answers(*rows):
        return judge(network, lambda *_, **__: FakeVerdict(rows))

    right = FakeRow("vanishing", lag=lag)
    found = answers(right, FakeRow("vanishing", lag=2 * lag), FakeRow("stable"))
    assert [(a.kind, a.lag_right) for a in found] == [("right", True), ("right", False), ("wrong and reliable", None)]
    assert (score(found).wrong_and_reliable, score(found).right, score(found).lags) == (1, 2 / 3, 1 / 2)
    assert len(problems(found)) == 2
    unsure = answers(
        FakeRow("unknown", False), FakeRow("stable", False), FakeRow("stable", False, "", 1, ("vanishing",))
    )
    assert [a.kind for a in unsure] == ["declined", "wrong", "declined"]
    assert confusion(unsure).splitlines()[1].split() == ["vanishing", ".", "1", *["."] * 6, "2"]


def assert_good(answers, right=0.99, lags=0.97):
    found = score(answers)
    report = "\n".join([str(found), confusion(answers), *problems(answers)])
    assert found.wrong_and_reliable == 0, report
    assert found.right >= right, report
    assert found.lags >= lags, report
    assert found.declined <= 0.10, report


def test_the_verdict_is_right_on_a_few_networks():
    assert_good([a for i in FEW for a in judge(bank("tanh-100")[i])])


@pytest.mark.slow
@pytest.mark.parametrize("group", groups())
def test_the_verdict_is_right_on_every_group_of_the_bank(group):
    jax.clear_caches()  # the hundreds of programs of another group would fill the memory maps of the process
    answers = [a for network in bank(group) for a in judge(network)]
    found = score(answers)
    print(found, confusion(answers), sep="\n")
    report = "\n".join([str(found), confusion(answers), *problems(answers)])
    assert found.wrong_and_reliable == 0, report
    assert found.right >= 0.99, report
    assert found.lags >= 0.97 or not any(a.lag_right is not None for a in answers), report
    assert found.declined <= 0.15, report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm-chrono-100", "lstm-forget-5.5", "tanh-2"])
def test_intervals_of_the_largest_exponent_contain_the_long_run_exponent(name):
    for found in measure(name, rows=40, steps=20_000):
        assert not found.covered < 0.85, found
