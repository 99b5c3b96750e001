"""The verdict on networks that are easy to judge wrongly: padding, resets, overflow, slow and non-normal networks."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import ZOO
from errors import raises
from microscope_bank.double import jacobians, states_before, widen
from microscope_bank.networks import Network, Quantised
from microscope_bank.truth import TENFOLD, expected_norms, truths

import seqjax as sj


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear(W, d=1):
    """h' = W h + x, without a bias."""
    n = len(W)
    cell = sj.VanillaRNN(d, n, activation="identity")
    return cell, sj.VanillaParams(jnp.ones((n, d)), jnp.asarray(W, jnp.float32), jnp.zeros(n))


def text(row):
    """All that a row says."""
    return " ".join([row.summary, row.reason, *row.evidence])


def numbers(string):
    """Every number in a text."""
    return [float(found) for found in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", string.replace(",", ""))]


def names_a_number(string, value, tolerance):
    return any(abs(found - value) <= tolerance for found in numbers(string))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Gain:
    """s' = x s: the input is the gain."""

    input_shape = (1,)

    def init(self, key):
        return jnp.ones(2)

    def initial_state(self, first):
        return first

    def step(self, first, s, x):
        return x * s, s


class Filled(NamedTuple):
    """The state of `Filling`."""

    h: jax.Array
    c: jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Filling:
    """c' = 1.1 c and h' = tanh(c'): the field c grows without bound while h saturates."""

    input_shape = (1,)

    def init(self, key):
        return jnp.full(3, 1.1)

    def initial_state(self, gain):
        return Filled(jnp.zeros_like(gain), jnp.ones_like(gain))

    def step(self, gain, s, x):
        c = gain * s.c
        return Filled(jnp.tanh(c), c), c


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Decays:
    """s_i' = a_i s_i + x."""

    input_shape = (1,)

    def init(self, key):
        return jnp.ones(2)

    def initial_state(self, a):
        return jnp.zeros_like(a)

    def step(self, a, s, x):
        return a * s + x, s


# Padding: a masked step is as if it were not there.

SHORT = sj.LSTM(2, 6, forget_bias=0.0)


def short_lstm(time, batch=3):
    return SHORT, SHORT.init(jax.random.key(0)), normal(1, batch, time, 2)


def assert_same_rows(result, expected):
    for row, other in zip(result.rows, expected.rows, strict=True):
        assert (row.regime, row.lag, row.steps, row.contracting) == (
            other.regime,
            other.lag,
            other.steps,
            other.contracting,
        )
    np.testing.assert_allclose(result.exponents.exponents[:, 0], expected.exponents.exponents[:, 0], atol=1e-3)


@pytest.fixture(scope="module")
def unpadded():
    cell, params, xs = short_lstm(60)
    return sj.verdict(cell, params, xs)


def test_an_lstm_without_a_forget_bias_loses_its_gradient_after_about_eleven_steps(unpadded):
    assert [row.regime for row in unpadded.rows] == ["vanishing"] * 3
    assert all(7 <= row.lag <= 17 and row.steps == 60 for row in unpadded.rows)


@pytest.mark.parametrize("time", [80, 120, 300])
def test_padding_at_the_end_changes_no_row(time, unpadded):
    cell, params, xs = short_lstm(60)
    padded = jnp.full((3, time, 2), jnp.nan).at[:, :60].set(xs)
    assert_same_rows(sj.verdict(cell, params, padded, mask=sj.length_mask(jnp.full(3, 60), time)), unpadded)


def test_holding_every_other_step_changes_no_row(unpadded):
    cell, params, xs = short_lstm(60)
    held = jnp.full((3, 120, 2), jnp.nan).at[:, ::2].set(xs)
    mask = jnp.broadcast_to(jnp.arange(120) % 2 == 0, (3, 120))
    assert_same_rows(sj.verdict(cell, params, held, mask=mask), unpadded)


def test_ragged_rows_have_the_verdicts_of_their_own_lengths():
    cell, params, xs = short_lstm(300, batch=4)
    lengths = [300, 150, 40, 10]
    ragged = sj.verdict(cell, params, xs, mask=sj.length_mask(jnp.array(lengths), 300))
    for b, length in enumerate(lengths):
        (row,) = sj.verdict(cell, params, xs[b : b + 1, :length]).rows
        assert (ragged.rows[b].regime, ragged.rows[b].steps) == (row.regime, length)
        assert ragged.rows[b].lag == row.lag


def test_a_row_without_valid_steps_is_unknown_and_changes_no_other_row(unpadded):
    cell, params, xs = short_lstm(60)
    mask = jnp.ones((3, 60), bool).at[1].set(False)
    result = sj.verdict(cell, params, xs, mask=mask)
    assert (result.rows[1].regime, result.rows[1].reliable, result.rows[1].steps) == ("unknown", False, 0)
    for b in (0, 2):
        assert (result.rows[b].regime, result.rows[b].lag) == (unpadded.rows[b].regime, unpadded.rows[b].lag)


def test_a_mask_without_valid_steps_is_an_error():
    cell, params, xs = short_lstm(60)
    with raises(ValueError, "mask"):
        sj.verdict(cell, params, xs, mask=jnp.zeros((3, 60), bool))


# Several attractors, and fixed points.


def doubled_tanh():
    """h' = tanh(2 h)."""
    cell = sj.VanillaRNN(1, 1)
    return cell, sj.VanillaParams(jnp.zeros((1, 1)), 2 * jnp.eye(1), jnp.zeros(1))


def test_two_attractors_are_not_forgotten():
    cell, params = doubled_tanh()
    result = sj.verdict(cell, params, jnp.zeros((2, 60, 1)), state=sj.VanillaState(jnp.array([[1.0], [-1.0]])))
    for row in result.rows:
        assert row.regime == "multistable" or "along" in row.summary, row.summary
        assert not row.forgets
        assert "forgets its initial state" not in text(row)
        assert row.contracting


def test_a_state_that_stays_at_an_unstable_fixed_point_is_not_chaotic():
    cell, params = doubled_tanh()
    result = sj.verdict(cell, params, jnp.zeros((2, 60, 1)))
    assert [row.regime for row in result.rows] == ["unstable fixed point"] * 2


# Rows of different regimes, growth and overflow.


def test_every_row_has_its_own_exponent_and_regime():
    xs = jnp.broadcast_to(jnp.array([0.9, 1.1])[:, None, None], (2, 100, 1))
    result = sj.verdict(Gain(), Gain().init(None), xs)
    np.testing.assert_allclose(result.exponents.exponents[:, 0], np.log([0.9, 1.1]), atol=1e-4)
    assert (result.regime, *(row.regime for row in result.rows)) == ("mixed", "vanishing", "exploding")
    # 0.9^44 is the first power below 0.01, and 1.1^25 the first one above 10.
    assert [row.lag for row in result.rows] == [44, 25]


def test_an_overflow_is_an_explosion_at_its_step():
    W = 1.2 * np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    cell, params = linear(W)
    xs = normal(2, 1, 1000, 1)
    states = np.asarray(sj.trajectory(cell, params, xs).h[0])
    step = int(np.argmin(np.isfinite(states).all(axis=1)))
    assert 470 < step < 490
    result = sj.verdict(cell, params, xs)
    assert result.rows[0].regime == "exploding"
    assert names_a_number(text(result.rows[0]), step, 2), text(result.rows[0])


@pytest.mark.parametrize("forget_bias", [4.0, 5.5])
def test_a_slow_lstm_is_not_chaotic_and_explodes_only_if_its_gradients_grow_tenfold(forget_bias):
    cell = sj.LSTM(8, 32, forget_bias=forget_bias)
    for seed in range(24):
        params, xs = cell.init(jax.random.key(seed)), normal(100 + seed, 1, 100, 8)
        (row,) = sj.verdict(cell, params, xs).rows
        if row.regime == "exploding":
            (truth,) = truths(Network("", seed, cell, params, np.asarray(xs)))
            assert truth.log_expected[-1] > TENFOLD - 0.4, (seed, row.summary)
        else:
            assert row.regime != "chaotic", (seed, row.summary)


def test_rectified_networks_of_a_large_gain_explode():
    cell = sj.VanillaRNN(2, 32, activation="relu")
    for seed in range(10):
        params = cell.init(jax.random.key(seed))
        params = params._replace(W_hh=2 * normal(seed, 32, 32) / math.sqrt(32))
        result = sj.verdict(cell, params, normal(100 + seed, 1, 200, 2))
        assert result.rows[0].regime == "exploding", (seed, result.rows[0].summary)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_an_input_that_is_not_a_number_is_named_with_its_step(activation):
    cell = sj.VanillaRNN(1, 4, activation=activation, recurrent_init=sj.Orthogonal(0.9))
    xs = normal(3, 2, 400, 1).at[0, 300:].set(jnp.nan)
    bad, good = sj.verdict(cell, cell.init(jax.random.key(0)), xs).rows
    assert (bad.regime, bad.reliable) == ("unknown", False)
    assert names_a_number(bad.reason, 300.5, 0.5), bad.reason
    assert good.regime == "vanishing"


@pytest.mark.parametrize("time", [100, 300, 900])
def test_a_field_that_grows_while_another_one_saturates_explodes(time):
    result = sj.verdict(Filling(), Filling().init(None), jnp.zeros((1, time, 1)))
    assert (result.regime, result.block) == ("exploding", "c")


@pytest.mark.parametrize("time", [300, 1000])
def test_a_slightly_expanding_rotation_explodes_at_its_closed_form(time):
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    result = sj.verdict(*linear(1.01 * Q), normal(4, 1, time, 1))
    assert (result.rows[0].regime, result.rows[0].lag) == ("exploding", math.ceil(math.log(10) / math.log(1.01)))  # 232


# Non-normal networks.


def chain(n, rho, coupling):
    return rho * np.eye(n) + coupling * np.eye(n, k=1)


@pytest.mark.optimized
def test_the_norm_of_a_non_normal_network_in_float32_is_that_of_float64():
    n, T = 24, 120
    cell = sj.VanillaRNN(1, n)
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(n, n)))[0]
    params = sj.VanillaParams(jnp.ones((n, 1)), jnp.asarray(q @ chain(n, 0.92, 2.0) @ q.T, jnp.float32), jnp.zeros(n))
    xs = normal(5, 1, T, 1)
    result = sj.gradient_by_lag(cell, params, xs, horizon=100)
    none = np.zeros((1, T), bool)
    before, _ = states_before(cell, params, jnp.zeros((1, n)), xs, ~none, none)
    with jax.enable_x64(True):
        J = np.asarray(jacobians(cell, widen(params), widen(before), widen(xs)))[0]
    norms = []
    for t in result.times[0][result.times[0] >= 100]:  # the others have no lag 100
        product = np.eye(n)
        for k in range(100):
            product = product @ J[t - 1 - k]
        norms.append(np.linalg.norm(product) / math.sqrt(n))
    expected = 0.5 * math.log(np.mean(np.square(norms)))
    assert abs(result.log_expected[100] - expected) < 0.1


