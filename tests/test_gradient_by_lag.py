"""Gradients by lag against products in float64, and against closed forms far outside the range of float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY
from errors import raises
from oracles import MASK, RESET, TIME, drawn, drawn_states

import seqjax as sj


def linear(W, dtype="float32"):
    """h_t = W h_{t-1}, and its parameters."""
    W = jnp.asarray(W, dtype)
    n = len(W)
    return sj.VanillaRNN(1, n, activation="identity"), sj.VanillaParams(
        jnp.zeros((n, 1), dtype), W, jnp.zeros(n, dtype)
    )


def squares(states):
    """A loss with a direct gradient at every state."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(states))


def logarithm(values):
    with np.errstate(divide="ignore"):
        return np.log(values)


def products(J, times, lags):
    """ds_t/ds_{t-k} for every sequence, time and lag, None before the beginning and after the end."""

    def product(J, t, k):
        return functools.reduce(np.matmul, [J[s - 1] for s in range(t, t - k, -1)], np.eye(J[0].shape[-1]))

    return [[[product(row, t, k) if k <= t <= len(row) else None for k in lags] for t in times] for row in J]


def of_valid_steps(J, mask):
    """The Jacobian of every valid step of a sequence, times those of the held steps before it, which may reset."""
    steps, before = [], np.eye(J.shape[-1])
    for J_t, valid in zip(J, mask, strict=True):
        before = J_t @ before
        if valid:
            steps.append(before)
            before = np.eye(J.shape[-1])
    return steps


@pytest.mark.parametrize("name", ["lstm", "user", "linen-gru"])
def test_norms_by_lag_are_those_of_the_products_of_jacobians(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params), mask=MASK, reset=RESET)
    steps = sj.analysis.step_jacobians(cell, params, xs, **options)
    J = [of_valid_steps(*row) for row in zip(np.asarray(steps.by_state), np.asarray(MASK), strict=True)]
    K, n = max(map(len, J)), steps.by_state.shape[-1]
    assert K < TIME  # both rows have held steps
    times = [2, K]
    result = sj.analysis.gradient_by_lag(cell, params, xs, horizon=K, times=times, **options)
    expected = products(J, times, result.lags)
    assert result.exact
    assert result.reliable
    np.testing.assert_array_equal(result.lags, np.arange(K + 1))

    squares = {name: np.full((2, 2, K + 1), np.nan) for name in ("all", *steps.parts)}
    for b, i, k in np.ndindex(2, 2, K + 1):
        if (M := expected[b][i][k]) is not None:
            squares["all"][b, i, k] = np.sum(M**2) / n
            for part, where in steps.parts.items():
                squares[part][b, i, k] = np.sum(M[:, where] ** 2) / n
    np.testing.assert_allclose(result.table, logarithm(squares["all"]) / 2, atol=1e-9)
    np.testing.assert_allclose(result.log_expected, logarithm(np.nanmean(squares["all"], (0, 1))) / 2, atol=1e-9)
    for part, log_norms in result.log_parts.items():
        np.testing.assert_allclose(log_norms, logarithm(np.nanmean(squares[part], (0, 1))) / 2, atol=1e-9)
    worst = [max(np.linalg.norm(M[k], 2) for b in expected for M in b if M[k] is not None) for k in result.lags]
    np.testing.assert_allclose(result.log_worst, logarithm(worst), atol=1e-9)


def test_the_gradient_of_any_loss_is_that_of_state_gradients(dtype):
    cell = EVERY["stack"]
    params, xs = drawn(cell, dtype)
    options = dict(state=drawn_states(cell, params), mask=MASK)
    result = sj.analysis.gradient_by_lag(cell, params, xs, loss=squares, horizon=1, **options)
    expected = jax.jit(lambda p: sj.state_gradients(cell, p, xs, squares, **options))(params)
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(expected)]
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    log_norms = np.log(np.linalg.norm(np.concatenate(leaves, axis=-1), axis=-1))
    # The state after a valid step stays the same over held steps, and its gradient includes what arrives there.
    assert len(result.log_gradient_parts) == len(leaves)
    for b, row in enumerate(np.asarray(MASK)):
        at = np.flatnonzero(row)
        at = np.array([0, *(at + 1)])
        np.testing.assert_allclose(result.log_gradient[b, : len(at)], log_norms[b, at], atol=tolerance)
        assert np.isnan(result.log_gradient[b, len(at) :]).all()
        for log_part, leaf in zip(result.log_gradient_parts.values(), leaves, strict=True):
            part = np.log(np.linalg.norm(leaf[b], axis=-1))
            np.testing.assert_allclose(log_part[b, : len(at)], part[at], atol=tolerance)


