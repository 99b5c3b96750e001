"""Lyapunov exponents against closed forms, published figures, and a loop of QRs in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, D
from errors import raises
from oracles import drawn
from scipy.special import psi

import seqjax as sj
from seqjax.analysis._flow import random_frame
from seqjax.analysis._statistics import bootstrap_interval


class Map:
    """s <- f(s), a cell without parameters or inputs."""

    def __init__(self, function, start):
        self.function, self.start = function, start

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.asarray(self.start)

    def step(self, params, s, x):
        s = self.function(s)
        return s, s


class Matrices:
    """s <- x s, so that the inputs are the Jacobians; the parameters are the initial state."""

    def init(self, key):
        return jnp.zeros(2)

    def initial_state(self, params):
        return params

    def step(self, params, s, x):
        return x @ s, s


class TanhNet:
    """x <- W tanh(x)."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return params["x"]

    def step(self, params, x, _):
        x = params["W"] @ jnp.tanh(x)
        return x, x


MATRICES, TANH_NET = Matrices(), TanhNet()


def exponents_of(J, **options):
    """The exponents for the Jacobians J (batch, time, n, n)."""
    J = jnp.asarray(J)
    return sj.analysis.lyapunov_exponents(MATRICES, jnp.zeros(J.shape[-1], J.dtype), J, **options)


def constant(W, time, dtype="float32"):
    """The same Jacobian at every step."""
    return np.broadcast_to(np.asarray(W, dtype), (1, time, *np.shape(W)))


