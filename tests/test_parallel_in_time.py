"""Parallel-in-time evaluation: the unroll in values and derivatives, and honest where it does not converge."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, D
from errors import raises
from oracles import MASK, RESET, assert_close, drawn, drawn_states, looped, weighted

import seqjax as sj
from seqjax.parallel._algebra import DENSE, DIAGONAL
from seqjax.parallel._linear_scan import linear_scan
from seqjax.parallel._smoother import smoothed_step

METHODS = [sj.DEER(), sj.QuasiDEER(), sj.ELK(), sj.QuasiELK()]
NEWTON = METHODS[:2]
NAMES = ["stack", "learned", "user", "linen-gru"]


@pytest.fixture(autouse=True)
def quiet():
    """Random cells on a few steps may grow; the warning has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sj.NotContractingWarning)
        yield


@functools.partial(jax.jit, static_argnames=("cell", "method", "reverse", "fallback", "max_iterations"))
def searched(cell, method, params, xs, state=None, mask=None, reset=None, **options):
    """The result, the gradient of `weighted` of it by params, inputs and given state, and the record."""

    def value(params, xs, state):
        flags = dict(state=state, mask=mask, reset=reset)
        result, found = sj.unroll_parallel(cell, params, xs, method=method, tolerance=1e-13, **flags, **options)
        return weighted(result), (result, found)

    by = (0, 1) if state is None else (0, 1, 2)
    (_, (result, found)), gradient = jax.value_and_grad(value, argnums=by, has_aux=True)(params, xs, state)
    return (result, gradient), found


def linear(W, U=None):
    """h_t = W h_{t-1} + U x_t."""
    n = len(W)
    U = jnp.ones((n, 1), W.dtype) if U is None else U
    return sj.VanillaRNN(1, n, activation="identity"), sj.VanillaParams(U, W, jnp.zeros(n, W.dtype))


def tanh(n, gain, dtype="float32"):
    """A random tanh network, chaotic for a gain well above 1, and inputs for it."""
    W = gain * jax.random.normal(jax.random.key(0), (n, n), dtype) / np.sqrt(n).astype(dtype)
    U = 0.5 * jax.random.normal(jax.random.key(1), (n, 1), dtype)
    return sj.VanillaRNN(1, n, dtype=dtype), sj.VanillaParams(U, W, jnp.zeros(n, dtype))


