"""Step Jacobians and their products: Jacobians against `jax.jacfwd`, products against a loop, at any lag."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY
from errors import raises
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from oracles import BATCH, MASK, RESET, TIME, assert_close, drawn, drawn_states, loop, row

import seqjax as sj

GRUS = {
    f"gru-{reset}-{update}": sj.GRU(3, 4, reset=reset, update=update)
    for reset, update in itertools.product(("after", "before"), ("keeps", "writes"))
}
UNITWISE = {
    "vanilla": sj.VanillaRNN(3, 4),
    "vanilla-relu": sj.VanillaRNN(3, 4, activation="relu"),
    "vanilla-identity": sj.VanillaRNN(3, 4, activation="identity"),
    "lstm": sj.LSTM(3, 4),
    "learned": sj.LearnedState(sj.LSTM(3, 4)),
    "stack": sj.stack([sj.LSTM(3, 4), sj.GRU(4, 4)]),
    **GRUS,
}
DISTINCT = [name for name in EVERY if name != "lstm-chrono"]  # of one equation, one is enough
SINGLE = ["nnx-simple"]  # flax always computes these in float32


@functools.cache
def derivatives(cell):
    """d s_t / d s_{t-1} and d s_t / d x_t of the cell's plain step, flat, by `jax.jacfwd`."""

    def step(v, like, params, x):
        return ravel_pytree(cell.step(params, ravel_pytree(like)[1](v), x)[0])[0]

    def both(params, state, x):
        v, _ = ravel_pytree(state)
        return jax.jacfwd(step)(v, state, params, x), jax.jacfwd(step, argnums=3)(v, state, params, x)

    return jax.jit(both)


def by_hand(cell, params, xs, **options):
    """The same at every step, by a loop over rows and times."""
    states = loop(cell, params, xs, **options).states
    result = [derivatives(cell)(params, row(states, b, t), xs[b, t]) for b, t in np.ndindex(xs.shape[:2])]
    by_state, by_input = (np.stack(each).reshape(*xs.shape[:2], *each[0].shape) for each in zip(*result, strict=True))
    return by_state, by_input


def linear(W):
    """h_t = W h_{t-1}, and its parameters."""
    n = len(W)
    return sj.VanillaRNN(1, n, activation="identity"), sj.VanillaParams(jnp.zeros((n, 1)), W, jnp.zeros(n))


def rotation(gain, angle=0.3):
    """A matrix with all singular values equal to `gain`."""
    return gain * jnp.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


@pytest.mark.parametrize("name", DISTINCT)
def test_the_jacobian_of_every_step_is_that_of_the_cells_own_step(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    state = drawn_states(cell, params)
    got = sj.analysis.step_jacobians(cell, params, xs, inputs=True, state=state)
    tolerance = 1e-5 if name in SINGLE else 1e-12
    for result, expected in zip(got, by_hand(cell, params, xs, state=state), strict=False):
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", UNITWISE)
def test_the_jacobian_of_unitwise_cells_equals_that_of_jax(name, x64):
    cell = UNITWISE[name]
    params, xs = drawn(cell, "float64", seed=7)
    states = drawn_states(cell, params)
    assert "acts unit by unit" in sj.explain(cell, params, xs[0, 0]).jacobian
    got = sj.analysis.step_jacobians(cell, params, xs[:, :1], state=states).by_state[:, 0]
    expected = jax.vmap(lambda s, x: derivatives(cell)(params, s, x)[0])(states, xs[:, 0])
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("update", "kept"), [("keeps", 0.8807970779778823), ("writes", 0.11920292202211755)])
def test_a_gru_without_weights_multiplies_by_its_update_gate(update, kept, x64):
    cell = sj.GRU(1, 3, update=update, dtype="float64")
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    params = params._replace(b_h=jnp.array([0, 0, 0, 2.0, 2, 2, 0, 0, 0]))
    result = sj.analysis.step_jacobians(cell, params, jnp.ones((1, 2, 1))).by_state
    np.testing.assert_allclose(result, np.broadcast_to(kept * np.eye(3), (1, 2, 3, 3)), atol=1e-15)