def symmetric(eigenvalues, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return Q * np.asarray(eigenvalues) @ Q.T


def tanh_net(n, g, seed=0, dtype="float64"):
    random = np.random.default_rng(seed)
    return {
        "W": jnp.asarray(random.normal(size=(n, n)) * g / np.sqrt(n), dtype),
        "x": jnp.asarray(random.normal(size=n), dtype),
    }


def sigmoid(b):
    return 1 / (1 + np.exp(-b))


@pytest.mark.parametrize("gain", [0.8, 1.2])
def test_every_exponent_of_an_orthogonal_network_is_the_logarithm_of_its_gain(gain, x64):
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    params = sj.VanillaParams(jnp.zeros((5, 1)), jnp.asarray(gain * Q), jnp.zeros(5))
    cell = sj.VanillaRNN(1, 5, activation="identity")
    result = sj.analysis.lyapunov_exponents(cell, params, jnp.ones((1, 200, 1)))
    np.testing.assert_allclose(result.exponents, np.full((1, 5), np.log(gain)), atol=1e-12)
    np.testing.assert_allclose((result.low, result.high), np.full((2, 1, 5), np.log(gain)), atol=1e-12)
    np.testing.assert_allclose(result.split_half, 0, atol=1e-12)
    assert result.reliable.all()
    assert result.kaplan_yorke[0] == (0 if gain < 1 else 5)
    assert result.entropy_rate[0] == pytest.approx(max(0, 5 * np.log(gain)), abs=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru-before", "stack", "user", "linen-gru"])
def test_all_exponents_sum_to_the_mean_logarithm_of_the_determinant(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64", time=60)
    steps = np.asarray(sj.analysis.step_jacobians(cell, params, xs).by_state)[:, 20:]
    result = sj.analysis.lyapunov_exponents(cell, params, xs, k=steps.shape[-1], burn_in=10, frame_burn_in=10)
    np.testing.assert_allclose(result.exponents.sum(1), np.linalg.slogdet(steps)[1].mean(1), atol=1e-9)
    assert (np.diff(result.exponents, axis=1) <= 0).all()
    assert result.reliable.all()


def test_the_mean_exponent_of_a_tanh_network_is_that_of_its_weights_and_slopes(x64):
    cell = sj.VanillaRNN(D, 6, dtype="float64")
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 300, D))
    result = sj.analysis.lyapunov_exponents(cell, params, xs, burn_in=50, frame_burn_in=50)
    slopes = 1 - np.asarray(sj.trajectory(cell, params, xs).h[:, 101:]) ** 2
    expected = np.linalg.slogdet(params.W_hh)[1] / 6 + np.log(slopes).mean((1, 2))
    np.testing.assert_allclose(result.exponents.mean(1), expected, atol=1e-10)


@pytest.mark.parametrize(
    "expected", [[-0.635181], [-0.288608, -0.981755], [-0.135181, -0.328329, -0.635181, -1.328329]]
)
def test_independent_gaussian_jacobians_have_the_spectrum_of_newman(expected):
    n = len(expected)
    np.testing.assert_allclose((np.log(2 / n) + psi((n - np.arange(n)) / 2)) / 2, expected, atol=1e-6)
    J = np.random.default_rng(n).normal(size=(8, 4000, n, n)) / np.sqrt(n)
    result = exponents_of(J.astype(np.float32))
    np.testing.assert_allclose(result.mean, expected, atol=0.02)
    assert (result.low <= expected).mean() > 0.8
    assert (expected <= result.high).mean() > 0.8
    assert not result.singular.any()


def test_an_lstm_without_weights_forgets_by_its_forget_gate_and_its_hidden_state_at_once(dtype):
    cell = sj.LSTM(1, 4, dtype=dtype)
    for bias, expected in ((0, -0.693147), (1, -0.313262), (5, -0.006715)):
        params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        params = params._replace(b_h=params.b_h.at[4:8].set(bias))
        result = sj.analysis.lyapunov_exponents(cell, params, jnp.ones((1, 100, 1), dtype))
        assert expected == pytest.approx(np.log(sigmoid(bias)), abs=1e-6)
        np.testing.assert_allclose(result.exponents[0, :4], expected, atol=2e-6)
        assert np.isneginf(result.exponents[0, 4:]).all()
        assert result.singular.tolist() == [[False] * 4 + [True] * 4]
        assert "4 of 8 exponents are minus infinity" in result.reason
        assert result.reliable.all()
        assert (result.kaplan_yorke[0], result.entropy_rate[0], result.reliable[0]) == (0, 0, True)


def test_a_gru_without_weights_forgets_by_its_update_gate(x64):
    cell = sj.GRU(1, 3, dtype="float64")
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    params = params._replace(b_h=params.b_h.at[3:6].set(2))
    result = sj.analysis.lyapunov_exponents(cell, params, jnp.ones((1, 50, 1)))
    np.testing.assert_allclose(result.exponents, np.full((1, 3), np.log(sigmoid(2))), atol=1e-12)


def test_printing_names_the_value_its_interval_and_whether_it_is_reliable():
    J = np.concatenate([constant(0.5 * np.eye(2), 50), constant(0.8 * np.eye(2), 50)], axis=1)
    said = str(exponents_of(np.concatenate([constant(0.5 * np.eye(2), 100), J]), burn_in=0, frame_burn_in=0))
    first, second, reason = said.splitlines()
    assert first == (
        "sequence 0: largest exponent -0.6931 nats per step (-0.6931 to -0.6931), smallest of 2 -0.6931, over 100 "
        "steps, reliable"
    )
    assert second.endswith("not reliable")
    assert "halves" in reason


def test_the_henon_map(x64):
    cell = Map(lambda s: jnp.stack([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]]), [0.1, 0.1])
    result = sj.analysis.lyapunov_exponents(cell, {}, jnp.zeros((1, 200_000, 0)))
    np.testing.assert_allclose(result.exponents[0], [0.41922, -1.62319], atol=1e-3)
    assert result.exponents[0].sum() == pytest.approx(np.log(0.3), abs=1e-12)
    assert result.kaplan_yorke[0] == pytest.approx(1.25827, abs=1e-3)
    assert result.entropy_rate[0] == result.exponents[0, 0]
    assert result.low[0, 0] < 0.41922 < result.high[0, 0]


def test_the_logistic_map_has_the_exponent_ln_2():
    result = sj.analysis.lyapunov_exponents(Map(lambda s: 4 * s * (1 - s), [0.3]), {}, jnp.zeros((1, 20_000, 0)))
    assert result.exponents[0, 0] == pytest.approx(np.log(2), abs=0.01)
    assert result.low[0, 0] < np.log(2) < result.high[0, 0]


