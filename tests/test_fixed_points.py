"""Fixed and slow points against closed forms, roots to nine digits, and F itself at every point."""

from __future__ import annotations

import dataclasses

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
    assert str(result.search).startswith("3 starts: 1 fixed, 2 unfinished; at most ")
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


@pytest.mark.parametrize("iterations", [10, 28, 60, 200])
def test_a_slowly_diverging_state_is_no_fixed_point(iterations):
    result = sj.analysis.fixed_points(Escape(), {"eps": jnp.array(1.0)}, count=8, max_iterations=iterations)
    assert set(result.search.outcome) <= {"unfinished", "stuck", "diverged"}


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


@dataclasses.dataclass(frozen=True)
class Rate:
    """h' = (1 - a) h + a f(W h + b) without an input."""

    n: int
    f: str
    a: float = 0.2
    input_shape = ()

    def init(self, key):
        return {"W": jax.random.normal(key, (self.n, self.n)), "b": jnp.zeros(self.n)}

    def initial_state(self, params):
        return jnp.zeros_like(params["b"])

    def step(self, params, h, x):
        h = (1 - self.a) * h + self.a * getattr(jax.nn, self.f)(params["W"] @ h + params["b"])
        return h, h


NUMPY = {"relu": lambda u: np.maximum(u, 0), "sigmoid": lambda u: 1 / (1 + np.exp(-u)), "tanh": np.tanh}


def rate(f, W, b, a=0.2):
    """The cell and its parameters, of which float32 represents every value exactly."""
    W, b = (np.asarray(value, np.float32).astype(float) for value in (W, b))
    return Rate(len(b), f, a), {"W": jnp.asarray(W, jnp.float32), "b": jnp.asarray(b, jnp.float32)}, W, b


def simulated(f, W, b, a=0.2, *, first, steps=5000):
    """The states in which a simulation in numpy comes to rest, without duplicates, and how many of `first` do."""
    h, a = np.asarray(first, float), np.float64(a)
    for _ in range(steps):
        before, h = h, (1 - a) * h + a * NUMPY[f](h @ W.T + b)
    rest = h[np.linalg.norm(h - before, axis=1) < 1e-9]
    different = []
    for each in rest:
        if not any(np.linalg.norm(each - other) < 1e-5 for other in different):
            different.append(each)
    return np.array(different), len(rest)


def assert_found(result, expected, atol=1e-6):
    """Every expected state is a stable fixed point of the result."""
    stable = result.points[(result.kind == "fixed") & result.stable]
    for point in expected:
        assert np.abs(stable - point).max(axis=1).min(initial=np.inf) < atol, result.reason


def test_both_attractors_of_a_rank_one_network_are_those_of_its_scalar_equation():
    n, rng = 128, np.random.default_rng(0)
    m = rng.normal(size=n)
    k = 2.5 * m + rng.normal(size=n)
    W = np.outer(m, k).astype(np.float32) / n
    params = sj.VanillaParams(W_xh=jnp.zeros((n, 1)), W_hh=jnp.asarray(W, jnp.float32), b_h=jnp.zeros(n))
    result = sj.analysis.fixed_points(sj.VanillaRNN(1, n), params)
    low, high = 0.1, 10.0  # the root of k^T tanh(m c) / n = c besides zero, by bisection
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if k @ np.tanh(m * c) / n > c else (low, c)
    assert int(result.stable.sum()) == 2
    assert_found(result, [np.tanh(m * c), -np.tanh(m * c)], atol=1e-5)
    assert result.reliable
    assert result.search.at_rest.tolist() == [True] * 64 + [False] * 64
    assert (result.search.forward_steps[1:64] > 10).all()


