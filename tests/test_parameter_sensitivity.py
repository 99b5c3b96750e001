"""Parameter sensitivity against `jax.jacfwd` of the whole sequence, closed forms, and gradients by step."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY
from errors import raises
from oracles import MASK, RESET, drawn, drawn_states, weighted

import seqjax as sj
from seqjax.analysis._leaves import floating_leaves

LONG = 2000
FLAGS = dict(mask=MASK, reset=RESET)


@functools.partial(jax.jit, static_argnames="cell")
def by_jax(cell, params, xs, **options):
    """ds_t/dtheta of every leaf, (batch, time, n, *leaf)."""

    def states(params):
        leaves = jax.tree.leaves(sj.trajectory(cell, params, xs, **options))
        return jnp.concatenate([leaf[:, 1:].reshape(*xs.shape[:2], -1) for leaf in leaves], axis=-1)

    return jax.jacfwd(states)(params)


def linear(w):
    """h_t = w h_{t-1} + x_t + b on inputs of zero, so h_t = 0, and its parameters."""
    cell = sj.VanillaRNN(1, 1, activation="identity")
    params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=w * jnp.eye(1), b_h=jnp.zeros(1))
    return cell, params, jnp.zeros((1, LONG, 1))


def last(outputs):
    return outputs[:, -1].sum()


@functools.partial(jax.jit, static_argnames="cell")
def by_step(cell, params, xs, **options):
    return sj.weight_gradients_by_step(cell, params, xs, weighted, **options)


@pytest.mark.parametrize(("name", "given"), [("lstm", True), ("learned", False), ("linen-gru", False)])
def test_every_columns_norm_is_that_of_jax(name, given, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params)) if given else FLAGS
    result = sj.analysis.parameter_sensitivity(cell, params, xs, **options)
    expected = floating_leaves(by_jax(cell, params, xs, **options))
    assert result.log_norm.keys() == expected.keys()
    for name, S in expected.items():
        norm = np.linalg.norm(np.asarray(S).reshape(*xs.shape[:2], -1), axis=-1)
        np.testing.assert_allclose(np.exp(result.log_norm[name]), norm, rtol=1e-9, atol=1e-12, err_msg=name)
    assert (result.exact, result.probes, result.reliable, result.reason, result.share) == (True, 0, True, "", None)


def test_random_combinations_have_the_same_mean_square():
    cell = EVERY["vanilla"]
    params, xs = drawn(cell, "float32")
    exact = sj.analysis.parameter_sensitivity(cell, params, xs)
    result = sj.analysis.parameter_sensitivity(cell, params, xs, probes=2000)
    assert (result.exact, result.probes) == (False, 2000)
    for name, log_norm in result.log_norm.items():
        norm = np.exp(exact.log_norm[name])
        np.testing.assert_allclose(np.exp(log_norm), norm, rtol=4 / math.sqrt(2 * 2000), err_msg=name)


def test_too_many_columns_are_probed(monkeypatch):
    monkeypatch.setattr("seqjax.analysis.sensitivity.EXACT", 10)
    cell, params, xs = linear(0.5)
    result = sj.analysis.parameter_sensitivity(cell, params, xs[:, :3])
    assert (result.exact, result.probes) == (True, 0)
    cell = sj.VanillaRNN(1, 2)
    result = sj.analysis.parameter_sensitivity(cell, cell.init(jax.random.key(0)), jnp.ones((1, 3, 1)))
    assert (result.exact, result.probes) == (False, 16)


def test_an_exploding_sensitivity_does_not_overflow():
    w = np.float64(np.float32(1.2))
    cell, params, xs = linear(1.2)  # overflows after 487 steps
    result = sj.analysis.parameter_sensitivity(cell, params, xs, loss=last)
    t = np.arange(1, LONG + 1)
    expected = t * math.log(w) + np.log1p(-(w**-t)) - math.log(w - 1)  # ln of (w^t - 1) / (w - 1)
    np.testing.assert_allclose(result.log_norm["b_h"][0], expected, rtol=1e-5, atol=1e-5)
    assert (result.log_norm["W_hh"] == -np.inf).all()  # h is 0
    assert result.reliable
    shares = (w - 1) * w**-t  # of w^(T-t) / |sum|
    np.testing.assert_allclose(result.share["b_h"], shares, rtol=1e-4, atol=1e-30)
    assert (result.share["W_hh"] == 0).all()


def test_a_vanishing_sensitivity_does_not_underflow_and_a_reset_restarts_it():
    inner, params, xs = linear(0.5)
    cell = sj.LearnedState(inner)
    params = sj.LearnedStateParams(params, sj.VanillaState(jnp.ones(1)))
    reset = (jnp.arange(LONG) == 1500)[None]
    result = sj.analysis.parameter_sensitivity(cell, params, xs, reset=reset)
    since = np.arange(1, LONG + 1) - np.where(np.arange(LONG) >= 1500, 1500, 0)
    np.testing.assert_allclose(result.log_norm["state.h"][0], since * math.log(0.5), rtol=1e-6)
    assert result.log_norm["state.h"][0, 1499] < -1000  # far below the smallest float
    np.testing.assert_allclose(np.exp(result.log_norm["cell.b_h"][0]), 2 - 0.5 ** (since - 1.0), rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("lstm", {}), ("learned", FLAGS)], ids=["plain", "flags"])
def test_shares_are_those_of_the_gradients_by_step_and_sum_to_one(name, options, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    result = sj.analysis.parameter_sensitivity(cell, params, xs, loss=weighted, **options)
    gradients = floating_leaves(by_step(cell, params, xs, **options))
    assert result.share.keys() == gradients.keys()
    for name, g in gradients.items():
        g = np.asarray(g).reshape(len(g), -1)
        whole = g.sum(0)
        np.testing.assert_allclose(result.share[name], g @ whole / (whole @ whole), rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(result.share[name].sum(), 1, rtol=1e-12)


def test_the_reason_names_the_leaf_that_is_not_finite():
    cell, params, xs = linear(0.5)
    result = sj.analysis.parameter_sensitivity(cell, params, xs.at[0, 3].set(jnp.nan), loss=last)
    assert not result.reliable
    assert result.reason.startswith("|ds/dW_xh| is not finite; |ds/dW_hh| is not finite")
    assert np.isfinite(result.log_norm["b_h"]).all()  # 1, whatever the state


def test_integer_parameters_are_ignored():
    class Counted:
        input_shape = ()

        def init(self, key):
            return {"w": jnp.array(0.5), "delay": jnp.array(2)}

        def initial_state(self, params):
            return jnp.zeros_like(params["w"])

        def step(self, params, h, x):
            h = params["w"] * h + x
            return h, h

    cell = Counted()
    result = sj.analysis.parameter_sensitivity(cell, cell.init(None), jnp.ones((1, 3)), loss=last)
    assert list(result.log_norm) == list(result.share) == ["w"]
    np.testing.assert_allclose(np.exp(result.log_norm["w"][0]), [0, 1, 2], atol=1e-6)  # d(1 + w + w^2)/dw = 1 + 2 w
    np.testing.assert_allclose(result.share["w"], [0, 0.25, 0.75], atol=1e-6)


def test_bad_input_raises_with_a_hint():
    cell, params, xs = linear(0.5)
    with raises(ValueError, "expected a positive number of probes, got 0"):
        sj.analysis.parameter_sensitivity(cell, params, xs, probes=0)
    with raises(ValueError, "expected at least one step, got none"):
        sj.analysis.parameter_sensitivity(cell, params, xs[:, :0])
    with raises(ValueError, "expected xs (batch, time, 1), got (1, 2000)"):
        sj.analysis.parameter_sensitivity(cell, params, xs[..., 0])