def test_the_cat_map_fills_the_plane(x64):
    cell = Map(lambda s: jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s % 1.0, [0.1, 0.2])
    result = sj.analysis.lyapunov_exponents(cell, {}, jnp.zeros((1, 1000, 0)))
    np.testing.assert_allclose(result.exponents, [[0.9624237, -0.9624237]], atol=1e-6)
    assert result.kaplan_yorke[0] == pytest.approx(2, abs=1e-9)
    assert np.isnan(sj.analysis.lyapunov_exponents(cell, {}, jnp.zeros((1, 1000, 0)), k=1).kaplan_yorke[0])


def test_the_lorenz_equations(x64):
    def flow(s):
        x, y, z = s
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    def runge_kutta(s, dt=0.01):
        a = flow(s)
        b = flow(s + dt / 2 * a)
        c = flow(s + dt / 2 * b)
        return s + dt / 6 * (a + 2 * b + 2 * c + flow(s + dt * c))

    result = sj.analysis.lyapunov_exponents(
        Map(runge_kutta, [1.0, 1.0, 20.0]), {}, jnp.zeros((1, 60_000, 0)), burn_in=1000
    )
    rates = result.exponents[0] / 0.01
    assert rates[0] == pytest.approx(0.9056, rel=0.03)
    assert rates[1] == pytest.approx(0, abs=0.02)
    assert rates[2] == pytest.approx(-14.5723, abs=0.05)
    assert rates.sum() == pytest.approx(-41 / 3, abs=0.01)
    assert result.kaplan_yorke[0] == pytest.approx(2.06215, abs=5e-3)


@pytest.mark.slow
def test_a_random_tanh_network_has_the_exponent_of_the_theory():
    result = sj.analysis.lyapunov_exponents(TANH_NET, tanh_net(256, 3.0, dtype="float32"), jnp.zeros((1, 1500, 0)))
    assert result.exponents[0, 0] == pytest.approx(0.3102, abs=0.03)
    assert result.reliable.all()


def test_a_chaotic_network_satisfies_the_sum_rule(x64):
    # Few steps, because two programs with different rounding errors soon follow different chaotic trajectories.
    n, params, xs = 32, tanh_net(32, 3.0), jnp.zeros((1, 50, 0))
    result = sj.analysis.lyapunov_exponents(TANH_NET, params, xs, k=n, burn_in=5, frame_burn_in=5)
    slopes = 1 - np.tanh(np.asarray(sj.trajectory(TANH_NET, params, xs)[0, 10:-1])) ** 2
    expected = np.linalg.slogdet(params["W"])[1] + np.log(slopes).sum(1).mean()
    assert result.exponents.sum() == pytest.approx(expected, abs=1e-9)
    assert result.exponents[0, 0] > 0
    assert 0 < result.kaplan_yorke[0] < n


def exponents_by_hand(J, Q):
    """ln R_ii of Q_t R_t = J_t Q_{t-1}, averaged, in numpy."""
    total = 0
    for J_t in J:
        Q, R = np.linalg.qr(J_t @ Q)
        total = total + np.log(np.abs(np.diag(R)))
    return np.sort(total / len(J))[::-1]


def test_perturbations_are_pushed_forward_and_not_gradients(x64):
    n = 10
    cell = sj.VanillaRNN(1, n, recurrent_init=sj.SpectralRadius(2.0), dtype="float64")
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 400, 1))
    steps = np.asarray(sj.analysis.step_jacobians(cell, params, xs).by_state[0])
    first = np.asarray(random_frame(jax.random.key(0), n, n, "float64")).T
    options = dict(k=n, burn_in=0, frame_burn_in=0)
    right = exponents_by_hand(steps, first)
    wrong = exponents_by_hand(np.swapaxes(steps, 1, 2), first)  # the same sum, but of another system
    result = sj.analysis.lyapunov_exponents(cell, params, xs, **options)
    np.testing.assert_allclose(result.exponents[0], right, atol=1e-9)
    assert wrong.sum() == pytest.approx(right.sum())
    assert abs(wrong[0] - right[0]) > 0.01


