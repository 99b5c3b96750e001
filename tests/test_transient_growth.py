"""A non-normal chain in float32 against products in float64: rounding errors of float32 grow as fast as perturbations.

With W = Q (0.92 I + 2 S) Q^T, S the shift, a perturbation grows by many orders of magnitude before it decays. In a
rotated basis no entry of W is zero, so rounding errors take part in this growth.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import seqjax as sj

N, TIME, LAG = 24, 150, 100
SCALES = [0.0, 0.5]  # of the inputs: a linear network, and one that saturates


@functools.cache
def chain(scale):
    """A network in float32, its inputs, and its Jacobians in float64, (TIME, N, N)."""
    random = np.random.default_rng(2)
    Q = np.linalg.qr(random.normal(size=(N, N)))[0]
    W = (Q @ (0.92 * np.eye(N) + 2 * np.eye(N, k=1)) @ Q.T).astype(np.float32)
    xs = (scale * random.normal(size=(TIME, 1)) * np.ones(N)).astype(np.float32)
    params = sj.VanillaParams(*map(jnp.asarray, (np.eye(N, dtype=np.float32), W, np.zeros(N, np.float32))))
    return params, xs[None], jacobians(W.astype(np.float64), xs.astype(np.float64))


def jacobians(W, xs):
    """J_t = diag(1 - h_t^2) W, in the dtype of W."""
    h, J = np.zeros_like(xs[0]), []
    for x in xs:
        h = np.tanh(W @ h + x)
        J.append((1 - h**2)[:, None] * W)
    return np.array(J)


def product(J):
    """J_T ... J_1 divided by exp(log_scale), and log_scale."""
    M, log_scale = np.eye(N, dtype=J.dtype), 0.0
    for J_t in J:
        M = J_t @ M
        size = np.abs(M).max()
        M, log_scale = M / size, log_scale + float(np.log(size))
    return M, log_scale


def log_expected(J):
    """ln |J_T ... J_1|_F / sqrt(n)."""
    M, log_scale = product(J)
    return log_scale + float(np.log(np.linalg.norm(M) / np.sqrt(N)))


@pytest.mark.parametrize("scale", SCALES)
def test_the_expected_norm_in_float32_is_that_of_the_product_in_float64(scale):
    params, xs, J = chain(scale)
    result = sj.analysis.gradient_by_lag(sj.VanillaRNN(N, N), params, xs, times=[TIME], horizon=LAG)
    assert abs(result.log_expected[LAG] - log_expected(J[-LAG:])) < 0.01
    # An analysis in float32 fails this test.
    in_float32 = jacobians(np.asarray(params.W_hh), xs[0])
    assert in_float32.dtype == np.float32
    assert abs(log_expected(in_float32[-LAG:]) - log_expected(J[-LAG:])) > 0.1


@pytest.mark.parametrize("scale", SCALES)
def test_the_product_in_float32_is_that_in_float64(scale):
    params, xs, J = chain(scale)
    result = sj.jacobian_product(sj.VanillaRNN(N, N), params, xs)
    M, log_scale = product(J)
    assert result.matrix.dtype == result.log_scale.dtype == np.float64
    np.testing.assert_allclose(np.exp(result.log_scale[0] - log_scale) * result.matrix[0], M, atol=1e-4)


def test_singular_values_in_float32_are_those_in_float64():
    params, xs, J = chain(0.5)
    result = sj.analysis.product_singular_values(sj.VanillaRNN(N, N), params, xs, k=2)
    M, log_scale = product(J)
    np.testing.assert_allclose(
        result.log_values[0], np.log(np.linalg.svd(M, compute_uv=False)[:2]) + log_scale, atol=0.01
    )
