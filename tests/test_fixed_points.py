"""Fixed and slow points against closed forms, roots to nine digits, and F itself at every point."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, D, N
from errors import raises

import seqjax as sj

SCALAR = sj.VanillaRNN(1, 1)


def scalar(w):
    """h' = tanh(w h + x)."""
    return sj.VanillaParams(W_xh=jnp.eye(1), W_hh=w * jnp.eye(1), b_h=jnp.zeros(1))


class Saddle:
    """h' = h - (h^2 + eps): two fixed points at +-sqrt(-eps), none if eps > 0."""

    input_shape = ()

    def init(self, key):
        return {"eps": jnp.array(0.01)}

    def initial_state(self, params):
        return jnp.zeros_like(params["eps"])

    def step(self, params, h, x):
        h = h - (h**2 + params["eps"])
        return h, h


class Escape(Saddle):
    """h' = h + eps exp(-h): its speed falls to zero, and there is no fixed point."""

    def step(self, params, h, x):
        h = h + params["eps"] * jnp.exp(-h)
        return h, h


@pytest.mark.parametrize(
    ("w", "root", "slope"), [(2.0, 0.957504024, 0.166372088), (1.5, 0.858559637, 0.394313026)], ids=["2", "1.5"]
)
def test_tanh_of_two_h_has_exactly_three_points_in_either_precision(w, root, slope, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), scalar(w))
    result = sj.analysis.fixed_points(SCALAR, params)
    np.testing.assert_allclose(result.points[:, 0], [-root, root, 0], atol=2e-9)
    np.testing.assert_allclose(result.jacobians[:, 0, 0], [slope, slope, w], atol=2e-8)
    np.testing.assert_allclose(result.eigenvalues[:, 0], [slope, slope, w], atol=2e-8)
    assert result.kind.tolist() == ["fixed"] * 3
    assert result.stable.tolist() == [True, True, False]
    assert result.unstable.tolist() == [0, 0, 1]
    assert result.points.dtype == result.states.h.dtype == np.float64


def test_every_start_is_counted_at_its_own_point():
    starts = sj.VanillaState(jnp.array([[0.9], [-1.0], [1.2], [np.nan], [0.001], [1.0]]))
    result = sj.analysis.fixed_points(SCALAR, scalar(2.0), starts=starts)
    assert result.counts.tolist() == [1, 3, 1]
    assert result.search.point.tolist() == [1, 0, 1, -1, 2, 1]
    assert result.search.outcome.tolist() == ["fixed", "fixed", "fixed", "diverged", "fixed", "fixed"]
    assert result.search.converged.tolist() == [True, True, True, False, True, True]
    assert result.reason == "6 starts: 1 diverged, 5 fixed; 3 fixed and 0 slow points"


def test_starts_at_one_point_are_one_point():
    starts = sj.VanillaState(jnp.full((6, 1), 0.5))
    result = sj.analysis.fixed_points(SCALAR, scalar(0.5), starts=starts)
    assert result.points.shape == (1, 1)
    assert result.counts.tolist() == [6]


def test_a_start_that_runs_out_of_iterations_is_reported_as_unfinished():
    starts = sj.VanillaState(jnp.array([[0.6], [0.0], [-0.6]]))  # 2 tanh'(1.2) = 0.61: Newton's step is too long
    result = sj.analysis.fixed_points(SCALAR, scalar(2.0), starts=starts, max_iterations=1, tolerance=1e-14)
    assert result.search.outcome.tolist() == ["unfinished", "fixed", "unfinished"]
    assert result.search.point.tolist() == [-1, 0, -1]
    assert result.search.converged.tolist() == [False, True, False]


def test_a_triple_root_is_one_point():
    result = sj.analysis.fixed_points(SCALAR, scalar(1.0))  # h = tanh(h): Newton's method converges slowly
    assert result.points.shape == (1, 1)
    assert abs(result.points[0, 0]) < 1e-4