def test_growth_before_decay_has_its_peak_and_the_lag_back_below_one():
    W = chain(6, 0.6, 3.0)
    norm = np.exp(expected_norms(np.broadcast_to(W, (200, 6, 6)), np.zeros(200, bool)))
    peak, back = int(np.argmax(norm)), int(np.flatnonzero(norm >= 1)[-1]) + 1
    assert (round(float(norm.max())), peak, back) == (2234, 12, 41)
    result = sj.verdict(*linear(W), normal(6, 1, 200, 1))
    row = result.rows[0]
    assert (row.regime, row.lag) == ("transient growth", peak)
    assert row.contracting
    said = text(row)
    assert names_a_number(said, norm.max(), 0.01 * norm.max()), said
    assert names_a_number(said, peak, 0), said
    assert names_a_number(said, back, 0), said


def test_resets_are_no_chaos():
    cell = sj.LSTM(2, 6)
    reset = jnp.broadcast_to(jnp.arange(200) % 50 == 49, (2, 200))
    result = sj.verdict(cell, cell.init(jax.random.key(0)), normal(7, 2, 200, 2), reset=reset)
    assert all(row.regime not in ("chaotic", "exploding") for row in result.rows)
    assert "reset" in " ".join([*result.evidence, *map(text, result.rows)])