class Relaxing:
    """A cubic cell, s + (x - s^3) / 5: it contracts where its trajectory is, and overflows far from there."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.zeros(1)

    def step(self, params, s, x):
        s = s + 0.2 * (x - s**3)
        return s, s


class Diagonal:
    """Units that do not mix, h_t = tanh(a h_{t-1} + x_t)."""

    def init(self, key):
        return jnp.linspace(-0.9, 0.9, D)

    def initial_state(self, a):
        return jnp.zeros_like(a)

    def step(self, a, h, x):
        h = jnp.tanh(a * h + x)
        return h, h


@pytest.mark.parametrize("algebra", [DENSE, DIAGONAL])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_linear_scan_is_the_recurrence(algebra, reverse, x64):
    generator = np.random.default_rng(0)
    A = generator.normal(size=(7, 3, 3) if algebra is DENSE else (7, 3))
    b, d, expected = generator.normal(size=(7, 3)), np.zeros(3), np.zeros((7, 3))
    for t in range(6, -1, -1) if reverse else range(7):
        expected[t] = d = (A[t] @ d if algebra is DENSE else A[t] * d) + b[t]
    got = linear_scan(algebra, jnp.asarray(A), jnp.asarray(b), reverse=reverse)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("algebra", [DENSE, DIAGONAL])
@pytest.mark.parametrize("mu", [1e-6, 0.3, 10.0])
def test_the_damped_step_is_the_least_squares_solution(algebra, mu, x64):
    generator, (T, n) = np.random.default_rng(1), (6, 3)
    J, r = generator.normal(size=(T, n, n) if algebra is DENSE else (T, n)), generator.normal(size=(T, n))
    L = np.eye(T * n)
    for t in range(1, T):
        L[t * n : (t + 1) * n, (t - 1) * n : t * n] = -(J[t] if algebra is DENSE else np.diag(J[t]))
    expected = np.linalg.solve(L.T @ L + mu * np.eye(T * n), L.T @ r.ravel()).reshape(T, n)
    got = smoothed_step(algebra, jnp.asarray(J), jnp.asarray(r), jnp.asarray(mu))
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_deer_is_the_loop_in_values_and_gradients_with_masks_and_resets(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    state, spoilt = drawn_states(cell, params), jnp.where(MASK[..., None], xs, jnp.nan)
    got, found = searched(cell, sj.DEER(), params, spoilt, state=state, mask=MASK, reset=RESET)
    assert_close(got, looped(cell, params, xs, state=state, mask=MASK, reset=RESET))
    assert np.all(found.converged)
    assert not np.any(found.fell_back)


@pytest.mark.parametrize(("method", "reverse"), [*zip(METHODS, [True, False, False, True], strict=True)], ids=repr)
def test_every_method_is_the_loop_in_values_and_gradients(method, reverse, x64):
    cell = EVERY["vanilla" if method == sj.ELK() else "lstm"]
    params, xs = drawn(cell, "float64")
    state, spoilt = drawn_states(cell, params), jnp.where(MASK[..., None], xs, jnp.nan)
    flags = dict(state=state, mask=MASK, reset=RESET, reverse=reverse)
    got, found = searched(cell, method, params, spoilt, **flags)
    assert_close(got, looped(cell, params, xs, **flags))
    assert np.all(found.converged)


@pytest.mark.parametrize("method", NEWTON, ids=repr)
def test_a_longer_sequence_is_the_unroll_to_the_tolerance(method):
    cell = sj.GRU(D, 8)
    params, xs = drawn(cell, "float32", time=500)
    (final, outputs), found = sj.unroll_parallel(cell, params, xs, method=method)
    expected = sj.unroll(cell, params, xs)
    assert_close((final, outputs), expected)
    np.testing.assert_array_equal(final.h, outputs[:, -1])
    assert np.all(found.residual < 7e-6)
    assert np.all(found.exponent < 0)
    true = sj.lyapunov_exponents(cell, params, xs, k=1).exponents[:, 0]
    np.testing.assert_allclose(found.exponent, true, atol=0.05)


def test_a_linear_cell_takes_one_iteration_and_is_its_closed_form(x64):
    W = 0.9 * jnp.array([[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]])
    impulse = jnp.zeros((1, 50, 1)).at[0, 0].set(1.0)
    cell, params = linear(W, jnp.array([[1.0], [0.0]]))
    (_, outputs), found = sj.unroll_parallel(cell, params, impulse)
    t = np.arange(50)
    expected = 0.9 ** t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    np.testing.assert_allclose(outputs[0], expected, atol=1e-13)
    assert found.iterations.tolist() == [1]
    np.testing.assert_allclose(found.exponent, np.log(0.9), rtol=1e-5)


def test_diagonals_are_enough_where_units_do_not_mix(x64):
    cell, xs = Diagonal(), jax.random.normal(jax.random.key(1), (2, 60, D))
    a = cell.init(jax.random.key(0))
    whole, found = sj.unroll_parallel(cell, a, xs)
    diagonal, as_found = sj.unroll_parallel(cell, a, xs, method=sj.QuasiDEER())
    assert_close(diagonal, whole)
    np.testing.assert_array_equal(as_found.iterations, found.iterations)
    assert found.iterations.max() < 8


def test_diagonals_are_taken_in_pieces_where_all_jacobians_are_too_many(monkeypatch, x64):
    monkeypatch.setattr("seqjax.parallel._flat.AT_ONCE", 7 * 16)
    cell = sj.GRU(D, 4, chrono=4)
    params, xs = drawn(cell, "float64", time=30)
    got, found = sj.unroll_parallel(cell, params, xs, method=sj.QuasiDEER(), tolerance=1e-13)
    assert_close(got, sj.unroll(cell, params, xs))
    assert found.converged.all()


@pytest.mark.parametrize("method", NEWTON, ids=repr)
def test_every_kind_of_derivative_is_the_unrolls(method, x64):
    cell = sj.VanillaRNN(D, 3)
    params, xs = drawn(cell, "float64", time=5)
    direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)

    def in_parallel(params):
        return sj.unroll_parallel(cell, params, xs, method=method, tolerance=1e-14)[0]

    def in_turn(params):
        return sj.unroll(cell, params, xs)

    for derivative in (
        lambda f: jax.jvp(f, (params,), (direction,)),
        lambda f: jax.jvp(jax.grad(lambda p: weighted(f(p))), (params,), (direction,))[1],
        lambda f: jax.vmap(jax.grad(lambda p: weighted(f(p))))(jax.tree.map(lambda p: jnp.stack([p, p / 2]), params)),
    ):
        assert_close(jax.jit(lambda: derivative(in_parallel))(), jax.jit(lambda: derivative(in_turn))())  # noqa: B023


def test_noise_is_drawn_as_unroll_draws_it(key, x64):
    cell = sj.stack([sj.Dropout(D, 0.3), sj.GRU(D, 4), sj.Dropout(4, 0.5)])
    params, xs = drawn(cell, "float64")
    got, found = sj.unroll_parallel(cell, params, xs, key=key, reverse=True)
    assert_close(got, sj.unroll(cell, params, xs, key=key, reverse=True))
    assert found.converged.all()


class Tokens:
    """Reads whole numbers, and has one among its parameters: neither has a tangent."""

    def init(self, key):
        return {"E": jax.random.normal(key, (5, D)), "shift": jnp.array(1)}

    def initial_state(self, params):
        return jnp.zeros_like(params["E"][0])

    def step(self, params, h, token):
        h = jnp.tanh(0.5 * h[::-1] + params["E"][(token + params["shift"]) % 5])
        return h, h


@pytest.mark.parametrize("method", NEWTON, ids=repr)
def test_whole_numbers_among_inputs_and_parameters_leave_gradients_alone(method, key, x64):
    cell, tokens = Tokens(), jnp.arange(12).reshape(2, 6) % 5
    params = cell.init(key)

    def gradient(run):
        return jax.grad(lambda E: weighted(run(cell, params | {"E": E}, tokens)))(params["E"])

    in_parallel = gradient(lambda *given: sj.unroll_parallel(*given, method=method, tolerance=1e-13)[0])
    assert_close(in_parallel, gradient(sj.unroll))


class Noisy(sj.GRU):
    """Noise in its state, and a closed form of the Jacobian that does not know of it."""

    def noise(self, key):
        return jax.random.bernoulli(key, 0.5, (self.hidden_size,))

    def step(self, params, state, x, noise=None):
        state, output = super().step(params, state, x)
        return (state if noise is None else sj.GRUState(jnp.where(noise, state.h, 0 * state.h))), output


def test_noise_in_the_state_falls_back_to_the_same_noise(key, x64):
    cell = Noisy(D, 4)
    params, xs = drawn(cell, "float64")
    expected = sj.unroll(cell, params, xs, key=key)
    for options in (dict(tolerance=1e-13), dict(max_iterations=1, fallback=True, tolerance=1e-14)):
        got, found = sj.unroll_parallel(cell, params, xs, key=key, **options)
        assert_close(got, expected)
        assert np.all(found.fell_back == ("fallback" in options))


def test_elk_converges_in_few_iterations_where_deer_overflows(x64):
    xs = 3 + 0.5 * jax.random.normal(jax.random.key(0), (1, 50, 1))
    expected = sj.unroll(Relaxing(), {}, xs)
    needed = {}
    for method in (sj.DEER(), sj.ELK()):
        got, found = sj.unroll_parallel(Relaxing(), {}, xs, method=method)
        assert_close(got, expected)
        assert found.converged.all()
        assert found.exponent[0] < -1
        needed[type(method).__name__] = int(found.iterations[0])
    assert needed["ELK"] < 30
    assert needed["DEER"] > 40  # one for nearly every step
    J = 1 - 0.6 * jnp.full((100, 1, 1), 50.0, jnp.float32) ** 2  # far from the trajectory
    assert not np.isfinite(linear_scan(DENSE, J, jnp.ones((100, 1), jnp.float32))).all()


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3]], ids=repr)
def test_every_method_is_exact_after_as_many_iterations_as_steps(method, x64):
    cell, params = tanh(6, 3.0, "float64")
    xs = jax.random.normal(jax.random.key(2), (1, 30, 1))
    got, found = sj.unroll_parallel(cell, params, xs, method=method, tolerance=1e-14, max_iterations=30)
    assert found.converged.all()
    np.testing.assert_allclose(got[1], sj.unroll(cell, params, xs)[1], atol=1e-7)
    assert found.iterations[0] > 5


def test_what_has_not_converged_is_said_and_the_fallback_is_the_scan(x64):
    cell, params = tanh(16, 3.0, "float64")
    xs = jax.random.normal(jax.random.key(2), (2, 60, 1)).at[0].set(0.0)  # at rest in row 0, chaotic in row 1
    expected, gradient = jax.value_and_grad(lambda p: weighted(sj.unroll(cell, p, xs)))(params)
    for fallback in (False, True):

        def value(p, fallback=fallback):
            result, found = sj.unroll_parallel(cell, p, xs, max_iterations=4, fallback=fallback)
            return weighted(result), found

        (got, found), got_gradient = jax.value_and_grad(value, has_aux=True)(params)
        assert found.converged.tolist() == [True, False]
        assert found.fell_back.tolist() == [False, fallback]
        assert found.residual[1] > 1e-3
        if fallback:
            np.testing.assert_allclose(got, expected, rtol=1e-9)
            for a, b in zip(got_gradient, gradient, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            assert abs(got - expected) > 1e-3


def test_a_warning_gives_the_exponent_where_perturbations_grow():
    cell, params = tanh(32, 3.0)
    xs = jax.random.normal(jax.random.key(2), (2, 300, 1))
    true = sj.lyapunov_exponents(cell, params, xs, k=1).exponents[:, 0]
    with pytest.warns(sj.NotContractingWarning, match=r"perturbations grow .* \+0\.\d+ per step in row"):
        _, found = sj.unroll_parallel(cell, params, xs, max_iterations=5, fallback=True, method=sj.QuasiDEER())
    np.testing.assert_allclose(found.exponent, true, atol=0.1)
    assert true.min() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grows, shrinks = linear(jnp.array([[1.1]])), linear(jnp.array([[0.9]]))
        traced = jax.jit(lambda p: sj.unroll_parallel(grows[0], p, xs[:, :40])[1])(grows[1])
        np.testing.assert_allclose(traced.exponent, np.log(1.1), rtol=1e-5)
        sj.unroll_parallel(*shrinks, xs[:, :40])
    with pytest.warns(sj.NotContractingWarning, match=r"\+0\.0953 per step"):
        sj.unroll_parallel(*grows, xs[:, :40])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_that_is_not_a_number_has_converged(bad):
    cell = sj.VanillaRNN(D, 4, activation="relu")
    params, xs = drawn(cell, "float32", time=20)
    _, found = sj.unroll_parallel(cell, params, xs.at[1, 7].set(bad))
    assert found.converged.tolist() == [True, False]
    assert found.residual[1] == np.inf
    got, found = sj.unroll_parallel(cell, params, xs.at[1, 7].set(bad), fallback=True)
    assert found.fell_back.tolist() == [False, True]
    np.testing.assert_allclose(got[1], sj.unroll(cell, params, xs.at[1, 7].set(bad))[1], rtol=1e-5)


def test_a_given_state_that_is_not_a_number_is_gone_after_a_reset(x64):
    cell = sj.LSTM(D, 4)
    params, xs = drawn(cell, "float64")
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), drawn_states(cell, params))
    reset = np.zeros(xs.shape[:2], bool)
    reset[:, 0] = True
    got, found = sj.unroll_parallel(cell, params, xs, state=broken, reset=reset, tolerance=1e-13)
    assert_close(got, sj.unroll(cell, params, xs))
    assert found.converged.all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_record_has_one_type_whatever_is_asked(dtype):
    cells = [sj.stack([sj.Dropout(D), sj.VanillaRNN(D, 4)]), sj.Dropout(D)]
    types = set()
    for cell in cells if dtype == "float32" else cells[:1]:
        params = jax.tree.map(lambda p: p.astype(dtype), cell.init(jax.random.key(0)))
        xs = jnp.ones((2, 6, D), dtype)
        for options in ({}, dict(method=sj.QuasiDEER(), fallback=True, mask=np.zeros((2, 6), bool))):
            result, found = sj.unroll_parallel(cell, params, xs, **options)
            expected = sj.unroll(cell, params, xs, mask=options.get("mask"))
            assert_close(result, expected)
            assert found.converged.all()
            types.add(jax.tree.structure(found))
            assert [str(leaf.dtype) for leaf in found] == ["bool", "int32", "float32", "float32", "bool"]
            assert {leaf.shape for leaf in found} == {(2,)}
    assert types == {jax.tree.structure(sj.Convergence(*range(5)))}


@pytest.mark.parametrize("shape", [(2, 0, D), (0, 5, D), (2, 1, D)])
def test_no_time_no_batch_and_one_step_are_the_unrolls(shape):
    cell = sj.VanillaRNN(D, 4)
    params, xs = cell.init(jax.random.key(0)), jnp.ones(shape)
    got, found = sj.unroll_parallel(cell, params, xs)
    assert_close(got, sj.unroll(cell, params, xs))
    assert found.converged.all()
    assert found.iterations.shape == (shape[0],)


def test_a_cell_without_a_state_is_every_step_at_once():
    cell = sj.Embedding(5, D)
    params, tokens = cell.init(jax.random.key(0)), jnp.arange(10).reshape(2, 5) % 5
    got, found = sj.unroll_parallel(cell, params, tokens)
    assert_close(got[1], sj.unroll(cell, params, tokens)[1])
    assert found.iterations.tolist() == [0, 0]
    assert found.exponent.tolist() == [-np.inf, -np.inf]


def test_the_batch_is_rows_that_converge_on_their_own():
    cell, params = tanh(8, 1.2)
    xs = jax.random.normal(jax.random.key(2), (3, 80, 1)) * jnp.array([0.0, 0.5, 2.0])[:, None, None]
    _, together = sj.unroll_parallel(cell, params, xs)
    assert together.iterations[0] == 0  # at rest from the start
    for x, iterations in zip(xs, together.iterations, strict=True):
        assert sj.unroll_parallel(cell, params, x[None])[1].iterations == iterations


def test_rebuilding_an_equal_cell_and_method_compiles_nothing():
    traces = []

    class Counted(sj.VanillaRNN):
        """Says when it is traced."""

        def step(self, params, state, x):
            traces.append(1)
            return super().step(params, state, x)

    params, xs = drawn(sj.VanillaRNN(D, 4), "float32", time=3)
    sj.unroll_parallel(Counted(D, 4), params, xs, method=sj.QuasiELK(0.5))
    first = len(traces)
    for tolerance in (None, 1e-3, 1e-4):
        sj.unroll_parallel(Counted(D, 4), params, xs, method=sj.QuasiELK(0.5), tolerance=tolerance)
    assert len(traces) == first


class Counting:
    """A count of steps beside its state."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return {"h": jnp.zeros(2), "steps": jnp.zeros((), jnp.int32)}

    def step(self, params, state, x):
        return {"h": 0.5 * state["h"] + x, "steps": state["steps"] + 1}, state["h"]


