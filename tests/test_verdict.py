"""The verdict on networks with a known regime."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY
from errors import raises
from oracles import drawn

import seqjax as sj
from seqjax.analysis import verdict


def linear(g, size=4):
    """h' = g Q h."""
    cell = sj.VanillaRNN(1, size, activation="identity", recurrent_init=sj.Orthogonal(g))
    return cell, cell.init(jax.random.key(0))


class Rate:
    """x' = W tanh(x), W from N(0, g^2 / n): chaotic above g = 1 (Sompolinsky, Crisanti and Sommers 1988)."""

    def __init__(self, size, g):
        self.size, self.g = size, g

    def init(self, key):
        return self.g * jax.random.normal(key, (self.size, self.size)) / math.sqrt(self.size)

    def initial_state(self, W):
        return jnp.cos(jnp.arange(float(self.size)))

    def step(self, W, x, _):
        x = W @ jnp.tanh(x)
        return x, x


def noise(time, features=1, batch=2):
    return jax.random.normal(jax.random.key(3), (batch, time, features))


def test_a_linear_map_vanishes_at_the_lag_of_its_closed_form():
    result = verdict(*linear(0.8), noise(60))
    assert (result.regime, result.contracting, result.reliable) == ("vanishing", True, True)
    assert result.lag == math.ceil(math.log(0.01) / math.log(0.8))  # 21
    assert "lag 21" in result.summary
    np.testing.assert_allclose(result.exponents.exponents, math.log(0.8), atol=1e-5)


def test_a_linear_map_above_one_explodes_and_is_not_chaotic():
    result = verdict(*linear(1.2), noise(60))
    assert (result.regime, result.contracting) == ("exploding", False)
    assert result.lag == math.floor(math.log(10) / math.log(1.2)) + 1  # 13: the first above tenfold
    assert "nothing bounds them" in " ".join(result.evidence)


def test_an_orthogonal_linear_map_is_stable_and_its_contraction_is_unknown():
    result = verdict(*linear(1.0), noise(60))
    assert (result.regime, result.contracting, result.lag) == ("stable", None, math.inf)


def test_a_strongly_coupled_random_network_is_chaotic():
    cell = Rate(128, 3.0)
    result = verdict(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 400, 0)), horizon=30)
    assert (result.regime, result.contracting) == ("chaotic", False)
    assert "the nonlinearity bounds them" in " ".join(result.evidence)
    assert 0.2 < result.exponents.exponents[0, 0] < 0.4  # 0.31 in the limit of many units
    assert result.reliable  # in 30 steps rounding errors do not grow to the size of the state


def test_a_sequence_too_short_to_distinguish_chaos_is_not_chaotic():
    result = verdict(*linear(1.05), noise(60))
    assert (result.regime, result.contracting) == ("exploding", False)
    assert "too little to tell chaos from slow growth" in " ".join(result.evidence)


def test_a_gradient_beyond_the_predictable_time_is_unreliable():
    cell = Rate(128, 3.0)
    result = verdict(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 400, 0)), horizon=200)
    assert result.regime == "chaotic"
    assert not result.reliable
    assert "belong to no trajectory" in " ".join(result.evidence)


def test_the_evidence_reports_growth_before_decay():
    cell = sj.VanillaRNN(1, 2, activation="identity")
    params = sj.VanillaParams(jnp.zeros((2, 1)), jnp.array([[0.9, 10.0], [0.0, 0.9]]), jnp.zeros(2))
    result = verdict(cell, params, noise(200), horizon=150)
    assert result.regime == "transient growth"
    assert "back below one at lag" in result.summary
    assert any("largest at lag 9" in line and "38.7" in line for line in result.evidence)


def test_an_open_forget_gate_is_stable_and_a_closed_one_vanishes_first_in_h():
    def lstm(b):
        cell = sj.LSTM(1, 3, forget_bias=b)
        params = cell.init(jax.random.key(0))
        return cell, params._replace(W_xh=0 * params.W_xh, W_hh=0 * params.W_hh)

    shut, open_ = verdict(*lstm(0.0), noise(60)), verdict(*lstm(8.0), noise(60))
    assert (shut.regime, shut.block, shut.lag) == ("vanishing", "h", 7.0)  # 0.5^7 < 0.01
    assert open_.regime == "stable"


def test_a_trajectory_that_is_not_finite_is_unknown():
    result = verdict(*linear(1.2), noise(60).at[0, 30].set(jnp.nan))
    assert (result.regime, result.rows[0].regime, result.rows[1].regime) == ("mixed", "unknown", "exploding")
    assert not result.reliable
    assert "sequence 0" in " ".join(result.evidence)
    assert "step 31" in " ".join(result.evidence)


@pytest.mark.parametrize("name", ["stack", "user", "linen-gru", "equinox-lstm", "learned"])
def test_any_cell_has_a_verdict(name):
    params, xs = drawn(EVERY[name], "float32", time=30)
    result = verdict(EVERY[name], params, xs)
    assert result.regime in ("vanishing", "stable", "exploding", "chaotic", "mixed")
    assert len(result.advice) >= (result.regime == "vanishing" and name == "stack")
    assert len(result.evidence) >= 2
    assert str(result).startswith(result.summary)


def test_masked_steps_are_ignored():
    cell, params = linear(0.8)
    xs = noise(80)
    mask = sj.length_mask([60, 60], 80)
    result = verdict(cell, params, xs.at[:, 60:].set(jnp.nan), mask=mask)
    assert result.reliable
    np.testing.assert_allclose(result.exponents.exponents, math.log(0.8), atol=1e-5)


def test_a_horizon_that_is_too_long_raises():
    with raises(ValueError, "expected a horizon from 0 to T = 20", "got 50"):
        verdict(*linear(0.8), noise(20), horizon=50)
