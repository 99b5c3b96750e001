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
    """dc_T/dc_{T-k} for k = 0..K, each as the derivative of an unroll from s_{T-k}."""
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
def test_the_path_is_the_derivative_of_the_unroll_and_the_product_of_the_gates(mask):
    cell = sj.LSTM(3, 4)
    params, xs = drawn(cell, "float64")
    result = cell_path(cell, params, xs, mask=mask)
    true = by_jacfwd(cell, params, xs, 6, mask)
    f = np.asarray(sj.gates(cell, params, xs, mask=mask)["forget"])
    for b, valid in enumerate(np.ones((2, 6), bool) if mask is None else mask):
        # Lag j begins before the last j valid steps.
        begins = [*np.flatnonzero(valid), 6][::-1]
        rows, K = np.stack([true[b, 6 - t] for t in begins]), valid.sum()
        np.testing.assert_allclose(result.log_true[b, : K + 1], np.log(np.sqrt((rows**2).sum((-2, -1)) / 4)), atol=1e-9)
        np.testing.assert_allclose(result.log_true_units[b], np.log(np.abs(np.diagonal(rows[-1]))), atol=1e-9)
        product = np.cumprod(f[b, valid][::-1], axis=0)
        norms = np.sqrt((product**2).mean(-1))
        np.testing.assert_allclose(result.log_forget[b, : K + 1], np.log([1, *norms]), atol=1e-9)
        np.testing.assert_allclose(result.log_forget_units[b], np.log(product[-1]), atol=1e-9)
        assert np.isnan(result.log_true[b, K + 1 :]).all()


def test_without_recurrent_weights_both_equal_the_closed_form_at_any_lag():
    cell = sj.LSTM(1, 2, forget_bias=1.0)
    params = cell.init(jax.random.key(0))
    params = params._replace(W_hh=0 * params.W_hh, W_xh=0 * params.W_xh)
    result = cell_path(cell, params, jnp.zeros((1, 5000, 1)))
    expected = -0.313262 * np.arange(5001)  # ln sigma(1) per step: 10^-680 at the end
    np.testing.assert_allclose(result.log_true[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.log_forget[0], expected, rtol=1e-4, atol=1e-5)


def test_the_paths_through_h_are_not_the_forget_gates():
    cell = sj.LSTM(3, 8, recurrent_init=sj.Orthogonal(3.0))
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 20, 3))
    result = cell_path(cell, params, xs)
    assert abs(result.log_true[0, -1] - result.log_forget[0, -1]) > 1


def test_a_layer_of_a_stack_is_selected_by_name():
    cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.LSTM(4, 2)])
    params = cell.init(jax.random.key(0))
    tokens = jnp.array([[0, 1, 2, 3]])
    assert cell_path(cell, params, tokens).log_true_units.shape == (1, 4)
    assert cell_path(cell, params, tokens, layer="2").log_true_units.shape == (1, 2)


class Renamed(sj.LSTM):
    """An LSTM whose keeping gate and memory have other names."""

    memory = "m"

    @property
    def gate_roles(self):
        return {"erase": "reads", "hold": "keeps"}

    def initial_state(self, params):
        h, c = super().initial_state(params)
        return {"h": h, "m": c}

    def step(self, params, state, x):
        (h, c), output = super().step(params, sj.LSTMState(state["h"], state["m"]), x)
        return {"h": h, "m": c}, output

    def gates(self, params, state, x):
        gates = super().gates(params, sj.LSTMState(state["h"], state["m"]), x)
        return {"erase": gates["output"], "hold": gates["forget"]}


def test_declared_roles_select_the_gate_and_its_memory(key):
    cell, own = sj.LSTM(3, 4), Renamed(3, 4)
    params, xs = cell.init(key), jax.random.normal(jax.random.key(1), (2, 5, 3))
    expected = cell_path(cell, params, xs)
    jax.tree.map(np.testing.assert_array_equal, cell_path(own, params, xs), expected)
    above, both = sj.stack([sj.VanillaRNN(3, 3), own]), sj.stack([cell, sj.LearnedState(Renamed(4, 4))])
    assert cell_path(above, above.init(key), xs).log_true_units.shape == (2, 4)
    assert cell_path(both, both.init(key), xs, layer="1").log_true_units.shape == (2, 4)


def test_before_a_reset_both_are_zero(key):
    cell = sj.LSTM(1, 2)
    result = cell_path(cell, cell.init(key), jnp.ones((1, 4, 1)), reset=jnp.array([[False, False, True, False]]))
    assert np.isneginf(result.log_true[0]).tolist() == [False, False, True, True, True]
    assert np.isneginf(result.log_forget[0]).tolist() == [False, False, True, True, True]


def test_a_cell_without_such_a_path_raises(key):
    cell = sj.GRU(1, 2)
    with raises(TypeError, "expected a cell with a state field c and a gate named forget, got GRU", "gradient_by_lag"):
        cell_path(cell, cell.init(key), jnp.ones((1, 4, 1)))
