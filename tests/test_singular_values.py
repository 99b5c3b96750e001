"""Singular values of long products against exact ones, and the spectra of single matrices against closed forms."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, OURS, ZOO, Sized
from errors import raises
from oracles import MASK, TIME, drawn, drawn_states

import seqjax as sj
from seqjax.analysis.singular_values import product_of_factors


class Matrices:
    """s <- x s, so that the inputs are the Jacobians; the parameters are the initial state."""

    def init(self, key):
        return jnp.zeros(2)

    def initial_state(self, params):
        return params

    def step(self, params, s, x):
        return x @ s, s


MATRICES = Matrices()


def values_of(J, **options):
    """The singular values of the product of J (batch, time, n, n)."""
    J = jnp.asarray(J)
    return sj.analysis.product_singular_values(MATRICES, jnp.zeros(J.shape[-1], J.dtype), J, **options)


def by_numpy(J):
    """ln sigma of J_T ... J_1, multiplied out in float64."""
    product = functools.reduce(lambda M, J_t: J_t @ M, np.asarray(J, np.float64), np.eye(J.shape[-1]))
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.svd(product, compute_uv=False))


def constant(W, time, dtype="float32"):
    """The same Jacobian at every step."""
    return np.broadcast_to(np.asarray(W, dtype), (1, time, *np.shape(W)))


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def normal(eigenvalues, seed=0):
    """A symmetric matrix, whose singular values are the moduli of its eigenvalues."""
    Q = orthogonal(len(eigenvalues), seed)
    return Q * np.asarray(eigenvalues) @ Q.T


@pytest.mark.parametrize("name", ["lstm", "gru-before", "stack", "user", "linen-lstm"])
def test_all_singular_values_are_those_of_the_product(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params), mask=MASK)
    steps = np.asarray(sj.analysis.step_jacobians(cell, params, xs, **options).by_state)
    n = steps.shape[-1]
    spans = ((0, None), (2, 5)) if name == "lstm" else ((0, None),)
    for start, stop in spans:
        spoilt = jnp.where(MASK[..., None], xs, jnp.nan)
        result = sj.analysis.product_singular_values(cell, params, spoilt, k=n, start=start, stop=stop, **options)
        expected = np.array([by_numpy(J[start:stop]) for J in steps])
        right = expected > expected[:, :1] - 20  # the product in float64 loses smaller values
        np.testing.assert_allclose(result.log_values[right], expected[right], atol=1e-6)
        total = np.linalg.slogdet(steps[:, start:stop])[1].sum(1)
        np.testing.assert_allclose(result.log_values.sum(1), total, atol=1e-9)
        assert (np.diff(result.log_values, axis=1) <= 0).all()
        assert result.converged.all()


def test_a_few_singular_values_are_the_largest_of_all(x64):
    J = np.random.default_rng(0).normal(size=(2, 30, 20, 20)) / 4
    result = values_of(J, k=3)
    np.testing.assert_allclose(result.log_values, [by_numpy(J_b)[:3] for J_b in J], atol=1e-8)
    assert result.converged.all()
    assert (result.change <= 1e-9).all()
    assert result.sweeps > 1
    assert values_of(J[:, :5]).log_values.shape == (2, 8)


@pytest.mark.parametrize("time", [100, 20_000])
def test_values_a_thousand_orders_of_magnitude_apart_are_accurate(time, dtype):
    eigenvalues = np.array([1.05, -1.0, 0.9, -0.5, 0.05])
    result = values_of(constant(normal(eigenvalues), time, dtype))
    tolerance = 3e-6 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(result.log_values[0], time * np.log(np.abs(eigenvalues)), atol=tolerance * time)
    assert result.converged.all()


def test_neighbours_that_are_neither_close_nor_far_are_accurate(x64):
    logs = -0.1 * np.arange(12)
    for time in (1, 10, 140):
        result = values_of(constant(normal(np.exp(logs)), time, "float64"), k=12)
        np.testing.assert_allclose(result.log_values[0], time * logs, atol=1e-10)


@pytest.mark.parametrize(("gain", "power"), [(0.8, 0.011529215046), (1.2, 38.337599924)])
def test_an_orthogonal_network_scales_every_direction_by_a_power_of_its_gain(gain, power, x64):
    J = constant(gain * orthogonal(20), 20, "float64")
    result = values_of(J, k=3)
    np.testing.assert_allclose(np.exp(result.log_values), power, rtol=1e-9)
    assert result.converged.all()


def test_a_matrix_of_small_radius_stretches_before_it_shrinks(x64):
    J = constant([[0.9, 10.0], [0.0, 0.9]], 12, "float64")
    log_norms = [values_of(J, stop=k).log_values[0, 0] for k in (1, 8, 9, 10)]
    np.testing.assert_allclose(np.exp(log_norms)[[0, 2]], [10.0804, 38.746], rtol=1e-4)
    assert log_norms[2] == max(log_norms)


def test_an_explosion_and_a_collapse_are_within_range():
    for scale in (1e-6, 1e6):
        result = values_of(constant(scale * normal([1.0, -0.5]), 300))
        np.testing.assert_allclose(result.log_values[0], 300 * np.log(scale * np.array([1, 0.5])), rtol=1e-6)


def test_close_values_converge_or_are_reported_as_not_converged(x64):
    slow = values_of(constant(normal(np.linspace(0.99, 1, 60)), 1, "float64"), k=3)
    error = np.abs(slow.log_values[0] - np.log(np.linspace(0.99, 1, 60)[:-4:-1]))
    assert slow.sweeps == 30
    assert error.max() > 1e-4
    assert not slow.converged[0][error > 1e-9].any()
    rough = values_of(constant(normal(np.linspace(0.9, 1, 40)), 10, "float64"), k=3, tolerance=1e-4)
    expected = 10 * np.log(np.linspace(0.9, 1, 40)[:-4:-1])
    assert rough.converged.all()
    np.testing.assert_allclose(rough.log_values[0], expected, atol=3e-4)


def test_a_singular_product_has_a_logarithm_of_minus_infinity(dtype):
    cell = sj.LSTM(1, 4, dtype=dtype)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    xs = jnp.ones((1, 60, 1), dtype)
    result = sj.analysis.product_singular_values(cell, params, xs)
    # Without weights c halves at every step, and h = tanh(c) / 2 is a copy of it: (1/2)^60 |(1, 1/2)|.
    np.testing.assert_allclose(result.log_values[0, :4], 60 * np.log(0.5) + np.log(1.25) / 2, rtol=1e-4)
    assert np.isneginf(result.log_values[0, 4:]).all()
    assert result.converged.all()
    nothing = values_of(np.zeros((1, 3, 20, 20), dtype), k=2)
    assert np.isneginf(nothing.log_values).all()
    assert nothing.converged.all()
    random = np.random.default_rng(0)
    # Whole numbers, because rounded to float32 a product of other factors would not be singular.
    low_rank = random.integers(-9, 10, (1, 4, 30, 2)) @ random.integers(-9, 10, (1, 4, 2, 30))
    result = values_of(low_rank.astype(dtype), k=4)
    np.testing.assert_allclose(result.log_values[0, :2], by_numpy(low_rank[0])[:2], rtol=1e-4)
    assert np.isneginf(result.log_values[0, 2:]).all()


def test_a_product_over_a_reset_is_zero(x64):
    J = np.random.default_rng(0).normal(size=(3, 12, 15, 15)) / 4
    reset = np.zeros((3, 12), bool)
    reset[1, 6], reset[2, 0] = True, True
    result = values_of(J, k=2, reset=reset)
    np.testing.assert_allclose(result.log_values[0], by_numpy(J[0])[:2], atol=1e-8)
    assert np.isneginf(result.log_values[1:]).all()
    assert result.converged.all()
    later = values_of(J, k=2, reset=reset, start=7)
    np.testing.assert_allclose(later.log_values, [by_numpy(J_b[7:])[:2] for J_b in J], atol=1e-8)


def test_a_sequence_that_is_not_finite_does_not_affect_others(x64):
    J = np.random.default_rng(0).normal(size=(2, 12, 15, 15)) / 4
    J[1, 5, 0, 0] = np.nan
    result = values_of(J, k=2)
    np.testing.assert_allclose(result.log_values[0], by_numpy(J[0])[:2], atol=1e-8)
    assert result.converged.tolist() == [[True, True], [False, False]]
    assert np.isnan(result.log_values[1]).all()
    all_of_it = values_of(J[:, :, :3, :3])
    assert all_of_it.converged[0].all()
    assert not all_of_it.converged[1].any()


def test_a_span_of_no_steps_changes_nothing():
    result = values_of(np.zeros((2, 5, 3, 3), np.float32), start=2, stop=2)
    assert result.log_values.tolist() == [[0, 0, 0]] * 2
    assert result.converged.all()


def test_the_product_of_triangular_factors_loses_no_value():
    random = np.random.default_rng(0)
    factors = np.triu(random.normal(size=(6, 4, 4)))
    factors[:, range(4), range(4)] = np.abs(factors[:, range(4), range(4)]) + 0.1
    np.testing.assert_allclose(product_of_factors(factors), by_numpy(factors), atol=1e-9)
    np.testing.assert_allclose(product_of_factors(factors * 1e200), by_numpy(factors) + 1200 * np.log(10), rtol=1e-12)


def test_a_stack_with_tokens_as_inputs():
    cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.GRU(4, 2)])
    result = sj.analysis.product_singular_values(cell, cell.init(jax.random.key(0)), jnp.arange(16).reshape(2, 8) % 5)
    assert np.isfinite(result.log_values).all()
    assert (result.log_values[:, 0] < 1).all()


def test_bad_arguments_raise_with_a_hint():
    J = np.zeros((1, 5, 3, 3), np.float32)
    with raises(ValueError, "expected k from 1 to the 3 numbers of the state", "got 4"):
        values_of(J, k=4)
    with raises(ValueError, "0 <= start <= stop <= time = 5", "start 4 and stop 2"):
        values_of(J, start=4, stop=2)


def test_all_sizes_of_a_normal_matrix_are_equal():
    for A in (normal([0.9, -0.7, 0.2]), 1.3 * orthogonal(4), np.array([[0.6, -0.8], [0.8, 0.6]])):
        result = sj.analysis.matrix_spectrum(A)
        np.testing.assert_allclose(result.numerical_radius, result.spectral_radius, rtol=1e-12)
        np.testing.assert_allclose(result.norm, result.spectral_radius, rtol=1e-12)
        np.testing.assert_allclose(result.singular_values, np.abs(result.eigenvalues), rtol=1e-12)
        assert result.departure < 1e-7
        assert result.condition == pytest.approx(result.singular_values[0] / result.singular_values[-1])


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_jordan_block_of_radius_zero_is_far_from_zero(n):
    result = sj.analysis.matrix_spectrum(np.eye(n, k=1))
    assert (result.spectral_radius, result.norm, result.condition) == (0, 1, np.inf)
    assert result.numerical_radius == pytest.approx(np.cos(np.pi / (n + 1)), abs=1e-12)
    assert result.departure == pytest.approx(np.sqrt(n - 1))


def test_a_matrix_of_small_radius_and_large_norm():
    result = sj.analysis.matrix_spectrum(np.array([[0.9, 10.0], [0.0, 0.9]]))
    assert result.spectral_radius == pytest.approx(0.9, abs=1e-7)
    assert result.norm == pytest.approx(10.0804, abs=1e-4)
    assert result.numerical_radius == pytest.approx(5.9)
    assert result.departure == pytest.approx(10)


def test_a_batch_of_matrices_equals_single_matrices():
    A = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    result = sj.analysis.matrix_spectrum(A)
    for b, t in np.ndindex(2, 3):
        alone = sj.analysis.matrix_spectrum(A[b, t])
        for name, value in alone._asdict().items():
            np.testing.assert_allclose(getattr(result, name)[b, t], value, atol=1e-9, err_msg=name)
        assert alone.spectral_radius <= alone.numerical_radius <= alone.norm <= 2 * alone.numerical_radius
    assert sj.analysis.matrix_spectrum(A, numerical_radius=False).numerical_radius is None
    assert sj.analysis.matrix_spectrum(np.diag([1.0, 1e-320])).condition == np.inf
    with raises(ValueError, "expected square matrices (..., n, n), got (2, 3)"):
        sj.analysis.matrix_spectrum(np.ones((2, 3)))
    with raises(ValueError, "expected finite matrices, got NaN or infinity"):
        sj.analysis.matrix_spectrum(np.full((2, 2), np.nan))


def test_the_bound_of_pascanu_holds():
    for gain, holds in ((0.8, True), (1.2, False)):
        cell = sj.VanillaRNN(2, 6, recurrent_init=sj.Orthogonal(gain))
        xs = jax.random.normal(jax.random.key(1), (2, 20, 2))
        result = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), xs, times=range(1, 21))
        assert result.bound == pytest.approx(gain, rel=1e-5)
        assert result.bound_holds is holds
        assert (result.largest_step_norm <= result.bound * (1 + 1e-6)).all()
        np.testing.assert_allclose(result.recurrent["W_hh"].spectral_radius, gain, rtol=1e-5)
        quarter = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), xs, gamma=0.25)
        assert quarter.bound == pytest.approx(gain / 4, rel=1e-5)  # a logistic function is four times flatter
        assert quarter.bound_holds


def test_the_bound_is_none_for_other_cells():
    class Leaky(sj.VanillaRNN):
        """Adds its old state to the new one, so the bound does not apply."""

        def step(self, params, state, x):
            new, _ = super().step(params, state, x)
            return sj.VanillaState(state.h + new.h), new.h

    for cell in (Leaky(2, 3), sj.LSTM(2, 3), sj.GRU(2, 3), EVERY["linen-gru"]):
        params, xs = cell.init(jax.random.key(0)), jnp.ones((1, 4, *cell.input_shape))
        result = sj.analysis.spectrum(cell, params, xs)
        assert (result.bound, result.bound_holds) == (None, None)


def matrices(cell):
    return sj.analysis.recurrent_matrices(cell, cell.init(jax.random.key(0)))


def test_recurrent_matrices_are_named_by_parameter_gate_and_layer():
    gates = {"lstm": ["input", "forget", "candidate", "output"], "gru": ["reset", "update", "candidate"]}
    assert list(matrices(sj.VanillaRNN(2, 3))) == ["W_hh"]
    for cell in (sj.LSTM(2, 3), sj.GRU(2, 3), sj.GRU(2, 3, reset="before")):
        named, params = matrices(cell), cell.init(jax.random.key(0))
        assert list(named) == [f"W_hh.{gate}" for gate in gates[type(cell).__name__.lower()]]
        for k, W in enumerate(named.values()):
            np.testing.assert_array_equal(W, params.W_hh[3 * k : 3 * k + 3])
    expected = [f"0.W_hh.{gate}" for gate in gates["lstm"]] + [f"1.W_hh.{gate}" for gate in gates["gru"]]
    assert list(matrices(OURS["stack"])) == expected
    assert list(matrices(ZOO["lstm-subclass"])) == [f"W_hh.{gate}" for gate in gates["lstm"]]


def test_recurrent_matrices_of_any_cell_come_from_its_step():
    """W of h' = tanh(W h + U x) however it is written, as it multiplies the state."""
    kernels = EVERY["linen-lstm"].init(jax.random.key(0))["params"]
    for name in ("linen-lstm", "linen-optimized-lstm"):  # separate products, and one product of concatenated kernels
        named = matrices(ZOO[name])
        assert list(named) == [f"params.h{gate}.kernel" for gate in "ifgo"]
    np.testing.assert_array_equal(matrices(ZOO["linen-lstm"])["params.hf.kernel"], kernels["hf"]["kernel"].T)
    weights = EVERY["equinox-gru"].init(jax.random.key(0)).weight_hh
    np.testing.assert_array_equal(matrices(EVERY["equinox-gru"])["weight_hh[4:8]"], weights[4:8])
    # The input and the state are one vector, so the first rows of its matrix are those of the input.
    w = ZOO["haiku-lstm"].init(jax.random.key(0))["lstm/linear"]["w"]
    np.testing.assert_array_equal(matrices(ZOO["haiku-lstm"])["lstm/linear.w[3:7, 8:12]"], w[3:7, 8:12].T)
    assert list(matrices(ZOO["readout"])) == ["W"]  # and not the product that only outputs read
    assert list(matrices(ZOO["layer-norm-lstm"])) == ["W"]
    params = ZOO["squared"].init(jax.random.key(0))
    np.testing.assert_allclose(matrices(ZOO["squared"])["product 1"], params["W"] @ params["W"], rtol=1e-6)
    assert matrices(ZOO["conditional"]) == matrices(ZOO["min-gru"]) == {}
    with raises(TypeError, "expected an example input, because TimeGap has no input_shape"):
        matrices(ZOO["time-gap"])
    cell = ZOO["time-gap"]
    assert list(sj.analysis.recurrent_matrices(cell, cell.init(jax.random.key(0)), cell.example_input())) == ["W"]