def test_the_jacobian_of_a_subclass_is_that_of_its_own_step(x64):
    class Forgetful(sj.LSTM):
        """Its step halves c."""

        def step(self, params, state, x):
            (h, c), _ = super().step(params, state, x)
            return sj.LSTMState(h, 0.5 * c), h

    params, xs = drawn(sj.LSTM(3, 4), "float64")
    got = sj.analysis.step_jacobians(Forgetful(3, 4), params, xs[:, :1])
    expected = sj.analysis.step_jacobians(sj.LSTM(3, 4), params, xs[:, :1])
    np.testing.assert_allclose(got.block("h", "c"), expected.block("h", "c"), atol=1e-14)
    np.testing.assert_allclose(got.block("c", "c"), 0.5 * expected.block("c", "c"), atol=1e-14)


def test_a_block_is_the_derivative_of_one_field_by_another(x64):
    cell, n = sj.LSTM(3, 4), 4
    params, xs = drawn(cell, "float64")
    state = drawn_states(cell, params)
    result = sj.analysis.step_jacobians(cell, params, xs, state=state)
    step = jax.jit(jax.jacfwd(lambda s, x: cell.step(params, s, x)[0]))
    states = loop(cell, params, xs, state=state).states
    for b, t in np.ndindex(BATCH, TIME):
        expected = step(sj.LSTMState(*map(jnp.asarray, row(states, b, t))), xs[b, t])
        for of, by in itertools.product("hc", "hc"):
            block = result.block(of, by)
            assert block.shape == (BATCH, TIME, n, n)
            np.testing.assert_allclose(block[b, t], getattr(getattr(expected, of), by), atol=1e-14)
    off_diagonal = np.asarray(result.block("c", "c")) * (1 - np.eye(n))
    assert not off_diagonal.any()  # dc/dc is only the forget gate


def test_the_fields_of_a_stack_are_named_by_layer():
    cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.GRU(4, 2)])
    params = cell.init(jax.random.key(0))
    result = sj.analysis.step_jacobians(cell, params, jnp.arange(10).reshape(2, 5) % 5)
    assert result.parts == {"1.h": slice(0, 4), "1.c": slice(4, 8), "2.h": slice(8, 10)}
    assert not np.any(result.block("1.h", "2.h"))  # nothing flows back down a stack
    assert np.any(result.block("2.h", "1.c"))
    assert result.by_input is None


@pytest.mark.parametrize("name", ["lstm", "gru-before", "learned-stack", "user", "linen-gru"])
def test_a_masked_step_is_the_identity_and_a_reset_is_zero(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    spoilt = jnp.where(MASK[..., None], xs, jnp.nan)
    options = dict(state=drawn_states(cell, params), mask=MASK, reset=RESET)
    result = sj.analysis.step_jacobians(cell, params, spoilt, inputs=True, **options)
    n = result.by_state.shape[-1]
    fresh = by_hand(cell, params, xs, state=jax.tree.map(lambda *s: jnp.stack(s), *[cell.initial_state(params)] * 2))
    plain = by_hand(cell, params, xs, **options)
    for b, t in np.ndindex(MASK.shape):
        by_state = np.zeros((n, n)) if RESET[b, t] else plain[0][b, t] if MASK[b, t] else np.eye(n)
        np.testing.assert_allclose(result.by_state[b, t], by_state, atol=1e-12)
        if not MASK[b, t]:
            assert not np.any(result.by_input[b, t])
        elif not RESET[b, t]:
            np.testing.assert_allclose(result.by_input[b, t], plain[1][b, t], atol=1e-12)
    np.testing.assert_allclose(result.by_input[0, 0], fresh[1][0, 0], atol=1e-12)  # reset at the first step


@pytest.mark.parametrize("name", ["lstm", "user"])
def test_a_product_is_that_of_the_step_jacobians_over_its_span(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params), mask=MASK)
    J = np.asarray(sj.analysis.step_jacobians(cell, params, xs, **options).by_state)
    for start, stop in ((0, TIME), (2, 5)):
        result = sj.analysis.jacobian_product(cell, params, xs, start=start, stop=stop, **options)
        for b in range(BATCH):
            expected = functools.reduce(lambda M, J_t: J_t @ M, J[b, start:stop], np.eye(J.shape[-1]))
            np.testing.assert_allclose(np.exp(result.log_scale[b]) * result.matrix[b], expected, rtol=1e-10, atol=1e-14)
            assert 0.5 <= np.abs(result.matrix[b]).max() <= 1