# Long and short memories.


def test_a_memory_of_thousands_of_steps_is_found():
    gain = math.exp(math.log(0.01) / 2303)
    result = sj.verdict(*linear(np.full((1, 1), gain)), 0.01 * normal(8, 1, 20_000, 1))
    assert result.rows[0].regime == "vanishing"
    assert abs(result.rows[0].lag - 2303) <= 3


def test_one_step_is_too_short():
    result = sj.verdict(*linear(0.5 * np.eye(2)), normal(9, 2, 1, 1))
    for row in result.rows:
        assert (row.regime, row.reliable) == ("unknown", False)
        assert "too short" in text(row)


def test_a_direction_that_is_kept_for_ever_is_named_beside_the_mean():
    a = np.r_[1.0, np.full(63, 0.5)]
    result = sj.verdict(Decays(), jnp.asarray(a, jnp.float32), 0.01 * normal(10, 1, 100, 1))
    said = " ".join([str(result), text(result.rows[0])])
    assert names_a_number(said, 1 / 8, 0.002), said  # sqrt(1 / 64), the mean over directions
    assert "best-kept" in said or "most favourable" in said
    assert result.rows[0].regime in ("stable", "vanishing")


def test_all_exponents_of_a_large_network_in_float32_obey_the_sum_rule():
    n, T = 64, 200
    cell = sj.VanillaRNN(2, n)
    params = cell.init(jax.random.key(0))._replace(W_hh=2 * normal(11, n, n) / math.sqrt(n))
    xs = 8 * normal(12, 1, T, 2)  # so strong that the network contracts, and rounding errors do not part trajectories
    result = sj.lyapunov_exponents(cell, params, xs, k=n, burn_in=0, frame_burn_in=0)
    none = np.zeros((1, T), bool)
    before, _ = states_before(cell, params, jnp.zeros((1, n)), xs, ~none, none)
    with jax.enable_x64(True):
        J = np.asarray(jacobians(cell, widen(params), widen(before), widen(xs)))[0]
    assert np.isfinite(result.exponents).all()
    assert float(result.exponents.sum()) == pytest.approx(np.linalg.slogdet(J)[1].mean(), rel=1e-3)