def test_a_constant_input_moves_the_points():
    result = sj.analysis.fixed_points(SCALAR, scalar(2.0), jnp.array([0.6]))
    assert result.points.shape == (1, 1)  # no pair near -0.5: 2 h + 0.6 = artanh(h) has one root
    h = result.points[0, 0]
    assert abs(h - np.tanh(2 * h + np.float64(np.float32(0.6)))) < 1e-14


@pytest.mark.parametrize("eps", [1e-4, 1e-11])
def test_after_two_fixed_points_merge_one_slow_point_remains(eps):
    result = sj.analysis.fixed_points(Saddle(), {"eps": jnp.array(eps)})
    assert result.kind.tolist() == ["slow"]
    np.testing.assert_allclose(result.residual, eps, rtol=1e-6)
    assert abs(result.points[0, 0]) < 1e-6
    assert result.counts.tolist() == [128]


def test_before_they_merge_one_fixed_point_is_stable_and_one_is_not():
    result = sj.analysis.fixed_points(Saddle(), {"eps": jnp.array(-0.25)})
    np.testing.assert_allclose(result.points[:, 0], [0.5, -0.5], atol=1e-12)
    np.testing.assert_allclose(result.spectral_radius, [0, 2], atol=1e-12)


def test_a_minimum_of_the_speed_above_the_tolerance_is_reported_as_fast():
    result = sj.analysis.fixed_points(Saddle(), {"eps": jnp.array(0.01)})
    assert set(result.search.outcome) == {"fast"}
    assert result.search.converged.all()
    assert result.points.shape == result.eigenvalues.shape == (0, 1)
    assert result.states.shape == (0,)


@pytest.mark.parametrize("iterations", [10, 28, 60])
def test_a_slowly_diverging_state_is_no_fixed_point(iterations):
    result = sj.analysis.fixed_points(Escape(), {"eps": jnp.array(1.0)}, count=8, max_iterations=iterations)
    assert set(result.search.outcome) <= {"unfinished", "diverged"}


def test_a_linear_cells_point_solves_its_equation_also_near_a_unit_eigenvalue(x64):
    cell = sj.VanillaRNN(D, N, activation="identity")
    W = np.diag([0.5, -0.9, 1 - 1e-9, 1.2]) + np.diag([0.3, 0.2, 0.0], 1)
    b, x = np.array([0.1, -0.2, 1e-9, 0.4]), np.array([0.3, -1.0, 0.5])
    W_xh = np.array([[1.0, 2, 0], [0, 1, -1], [0, 0, 0], [1, 0, 1]])
    params = sj.VanillaParams(*map(jnp.asarray, (W_xh, W, b)))
    result = sj.analysis.fixed_points(cell, params, jnp.asarray(x), count=16)
    expected = np.linalg.solve(np.eye(N) - W, W_xh @ x + b)
    assert result.points.shape == (1, N)
    np.testing.assert_allclose(result.points[0], expected, rtol=1e-5)
    np.testing.assert_allclose(result.eigenvalues[0], [1.2, 1 - 1e-9, -0.9, 0.5], rtol=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru-before", "linen-lstm"])
def test_for_any_cell_the_step_does_not_change_the_points(name):
    cell = EVERY[name]
    params = jax.tree.map(lambda leaf: 2 * leaf, cell.init(jax.random.key(1)))
    x = jnp.array([0.1, -0.2, 0.3])
    result = sj.analysis.fixed_points(cell, params, x, count=24, scale=0.3)
    assert len(result.points) > 0
    fixed = result.kind == "fixed"
    assert (result.residual[fixed] < 1e-10).all()
    assert result.counts.sum() == (result.search.point >= 0).sum()
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype("float64"), (params, x))
        _, unravel = jax.flatten_util.ravel_pytree(cell.initial_state(params))

        def step(v):
            return jax.flatten_util.ravel_pytree(cell.step(params, unravel(v), x)[0])[0]

        points = jnp.asarray(result.points)
        moved, J = jax.jit(jax.vmap(lambda v: (step(v) - v, jax.jacfwd(step)(v))))(points)
        states = jax.vmap(unravel)(points)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), result.residual, atol=1e-13)
    np.testing.assert_allclose(result.jacobians, J, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, result.states, states)
    moduli = np.abs(result.eigenvalues)
    assert (np.diff(moduli, axis=1) <= 1e-12).all()
    np.testing.assert_array_equal(result.spectral_radius, moduli[:, 0])
    np.testing.assert_array_equal(result.unstable, (moduli > 1).sum(1))