def test_the_exponents_of_an_lstm_are_those_of_both_its_states():
    cell = sj.LSTM(2, 8, forget_bias=3.0)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 300, 2))
    result = sj.analysis.lyapunov_exponents(cell, params, xs, k=3)
    hidden = np.asarray(sj.analysis.step_jacobians(cell, params, xs).block("h", "h")[0], float)
    assert -0.1 < result.exponents[0, 0] < 0
    assert exponents_by_hand(hidden[100:], np.eye(8))[0] < -0.5  # the result for only the h block


def test_the_frame_aligns_before_the_mean_begins():
    J = constant(symmetric([0.9, 0.5, 0.1]), 60)
    expected = np.log([[0.9, 0.5, 0.1]])
    np.testing.assert_allclose(exponents_of(J).exponents, expected, atol=1e-4)
    early = exponents_of(J, burn_in=0, frame_burn_in=0)
    assert np.abs(early.exponents - expected).max() > 1e-3


SPREAD = {
    "four orders a step": lambda: constant(symmetric([1.5, 0.9, 0.01, 1e-4]), 400),
    "half an order a step": lambda: constant(symmetric([1.0, 0.9, 0.6, 0.3]), 400),
    "calm, then torn": lambda: np.concatenate(
        [constant(symmetric([0.9, 0.8, 0.7, 0.6]), 300), constant(symmetric([2.0, 1.0, 0.1, 0.01], 1), 100)], axis=1
    ),
    "random": lambda: np.random.default_rng(0).normal(size=(1, 400, 4, 4)).astype(np.float32),
    "vanishing": lambda: constant(symmetric([1e-3, 1e-3, 1e-3, 1e-3]), 400),
    "exploding": lambda: constant(symmetric([1e3, 1e3, 1e3, 1e3]), 400),
}


@pytest.mark.parametrize("name", SPREAD)
def test_the_default_interval_loses_no_exponent(name):
    J = SPREAD[name]()
    options = dict(burn_in=20, frame_burn_in=20)
    chosen, every = exponents_of(J, **options), exponents_of(J, qr_every=1, **options)
    np.testing.assert_allclose(chosen.exponents, every.exponents, atol=1e-4, rtol=1e-6)
    changes = name == "calm, then torn"  # then no interval from one half describes the other
    assert chosen.reliable[0] == (not changes)
    assert ("halves" in chosen.reason) == changes
    assert every.qr_every == 1


def test_an_interval_that_is_too_long_is_reported():
    # In float64 the columns lose their digits after 30 orders of magnitude, and leave its range after 308.
    for name, every in (("half an order a step", 60), ("vanishing", 120), ("exploding", 120)):
        result = exponents_of(SPREAD[name](), qr_every=every)
        assert not result.reliable[0]
        assert f"qr_every={every}" in result.reason
    calm, torn = SPREAD["calm, then torn"](), SPREAD["random"]()
    result = exponents_of(np.concatenate([constant(np.eye(4), 400), calm, torn]), qr_every=30)
    assert result.reliable.tolist() == [True, False, False]
    assert result.reason.startswith("sequence 1: qr_every=30")
    assert "qr_every" not in exponents_of(calm, qr_every=1).reason


def test_fewer_exponents_are_the_first_of_all(x64):
    cell = sj.VanillaRNN(D, 6, recurrent_init=sj.SpectralRadius(1.2), dtype="float64")
    params, xs = cell.init(jax.random.key(3)), jax.random.normal(jax.random.key(1), (2, 600, D))
    every = sj.analysis.lyapunov_exponents(cell, params, xs, k=6)
    for k in (1, 3):
        result = sj.analysis.lyapunov_exponents(cell, params, xs, k=k, key=jax.random.key(k))
        np.testing.assert_allclose(result.exponents, every.exponents[:, :k], atol=2e-3)


def test_a_batch_is_its_sequences_one_by_one(x64):
    J = np.random.default_rng(0).normal(size=(3, 80, 3, 3))
    together = exponents_of(J, qr_every=2)
    for b in range(3):
        alone = exponents_of(J[b : b + 1], qr_every=2)
        for name in ("exponents", "low", "high", "split_half", "history", "kaplan_yorke", "entropy_rate"):
            np.testing.assert_allclose(getattr(together, name)[b], getattr(alone, name)[0], atol=1e-12, err_msg=name)


