"""Each cell against its equations written out in numpy, and against what is known in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import seqjax as sj

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4))  # features, hidden units
CONVENTIONS = [("after", "keeps"), ("after", "writes"), ("before", "keeps"), ("before", "writes")]


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def draw(data, sizes, gates):
    """Random weights of `gates` blocks in the equations' order, an input and two states; nothing is zero."""
    (d, n), rng = sizes, np.random.default_rng(data.draw(st.integers(0, 2**16)))
    shapes = (gates * n, d), (gates * n, n), (gates * n,), (n,), (d,), (n,), (n,)
    return tuple(rng.normal(size=shape) for shape in shapes)


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-12, atol=1e-12)


def step_and_gates(cell, *numbers):
    """State, output and gates of one step in float64."""
    with jax.enable_x64(True):
        params, state, x = jax.tree.map(jnp.asarray, numbers)
        gates = jax.jit(cell.gates)(params, state, x) if hasattr(cell, "gates") else None
        return *jax.jit(cell.step)(params, state, x), gates


@pytest.mark.parametrize(
    ("activation", "phi"), [("tanh", np.tanh), ("relu", lambda a: np.where(a > 0, a, 0)), ("identity", lambda a: a)]
)
@settings(max_examples=5)
@given(data=st.data(), sizes=SIZES)
def test_a_vanilla_step_is_phi_of_the_affine_map(activation, phi, data, sizes):
    W_xh, W_hh, b_h, _, x, h, _ = draw(data, sizes, 1)
    expected = [phi(sum(W_xh[j] * x) + sum(W_hh[j] * h) + b_h[j]) for j in range(sizes[1])]
    cell = sj.VanillaRNN(*sizes, activation=activation, dtype="float64")
    state, output, _ = step_and_gates(cell, sj.VanillaParams(W_xh, W_hh, b_h), sj.VanillaState(h), x)
    close(output, expected)
    close(state.h, expected)


@settings(max_examples=5)
@given(data=st.data(), sizes=SIZES)
def test_an_lstm_step_and_its_gates_are_the_equations(data, sizes):
    W_xh, W_hh, b_h, _, x, h, c = draw(data, sizes, 4)
    n = sizes[1]
    a_i, a_f, a_c, a_o = (W_xh[j : j + n] @ x + W_hh[j : j + n] @ h + b_h[j : j + n] for j in range(0, 4 * n, n))
    i, f, c_tilde, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_c), sigmoid(a_o)
    cell = sj.LSTM(*sizes, dtype="float64")
    state, output, gates = step_and_gates(cell, sj.LSTMParams(W_xh, W_hh, b_h), sj.LSTMState(h, c), x)
    close(state.c, f * c + i * c_tilde)
    close(state.h, o * np.tanh(f * c + i * c_tilde))
    close(output, state.h)
    for name, gate in {"input": i, "forget": f, "candidate": c_tilde, "output": o}.items():
        close(gates[name], gate)


def gru_by_hand(reset, update, W_xh, W_hh, b_h, b_hn, x, h):
    n = len(h)
    (x_r, x_z, x_n), (U_r, U_z, U_n) = np.split(W_xh @ x + b_h, 3), np.split(W_hh, 3)
    r, z = sigmoid(x_r + U_r @ h), sigmoid(x_z + U_z @ h)
    inner = [r[j] * (sum(U_n[j] * h) + b_hn[j]) if reset == "after" else sum(U_n[j] * r * h) for j in range(n)]
    h_tilde = np.tanh(x_n + np.array(inner))
    return r, z, h_tilde, (1 - z) * h_tilde + z * h if update == "keeps" else (1 - z) * h + z * h_tilde


@pytest.mark.parametrize(("reset", "update"), CONVENTIONS)
@settings(max_examples=5)
@given(data=st.data(), sizes=SIZES)
def test_a_gru_step_and_its_gates_are_the_equations_of_each_convention(reset, update, data, sizes):
    W_xh, W_hh, b_h, b_hn, x, h, _ = draw(data, sizes, 3)
    r, z, h_tilde, expected = gru_by_hand(reset, update, W_xh, W_hh, b_h, b_hn, x, h)
    cell = sj.GRU(*sizes, reset=reset, update=update, dtype="float64")
    params = sj.GRUParams(W_xh, W_hh, b_h, b_hn if reset == "after" else None)
    state, output, gates = step_and_gates(cell, params, sj.GRUState(h), x)
    close(output, expected)
    close(state.h, expected)
    for name, gate in {"reset": r, "update": z, "candidate": h_tilde}.items():
        close(gates[name], gate)


