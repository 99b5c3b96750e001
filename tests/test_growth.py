"""The growth of frames and of gradients under jit, vmap and grad, against closed forms, products and differences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, D, N, Sized
from errors import raises
from oracles import BATCH, MASK, RESET, TIME, drawn, drawn_states, like

import seqjax as sj
from seqjax.analysis import frame_growth, lag_growth


@dataclasses.dataclass(frozen=True)
class Henon:
    """x <- 1 - a x^2 + y, y <- b x, whose Jacobian has the determinant -b at every step."""

    def init(self, key):
        return {"a": jnp.array(1.4), "b": jnp.array(0.3)}

    def initial_state(self, params):
        return jnp.stack([jnp.zeros_like(params["a"])] * 2)

    def step(self, params, s, _):
        s = jnp.stack([1 - params["a"] * s[0] ** 2 + s[1], params["b"] * s[0]])
        return s, s


@dataclasses.dataclass(frozen=True)
class Alternating:
    """h <- a h at even counts of steps and h <- a^2 h at odd ones, with the count in the state."""

    def init(self, key):
        return jnp.array(0.5)

    def initial_state(self, a):
        return {"h": jnp.ones_like(a)[None], "count": jnp.array(0)}

    def step(self, a, s, x):
        gain = jnp.where(s["count"] % 2 == 0, a, a**2)
        return {"h": gain * s["h"] + x, "count": s["count"] + 1}, s["h"]


class Counting(Sized):
    """h <- tanh(W h + U x), which counts how often its step is traced."""

    traces = 0

    def step(self, params, h, x):
        Counting.traces += 1
        h = jnp.tanh(params["W"] @ h + params["U"] @ x)
        return h, h


def scaled_rotation(g, n=4):
    """h <- g Q h with Q orthogonal."""
    Q = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0], g.dtype)
    zeros = jnp.zeros((n, 1), g.dtype)
    return sj.VanillaRNN(1, n, activation="identity"), sj.VanillaParams(zeros, g * Q, zeros[:, 0])


def zeros(g, time):
    return jnp.zeros((1, time, 1), g.dtype)


def orthonormal_rows(batch, k, n):
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(batch, n, k)))[0]
    return jnp.asarray(np.swapaxes(Q, 1, 2))


def moved(params, direction, h):
    return jax.tree.map(lambda a, b: a + h * b, params, direction)


def assert_is_the_slope(value, params, h=1e-5, rtol=1e-6):
    """The gradient of a jitted function of the parameters against central differences in a random direction."""
    direction = like(params, "float64", 9)
    slopes = jax.tree.map(jnp.vdot, jax.jit(jax.grad(value))(params), direction)
    value = jax.jit(value)
    expected = (value(moved(params, direction, h)) - value(moved(params, direction, -h))) / (2 * h)
    np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), expected, rtol)


@pytest.mark.parametrize("name", ["lstm", "user"])
def test_the_blocks_of_a_frame_are_the_factors_of_the_products_of_jacobians(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params), mask=MASK)
    steps = np.asarray(sj.analysis.step_jacobians(cell, params, xs, **options).by_state)
    frame = orthonormal_rows(BATCH, 3, steps.shape[-1])
    growth = frame_growth(cell, params, xs, every=4, frame=frame, **options)
    assert growth.log_growth.shape == (BATCH, 2, 3)
    for b in range(BATCH):
        V = np.asarray(frame[b]).T
        for block, J in enumerate((steps[b, :4], steps[b, 4:])):
            for J_t in J:
                V = J_t @ V
            V, R = np.linalg.qr(V)
            V *= np.sign(np.diagonal(R))
            np.testing.assert_allclose(growth.log_growth[b, block], np.log(np.abs(np.diagonal(R))), atol=1e-9)
        np.testing.assert_allclose(growth.frame[b], V.T, atol=1e-9)
    np.testing.assert_array_equal(growth.steps, np.stack([MASK[:, :4].sum(1), MASK[:, 4:].sum(1)], 1))
    final = sj.unroll(cell, params, xs, **options)[0]
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-12), growth.state, final)


def test_the_exponents_are_those_of_lyapunov_exponents(x64):
    cell = EVERY["lstm"]
    params, xs = drawn(cell, "float64")
    options = dict(k=3, state=drawn_states(cell, params), mask=MASK, reset=RESET)
    growth = jax.jit(lambda params, mask: frame_growth(cell, params, xs, **options | {"mask": mask}))(params, MASK)
    expected = sj.lyapunov_exponents(cell, params, xs, burn_in=0, frame_burn_in=0, **options)
    np.testing.assert_array_equal(growth.steps.sum(1), expected.steps)
    np.testing.assert_allclose(-np.sort(-growth.exponents, axis=1), expected.exponents, atol=1e-9)


def test_growth_rates_and_their_slopes_are_those_of_the_gain_for_every_gain_of_an_ensemble(dtype):
    gains = jnp.array([0.8, 1.25], dtype)

    def exponents(g):
        cell, params = scaled_rotation(g)
        rates = frame_growth(cell, params, zeros(g, 30), k=3, every=7).exponents[0]
        return rates, rates

    def by_lag(g):
        cell, params = scaled_rotation(g)
        log_norms = lag_growth(cell, params, zeros(g, 30), lags=20, times=[20, 30])[0, 1]
        return log_norms, log_norms

    tolerance = 1e-5 if dtype == "float32" else 1e-12
    slopes, rates = jax.jit(jax.vmap(jax.jacrev(exponents, has_aux=True)))(gains)
    assert rates.dtype == slopes.dtype == dtype
    gains = np.asarray(gains)
    np.testing.assert_allclose(rates, np.log(np.stack([gains] * 3, 1)), tolerance)
    np.testing.assert_allclose(slopes, 1 / np.stack([gains] * 3, 1), tolerance)
    slopes, log_norms = jax.jit(jax.vmap(jax.jacfwd(by_lag, has_aux=True)))(jnp.asarray(gains))
    assert log_norms.dtype == slopes.dtype == dtype
    np.testing.assert_allclose(log_norms, np.outer(np.log(gains), np.arange(21)), tolerance, 1e-6)
    np.testing.assert_allclose(slopes, np.outer(1 / gains, np.arange(21)), tolerance)


def test_the_henon_map_has_the_published_exponents(x64):
    cell = Henon()
    starts = jnp.asarray(np.random.default_rng(0).uniform(-0.1, 0.1, (256, 2)))
    burn_in = frame_growth(cell, cell.init(None), jnp.zeros((256, 100, 0)), state=starts)
    growth = frame_growth(cell, cell.init(None), jnp.zeros((256, 1000, 0)), state=burn_in.state, frame=burn_in.frame)
    # Sprott 2003, "Chaos and Time-Series Analysis"; the standard error over the 256 trajectories is 0.0007
    np.testing.assert_allclose(growth.exponents.mean(0), [0.41922, -1.62319], atol=3e-3)
    np.testing.assert_allclose(growth.exponents.sum(1), np.log(0.3), atol=1e-12)


def test_the_slopes_of_the_henon_map_are_those_of_differences_and_of_its_determinant(x64):
    cell = Henon()
    params = cell.init(None)

    def exponents(params):
        return frame_growth(cell, params, jnp.zeros((1, 20, 0))).exponents[0]

    slopes = jax.jit(jax.jacfwd(exponents))(params)
    assert slopes["b"].sum() == pytest.approx(1 / 0.3, rel=1e-8)
    assert slopes["a"].sum() == pytest.approx(0, abs=1e-8)
    assert_is_the_slope(lambda params: exponents(params)[0], params, h=1e-7)


@pytest.mark.parametrize("name", ["gru-before", "linen-lstm"])
def test_the_slopes_are_those_of_differences(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")

    def both(params):  # one function, because compilation takes nearly all the time
        growth = frame_growth(cell, params, xs, k=2, every=4, mask=MASK, reset=RESET)
        log_norms = lag_growth(cell, params, xs, lags=2, times=[2], mask=MASK)
        return growth.exponents[:, 0].mean() + log_norms[..., 1:].mean()

    assert_is_the_slope(both, params)


def test_an_ensemble_has_the_numbers_of_its_members(x64):
    cell = sj.LSTM(D, N)
    members = [drawn(cell, "float64", seed=seed) for seed in range(3)]
    params, xs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def both(params, xs):
        growth = frame_growth(cell, params, xs, k=3)
        return growth, growth.exponents, lag_growth(cell, params, xs, lags=4)

    together, one_by_one = jax.vmap(both)(params, xs), [both(*member) for member in members]
    for i, member in enumerate(one_by_one):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=1e-12), together, member)  # noqa: B023
    np.testing.assert_allclose(together[0].exponents, together[1], atol=1e-12)


def test_a_run_continues_from_the_state_and_the_frame_that_it_returned(x64):
    cell = sj.LSTM(D, N)
    params, xs = drawn(cell, "float64", time=12)
    run = jax.jit(lambda xs, state, frame: frame_growth(cell, params, xs, every=3, frame=frame, state=state))
    whole = frame_growth(cell, params, xs, k=8, every=3)
    first = frame_growth(cell, params, xs[:, :6], k=8, every=3)
    second = run(xs[:, 6:], first.state, first.frame)
    log_growth = np.concatenate([first.log_growth, second.log_growth], axis=1)
    np.testing.assert_allclose(log_growth, whole.log_growth, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), second[2:], whole[2:])


def test_a_counter_in_the_state_continues_too():
    cell, a = Alternating(), jnp.array(0.5)
    first = frame_growth(cell, a, jnp.zeros((1, 3, 1)))
    second = frame_growth(cell, a, jnp.zeros((1, 2, 1)), state=first.state, frame=first.frame)
    assert int(first.state["count"][0]) == 3
    assert int(second.state["count"][0]) == 5
    log_growth = np.concatenate([first.log_growth, second.log_growth], axis=1)[0, :, 0]
    np.testing.assert_allclose(log_growth, np.log(0.5) * np.array([1, 2, 1, 2, 1]), 1e-6)
    slope = jax.grad(lambda a: frame_growth(cell, a, jnp.zeros((1, 4, 1))).exponents[0, 0])(a)
    assert slope == pytest.approx(1.5 / 0.5, rel=1e-6)  # of (1.5 ln a)


def test_states_in_bfloat16_continue_in_their_dtype_and_are_analysed_in_float32():
    cell = sj.GRU(D, N)
    params, xs = drawn(cell, "bfloat16")
    first = frame_growth(cell, params, xs, k=2)
    assert (first.state.h.dtype, first.log_growth.dtype) == (jnp.bfloat16, jnp.float32)
    second = frame_growth(cell, params, xs, state=first.state, frame=first.frame)
    assert np.isfinite(second.log_growth).all()


def test_equal_shapes_are_traced_once():
    cell = Counting(D, N)
    params, xs = drawn(cell, "float32")
    other = jax.tree.map(lambda leaf: leaf + 0.1, params)
    for function in (lambda p: frame_growth(cell, p, xs, k=2).log_growth, lambda p: lag_growth(cell, p, xs, lags=3)):
        for run in (function, jax.jit(jax.grad(lambda p: jnp.nanmean(function(p))))):  # noqa: B023
            run(params)
            traces = Counting.traces
            run(other)
            assert Counting.traces == traces


@pytest.mark.parametrize("name", ["lstm", "user", "linen-gru"])
def test_norms_by_lag_are_the_table_of_gradient_by_lag(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(times=[2, 3], state=drawn_states(cell, params), mask=MASK, reset=RESET)
    expected = sj.gradient_by_lag(cell, params, xs, horizon=3, **options).table
    got = jax.jit(lambda mask, reset: lag_growth(cell, params, xs, lags=3, **options | {"mask": mask, "reset": reset}))
    got = got(MASK, RESET)
    assert np.isneginf(got).any()  # a lag across a reset
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_large_states_are_estimated_from_random_gradients_at_the_times_of_gradient_by_lag(x64):
    n = 260
    cell, params = scaled_rotation(jnp.array(1.0), n)
    W = np.linspace(0.5, 1, n)[:, None] * np.asarray(params.W_hh)
    params, xs = params._replace(W_hh=jnp.asarray(W)), jnp.zeros((1, 14, 1))
    norms = [np.linalg.norm(np.linalg.matrix_power(W, k)) / np.sqrt(n) for k in range(4)]
    exact = lag_growth(cell, params, xs, lags=3, times=[14], frame=jnp.eye(n))
    np.testing.assert_allclose(exact[0, 0], np.log(norms), atol=1e-9)
    estimate = jax.jit(lambda params: lag_growth(cell, params, xs, lags=3))(params)
    times = np.unique(np.linspace(3, 14, 12).round())
    assert estimate.shape == (1, len(times), 4)
    np.testing.assert_allclose(estimate[0], np.stack([np.log(norms)] * len(times)), atol=0.1)
    assert not np.allclose(estimate[0, 0, 1:], np.log(norms)[1:], atol=1e-6)


def test_no_lag_is_too_long_for_float32_nor_is_its_slope():
    def last(g):
        cell, params = scaled_rotation(g)
        return lag_growth(cell, params, zeros(g, 2000), lags=2000, times=[2000])[0, 0, -1]

    value, slope = jax.jit(jax.value_and_grad(last))(jnp.array(0.8))
    assert value == pytest.approx(2000 * np.log(0.8), rel=1e-4)  # 0.8^2000 is 1e-194
    assert slope == pytest.approx(2000 / 0.8, rel=1e-4)


def test_a_lag_across_a_reset_has_no_gradient_and_no_slope():
    g = jnp.array(0.8)
    reset = jnp.zeros((1, 10), bool).at[0, 6].set(True)

    def log_norms(g):
        cell, params = scaled_rotation(g)
        return lag_growth(cell, params, zeros(g, 10), lags=10, times=[9], reset=reset)[0, 0]

    got, slopes = log_norms(g), jax.jacrev(log_norms)(g)
    np.testing.assert_allclose(got[:3], np.log(0.8) * np.arange(3), atol=1e-6)
    np.testing.assert_allclose(slopes[:3], np.arange(3) / 0.8, atol=1e-5)
    assert np.isneginf(got[3:10]).all()
    assert np.isnan(got[10])
    np.testing.assert_array_equal(slopes[3:], 0)


def test_each_sequence_may_have_its_own_times_and_those_that_it_does_not_have_are_nan():
    cell = sj.GRU(D, N)
    params, xs = drawn(cell, "float32")
    lengths = MASK.sum(1)
    times = np.stack([lengths, lengths + 1, 0 * lengths], axis=1)
    got = jax.jit(lambda times: lag_growth(cell, params, xs, lags=2, times=times, mask=MASK))(times)
    for b, length in enumerate(lengths):
        at_end = lag_growth(cell, params, xs, lags=2, times=[int(length)], mask=MASK)[b, 0]
        np.testing.assert_allclose(got[b, 0], at_end, 1e-6)
    assert np.isnan(got[:, 1:]).all()


def test_arguments_that_do_not_fit_are_refused():
    cell = sj.GRU(D, N)
    params, xs = drawn(cell, "float32")
    frame = orthonormal_rows(BATCH, 2, N).astype(jnp.float32)
    with raises(ValueError, "every", "got 0"):
        frame_growth(cell, params, xs, every=0)
    with raises(ValueError, "k from 1 to the 4", "got 5"):
        frame_growth(cell, params, xs, k=5)
    with raises(ValueError, "(2, 2, 4)", "got (1, 2, 4)"):
        frame_growth(cell, params, xs, frame=frame[:1])
    with raises(ValueError, "(2, 3, 4)", "got (2, 2, 4)"):
        frame_growth(cell, params, xs, k=3, frame=frame)
    with raises(TypeError, "float32", "got float16"):
        frame_growth(cell, params, xs, frame=frame.astype(jnp.float16))
    with raises(ValueError, "T = 0"):
        frame_growth(cell, params, xs[:, :0])
    with raises(ValueError, "T = 0"):
        lag_growth(cell, params, xs[:, :0], lags=0)
    with raises(ValueError, f"lags from 0 to T = {TIME}", "got 7"):
        lag_growth(cell, params, xs, lags=7)
    with raises(ValueError, f"times from 1 to T = {TIME}", "[7]"):
        lag_growth(cell, params, xs, lags=1, times=[7])
    with raises(ValueError, "batch = 2", "got (1, 1)"):
        lag_growth(cell, params, xs, lags=1, times=jnp.array([[1]]))
    with raises(ValueError, "n = 4", "got (2, 2, 4)"):
        lag_growth(cell, params, xs, lags=1, frame=frame)