@pytest.mark.parametrize("name", ["vanilla", "lstm", "gru-before"])
def test_a_gradient_is_pulled_back_by_the_transposed_jacobians(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64", batch=1)
    weights = np.cos(np.arange(100.0))

    def last(states):
        flat = jnp.concatenate([leaf[0, -1] for leaf in jax.tree.leaves(states)])
        return flat @ weights[: flat.size]

    gradients = sj.state_gradients(cell, params, xs, last)
    J = np.asarray(sj.analysis.step_jacobians(cell, params, xs).by_state[0])
    g = weights[: J.shape[-1]]
    for J_t in J[::-1]:
        g = J_t.T @ g
    assert_close(np.asarray(ravel_pytree(row(gradients, 0, 0))[0]), g)


@pytest.mark.parametrize(("gain", "power"), [(0.8, 0.011529215046), (1.2, 38.337599924)])
def test_an_orthogonal_network_multiplies_by_a_power_of_its_gain(gain, power, x64):
    result = sj.analysis.jacobian_product(*linear(rotation(gain)), jnp.ones((1, 20, 1)))
    values = np.linalg.svd(result.matrix[0], compute_uv=False) * np.exp(result.log_scale[0])
    np.testing.assert_allclose(values, power, rtol=1e-10)


@pytest.mark.parametrize("gain", [0.8, 1.2])
def test_the_scale_of_a_hundred_thousand_steps_in_float32_is_accurate(gain):
    W = rotation(gain)
    assert W.dtype == jnp.float32
    result = sj.analysis.jacobian_product(*linear(W), jnp.ones((1, 100_000, 1)))
    values = np.linalg.svd(np.asarray(result.matrix[0], np.float64), compute_uv=False)
    of_rounded = 0.5 * np.linalg.slogdet(np.asarray(W, np.float64))[1]  # float32 has no 0.8
    np.testing.assert_allclose(np.log(values) + float(result.log_scale[0]), 100_000 * of_rounded, rtol=2e-6)
    np.testing.assert_allclose(of_rounded, np.log(gain), rtol=1e-6)


def test_a_matrix_of_small_radius_makes_perturbations_grow_before_they_shrink(x64):
    cell, params = linear(jnp.array([[0.9, 10.0], [0.0, 0.9]]))
    norms = {}
    for k in (1, 8, 9, 10, 40):
        result = sj.analysis.jacobian_product(cell, params, jnp.ones((1, 40, 1)), stop=k)
        norms[k] = np.linalg.norm(result.matrix[0], 2) * np.exp(result.log_scale[0])
    assert norms[1] == pytest.approx(10.0804, abs=1e-4)
    assert norms[9] == pytest.approx(38.746, abs=1e-3)
    assert max(norms[8], norms[10]) < norms[9]
    assert norms[40] < norms[1]


def test_a_product_over_a_reset_is_zero():
    cell, params = linear(rotation(0.8))
    reset = np.zeros((2, 5), bool)
    reset[1, 2] = True
    result = sj.analysis.jacobian_product(cell, params, jnp.ones((2, 5, 1)), reset=reset)
    assert not result.matrix[1].any()
    assert np.isneginf(result.log_scale).tolist() == [False, True]
    after = sj.analysis.jacobian_product(cell, params, jnp.ones((2, 5, 1)), reset=reset, start=3)
    np.testing.assert_allclose(np.exp(after.log_scale[1]) * after.matrix[1], rotation(0.8) @ rotation(0.8), atol=1e-6)


class Counter:
    """Its state is only a whole number."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.zeros((), jnp.int32)

    def step(self, params, s, x):
        return s + 1, x


class Outside:
    """Computes its state in a callback, which has no derivative."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.zeros(2)

    def step(self, params, h, x):
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h + x), h


@jax.custom_vjp
def rounded(h):
    return jnp.round(h)


rounded.defvjp(lambda h: (jnp.round(h), None), lambda _, g: (g,))


class StraightThrough(Outside):
    """Rounds its state with the gradient of the identity, but without a forward-mode rule."""

    def step(self, params, h, x):
        return rounded(0.5 * h + x), h


class Dynamic(Outside):
    """Its loop has a forward-mode derivative, but no reverse-mode derivative."""

    def step(self, params, h, x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.9 * c[1]), (0, h + x))[1], h