@pytest.mark.parametrize(("gain", "power"), [(0.8, 0.011529215046), (1.2, 38.337599924)])
def test_an_orthogonal_network_scales_every_gradient_by_a_power_of_its_gain(gain, power, x64):
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    result = sj.analysis.gradient_by_lag(*linear(gain * Q, "float64"), jnp.ones((1, 30, 1)), horizon=20)
    for log_norms in (result.log_expected, result.log_worst):
        np.testing.assert_allclose(log_norms, np.arange(21) * np.log(gain), atol=1e-12)
        assert np.exp(log_norms[20]) == pytest.approx(power, rel=1e-10)
    np.testing.assert_allclose(result.log_gradient[0], np.arange(30, -1, -1) * np.log(gain), atol=1e-12)


@pytest.mark.parametrize("gain", [0.8, 1.2])
def test_no_lag_is_too_long_for_float32(gain):
    T = 20_000
    result = sj.analysis.gradient_by_lag(*linear([[gain]]), jnp.ones((1, T, 1)), horizon=T, times=[T])
    expected = np.arange(T + 1) * np.log(np.float64(np.float32(gain)))
    assert expected[1000] == pytest.approx(1000 * np.log(gain), rel=1e-6)
    for log_norms in (result.log_expected, result.log_worst, result.log_parts["h"], result.log_gradient[0, ::-1]):
        np.testing.assert_allclose(log_norms, expected, rtol=1e-6, atol=2e-3)
    assert result.horizon == (21 if gain < 1 else np.inf)


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.2])
def test_gradients_that_arrive_at_every_step_add_up_at_any_scale(gain):
    T = 5000
    result = sj.analysis.gradient_by_lag(*linear([[gain]]), jnp.ones((1, T, 1)), horizon=1, loss=lambda s: s.h.sum())
    rate = np.log(np.float64(np.float32(gain)))
    expected = np.logaddexp.accumulate(rate * np.arange(T))[::-1]  # of s_1..s_T: sum of gain^j for j = 0..T-t
    np.testing.assert_allclose(result.log_gradient[0, 1:], expected, rtol=1e-6, atol=1e-3)
    assert result.log_gradient[0, 0] == pytest.approx(expected[0] + rate, rel=1e-6)


def test_a_vanished_gradient_does_not_hide_a_direct_one():
    result = sj.analysis.gradient_by_lag(
        *linear([[0.5]]), jnp.ones((1, 2000, 1)), horizon=1, loss=lambda s: s.h[0, 1499, 0] + 1e-3 * s.h[0, 9, 0]
    )
    expected = np.full(2001, -np.inf)  # nothing arrives after step 1500
    expected[:1501] = np.log(0.5) * (1500 - np.arange(1501))
    expected[:11] = np.log(1e-3) + np.log(0.5) * (10 - np.arange(11))
    np.testing.assert_allclose(result.log_gradient[0], expected, rtol=1e-6)
    assert result.reliable