def test_all_patterns_of_a_hopfield_network_are_found():
    i = np.arange(64)
    patterns = np.array([1 - 2 * (i // width % 2) for width in (1, 4, 16)])  # orthogonal rows of +-1
    cell, params, *_ = rate("tanh", 1.5 * patterns.T @ patterns / 64, np.zeros(64))
    result = sj.analysis.fixed_points(cell, params)
    h = simulated("tanh", np.array([[1.5]]), np.zeros(1), first=[[1.0]])[0][0, 0]  # h = tanh(1.5 h)
    assert_found(result, [sign * h * pattern for pattern in patterns for sign in (1, -1)])
    assert (result.stable & (result.kind == "fixed")).sum() == 6


def test_the_low_and_the_high_state_of_excitatory_and_inhibitory_units_are_found():
    n, excitatory, rng = 100, 80, np.random.default_rng(0)
    W = rng.uniform(0.5, 1.5, (n, n)) * np.where(np.arange(n) < excitatory, 20.0, -25.0) / n
    cell, params, W, b = rate("sigmoid", W, np.full(n, -4.0))
    expected, resting = simulated("sigmoid", W, b, first=[np.zeros(n), np.ones(n)])
    assert (len(expected), resting) == (2, 2)
    assert_found(sj.analysis.fixed_points(cell, params), expected)


def test_all_four_states_of_a_gru_with_two_bits_are_found():
    n, rng = 64, np.random.default_rng(1)
    signs, bit = rng.choice([-1.0, 1.0], n), np.arange(n) % 2
    W_hh = np.zeros((3 * n, n), np.float32)
    W_hh[2 * n :] = 6.0 * np.equal.outer(bit, bit) * np.outer(signs, signs) * 2 / n  # the gates are 1/2
    params = sj.GRUParams(jnp.zeros((3 * n, 2)), jnp.asarray(W_hh), jnp.zeros(3 * n), jnp.zeros(n))
    result = sj.analysis.fixed_points(sj.GRU(2, n), params)
    h = simulated("tanh", np.array([[3.0]]), np.zeros(1), first=[[1.0]])[0][0, 0]  # h = tanh(6 h / 2)
    assert_found(result, [h * signs * np.where(bit, one, two) for one in (1, -1) for two in (1, -1)])


def test_the_point_of_a_rectified_network_solves_the_equations_of_its_active_units():
    n, rng = 24, np.random.default_rng(3)
    cell, params, W, b = rate("relu", 0.7 * rng.normal(size=(n, n)) / np.sqrt(n), rng.normal(size=n), a=1.0)
    result = sj.analysis.fixed_points(cell, params, count=32)
    assert result.points.shape == (1, n)
    active = result.points[0] > 1e-9
    expected = np.zeros(n)
    expected[active] = np.linalg.solve(np.eye(active.sum()) - W[np.ix_(active, active)], b[active])
    np.testing.assert_allclose(result.points[0], expected, atol=1e-10)
    assert (W @ expected + b)[~active].max() < 0 < (W @ expected + b)[active].min()


@pytest.mark.parametrize("kind", ["winner-take-all", "symmetric", "inhibitory"])
def test_every_state_at_rest_of_a_rectified_network_is_found(kind):
    n, rng = 32, np.random.default_rng(0)
    Z = rng.normal(size=(n, n))
    W = {
        "winner-take-all": -1.5 * (1 - np.eye(n)) * np.exp(0.1 * Z),
        "symmetric": 1.2 * (Z + Z.T) / np.sqrt(8 * n),
        "inhibitory": -2.5 * np.abs(Z + Z.T) / np.sqrt(2 * n),
    }[kind]
    cell, params, W, b = rate("relu", W, 1 + 0.5 * rng.normal(size=n), a=0.1)
    expected, resting = simulated("relu", W, b, 0.1, first=0.5 * rng.normal(size=(32, n)))
    assert resting == 32
    result = sj.analysis.fixed_points(cell, params, count=64)
    assert_found(result, expected)
    assert (result.search.outcome == "fixed").mean() > 0.9, result.reason
    unfinished = result.search.outcome == "unfinished"
    assert (result.search.iterations[unfinished] == 200).all()


def test_given_states_that_are_stuck_at_a_kink_are_run_forward():
    n, rng = 32, np.random.default_rng(0)
    Z = rng.normal(size=(n, n))
    cell, params, W, b = rate("relu", -1.5 * (1 - np.eye(n)) * np.exp(0.1 * Z), 1 + 0.5 * rng.normal(size=n), a=0.1)
    first = rng.normal(size=(64, n)).astype(np.float32)
    expected, _ = simulated("relu", W, b, 0.1, first=first)
    result = sj.analysis.fixed_points(cell, params, starts=jnp.asarray(first))
    assert (result.search.outcome == "fixed").mean() > 0.9, result.reason
    at_rest = np.unique(result.search.point[result.search.at_rest])
    assert len(at_rest) > 0
    for point in result.points[at_rest[at_rest >= 0]]:
        assert np.abs(expected - point).max(axis=1).min() < 1e-6
    assert result.covered.startswith("64 given states;")


def test_an_oscillation_is_reported():
    result = sj.analysis.fixed_points(SCALAR, scalar(-2.0))  # h = +-0.9575 in turn
    assert result.points.shape == (1, 1)
    assert result.unstable.tolist() == [1]
    assert not result.search.at_rest[1:].any()
    assert "; 63 of 64 states that were run forward did not come to rest (an oscillation" in result.reason


def test_print_says_the_points_what_was_covered_and_the_reason():
    lines = str(sj.analysis.fixed_points(SCALAR, scalar(2.0))).splitlines()
    assert lines[0] == "3 fixed points (2 stable), 0 slow points"
    slowest = -1 / np.log(0.166372088)
    assert lines[1].startswith(
        f"  1. fixed, stable, spectral radius 0.1664, slowest time constant {slowest:.3g} steps, "
    )
    assert lines[3].startswith("  3. fixed, unstable in 1 direction, spectral radius 2, no decaying mode, ")
    assert lines[4] == (
        "covered: 64 random states and 64 states that were run forward for up to 1000 steps; "
        "a search cannot prove that there are no other points"
    )
    assert lines[5:] == ["reliable: yes", "reason: 128 starts: 128 fixed; 3 fixed and 0 slow points"]


def test_one_start_is_the_initial_state_and_the_words_say_so():
    result = sj.analysis.fixed_points(SCALAR, scalar(2.0), count=1)
    assert result.points.tolist() == [[0.0]]
    assert result.covered.startswith("1 state that was run forward for up to 1000 steps;")
    assert sj.analysis.fixed_points(SCALAR, scalar(2.0), count=2, forward_steps=0).covered.startswith(
        "2 random states;"
    )


def test_parameters_that_are_not_finite_are_named():
    result = sj.analysis.fixed_points(SCALAR, scalar(np.nan))
    assert len(result.points) == 0
    assert not result.reliable
    assert "the step is not finite at any start: params.W_hh contains NaN or infinity" in str(result)


class Quantized(Saddle):
    """h' = tanh(2 h) rounded to eighths, with the derivative zero, or that of tanh(2 h)."""

    def __init__(self, straight_through):
        self.straight_through = straight_through

    def step(self, params, h, x):
        smooth = jnp.tanh(2 * h) + 0 * params["eps"]
        rounded = jnp.round(8 * smooth) / 8
        h = smooth + jax.lax.stop_gradient(rounded - smooth) if self.straight_through else rounded
        return h, h


@pytest.mark.parametrize(
    ("straight_through", "doubt"),
    [(False, "derivative of the step is zero at every start"), (True, "differs from a finite difference at")],
)
def test_a_quantized_step_is_not_reliable(straight_through, doubt):
    result = sj.analysis.fixed_points(Quantized(straight_through), {"eps": jnp.array(0.0)}, count=16)
    assert not result.reliable
    assert doubt in result.reason


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
    with raises(ValueError, "expected a positive scale, got nan"):
        find(SCALAR, params, scale=float("nan"))
    with raises(ValueError, "expected a whole number for count, got 2.5"):
        find(SCALAR, params, count=2.5)
    with raises(ValueError, "expected a whole number for forward_steps, got -1"):
        find(SCALAR, params, forward_steps=-1)
    with raises(TypeError, "expected a cell with a state", "Embedding"):
        find(sj.Embedding(3, 2), sj.Embedding(3, 2).init(jax.random.key(0)), 1)

    class NoShape(Saddle):
        input_shape = None

    with raises(ValueError, "expected x, the input of every step, got None for NoShape", "pass x"):
        find(NoShape(), {"eps": jnp.array(1.0)})