@dataclasses.dataclass(frozen=True)
class Projected(Sized):
    """An LSTM whose hidden state is a projection to two numbers (Sak, Senior and Beaufays 2014)."""

    def shapes(self, d, n):
        return {"W": (4 * n, 2), "U": (4 * n, d), "P": (2, n)}

    def initial_state(self, params):
        return {"c": jnp.zeros(self.hidden_size), "h": jnp.zeros(2)}

    def step(self, params, state, x):
        i, f, g, o = jnp.split(params["W"] @ state["h"] + params["U"] @ x, 4)
        c = jax.nn.sigmoid(f) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = params["P"] @ (jax.nn.sigmoid(o) * jnp.tanh(c))
        return {"c": c, "h": h}, h


def test_matrices_that_are_not_square_have_no_spectrum():
    cell = Projected(3, 4)
    shapes = {name: W.shape for name, W in matrices(cell).items()}
    assert shapes == {f"W[{4 * k}:{4 * k + 4}]": (4, 2) for k in range(4)} | {"P": (2, 4)}
    result = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), jnp.ones((1, 3, 3)), gamma=1.0)
    assert (result.recurrent, result.bound) == ({}, None)


@pytest.mark.parametrize("name", ["lstm", "stack", "user", "equinox-gru"])
def test_the_spectra_of_chosen_steps_are_those_of_their_jacobians(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params), mask=MASK)
    result = sj.analysis.spectrum(cell, params, xs, times=[4, 2], **options)
    steps = np.asarray(sj.analysis.step_jacobians(cell, params, xs, **options).by_state)[:, [3, 1]]
    np.testing.assert_allclose(result.steps.singular_values, np.linalg.svd(steps, compute_uv=False), atol=1e-12)
    np.testing.assert_allclose(result.largest_step_norm, result.steps.norm.max(1))
    assert result.times.tolist() == [4, 2]


def test_the_steps_of_a_spectrum_are_chosen_where_the_fewest_sequences_are_held():
    cell = sj.VanillaRNN(1, 2)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((3, TIME, 1))
    held = jnp.zeros((3, TIME), bool).at[:2, 1].set(True).at[:2, 4].set(True)  # the third sequence is held throughout
    assert sj.analysis.spectrum(cell, params, xs, mask=held).times.tolist() == [2, 5]


def test_times_outside_the_sequence_raise():
    cell = sj.VanillaRNN(1, 2)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((1, TIME, 1))
    assert sj.analysis.spectrum(cell, params, xs).times.tolist() == list(range(1, TIME + 1))
    for times in ([0], [TIME + 1], []):
        with raises(ValueError, f"expected times from 1 to T = {TIME}", f"got {times}"):
            sj.analysis.spectrum(cell, params, xs, times=times)
    with raises(ValueError, "expected xs (batch, time, 1), got (6, 1)", "xs[None]"):
        sj.analysis.spectrum(cell, params, xs[0])
    with raises(ValueError, "T = 0"):
        sj.analysis.spectrum(cell, params, xs[:, :0])