class Backward(Counting):
    """A step with a derivative in reverse mode alone."""

    def initial_state(self, params):
        return jnp.zeros(2)

    def step(self, params, state, x):
        @jax.custom_vjp
        def half(s):
            return 0.5 * s

        half.defvjp(lambda s: (half(s), None), lambda _, g: (0.5 * g,))
        return half(state) + x, state


def test_bad_input_is_refused_by_name_before_anything_compiles():
    cell, xs = sj.GRU(D, 4), jnp.ones((2, 6, D))
    params = cell.init(jax.random.key(0))
    two = jnp.ones((1, 3, 2))
    for method in (sj.DEER(), sj.QuasiELK()):
        name = type(method).__name__
        with raises(TypeError, name, "Counting's state['steps']", "int32", "sj.unroll"):
            sj.unroll_parallel(Counting(), {}, two, method=method)
        with raises(TypeError, name, "Backward.step", "forward mode", "jax.custom_jvp"):
            sj.unroll_parallel(Backward(), {}, two, method=method)
    with raises(TypeError, "expected method, one of DEER()", "'deer'"):
        sj.unroll_parallel(cell, params, xs, method="deer")
    with raises(TypeError, "the class ELK: ELK() is one"):
        sj.unroll_parallel(cell, params, xs, method=sj.ELK)
    for tolerance in (0.0, -1.0, float("nan")):
        with raises(ValueError, "positive tolerance", "leave it out"):
            sj.unroll_parallel(cell, params, xs, tolerance=tolerance)
    for most in (0, 2.5, True):
        with raises(ValueError, "max_iterations", "at least 1", repr(most)):
            sj.unroll_parallel(cell, params, xs, max_iterations=most)
    for damping in (0, -1.0, np.nan, True):
        with raises(ValueError, "ELK damping", "positive", "DEER()"):
            sj.ELK(damping)
    with raises(ValueError, "expected xs (batch, time, 3)"):
        sj.unroll_parallel(cell, params, xs[0])
    with raises(ValueError, "expected mask (batch, time) = (2, 6)"):
        sj.unroll_parallel(cell, params, xs, mask=jnp.ones((2, 5), bool))


def test_methods_are_values():
    assert sj.ELK() == sj.ELK(1.0)
    assert hash(sj.ELK(0.5)) == hash(sj.ELK(0.5))
    assert sj.ELK(0.5) != sj.ELK()
    assert sj.DEER() != sj.QuasiDEER()
