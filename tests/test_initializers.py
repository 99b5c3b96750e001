"""How weights begin: each initialiser and each cell's biases against the property that defines them."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax as sj

N = 32


def gates(W, count):
    return np.split(np.asarray(W, float), count)


def singular_values(W):
    return np.linalg.svd(np.asarray(W, float), compute_uv=False)


@pytest.mark.parametrize(("cell", "count"), [(sj.VanillaRNN(3, N), 1), (sj.LSTM(3, N), 4), (sj.GRU(3, N), 3)])
def test_the_recurrent_matrix_of_every_gate_is_orthogonal_by_itself(cell, count, key):
    blocks = gates(cell.init(key).W_hh, count)
    for block in blocks:
        np.testing.assert_allclose(block @ block.T, np.eye(N), atol=1e-5)
    fused = gates(sj.Orthogonal()(key, (count * N, N)), count)
    assert count == 1 or all(singular_values(block).min() < 0.9 for block in fused)  # cut from one, they are not
    for a, b in itertools.pairwise(blocks):
        assert not np.allclose(a, b)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_every_singular_value_of_an_orthogonal_matrix_is_its_gain(shape, key, dtype):
    W = sj.Orthogonal(0.8)(key, shape, dtype)
    tolerance = {"float32": 1e-5, "float64": 1e-10}[dtype]
    np.testing.assert_allclose(singular_values(W), 0.8, rtol=tolerance)
    if shape[0] == shape[1]:
        power = np.linalg.matrix_power(np.asarray(W, float), 20)
        np.testing.assert_allclose(singular_values(power), 0.011529215046, rtol=40 * tolerance)


@pytest.mark.parametrize(("size", "radius"), [(1, 0.5), (2, 1.0), (7, 1.3), (64, 0.9), (200, 1.0)])
def test_the_largest_eigenvalue_has_the_spectral_radius(size, radius):
    draw = jax.jit(lambda key: sj.SpectralRadius(radius)(key, (size, size)))
    for seed in range(5):
        eigenvalues = np.linalg.eigvals(np.asarray(draw(jax.random.key(seed)), float))
        np.testing.assert_allclose(np.abs(eigenvalues).max(), radius, rtol=1e-3)


def test_every_gate_has_the_spectral_radius(key):
    cell = sj.LSTM(3, N, recurrent_init=sj.SpectralRadius(0.9))
    for block in gates(jax.jit(cell.init)(key).W_hh, 4):
        np.testing.assert_allclose(np.abs(np.linalg.eigvals(block)).max(), 0.9, rtol=1e-3)


@pytest.mark.parametrize(
    ("initializer", "shape", "bound"),
    [
        (sj.Uniform(), (100, 40), 0.1),
        (sj.Uniform(), (25, 300), 0.2),
        (sj.Uniform(0.03), (100, 40), 0.03),
        (sj.Glorot(), (50, 100), 0.2),
        (sj.Glorot(), (100, 50), 0.2),
    ],
)
def test_uniform_weights_fill_their_bounds_and_no_more(initializer, shape, bound, key):
    W = np.asarray(initializer(key, shape), float)
    assert 0.98 * bound < W.max() <= bound
    assert -bound <= W.min() < -0.98 * bound
    np.testing.assert_allclose(W.std(), bound / 3**0.5, rtol=0.05)
    np.testing.assert_allclose(W.mean(), 0, atol=0.05 * bound)


def test_chrono_biases_span_the_times_they_are_meant_for(key):
    n, longest = 2000, 50
    b_i, b_f, b_c, b_o = gates(sj.LSTM(1, n, chrono=longest, recurrent_init=sj.Uniform()).init(key).b_h, 4)
    np.testing.assert_array_equal(b_i, -b_f)
    assert not np.any(b_c)
    assert not np.any(b_o)
    spans = np.exp(b_f)  # uniform on [1, longest - 1]
    assert 1 <= spans.min() < 1.1
    assert longest - 1.2 < spans.max() < longest - 1 + 1e-4
    np.testing.assert_allclose(spans.mean(), longest / 2, rtol=0.03)
    forget = 1 / (1 + np.exp(-b_f))
    assert forget.min() >= 1 / 2
    assert forget.max() <= 1 - 1 / longest + 1e-6


@pytest.mark.parametrize(
    ("reset", "update", "sign"),
    [("after", "keeps", 1), ("before", "writes", -1), ("before", "keeps", 1), ("after", "writes", -1)],
)
def test_chrono_opens_the_update_gate_towards_the_old_state(reset, update, sign, key):
    cell = sj.GRU(1, 500, reset=reset, update=update, chrono=20, recurrent_init=sj.Uniform())
    b_r, b_z, b_n = gates(cell.init(key).b_h, 3)
    assert not np.any(b_r)
    assert not np.any(b_n)
    spans = np.exp(sign * b_z)
    assert 1 <= spans.min() < 1.2
    assert 18.8 < spans.max() < 19 + 1e-4
    zero = jax.tree.map(jnp.zeros_like, cell.init(key))._replace(b_h=cell.init(key).b_h)
    kept, _ = cell.step(zero, sj.GRUState(jnp.ones(500)), jnp.zeros(1))  # with no weights h' is what is kept of h = 1
    np.testing.assert_allclose(kept.h, spans / (1 + spans), rtol=1e-5)


@pytest.mark.parametrize("bias", [0.0, 1.0, 3.5])
def test_the_forget_bias_is_in_the_forget_gate_and_nowhere_else(bias, key):
    b_i, b_f, b_c, b_o = gates(sj.LSTM(3, N, forget_bias=bias).init(key).b_h, 4)
    np.testing.assert_array_equal(b_f, bias)
    assert not np.any([b_i, b_c, b_o])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "cell",
    [
        sj.VanillaRNN(3, 4, recurrent_init=sj.SpectralRadius()),
        sj.LSTM(3, 4, chrono=9),
        sj.GRU(3, 4, input_init=sj.Uniform(), chrono=9),
        sj.GRU(3, 4, reset="before", chrono=9),
        sj.Embedding(5, 3),
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_parameters_are_of_the_dtype_that_the_cell_names(cell, dtype, x64):
    params = jax.eval_shape(dataclasses.replace(cell, dtype=dtype).init, jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_of_half_precision_keep_their_property(dtype, key):
    for initializer, measure in ((sj.Orthogonal(0.8), singular_values), (sj.SpectralRadius(0.8), np.linalg.eigvals)):
        W = jax.jit(lambda key: initializer(key, (16, 16), dtype))(key)  # noqa: B023
        np.testing.assert_allclose(np.abs(measure(np.asarray(W, float))).max(), 0.8, rtol=0.01)


def test_two_keys_draw_different_weights_and_one_key_the_same():
    for cell in (sj.VanillaRNN(3, 4), sj.LSTM(3, 4), sj.GRU(3, 4), sj.Embedding(5, 3)):
        once, again, other = (jax.tree.leaves(cell.init(jax.random.key(seed))) for seed in (0, 0, 1))
        assert all(map(np.array_equal, once, again))
        assert not np.array_equal(once[0], other[0])


@pytest.mark.parametrize("kind", [sj.Orthogonal, sj.SpectralRadius, sj.Uniform])
def test_initialisers_are_values(kind):
    assert kind(0.5) == kind(0.5)
    assert hash(kind(0.5)) == hash(kind(0.5))
    assert kind(0.5) != kind(0.6)
    assert eval(repr(kind(0.5)), vars(sj)) == kind(0.5)
    assert sj.LSTM(3, 4, recurrent_init=kind(0.5)) == sj.LSTM(3, 4, recurrent_init=kind(0.5))
