"""The additive path of the LSTM: dc_T/dc_0 through every path beside the product of its forget gates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from oracles import drawn

import seqjax as sj
from seqjax.analysis import cell_path

MASK = np.array([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)


def by_jacfwd(cell, params, xs, K, mask=None):
    """dc_T/dc_{T-k} for k = 0..K, each by differentiating the unroll from s_{T-k} on."""
    T, states, blocks = xs.shape[1], sj.trajectory(cell, params, xs, mask=mask), []
    for k in range(K + 1):
        rows = []
        for b in range(len(xs)):
            start = jax.tree.map(lambda leaf, b=b, k=k: leaf[b : b + 1, T - k], states)
            part = None if mask is None else mask[b : b + 1, T - k :]

            def last(c, b=b, k=k, start=start, part=part):
                return sj.unroll(cell, params, xs[b : b + 1, T - k :], state=start._replace(c=c[None]), mask=part)[0].c[
                    0
                ]

            rows.append(jax.jacfwd(last)(start.c[0]))
        blocks.append(np.stack(rows))
    return np.stack(blocks, axis=1)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.usefixtures("x64")
def test_it_is_the_derivative_of_the_unroll_and_the_product_of_the_gates(mask):
    cell = sj.LSTM(3, 4)
    params, xs = drawn(cell, "float64")
    found = cell_path(cell, params, xs, mask=mask)
    true = by_jacfwd(cell, params, xs, 6, mask)
    np.testing.assert_allclose(found.log_true, np.log(np.sqrt((true**2).sum((-2, -1)) / 4)), atol=1e-9)
    units = np.log(np.abs(np.diagonal(true[:, -1], axis1=-2, axis2=-1)))
    np.testing.assert_allclose(found.log_true_units, units, atol=1e-9)

    f = np.asarray(sj.gates(cell, params, xs, mask=mask)["forget"])
    f = f if mask is None else np.where(mask[..., None], f, 1)
    product = np.stack([f[:, 6 - k :].prod(axis=1) for k in range(7)], axis=1)
    np.testing.assert_allclose(found.log_forget, np.log(np.sqrt((product**2).mean(-1))), atol=1e-9)
    np.testing.assert_allclose(found.log_forget_units, np.log(product[:, -1]), atol=1e-9)


def test_where_nothing_reads_h_both_are_the_closed_form_at_any_lag():
    cell = sj.LSTM(1, 2, forget_bias=1.0)
    params = cell.init(jax.random.key(0))
    params = params._replace(W_hh=0 * params.W_hh, W_xh=0 * params.W_xh)
    found = cell_path(cell, params, jnp.zeros((1, 5000, 1)))
    expected = -0.313262 * np.arange(5001)  # ln sigma(1) a step: 10^-680 at the end
    np.testing.assert_allclose(found.log_true[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.log_forget[0], expected, rtol=1e-4, atol=1e-5)


def test_the_paths_through_h_are_not_the_forget_gates():
    cell = sj.LSTM(3, 8, recurrent_init=sj.Orthogonal(3.0))
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 20, 3))
    found = cell_path(cell, params, xs)
    assert abs(found.log_true[0, -1] - found.log_forget[0, -1]) > 1


def test_a_layer_of_a_stack_is_found_by_its_name():
    cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.LSTM(4, 2)])
    params = cell.init(jax.random.key(0))
    tokens = jnp.array([[0, 1, 2, 3]])
    assert cell_path(cell, params, tokens).log_true_units.shape == (1, 4)
    assert cell_path(cell, params, tokens, layer="2").log_true_units.shape == (1, 2)


def test_after_a_reset_nothing_is_left(key):
    cell = sj.LSTM(1, 2)
    found = cell_path(cell, cell.init(key), jnp.ones((1, 4, 1)), reset=jnp.array([[False, False, True, False]]))
    assert np.isneginf(found.log_true[0]).tolist() == [False, False, True, True, True]
    assert np.isneginf(found.log_forget[0]).tolist() == [False, False, True, True, True]


def test_a_cell_without_such_a_path_is_refused(key):
    cell = sj.GRU(1, 2)
    with raises(TypeError, "expected a cell with a state field c and a gate named forget, got GRU", "gradient_by_lag"):
        cell_path(cell, cell.init(key), jnp.ones((1, 4, 1)))