def test_the_order_is_fixed_before_slow_by_rising_spectral_radius():
    cell = sj.VanillaRNN(D, 8, recurrent_init=sj.SpectralRadius(2.0))
    result = sj.analysis.fixed_points(cell, cell.init(jax.random.key(5)), count=64, slow_tolerance=1.0)
    assert {"fixed", "slow"} == set(result.kind)
    slow = result.kind == "slow"
    assert (np.diff(slow.astype(int)) >= 0).all()
    for kind in (slow, ~slow):
        assert (np.diff(result.spectral_radius[kind]) > -1e-8).all()
    gaps = np.linalg.norm(result.points[:, None] - result.points[None], axis=-1) + np.eye(len(slow))
    assert gaps.min() > 1e-4


def test_states_of_a_trajectory_are_starts_and_a_token_is_an_input():
    cell = sj.stack([sj.Embedding(5, 2), sj.GRU(2, 3)])
    params = cell.init(jax.random.key(0))
    states = sj.trajectory(cell, params, jnp.array([[0, 1, 2, 3, 4, 0, 1], [4, 4, 2, 2, 0, 0, 1]]))
    each = [sj.analysis.fixed_points(cell, params, token, starts=states, count=8) for token in (1, 4)]
    for result in each:
        assert len(result.search.outcome) == 8  # of 16 states
        assert set(result.search.outcome) == {"fixed"}
    assert not np.allclose(each[0].points[0], each[1].points[0], atol=0.01)
    settled = sj.unroll(cell, params, jnp.full((1, 300), 4))[0][1].h[0]
    np.testing.assert_allclose(each[1].states[1].h[0], settled, atol=1e-5)
    every = sj.analysis.fixed_points(cell, params, 4, starts=jax.tree.map(lambda leaf: leaf[0], states))
    assert len(every.search.outcome) == 8


def test_a_cell_that_computes_in_float32_needs_a_wider_tolerance():
    cell = EVERY["nnx-simple"]
    result = sj.analysis.fixed_points(cell, cell.init(jax.random.key(0)), jnp.ones(D), count=8, tolerance=1e-6)
    assert result.kind.tolist() == ["fixed"]


def test_many_starts_run_in_several_batches(monkeypatch):
    cell, params = Saddle(), {"eps": jnp.array(-0.25)}  # it compares by identity, so every search compiles
    whole = sj.analysis.fixed_points(cell, params, count=10)
    monkeypatch.setattr("seqjax.analysis._descent.AT_ONCE", 4)
    parts = sj.analysis.fixed_points(cell, params, count=10)
    np.testing.assert_allclose(parts.points, whole.points, atol=1e-12)
    assert parts.search.outcome.tolist() == whole.search.outcome.tolist()


def test_bad_input_raises_with_a_hint():
    params = scalar(2.0)
    find = sj.analysis.fixed_points
    with raises(ValueError, "expected x (1,), the input of one step of one example, got (2, 1)"):
        find(SCALAR, params, jnp.ones((2, 1)))
    with raises(ValueError, "expected starts.h (starts, ...)", "state[None]"):
        find(SCALAR, params, starts=sj.VanillaState(jnp.ones(1)))
    with raises(ValueError, "expected starts that are states of VanillaRNN", "sj.trajectory"):
        find(SCALAR, params, starts=jnp.ones((5, 1)))
    with raises(ValueError, "expected a positive tolerance, got 0"):
        find(SCALAR, params, tolerance=0)
    with raises(TypeError, "expected a cell with a state", "Embedding"):
        find(sj.Embedding(3, 2), sj.Embedding(3, 2).init(jax.random.key(0)), 1)

    class NoShape(Saddle):
        input_shape = None

    with raises(ValueError, "expected x, the input of every step, got None for NoShape", "pass x"):
        find(NoShape(), {"eps": jnp.array(1.0)})