class TwoRates:
    """One number that halves at every step, and one that does not change."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return {"halves": jnp.zeros(()), "stays": jnp.zeros(())}

    def step(self, params, state, x):
        return {"halves": 0.5 * state["halves"] + x, "stays": state["stays"] + x}, x


def test_the_small_part_of_a_gradient_is_as_accurate_as_the_large_one():
    result = sj.analysis.gradient_by_lag(
        TwoRates(), {}, jnp.ones((1, 100)), loss=lambda s: sum(v.sum() for v in s.values())
    )
    expected = np.arange(101) * np.log(0.5) - np.log(2) / 2  # over sqrt(n), n = 2
    np.testing.assert_allclose(result.log_parts["halves"], expected, rtol=1e-6)
    np.testing.assert_allclose(result.log_parts["stays"], -np.log(2) / 2, rtol=1e-6)
    single = sj.analysis.gradient_by_lag(
        TwoRates(), {}, jnp.ones((1, 100)), loss=lambda s: s["halves"][0, -1] + s["stays"][0, -1]
    )
    np.testing.assert_allclose(single.log_gradient_parts["halves"][0], np.arange(100, -1, -1) * np.log(0.5), rtol=1e-6)


def test_a_matrix_of_small_radius_makes_gradients_grow_before_they_shrink(x64):
    result = sj.analysis.gradient_by_lag(*linear([[0.9, 10.0], [0.0, 0.9]], "float64"), jnp.ones((1, 100, 1)))
    worst = np.exp(result.log_worst)
    assert worst[1] == pytest.approx(10.0804, abs=1e-4)
    assert (np.argmax(worst), worst.max()) == (9, pytest.approx(38.746, abs=1e-3))
    assert worst[-1] < 0.1


@pytest.mark.slow
def test_the_worst_norm_of_a_large_network_is_its_spectral_norm():
    n = 120
    W = np.random.default_rng(0).normal(size=(n, n)) / np.sqrt(n)
    result = sj.analysis.gradient_by_lag(*linear(W), jnp.ones((1, 8, 1)), horizon=8)
    expected = [np.log(np.linalg.norm(np.linalg.matrix_power(W, k), 2)) for k in range(9)]
    np.testing.assert_allclose(result.log_worst, expected, atol=1e-3)


def test_values_before_the_beginning_are_nan():
    cell = sj.GRU(2, 3)
    result = sj.analysis.gradient_by_lag(
        cell, cell.init(jax.random.key(0)), jnp.ones((2, 12, 2)), horizon=9, times=[7, 3]
    )
    np.testing.assert_array_equal(np.isnan(result.table), np.broadcast_to(result.lags > [[[7], [3]]], (2, 2, 10)))
    np.testing.assert_array_equal(np.isnan(result.log_expected), result.lags > 7)
    np.testing.assert_array_equal(np.isnan(result.log_worst), result.lags > 7)
    np.testing.assert_array_equal(result.log_expected[4:8], result.table[0, 0, 4:8])  # of equal sequences, lag by lag
    assert result.times.tolist() == [[7, 3], [7, 3]]
    assert result.reliable


def test_the_horizon_is_where_the_expected_norm_stays_below_the_threshold():
    cell, params = linear([[0.5]])
    xs = jnp.ones((1, 30, 1))
    assert sj.analysis.gradient_by_lag(cell, params, xs).horizon == 7  # 0.5^6 > 0.01 > 0.5^7
    assert sj.analysis.gradient_by_lag(cell, params, xs, threshold=0.3).horizon == 2
    assert sj.analysis.gradient_by_lag(cell, params, xs, threshold=1e-20).horizon == np.inf
    assert sj.analysis.gradient_by_lag(cell, params, xs, times=[9], horizon=20).horizon == 7
    with raises(ValueError, "at least one valid step", "a mask that is False everywhere"):
        sj.analysis.gradient_by_lag(cell, params, xs, mask=np.zeros((1, 30), bool))
    reset = np.ones((1, 30), bool)
    assert sj.analysis.gradient_by_lag(cell, params, xs, reset=reset).horizon == 1
    assert np.isnan(sj.analysis.memory_horizon([np.nan, 0.0], 0.5))
    with raises(ValueError, "expected a positive threshold, got 0"):
        sj.analysis.memory_horizon([0.0], 0)


def test_padding_is_no_time_and_a_reset_ends_a_gradient():
    cell, params = linear([[0.5]])
    mask, reset = np.ones((2, 10), bool), np.zeros((2, 10), bool)
    mask[0, 6:], reset[1, 3] = False, True
    xs = np.where(mask[..., None], 1.0, np.nan).astype(np.float32)
    result = sj.analysis.gradient_by_lag(cell, params, xs, mask=mask, reset=reset, times=[6, 10], horizon=10)
    steps = np.arange(11)
    np.testing.assert_allclose(result.table[0, 0], np.where(steps > 6, np.nan, np.log(0.5) * steps), rtol=1e-6)
    assert np.isnan(result.table[0, 1, 1:]).all()
    np.testing.assert_allclose(result.table[1, 1], np.where(steps > 6, -np.inf, np.log(0.5) * steps), rtol=1e-6)
    np.testing.assert_allclose(result.log_gradient[0, :7], result.table[0, 0, 6::-1], rtol=1e-6)
    assert np.isnan(result.log_gradient[0, 7:]).all()
    np.testing.assert_allclose(result.log_gradient[1], result.table[1, 1, ::-1], rtol=1e-6)
    assert result.reliable


@pytest.mark.slow
def test_random_gradients_estimate_the_exact_norms():
    n = 150
    cell = sj.VanillaRNN(1, n, recurrent_init=sj.SpectralRadius(0.9))
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 12, 1))
    exact = sj.analysis.gradient_by_lag(cell, params, xs, times=[12])
    probed = sj.analysis.gradient_by_lag(cell, params, xs, times=[12], exact=False)
    assert (exact.exact, probed.exact) == (True, False)
    np.testing.assert_allclose(probed.log_expected, exact.log_expected, atol=0.15)
    assert (probed.log_worst <= exact.log_worst + 1e-3).all()
    np.testing.assert_allclose(probed.log_gradient, exact.log_gradient, atol=1e-5)


def test_tokens_need_only_derivatives_above_the_embedding():
    cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.GRU(4, 2)])
    result = sj.analysis.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.arange(16).reshape(2, 8) % 5)
    assert list(result.log_parts) == list(result.log_gradient_parts) == ["1.h", "1.c", "2.h"]
    assert np.isfinite(result.log_expected).all()
    assert result.log_expected[0] == pytest.approx(0, abs=1e-6)


class Root:
    """h_t = sqrt(h_{t-1} + x_t): at zero it is finite but has no derivative."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.ones(2)

    def step(self, params, h, x):
        return jnp.sqrt(h * x), h


