"""Fixed and slow points: against closed forms and roots to nine digits, and against F itself at every point found."""

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
    """h' = h - (h^2 + eps): two fixed points at +-sqrt(-eps), gone where eps > 0."""

    input_shape = ()

    def init(self, key):
        return {"eps": jnp.array(0.01)}

    def initial_state(self, params):
        return jnp.zeros_like(params["eps"])

    def step(self, params, h, x):
        h = h - (h**2 + params["eps"])
        return h, h


class Escape(Saddle):
    """h' = h + eps exp(-h): ever slower, and no fixed point."""

    def step(self, params, h, x):
        h = h + params["eps"] * jnp.exp(-h)
        return h, h


@pytest.mark.parametrize(
    ("w", "root", "slope"), [(2.0, 0.957504024, 0.166372088), (1.5, 0.858559637, 0.394313026)], ids=["2", "1.5"]
)
def test_tanh_of_two_h_has_exactly_three_points_in_either_precision(w, root, slope, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), scalar(w))
    found = sj.analysis.fixed_points(SCALAR, params)
    np.testing.assert_allclose(found.points[:, 0], [-root, root, 0], atol=2e-9)
    np.testing.assert_allclose(found.jacobians[:, 0, 0], [slope, slope, w], atol=2e-8)
    np.testing.assert_allclose(found.eigenvalues[:, 0], [slope, slope, w], atol=2e-8)
    assert found.kind.tolist() == ["fixed"] * 3
    assert found.stable.tolist() == [True, True, False]
    assert found.unstable.tolist() == [0, 0, 1]
    assert found.points.dtype == found.states.h.dtype == np.float64


def test_every_start_is_counted_at_its_own_point():
    starts = sj.VanillaState(jnp.array([[0.9], [-1.0], [1.2], [np.nan], [0.001], [1.0]]))
    found = sj.analysis.fixed_points(SCALAR, scalar(2.0), starts=starts)
    assert found.counts.tolist() == [1, 3, 1]
    assert found.search.point.tolist() == [1, 0, 1, -1, 2, 1]
    assert found.search.outcome.tolist() == ["fixed", "fixed", "fixed", "diverged", "fixed", "fixed"]
    assert found.search.converged.tolist() == [True, True, True, False, True, True]
    assert found.reason == "6 starts: 1 diverged, 5 fixed; 3 fixed and 0 slow points"


def test_starts_at_one_point_are_one_point():
    starts = sj.VanillaState(jnp.full((6, 1), 0.5))
    found = sj.analysis.fixed_points(SCALAR, scalar(0.5), starts=starts)
    assert found.points.shape == (1, 1)
    assert found.counts.tolist() == [6]


def test_a_start_that_runs_out_of_iterations_is_reported_and_is_no_point():
    starts = sj.VanillaState(jnp.array([[0.6], [0.0], [-0.6]]))  # 2 tanh'(1.2) = 0.61, where Newton's step is too long
    found = sj.analysis.fixed_points(SCALAR, scalar(2.0), starts=starts, max_iterations=1, tolerance=1e-14)
    assert found.search.outcome.tolist() == ["unfinished", "fixed", "unfinished"]
    assert found.search.point.tolist() == [-1, 0, -1]
    assert found.search.converged.tolist() == [False, True, False]


def test_a_triple_root_is_one_point():
    found = sj.analysis.fixed_points(SCALAR, scalar(1.0))  # h = tanh(h), where Newton's step converges slowly
    assert found.points.shape == (1, 1)
    assert abs(found.points[0, 0]) < 1e-4


def test_a_constant_input_moves_the_points():
    found = sj.analysis.fixed_points(SCALAR, scalar(2.0), jnp.array([0.6]))
    assert found.points.shape == (1, 1)  # the pair near -0.5 is gone: 2 h + 0.6 = artanh(h) has one root
    h = found.points[0, 0]
    assert abs(h - np.tanh(2 * h + np.float64(np.float32(0.6)))) < 1e-14


@pytest.mark.parametrize("eps", [1e-4, 1e-11])
def test_where_two_fixed_points_have_just_vanished_the_point_is_slow(eps):
    found = sj.analysis.fixed_points(Saddle(), {"eps": jnp.array(eps)})
    assert found.kind.tolist() == ["slow"]
    np.testing.assert_allclose(found.residual, eps, rtol=1e-6)
    assert abs(found.points[0, 0]) < 1e-6
    assert found.counts.tolist() == [128]


def test_before_they_vanish_both_are_found_and_one_repels():
    found = sj.analysis.fixed_points(Saddle(), {"eps": jnp.array(-0.25)})
    np.testing.assert_allclose(found.points[:, 0], [0.5, -0.5], atol=1e-12)
    np.testing.assert_allclose(found.spectral_radius, [0, 2], atol=1e-12)


def test_a_minimum_of_the_speed_that_is_not_slow_is_reported_and_is_no_point():
    found = sj.analysis.fixed_points(Saddle(), {"eps": jnp.array(0.01)})
    assert set(found.search.outcome) == {"fast"}
    assert found.search.converged.all()
    assert found.points.shape == found.eigenvalues.shape == (0, 1)
    assert found.states.shape == (0,)


@pytest.mark.parametrize("iterations", [10, 28, 60])
def test_a_state_on_its_way_to_infinity_is_no_point(iterations):
    found = sj.analysis.fixed_points(Escape(), {"eps": jnp.array(1.0)}, count=8, max_iterations=iterations)
    assert set(found.search.outcome) <= {"unfinished", "diverged"}