def test_means_and_spreads_over_sequences_are_those_of_ordered_exponents(x64):
    J = np.random.default_rng(0).normal(size=(6, 3, 4, 4))  # so short that QR has not sorted them
    result = exponents_of(J, burn_in=0, frame_burn_in=0)
    assert (np.diff(result.exponents, axis=1) <= 0).all()
    np.testing.assert_allclose(result.mean, result.exponents.mean(0))
    np.testing.assert_allclose(result.spread, result.exponents.std(0))
    np.testing.assert_allclose(result.history[:, -1], result.exponents)
    assert not exponents_of(J[:1]).spread.any()


def test_padding_does_not_change_the_exponents(x64):
    J = np.random.default_rng(0).normal(size=(2, 90, 3, 3))
    mask = np.ones((2, 90), bool)
    mask[0, 60:], mask[1, 20:80:3] = False, False
    options = dict(burn_in=5, frame_burn_in=5, qr_every=1)
    result = exponents_of(np.where(mask[..., None, None], J, np.nan), mask=mask, **options)
    for b in range(2):
        cut = exponents_of(J[b][mask[b]][None], **options)
        assert result.steps[b] == cut.steps[0] == mask[b].sum() - 10
        for name in ("exponents", "low", "high", "split_half", "kaplan_yorke"):
            np.testing.assert_allclose(getattr(result, name)[b], getattr(cut, name)[0], atol=1e-12, err_msg=name)
    assert result.reliable.all()


def test_a_sequence_that_ends_within_the_burn_in_has_no_exponents():
    J = np.random.default_rng(0).normal(size=(2, 50, 2, 2)).astype(np.float32)
    result = exponents_of(J, mask=sj.length_mask([50, 15], 50), burn_in=10, frame_burn_in=10)
    assert result.reliable.tolist() == [True, False]
    assert result.reason == "sequence 1: no valid step is left after the burn-in"
    for values in (result.exponents, result.low, result.split_half, result.kaplan_yorke, result.entropy_rate):
        assert np.isnan(values[1]).all()
        assert np.isfinite(values[0]).all() or values is result.kaplan_yorke


def test_a_reset_does_not_change_the_perturbations(x64):
    J = np.random.default_rng(0).normal(size=(1, 60, 3, 3))
    reset = np.zeros((1, 60), bool)
    reset[0, ::7] = True
    np.testing.assert_allclose(exponents_of(J, reset=reset).exponents, exponents_of(J).exponents, atol=1e-12)
    cell = sj.VanillaRNN(1, 1, dtype="float64")
    params = sj.VanillaParams(jnp.zeros((1, 1)), jnp.array([[2.0]]), jnp.zeros(1))
    state = sj.VanillaState(jnp.full((1, 1), 0.957504024))
    options = dict(state=state, burn_in=0, frame_burn_in=0)
    fixed = sj.analysis.lyapunov_exponents(cell, params, jnp.ones((1, 20, 1)), **options)
    assert fixed.exponents[0, 0] == pytest.approx(np.log(0.166372088), abs=1e-7)  # of tanh(2h) at its fixed point
    back = np.arange(20)[None] == 10
    result = sj.analysis.lyapunov_exponents(cell, params, jnp.ones((1, 20, 1)), reset=back, **options)
    assert result.exponents[0, 0] == pytest.approx((np.log(0.166372088) + np.log(2)) / 2, abs=1e-7)  # from then on at 0


def test_a_stack_with_tokens_as_inputs():
    cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.GRU(4, 2)])
    tokens = jax.random.randint(jax.random.key(1), (2, 60), 0, 5)
    result = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), tokens)
    assert result.exponents.shape == (2, 8)
    assert np.isfinite(result.exponents).all()
    assert result.reliable.all()


def test_the_reason_names_the_step_that_is_not_finite():
    cell = sj.VanillaRNN(1, 3)
    xs = np.ones((2, 80, 1), np.float32)
    xs[1, 49] = np.nan
    result = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), xs)
    assert not result.reliable[1]
    assert result.reason.endswith(
        "sequence 1: the state is not finite from step 50 on: the input of this step is not finite"
    )
    before = sj.analysis.lyapunov_exponents(cell, cell.init(jax.random.key(0)), xs[1:, :49])  # the steps before it
    np.testing.assert_allclose(result.exponents[1], before.exponents[0], atol=1e-9)
    assert result.steps.tolist() == [48, 31]
    doubles = Map(lambda s: s**2, [1.5, 2.0])
    assert "not finite" in sj.analysis.lyapunov_exponents(doubles, {}, jnp.zeros((1, 40, 0)), qr_every=5).reason


