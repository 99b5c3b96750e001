"""`unroll` is the loop that it stands for: in value and in gradient, with every option, for every cell."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, OURS, D, N
from jax.test_util import check_grads
from oracles import MASK, RESET, assert_close, drawn, drawn_states, like, loop, looped, pile, row, scanned, weighted

import seqjax as sj

SOME = ["lstm", "learned"]


@pytest.mark.parametrize("name", EVERY)
def test_scan_is_the_loop_in_value_and_gradient(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    state = drawn_states(cell, params)
    for mask, reset in ((MASK, RESET), (~MASK, RESET[::-1]), (MASK | True, RESET & False)):
        options = dict(state=state, mask=mask, reset=reset)
        assert_close(scanned(cell, params, xs, **options), looped(cell, params, xs, **options))


@pytest.mark.parametrize("name", SOME)
def test_scan_from_the_cells_own_state_is_the_loop(name, dtype):
    cell = EVERY[name]
    params, xs = drawn(cell, dtype)
    assert_close(scanned(cell, params, xs), looped(cell, params, xs))


@pytest.mark.parametrize("name", SOME)
def test_reverse_scan_is_the_loop_backwards(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(mask=MASK, reset=RESET, reverse=True)
    assert_close(scanned(cell, params, xs, **options), looped(cell, params, xs, **options))


@pytest.mark.parametrize("name", SOME)
def test_reverse_is_the_forward_run_of_the_flipped_sequence(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    final, outputs = sj.unroll(cell, params, xs, mask=MASK, reverse=True)
    flipped_final, flipped = sj.unroll(cell, params, xs[:, ::-1], mask=MASK[:, ::-1])
    assert_close((final, outputs), (flipped_final, flipped[:, ::-1]))


@pytest.mark.parametrize("name", SOME)
def test_masked_run_is_the_run_of_the_hand_cut_sequence(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    final, outputs = sj.unroll(cell, params, xs, mask=MASK)
    for b, valid in enumerate(MASK):
        cut = sj.unroll(cell, params, xs[b : b + 1, valid])
        assert_close((row(final, b), outputs[b, valid]), row(cut, 0))
        assert not np.any(outputs[b, ~valid])


@pytest.mark.parametrize("name", ["gru-before", "learned"])
def test_gradients_are_those_of_finite_differences(name, x64):
    cell = OURS[name]
    params, xs = drawn(cell, "float64", time=3)
    run = jax.jit(lambda params, xs: sj.unroll(cell, params, xs, mask=MASK[:, :3], reset=RESET[:, 2:5]))
    check_grads(run, (params, xs), order=1, atol=1e-6, rtol=1e-6)


def test_second_derivatives_are_those_of_finite_differences(x64):
    cell = OURS["lstm"]
    params, xs = drawn(cell, "float64", time=3)
    direction = like(params, "float64", seed=9)
    gradient = jax.jit(jax.grad(lambda p: weighted(sj.unroll(cell, p, xs, mask=MASK[:, :3]))))
    _, got = jax.jvp(gradient, (params,), (direction,))
    ahead, behind = (gradient(jax.tree.map(lambda p, d: p + e * d, params, direction)) for e in (1e-5, -1e-5))  # noqa: B023
    for a, b, c in zip(*map(jax.tree.leaves, (got, ahead, behind)), strict=True):
        np.testing.assert_allclose(a, (b - c) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_trajectory_is_every_state_of_the_loop(name, reverse, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    states = sj.trajectory(cell, params, xs, mask=MASK, reset=RESET, reverse=reverse)
    assert_close(states, loop(cell, params, xs, mask=MASK, reset=RESET, reverse=reverse).states)
    final, _ = sj.unroll(cell, params, xs, mask=MASK, reset=RESET, reverse=reverse)
    assert_close(jax.tree.map(lambda leaf: leaf[:, 0 if reverse else -1], states), final)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_two_calls_with_the_state_carried_are_one(name, reverse, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    halves = [slice(0, 3), slice(3, 6)]
    final, outputs = sj.unroll(cell, params, xs, mask=MASK, reset=RESET, reverse=reverse)
    state, parts = None, []
    for half in reversed(halves) if reverse else halves:
        options = dict(mask=MASK[:, half], reset=RESET[:, half], reverse=reverse)
        state, part = sj.unroll(cell, params, xs[:, half], state=state, **options)
        parts.append(part)
    assert_close((state, jnp.concatenate(parts[::-1] if reverse else parts, axis=1)), (final, outputs))


@pytest.mark.parametrize("name", SOME)
def test_no_steps_return_the_state_and_no_output(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    given = drawn_states(cell, params)
    own = pile([cell.initial_state(params)] * 2)
    for state, expected in ((None, own), (given, given)):
        final, outputs = sj.unroll(cell, params, xs[:, :0], state=state, reset=RESET[:, :0])
        assert_close(final, expected)
        assert (outputs.shape, str(outputs.dtype)) == ((2, 0, N), "float64")
    assert_close(sj.trajectory(cell, params, xs[:, :0]), jax.tree.map(lambda leaf: leaf[:, None], own))


@pytest.mark.parametrize(
    ("step", "cell"),
    [(sj.vanilla_step, sj.VanillaRNN(D, N)), (sj.lstm_step, sj.LSTM(D, N)), (sj.gru_step, sj.GRU(D, N))],
)
def test_the_plain_step_scans_without_a_cell(step, cell, dtype):
    params, xs = drawn(cell, dtype)
    one = jax.lax.scan(partial(step, params), row(drawn_states(cell, params), 0), xs[0])
    assert_close(one, row(sj.unroll(cell, params, xs, state=drawn_states(cell, params)), 0))


def test_the_parameters_are_as_many_as_the_equations_say_and_serve_every_length(x64):
    for cell, count in (
        (sj.VanillaRNN(D, N), N * (D + N + 1)),
        (sj.LSTM(D, N), 4 * N * (D + N + 1)),
        (sj.GRU(D, N), 3 * N * (D + N + 1) + N),
        (sj.GRU(D, N, reset="before"), 3 * N * (D + N + 1)),
        (sj.LearnedState(sj.LSTM(D, N)), 4 * N * (D + N + 1) + 2 * N),
    ):
        assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.init, jax.random.key(0)))) == count
        params, xs = drawn(cell, "float64", batch=1, time=9)
        assert_close(sj.unroll(cell, params, xs)[1][:, :1], sj.unroll(cell, params, xs[:, :1])[1])


def test_a_stack_is_its_layers_one_after_another(x64):
    cell = OURS["stack"]
    params, xs = drawn(cell, "float64")
    final, outputs = sj.unroll(cell, params, xs, mask=MASK, reset=RESET)
    below, hs = sj.unroll(cell.cells[0], params[0], xs, mask=MASK, reset=RESET)
    above, expected = sj.unroll(cell.cells[1], params[1], hs, mask=MASK, reset=RESET)
    assert_close((final, outputs), ((below, above), expected))


def test_a_stack_run_layer_by_layer_is_the_scan_of_its_step(x64):
    cell = OURS["stack"]
    params, xs = drawn(cell, "float64")

    class StepAlone:
        input_shape, init, initial_state, step = (D,), cell.init, cell.initial_state, cell.step

    options = dict(mask=MASK, reset=RESET, reverse=True)
    assert_close(scanned(cell, params, xs, **options), scanned(StepAlone(), params, xs, **options))


def test_the_gradient_of_a_learned_state_is_the_product_of_the_steps(x64):
    cell = sj.LearnedState(sj.VanillaRNN(N, N, activation="identity"))
    params, xs = drawn(cell, "float64", batch=1, time=20)
    orthogonal, weights = np.linalg.qr(params.cell.W_hh)[0], np.array([1.0, -2.0, 0.5, 3.0])
    gradient = jax.jit(jax.grad(lambda p: sj.unroll(cell, p, xs)[1][0, -1] @ weights))
    for gain, power in ((0.8, 0.011529215046), (1.2, 38.337599924)):
        W_hh = gain * orthogonal
        got = gradient(params._replace(cell=params.cell._replace(W_hh=W_hh))).state.h
        np.testing.assert_allclose(got, np.linalg.matrix_power(W_hh, 20).T @ weights, rtol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(got), power * np.linalg.norm(weights), rtol=1e-9)