def test_a_linear_cells_point_solves_its_equation_also_near_a_unit_eigenvalue(x64):
    cell = sj.VanillaRNN(D, N, activation="identity")
    W = np.diag([0.5, -0.9, 1 - 1e-9, 1.2]) + np.diag([0.3, 0.2, 0.0], 1)
    b, x = np.array([0.1, -0.2, 1e-9, 0.4]), np.array([0.3, -1.0, 0.5])
    W_xh = np.array([[1.0, 2, 0], [0, 1, -1], [0, 0, 0], [1, 0, 1]])
    params = sj.VanillaParams(*map(jnp.asarray, (W_xh, W, b)))
    found = sj.analysis.fixed_points(cell, params, jnp.asarray(x), count=16)
    expected = np.linalg.solve(np.eye(N) - W, W_xh @ x + b)
    assert found.points.shape == (1, N)
    np.testing.assert_allclose(found.points[0], expected, rtol=1e-5)
    np.testing.assert_allclose(found.eigenvalues[0], [1.2, 1 - 1e-9, -0.9, 0.5], rtol=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru-before", "linen-lstm"])
def test_at_every_point_of_any_cell_the_state_stays_and_the_jacobian_is_that_of_the_step(name):
    cell = EVERY[name]
    params = jax.tree.map(lambda leaf: 2 * leaf, cell.init(jax.random.key(1)))
    x = jnp.array([0.1, -0.2, 0.3])
    found = sj.analysis.fixed_points(cell, params, x, count=24, scale=0.3)
    assert len(found.points) > 0
    fixed = found.kind == "fixed"
    assert (found.residual[fixed] < 1e-10).all()
    assert found.counts.sum() == (found.search.point >= 0).sum()
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype("float64"), (params, x))
        _, unravel = jax.flatten_util.ravel_pytree(cell.initial_state(params))

        def step(v):
            return jax.flatten_util.ravel_pytree(cell.step(params, unravel(v), x)[0])[0]

        points = jnp.asarray(found.points)
        moved, J = jax.jit(jax.vmap(lambda v: (step(v) - v, jax.jacfwd(step)(v))))(points)
        states = jax.vmap(unravel)(points)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), found.residual, atol=1e-13)
    np.testing.assert_allclose(found.jacobians, J, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, found.states, states)
    moduli = np.abs(found.eigenvalues)
    assert (np.diff(moduli, axis=1) <= 1e-12).all()
    np.testing.assert_array_equal(found.spectral_radius, moduli[:, 0])
    np.testing.assert_array_equal(found.unstable, (moduli > 1).sum(1))


def test_the_order_is_fixed_before_slow_by_rising_spectral_radius():
    cell = sj.VanillaRNN(D, 8, recurrent_init=sj.SpectralRadius(2.0))
    found = sj.analysis.fixed_points(cell, cell.init(jax.random.key(5)), count=64, slow_tolerance=1.0)
    assert {"fixed", "slow"} == set(found.kind)
    slow = found.kind == "slow"
    assert (np.diff(slow.astype(int)) >= 0).all()
    for kind in (slow, ~slow):
        assert (np.diff(found.spectral_radius[kind]) > -1e-8).all()
    gaps = np.linalg.norm(found.points[:, None] - found.points[None], axis=-1) + np.eye(len(slow))
    assert gaps.min() > 1e-4


def test_states_of_a_trajectory_are_starts_and_a_token_is_an_input():
    cell = sj.stack([sj.Embedding(5, 2), sj.GRU(2, 3)])
    params = cell.init(jax.random.key(0))
    states = sj.trajectory(cell, params, jnp.array([[0, 1, 2, 3, 4, 0, 1], [4, 4, 2, 2, 0, 0, 1]]))
    each = [sj.analysis.fixed_points(cell, params, token, starts=states, count=8) for token in (1, 4)]
    for found in each:
        assert len(found.search.outcome) == 8  # of 16 states
        assert set(found.search.outcome) == {"fixed"}
    assert not np.allclose(each[0].points[0], each[1].points[0], atol=0.01)
    settled = sj.unroll(cell, params, jnp.full((1, 300), 4))[0][1].h[0]
    np.testing.assert_allclose(each[1].states[1].h[0], settled, atol=1e-5)
    every = sj.analysis.fixed_points(cell, params, 4, starts=jax.tree.map(lambda leaf: leaf[0], states))
    assert len(every.search.outcome) == 8


def test_a_cell_that_computes_in_float32_needs_a_wider_tolerance():
    cell = EVERY["nnx-simple"]
    found = sj.analysis.fixed_points(cell, cell.init(jax.random.key(0)), jnp.ones(D), count=8, tolerance=1e-6)
    assert found.kind.tolist() == ["fixed"]


def test_many_starts_are_descended_in_turn(monkeypatch):
    cell, params = Saddle(), {"eps": jnp.array(-0.25)}  # it compares by identity, so every search compiles
    whole = sj.analysis.fixed_points(cell, params, count=10)
    monkeypatch.setattr("seqjax.analysis._descent.AT_ONCE", 4)
    parts = sj.analysis.fixed_points(cell, params, count=10)
    np.testing.assert_allclose(parts.points, whole.points, atol=1e-12)
    assert parts.search.outcome.tolist() == whole.search.outcome.tolist()


def test_bad_input_is_refused_with_its_fix():
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
        input_shape = property(lambda self: self.missing)

    with raises(ValueError, "expected x, the input of every step, got None for NoShape", "pass x"):
        find(NoShape(), {"eps": jnp.array(1.0)})
