"""The verdict in words, on networks of which the regime is known beforehand."""

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
    found = verdict(*linear(0.8), noise(60))
    assert (found.regime, found.contracting, found.reliable) == ("vanishing", True, True)
    assert found.lag == math.ceil(math.log(0.01) / math.log(0.8))  # 21
    assert "lag 21" in found.summary
    np.testing.assert_allclose(found.exponents.exponents, math.log(0.8), atol=1e-5)


def test_a_linear_map_above_one_explodes_and_is_not_called_chaotic():
    found = verdict(*linear(1.2), noise(60))
    assert (found.regime, found.contracting) == ("exploding", False)
    assert found.lag == math.floor(math.log(10) / math.log(1.2)) + 1  # 13: the first above tenfold
    assert "nothing bounds them" in " ".join(found.evidence)


def test_an_orthogonal_linear_map_is_stable_and_nothing_is_said_of_contraction():
    found = verdict(*linear(1.0), noise(60))
    assert (found.regime, found.contracting, found.lag) == ("stable", None, math.inf)


def test_a_strongly_coupled_random_network_is_chaotic():
    cell = Rate(128, 3.0)
    found = verdict(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 400, 0)), horizon=30)
    assert (found.regime, found.contracting) == ("chaotic", False)
    assert "the nonlinearity bounds them" in " ".join(found.evidence)
    assert 0.2 < found.exponents.exponents[0, 0] < 0.4  # 0.31 in the limit of many units
    assert found.reliable  # 30 steps are fewer than rounding errors need to grow to the state's size


def test_a_sequence_too_short_to_tell_chaos_from_slow_growth_is_not_called_chaotic():
    found = verdict(*linear(1.05), noise(60))
    assert (found.regime, found.contracting) == ("exploding", False)
    assert "too little to tell chaos from slow growth" in " ".join(found.evidence)


def test_a_gradient_longer_than_chaos_allows_is_called_unreliable():
    cell = Rate(128, 3.0)
    found = verdict(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 400, 0)), horizon=200)
    assert found.regime == "chaotic"
    assert not found.reliable
    assert "belong to no trajectory" in " ".join(found.evidence)


def test_growth_before_decay_is_said_of_a_non_normal_map():
    cell = sj.VanillaRNN(1, 2, activation="identity")
    params = sj.VanillaParams(jnp.zeros((2, 1)), jnp.array([[0.9, 10.0], [0.0, 0.9]]), jnp.zeros(2))
    found = verdict(cell, params, noise(200), horizon=150)
    assert found.regime == "vanishing"
    assert any("largest at lag 9" in line and "38.7" in line for line in found.evidence)


def test_an_open_forget_gate_is_stable_where_a_shut_one_vanishes_first_in_h():
    def lstm(b):
        cell = sj.LSTM(1, 3, forget_bias=b)
        params = cell.init(jax.random.key(0))
        return cell, params._replace(W_xh=0 * params.W_xh, W_hh=0 * params.W_hh)

    shut, open_ = verdict(*lstm(0.0), noise(60)), verdict(*lstm(8.0), noise(60))
    assert (shut.regime, shut.block, shut.lag) == ("vanishing", "h", 7.0)  # 0.5^7 < 0.01
    assert open_.regime == "stable"


def test_a_trajectory_that_is_not_finite_is_said_so():
    found = verdict(*linear(1.2), noise(60).at[0, 30].set(jnp.nan))
    assert (found.regime, found.reliable) == ("unknown", False)
    assert "sequence 0" in " ".join(found.evidence)
    assert "step 31" in " ".join(found.evidence)


@pytest.mark.parametrize("name", ["stack", "user", "linen-gru", "equinox-lstm", "learned"])
def test_it_speaks_of_any_cell(name):
    params, xs = drawn(EVERY[name], "float32", time=30)
    found = verdict(EVERY[name], params, xs)
    assert found.regime in ("vanishing", "stable", "exploding", "chaotic")
    assert len(found.advice) >= 1
    assert len(found.evidence) >= 2
    assert str(found).startswith(found.summary)


def test_a_mask_cuts_what_it_measures():
    cell, params = linear(0.8)
    xs = noise(80)
    mask = sj.length_mask([60, 60], 80)
    found = verdict(cell, params, xs.at[:, 60:].set(jnp.nan), mask=mask)
    assert found.reliable
    np.testing.assert_allclose(found.exponents.exponents, math.log(0.8), atol=1e-5)


def test_too_long_a_horizon_is_refused():
    with raises(ValueError, "expected a horizon from 0 to T = 20", "got 50"):
        verdict(*linear(0.8), noise(20), horizon=50)