def test_split_half_is_the_second_half_minus_the_first(x64):
    J = np.concatenate([constant(0.5 * np.eye(2), 50, "float64"), constant(0.8 * np.eye(2), 50, "float64")], axis=1)
    result = exponents_of(J, burn_in=0, frame_burn_in=0, qr_every=1)
    np.testing.assert_allclose(result.split_half, np.log(0.8) - np.log([[0.5, 0.5]]), atol=1e-12)
    assert result.history.shape == (1, 100, 2)
    assert result.history_steps.tolist() == list(range(1, 101))
    np.testing.assert_allclose(result.history[0, 49], np.log(0.5), atol=1e-12)
    np.testing.assert_allclose(result.history[:, -1], result.exponents)
    short = exponents_of(J[:, :7], burn_in=0, frame_burn_in=0, qr_every=7)
    assert np.isnan((short.low, short.split_half)).all()  # one block has no interval and no halves
    np.testing.assert_allclose(short.exponents, np.log([[0.5, 0.5]]))


@pytest.mark.parametrize(("steps", "likeness"), [(40, 0.0), (400, 0.5)])
def test_the_interval_contains_the_true_mean_in_nineteen_of_twenty_cases(steps, likeness):
    random, held = np.random.default_rng(0), 0
    for _ in range(300):
        noise = random.normal(size=(steps + 50, 1))
        for t in range(1, len(noise)):
            noise[t] += likeness * noise[t - 1]
        low, high = bootstrap_interval(noise[50:], np.ones(steps))
        held += low[0] < 0 < high[0]
    assert 0.91 <= held / 300 <= 0.98


def test_the_dimension_interpolates_the_zero_of_the_partial_sums():
    dimension = sj.analysis.kaplan_yorke_dimension
    assert dimension([0.41922, -1.62319]) == pytest.approx(1.25827, abs=1e-5)
    assert dimension([0.9056, 0.0, -14.5723]) == pytest.approx(2.06215, abs=1e-4)
    assert dimension([-0.1, -0.2]) == 0
    assert dimension([1.0, -np.inf]) == 1
    assert np.isnan(dimension([0.5, 0.1]))
    assert np.isnan(dimension([np.nan, -1.0]))


def test_a_batch_without_a_finite_step_has_no_exponent_and_says_so():
    cell = sj.VanillaRNN(1, 3)
    params = cell.init(jax.random.key(0))
    found = sj.lyapunov_exponents(cell, params, jnp.full((2, 20, 1), jnp.nan))
    assert np.isnan(found.exponents).all()
    assert (found.steps == 0).all()
    assert not found.reliable.any()
    assert "not finite" in found.reason
    verdict = sj.verdict(cell, params, jnp.full((2, 20, 1), jnp.nan))
    assert {row.regime for row in verdict.rows} == {"unknown"}
    assert len(verdict.evidence) == 1  # once, and not for each measurement


def test_bad_arguments_raise_with_a_hint():
    J = constant(np.eye(3), 10)
    for k in (0, 4, 2.0, True):
        with raises(ValueError, "expected k from 1 to the 3 numbers of the state", f"got {k}", "k=3 gives all"):
            exponents_of(J, k=k)
    with raises(ValueError, "longer than burn_in + frame_burn_in, 5 + 5 steps, got 10", "shorter burn-in"):
        exponents_of(J, burn_in=5, frame_burn_in=5)
    with raises(ValueError, "at least one step", "got T = 0"):
        exponents_of(J[:, :0])
    with raises(ValueError, "whole steps of burn-in, got 1.5"):
        exponents_of(J, burn_in=1.5)
    for qr_every in (0, 2.5):
        with raises(ValueError, "qr_every of at least 1 whole step", f"got {qr_every}"):
            exponents_of(J, qr_every=qr_every)