def test_a_step_without_a_derivative_raises_with_the_cause():
    xs = jnp.ones((1, 3, 2))
    with raises(TypeError, "expected a floating-point state", "got only int32", "Counter's state"):
        sj.analysis.step_jacobians(Counter(), {}, xs)
    with raises(TypeError, "a step that JAX can differentiate", "Outside.step", "custom_jvp"):
        sj.analysis.step_jacobians(Outside(), {}, xs)
    with raises(TypeError, "a step that JAX can differentiate", "StraightThrough.step", "custom_vjp", "custom_jvp"):
        sj.analysis.step_jacobians(StraightThrough(), {}, xs)
    with raises(TypeError, "a step that JAX can differentiate", "Dynamic.step", "Reverse-mode"):
        sj.analysis.gradient_by_lag(Dynamic(), {}, xs)
    with raises(TypeError, "a cell with a state", "got Embedding"):
        sj.analysis.step_jacobians(sj.Embedding(4, 2), sj.EmbeddingParams(jnp.ones((4, 2))), xs[..., 0].astype(int))


def test_an_analysis_needs_only_its_own_direction_of_derivatives():
    xs = jnp.ones((1, 3, 2))
    straight = sj.analysis.gradient_by_lag(StraightThrough(), {}, xs)
    np.testing.assert_allclose(straight.log_expected, np.arange(4) * np.log(0.5), atol=1e-6)
    pushed = sj.analysis.step_jacobians(Dynamic(), {}, xs)
    np.testing.assert_allclose(pushed.by_state, np.broadcast_to(0.729 * np.eye(2), (1, 3, 2, 2)), atol=1e-6)


def test_bad_arguments_raise_with_a_hint():
    cell = sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)])
    params, tokens = cell.init(jax.random.key(0)), jnp.zeros((2, 5), int)
    with raises(TypeError, "expected floating-point xs for ds_t/dx_t", "int32", "leave inputs=False for tokens"):
        sj.analysis.step_jacobians(cell, params, tokens, inputs=True)
    result = sj.analysis.step_jacobians(cell, params, tokens)
    with raises(ValueError, "expected a field of the state, one of 1.h", "'c'"):
        result.block("1.h", "c")
    with raises(ValueError, "at least one sequence", "batch of 0"):
        sj.analysis.step_jacobians(cell, params, tokens[:0])
    for start, stop in ((3, 2), (-1, 2), (0, 6)):
        with raises(ValueError, "0 <= start <= stop <= time = 5", f"start {start} and stop {stop}"):
            sj.analysis.jacobian_product(cell, params, tokens, start=start, stop=stop)


def test_a_sequence_of_no_steps_has_no_jacobians_and_a_product_of_one():
    cell, params = linear(rotation(0.8))
    assert sj.analysis.step_jacobians(cell, params, jnp.ones((2, 0, 1)), inputs=True).by_state.shape == (2, 0, 2, 2)
    result = sj.analysis.jacobian_product(cell, params, jnp.ones((2, 0, 1)))
    np.testing.assert_array_equal(result.matrix, np.broadcast_to(np.eye(2), (2, 2, 2)))
    assert not result.log_scale.any()


def products(jaxpr):
    """The matrix products of a program, and of the programs in it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize("cell", [UNITWISE["lstm"], UNITWISE["gru-before-keeps"], UNITWISE["stack"]])
def test_measurements_multiply_in_float32_whatever_the_precision_of_training_is(cell):
    params, xs = drawn(cell, "float32")
    measures = {
        "step_jacobians": lambda params: sj.step_jacobians(cell, params, xs).by_state,
        "frame_growth": lambda params: sj.analysis.frame_growth(cell, params, xs, k=1).log_growth,
    }
    with jax.default_matmul_precision("bfloat16"):
        trained = [*products(jax.make_jaxpr(lambda params: sj.unroll(cell, params, xs))(params).jaxpr)]
        measured = {name: [*products(jax.make_jaxpr(f)(params).jaxpr)] for name, f in measures.items()}
    float32 = (jax.lax.Precision.HIGHEST,) * 2
    assert trained
    assert all(eqn.params["precision"] != float32 for eqn in trained)
    for found in measured.values():
        assert found
        assert all(eqn.params["precision"] == float32 for eqn in found)