@pytest.mark.parametrize(("kind", "reverse"), [("lstm", False), ("gru", True), ("stack", True), ("learned", False)])
def test_gates_over_a_sequence_are_those_of_each_step_from_the_state_before_it(kind, reverse, x64, key):
    lstm, gru = sj.LSTM(3, 3, dtype="float64"), sj.GRU(3, 2, dtype="float64")
    cell = {"lstm": lstm, "gru": gru, "stack": sj.stack([lstm, gru]), "learned": sj.LearnedState(lstm)}[kind]

    def of_the_stack(params, state, x):
        _, below = lstm.step(params[0], state[0], x)
        named = ("0/", lstm.gates(params[0], state[0], x)), ("1/", gru.gates(params[1], state[1], below))
        return {layer + name: gate for layer, gates in named for name, gate in gates.items()}

    def of_the_learned(params, state, x):
        return lstm.gates(params.cell, state, x)

    of_one = jax.jit({"stack": of_the_stack, "learned": of_the_learned}.get(kind, cell.gates))
    params, xs = cell.init(key), jax.random.normal(key, (2, 4, 3))
    if kind == "learned":
        params = params._replace(state=sj.LSTMState(jnp.full(3, 0.3), jnp.full(3, -0.7)))
    mask = jnp.array([[True, True, False, True], [False, True, True, True]])
    named = sj.gates(cell, params, xs, mask=mask, reverse=reverse)
    before = jax.tree.map(np.asarray, sj.trajectory(cell, params, xs, mask=mask, reverse=reverse))
    xs = np.asarray(xs)
    for b, t in np.ndindex(2, 4):
        state = jax.tree.map(lambda leaf: leaf[b, t + reverse], before)  # noqa: B023
        expected = of_one(params, state, xs[b, t])
        assert sorted(named) == sorted(expected)
        for name, gate in named.items():
            close(gate[b, t], np.asarray(expected[name]) * bool(mask[b, t]))


@pytest.mark.parametrize(("g", "expected"), [(0.8, 0.011529215046), (1.2, 38.337599924)])
def test_twenty_steps_of_a_scaled_rotation_stretch_every_direction_by_g_to_the_twentieth(g, expected, x64, key):
    cell = sj.VanillaRNN(1, 6, activation="identity", recurrent_init=sj.Orthogonal(g), dtype="float64")
    params, xs = cell.init(key), jnp.zeros((1, 20, 1))

    def last(h):
        return sj.unroll(cell, params, xs, state=sj.VanillaState(h[None]))[0].h[0]

    singular = np.linalg.svd(jax.jit(jax.jacobian(last))(jnp.zeros(6)), compute_uv=False)
    np.testing.assert_allclose(singular, g**20, rtol=1e-12)
    assert singular[0] == pytest.approx(expected, rel=1e-9, abs=0)


def state_jacobian(cell, params, state, x):
    """d s_t / d s_{t-1} over the whole state."""
    flat, restore = ravel_pytree(state)
    return np.asarray(jax.jit(jax.jacobian(lambda s: ravel_pytree(cell.step(params, restore(s), x)[0])[0]))(flat))


@pytest.mark.parametrize(("bias", "log_forget"), [(0.0, -0.693147), (1.0, -0.313262), (5.0, -0.006715)])
def test_an_lstm_without_weights_forgets_at_the_logistic_of_its_bias(bias, log_forget, x64, key):
    n, cell = 4, sj.LSTM(2, 4, forget_bias=bias, recurrent_init=sj.Uniform(), dtype="float64")
    params = cell.init(key)
    params = params._replace(W_xh=0 * params.W_xh, W_hh=0 * params.W_hh)
    state = sj.LSTMState(*jax.random.normal(key, (2, n)))
    eigenvalues = np.sort(np.linalg.eigvals(state_jacobian(cell, params, state, jnp.ones(2))).real)
    np.testing.assert_allclose(eigenvalues, [0] * n + [sigmoid(bias)] * n, atol=1e-13)
    assert np.log(eigenvalues[-1]) == pytest.approx(log_forget, abs=5e-7)


@pytest.mark.parametrize(("reset", "update"), CONVENTIONS)
def test_a_gru_without_weights_keeps_what_its_update_gate_leaves(reset, update, x64, key):
    b_z = np.array([-1.0, 0.0, 2.0])
    cell = sj.GRU(2, 3, reset=reset, update=update, dtype="float64")
    params = jax.tree.map(jnp.zeros_like, jax.eval_shape(cell.init, key))
    params = params._replace(b_h=params.b_h.at[3:6].set(b_z))
    J = state_jacobian(cell, params, sj.GRUState(jax.random.normal(key, (3,))), jnp.ones(2))
    np.testing.assert_allclose(J, np.diag(sigmoid(b_z if update == "keeps" else -b_z)), atol=1e-15)


@pytest.mark.parametrize(("w", "point", "slope"), [(2.0, 0.957504024, 0.166372088), (1.5, 0.858559637, 0.394313026)])
def test_the_scalar_network_settles_at_its_fixed_points_with_their_slope(w, point, slope, x64):
    cell = sj.VanillaRNN(1, 1, dtype="float64")
    params = sj.VanillaParams(jnp.zeros((1, 1)), jnp.full((1, 1), w), jnp.zeros(1))
    starts = sj.VanillaState(jnp.array([[-0.5], [0.0], [1e-3], [3.0]]))
    ends = sj.unroll(cell, params, jnp.zeros((4, 100, 1)), state=starts)[0].h
    np.testing.assert_allclose(ends[:, 0], [-point, 0, point, point], atol=1e-9)
    for end, expected in zip(ends, [slope, w, slope, slope], strict=True):
        J = state_jacobian(cell, params, sj.VanillaState(end), jnp.zeros(1))
        assert J.item() == pytest.approx(expected, abs=1e-9)