def test_the_reason_names_the_step_that_is_not_finite():
    cell, params = linear([[1e30]])
    state = sj.VanillaState(jnp.ones((2, 1)).at[0].set(0))
    result = sj.analysis.gradient_by_lag(cell, params, jnp.ones((2, 5, 1)), state=state)
    assert not result.reliable
    assert result.reason == "sequence 1: the state is not finite from step 2 on: it exceeds the range of float32"
    xs = (
        jnp.ones((1, 6, 2)).at[0, 3].set(0)
    )  # the state is zero from the fourth step, and the root has no derivative there
    result = sj.analysis.gradient_by_lag(Root(), {}, xs)
    assert not result.reliable
    assert result.reason == "sequence 0: the gradient is not finite by the state after step 5 and before"
    assert np.isnan(result.horizon)


def test_bad_arguments_raise_with_a_hint():
    cell, params = linear([[0.5]])
    xs = jnp.ones((1, 6, 1))
    for horizon in (7, -1, 2.5, True):
        with raises(ValueError, "expected a horizon from 0 to T = 6 steps", f"got {horizon}"):
            sj.analysis.gradient_by_lag(cell, params, xs, horizon=horizon)
    for times in ([0], [7], []):
        with raises(ValueError, "expected times from 1 to T = 6", f"got {times}"):
            sj.analysis.gradient_by_lag(cell, params, xs, times=times)
    with raises(ValueError, "at least one step", "got T = 0"):
        sj.analysis.gradient_by_lag(cell, params, xs[:, :0])
    with raises(ValueError, "at least one sequence"):
        sj.analysis.gradient_by_lag(cell, params, xs[:0])
    with raises(ValueError, "expected a positive threshold"):
        sj.analysis.gradient_by_lag(cell, params, xs, threshold=0.0)


def test_gradients_beyond_the_predictable_time_of_chaos_are_unreliable():
    cell = sj.VanillaRNN(1, 64, recurrent_init=sj.Orthogonal(4.0))
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 100, 1))
    short, long = (sj.gradient_by_lag(cell, params, xs, horizon=K, times=[100]) for K in (5, 100))
    assert short.reliable
    assert not long.reliable
    lost = int(np.flatnonzero(long.log_worst > -np.log(np.finfo(np.float32).eps))[0])
    assert f"within {lost} steps rounding errors of float32 grow as large as the state" in long.reason


def test_growing_gradients_of_a_linear_map_are_reliable():
    cell = sj.VanillaRNN(1, 4, activation="identity", recurrent_init=sj.Orthogonal(2.0))
    result = sj.gradient_by_lag(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 100, 1)), times=[100])
    assert result.reliable
    np.testing.assert_allclose(result.log_expected[-1], 100 * np.log(2), rtol=1e-5)