def test_a_memory_beyond_the_largest_lag_has_an_estimate():
    n, K = 256, 100
    slow = 1.02 * (math.log(1 / math.sqrt(n)) - math.log(0.0275)) / K  # so that lag 100 has about 0.0275
    a = np.r_[math.exp(-slow), np.full(n - 1, 0.01)]
    result = sj.verdict(Decays(), jnp.asarray(a, jnp.float32), 0.01 * normal(13, 1, K, 1))
    lag = math.log(math.sqrt(n) * 0.01) / -slow
    said = str(result)
    assert f"> {K} steps" in said, said
    assert names_a_number(said, lag, 0.05 * lag), said
    assert "inf" not in said


# Steps without a useful derivative, and states that are not real vectors.


def test_a_step_whose_derivative_is_zero_everywhere_is_unknown():
    result = sj.verdict(Quantised(), jnp.full(3, 0.9), normal(14, 2, 40, 1))
    for row in result.rows:
        assert (row.regime, row.reliable) == ("unknown", False)
        assert "derivative" in text(row)
        assert "zero" in text(row)


@pytest.mark.parametrize("name", ["complex-diagonal", "counter", "bfloat16"])
def test_a_state_that_is_no_vector_of_float32_has_a_verdict(name):
    cell = sj.LSTM(3, 4, dtype="bfloat16") if name == "bfloat16" else ZOO[name]
    xs = normal(15, 2, 40, 3)
    result = sj.verdict(cell, cell.init(jax.random.key(0)), xs.astype("bfloat16") if name == "bfloat16" else xs)
    assert len(result.rows) == 2
    assert str(result)
