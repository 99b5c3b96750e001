"""Analyses of states that are not only float32 or float64: complex numbers, counters, random keys, bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax as sj
from seqjax.analysis import (
    fixed_points,
    gradient_by_lag,
    jacobian_product,
    lyapunov_exponents,
    product_singular_values,
    step_jacobians,
)

LAM = np.array([0.9 * np.exp(0.5j), 0.7j, 1.05 * np.exp(-2j)], np.complex64)
TIME = 40


class Stateful:
    """A cell whose parameters are its initial state."""

    input_shape = (3,)

    def init(self, key):
        return jnp.zeros(3)

    def initial_state(self, params):
        return params


class LRU(Stateful):
    """A linear recurrent unit with a diagonal of complex eigenvalues, z <- lam z + x (Orvieto et al. 2023)."""

    def init(self, key):
        return jnp.asarray(LAM)

    def initial_state(self, params):
        return jnp.zeros_like(params)

    def step(self, params, z, x):
        z = params * z + x.astype(z.dtype)
        return z, z.real


class Alternating(Stateful):
    """h <- 0.5 h + x at even counts and h <- 0.25 h + x at odd ones."""

    def initial_state(self, params):
        return {"h": params, "t": jnp.zeros((), jnp.int32)}

    def step(self, params, s, x):
        a = jnp.where(s["t"] % 2 == 0, 0.5, 0.25).astype(x.dtype)
        return {"h": a * s["h"] + x.astype(s["h"].dtype), "t": s["t"] + 1}, s["h"]


class Noisy(Stateful):
    """h <- a h + x with factors a of each unit drawn from a key in the state."""

    def initial_state(self, params):
        return {"h": params, "key": jax.random.key(7)}

    def step(self, params, s, x):
        key, now = jax.random.split(s["key"])
        a = self.factors(now).astype(s["h"].dtype)
        return {"h": a * s["h"] + x.astype(s["h"].dtype), "key": key}, s["h"]

    def factors(self, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, (3,)), 0.9, 0.4)


class OnlyFloat32(Stateful):
    """h <- tanh(W h + x), in float32 whatever the dtype of the parameters is."""

    def init(self, key):
        return {"W": jax.random.normal(key, (3, 3))}

    def initial_state(self, params):
        return jnp.zeros(3, jnp.float32)

    def step(self, params, h, x):
        h = jnp.tanh(params["W"].astype(jnp.float32) @ h + x.astype(jnp.float32))
        return h, h


def inputs(time=TIME, batch=1):
    return np.random.default_rng(0).normal(size=(batch, time, 3)).astype(np.float32)


def check_diagonal(cell, params, a, **options):
    """Compares all analyses over time with the diagonals a (time, 3) of the Jacobians of one sequence."""
    xs = options.pop("xs", inputs())
    J = step_jacobians(cell, params, xs, **options).by_state
    np.testing.assert_allclose(J[0], a[:, :, None] * np.eye(3), atol=1e-6)
    total = np.log(a).sum(axis=0)
    values = product_singular_values(cell, params, xs, **options)
    np.testing.assert_allclose(values.log_values[0], np.sort(total)[::-1], atol=1e-4)
    exponents = lyapunov_exponents(cell, params, xs, burn_in=0, frame_burn_in=0, qr_every=1, **options)
    # The first frame is random, so a direction needs some steps to align.
    np.testing.assert_allclose(exponents.exponents[0].sum(), total.sum() / len(a), atol=1e-5)
    lags = gradient_by_lag(cell, params, xs, times=[len(a)], horizon=len(a), **options)
    norms = [0.5 * np.log(np.mean(a[len(a) - k :].prod(axis=0) ** 2)) for k in range(len(a) + 1)]
    np.testing.assert_allclose(lags.log_expected, norms, atol=1e-4)
    product = jacobian_product(cell, params, xs, **options)
    np.testing.assert_allclose(np.log(np.diagonal(product.matrix[0])) + product.log_scale[0], total, atol=1e-4)


def test_exponents_of_complex_eigenvalues_are_logarithms_of_their_moduli_twice():
    sizes = np.sort(np.log(np.abs(LAM)))[::-1]
    result = lyapunov_exponents(LRU(), jnp.asarray(LAM), inputs(2000), k=6)
    np.testing.assert_allclose(result.exponents[0], np.repeat(sizes, 2), atol=1e-4)


def test_a_complex_state_counts_as_pairs_of_real_numbers():
    cell, params, xs = LRU(), jnp.asarray(LAM), inputs()
    result = step_jacobians(cell, params, xs)
    real, imaginary = np.diag(LAM.real), np.diag(LAM.imag)
    expected = np.block([[real, -imaginary], [imaginary, real]])
    np.testing.assert_allclose(result.by_state, np.broadcast_to(expected, (1, TIME, 6, 6)), atol=1e-6)
    sizes = np.log(np.abs(LAM.astype(complex)))
    values = product_singular_values(cell, params, xs)
    np.testing.assert_allclose(values.log_values[0], np.repeat(np.sort(TIME * sizes)[::-1], 2), atol=1e-4)
    lags = gradient_by_lag(cell, params, xs, times=[TIME], horizon=TIME)
    norms = [0.5 * np.log(np.mean(np.exp(2 * k * sizes))) for k in range(TIME + 1)]
    np.testing.assert_allclose(lags.log_expected, norms, atol=1e-4)
    np.testing.assert_allclose(lags.log_worst, sizes.max() * np.arange(TIME + 1), atol=1e-4)


def test_the_fixed_point_of_a_complex_state():
    x = np.array([1.0, -2.0, 0.5], np.float32)
    result = fixed_points(LRU(), jnp.asarray(LAM), x, count=8, forward_steps=0)
    np.testing.assert_allclose(result.states, [x / (1 - LAM)], rtol=1e-6)
    np.testing.assert_allclose(np.sort(np.abs(result.eigenvalues[0])), np.repeat(np.sort(np.abs(LAM)), 2), rtol=1e-6)


def test_a_counter_in_the_state_has_no_derivative_but_its_values_are_used():
    a = np.where(np.arange(TIME) % 2 == 0, 0.5, 0.25)[:, None] * np.ones(3)
    check_diagonal(Alternating(), jnp.ones(3), a)


def test_a_counter_counts_valid_steps_and_restarts_at_a_reset():
    mask, reset = np.array([[1, 0, 1, 1, 1, 1]], bool), np.array([[0, 0, 0, 1, 0, 0]], bool)
    result = step_jacobians(Alternating(), jnp.ones(3), inputs(6), inputs=True, mask=mask, reset=reset)
    np.testing.assert_allclose(result.by_state[0, :, 0, 0], [0.5, 1, 0.25, 0, 0.25, 0.5])
    np.testing.assert_array_equal(result.by_input[0], mask[0][:, None, None] * np.eye(3))


def test_a_random_key_in_the_state_has_no_derivative_but_its_noise_is_used():
    cell, key, a = Noisy(), jax.random.key(7), []
    for _ in range(TIME):
        key, now = jax.random.split(key)
        a.append(np.asarray(cell.factors(now), np.float64))
    check_diagonal(cell, jnp.ones(3), np.array(a))


@pytest.mark.parametrize("analyse", [lyapunov_exponents, gradient_by_lag, product_singular_values, step_jacobians])
def test_half_precision_is_analysed_as_the_same_numbers_in_float32(analyse):
    coarse, wide = (sj.VanillaRNN(3, 3, dtype=dtype) for dtype in ("bfloat16", "float32"))
    params, xs = coarse.init(jax.random.key(0)), jnp.asarray(inputs(), jnp.bfloat16)
    assert params.W_hh.dtype == jnp.bfloat16
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    numbers = [
        next(leaf for leaf in analyse(*problem) if np.ndim(leaf))
        for problem in ((coarse, params, xs), (wide, widened, xs.astype(jnp.float32)))
    ]
    np.testing.assert_allclose(*numbers, atol=1e-6)


def test_a_cell_that_computes_only_in_float32_is_analysed_in_float32():
    cell, xs = OnlyFloat32(), inputs()
    params = cell.init(jax.random.key(0))
    h, J, W = np.zeros(3), [], np.asarray(params["W"], np.float64)
    for x in xs[0].astype(np.float64):
        h = np.tanh(W @ h + x)
        J.append((1 - h**2)[:, None] * W)
    np.testing.assert_allclose(step_jacobians(cell, params, xs).by_state[0], J, atol=1e-5)
    product = np.linalg.multi_dot(J[::-1])
    ln_sigma = np.log(np.linalg.svd(product, compute_uv=False))
    values = product_singular_values(cell, params, xs).log_values[0]
    np.testing.assert_allclose(values[0], ln_sigma[0], atol=1e-3)
    np.testing.assert_allclose(values.sum(), sum(np.linalg.slogdet(J_t)[1] for J_t in J), rtol=1e-4)
    exponents = lyapunov_exponents(cell, params, xs, burn_in=0, frame_burn_in=0).exponents[0]
    np.testing.assert_allclose(exponents.sum() * TIME, values.sum(), rtol=1e-4)
    expected = np.log(np.linalg.norm(product) / np.sqrt(3))
    lags = gradient_by_lag(cell, params, xs, times=[TIME], horizon=TIME)
    np.testing.assert_allclose(lags.log_expected[-1], expected, atol=1e-3)
