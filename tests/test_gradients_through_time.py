"""Gradients through time, taken apart: against `jax.grad`, against loops by hand, and against products of Jacobians."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, OURS
from jax.flatten_util import ravel_pytree
from oracles import MASK, RESET, TIME, add, assert_close, backward, drawn, drawn_states, loop, pile, row, weighted
from oracles import weighted_gradient as gradient_of

import seqjax as sj

SOME = ["lstm", "learned"]
DISTINCT = [name for name in EVERY if name not in ("lstm-chrono", "learned")]  # of one equation, one is enough


@functools.partial(jax.jit, static_argnames=("cell", "window"))
def truncated(cell, params, xs, window, **options):
    return sj.truncated_grad(cell, params, xs, weighted, window, **options)


@functools.partial(jax.jit, static_argnames="cell")
def taken_apart(cell, params, xs, **options):
    """The gradient of `weighted` outputs in a window of the whole sequence, and step by step."""
    whole = sj.truncated_grad(cell, params, xs, weighted, TIME, **options)
    return whole, sj.weight_gradients_by_step(cell, params, xs, weighted, **options)


@functools.partial(jax.jit, static_argnames="cell")
def by_jax(cell, params, xs, **options):
    return jax.grad(lambda p: weighted(sj.unroll(cell, p, xs, **options)[1]))(params)


def by_hand(cell, params, xs, window=None, **options):
    """The same by hand, one entry for each step; by hand is by `jax.grad`, says test_unroll_is_a_loop."""
    final, outputs, _ = loop(cell, params, xs, **options)
    nothing = jax.tree.map(np.zeros_like, final)
    return backward(cell, params, xs, nothing, gradient_of(outputs), window=window, **options)[0]


@pytest.mark.parametrize("name", DISTINCT)
def test_each_steps_weight_gradient_is_its_own_and_their_sum_is_that_of_the_longest_window(name, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    whole, by_step = taken_apart(cell, params, xs, mask=MASK, reset=RESET)
    expected = by_hand(cell, params, xs, mask=MASK, reset=RESET)
    if name == "nnx-simple":  # flax computes this one in float32, whatever its parameters
        whole, by_step, expected = jax.tree.map(lambda leaf: leaf.astype("float32"), (whole, by_step, expected))
    assert_close(whole, functools.reduce(add, expected))
    assert_close(by_step, pile(expected))


def test_a_window_longer_than_the_sequence_is_the_full_gradient(dtype):
    cell = OURS["learned"]
    params, xs = drawn(cell, dtype)
    assert_close(truncated(cell, params, xs, TIME + 3), by_jax(cell, params, xs))


def test_the_full_gradient_from_a_given_state_is_that_of_jax(x64):
    cell = OURS["lstm"]
    params, xs = drawn(cell, "float64")
    options = dict(state=drawn_states(cell, params), mask=MASK, reset=RESET)
    whole, by_step = taken_apart(cell, params, xs, **options)
    expected = by_jax(cell, params, xs, **options)
    assert_close((whole, jax.tree.map(lambda leaf: leaf.sum(0), by_step)), (expected, expected))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("name", SOME)
def test_a_short_window_is_every_outputs_own_last_steps(name, window, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(mask=MASK, reset=RESET, state=None if name == "learned" else drawn_states(cell, params))
    expected = by_hand(cell, params, xs, window=window, **options)
    assert_close(truncated(cell, params, xs, window, **options), functools.reduce(add, expected))


def test_a_window_is_the_gradient_from_a_state_that_was_detached_so_many_steps_ago(x64):
    cell, window = sj.VanillaRNN(3, 4), 2
    params, xs = drawn(cell, "float64")
    states = sj.trajectory(cell, params, xs)

    def loss(params):
        total = 0.0
        for t in range(TIME):
            first = max(0, t + 1 - window)
            state = sj.detach(jax.tree.map(lambda leaf: leaf[:, first], states))  # noqa: B023
            total += jnp.sum(sj.unroll(cell, params, xs[:, first : t + 1], state=state)[1][:, -1] ** 3)
        return total

    got = jax.jit(lambda p: sj.truncated_grad(cell, p, xs, lambda outputs: jnp.sum(outputs**3), window))(params)
    assert_close(got, jax.jit(jax.grad(loss))(params))


def test_a_window_of_one_step_has_no_recurrence(x64):
    cell = sj.VanillaRNN(3, 4)
    params, xs = drawn(cell, "float64")
    got = truncated(cell, params, xs, 1)
    states = sj.trajectory(cell, params, xs).h
    before, after = np.asarray(states[:, :-1]), np.asarray(states[:, 1:])
    local = gradient_of(after) * (1 - after**2)  # dL/da_t, a_t = W_xh x_t + W_hh h_{t-1} + b_h, at fixed h_{t-1}
    expected = [
        np.einsum("btn,btd->nd", local, np.asarray(xs)),
        np.einsum("btn,btm->nm", local, before),
        local.sum((0, 1)),
    ]
    assert_close(got, sj.VanillaParams(*expected))


@pytest.mark.parametrize(("name", "given"), [("learned", False), ("lstm", True)])
def test_state_gradients_are_those_of_a_nudge_to_each_state(name, given, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, "float64")
    options = dict(mask=MASK, reset=RESET, state=drawn_states(cell, params) if given else None)
    zeros = jax.tree.map(jnp.zeros_like, sj.trajectory(cell, params, xs, **options))
    first = options["state"] or jax.vmap(lambda _: cell.initial_state(params))(xs)

    def nudged(nudges):
        """The loss where the nudge e_t is added to s_t, for one t after another; where masked, s_t is s_{t-1}."""
        rows = []
        for b in range(len(xs)):
            one = jax.tree.map(lambda leaf: leaf[b], nudges)  # noqa: B023
            s, states = jax.tree.map(lambda s, e: s[b] + e[0], first, one), []  # noqa: B023
            for t in range(TIME):
                if RESET[b, t]:
                    s = cell.initial_state(params)
                if MASK[b, t]:
                    s, _ = jax.jit(cell.step)(params, s, xs[b, t])
                s = jax.tree.map(lambda s, e: s + e[t + 1], s, one)  # noqa: B023
                states.append(s)
            rows.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        return weighted(jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))

    assert_close(sj.state_gradients(cell, params, xs, weighted, **options), jax.jit(jax.grad(nudged))(zeros))


@pytest.mark.parametrize("name", ["vanilla", "lstm", "gru-before"])
def test_the_gradient_of_the_first_state_is_the_product_of_the_jacobians(name, x64):
    cell = OURS[name]
    params, xs = drawn(cell, "float64", batch=1)
    states = row(sj.trajectory(cell, params, xs), 0)

    def last(states):
        return weighted(jax.tree.map(lambda leaf: leaf[:, -1], states))

    delta, unravel = ravel_pytree(gradient_of(row(states, TIME)))  # over (h, c) for an LSTM
    jacobian = jax.jit(jax.jacfwd(lambda s, x: ravel_pytree(cell.step(params, unravel(s), x)[0])[0]))
    deltas = [delta]
    for t in reversed(range(TIME)):
        deltas.append(jacobian(ravel_pytree(row(states, t))[0], xs[0, t]).T @ deltas[-1])
    got = row(sj.state_gradients(cell, params, xs, last), 0)
    assert_close(jax.vmap(lambda s: ravel_pytree(s)[0])(got), np.stack(deltas[::-1]))


@pytest.mark.parametrize(("bias", "kept"), [(0.0, 0.5), (1.0, 0.7310585786300049), (5.0, 0.9933071490757153)])
def test_the_cell_state_of_an_lstm_without_weights_keeps_a_power_of_the_forget_gate(bias, kept, x64):
    cell = sj.LSTM(1, 2)
    b_h = jnp.array([0, 0, bias, bias, 0, 0, 0, 0])
    params = sj.LSTMParams(jnp.zeros((8, 1)), jnp.zeros((8, 2)), b_h)
    got = sj.state_gradients(cell, params, jnp.ones((1, 20, 1)), lambda states: states.c[0, -1].sum())
    np.testing.assert_allclose(got.c[0], np.repeat(kept ** np.arange(20, -1, -1)[:, None], 2, 1), rtol=1e-12)
    assert not np.any(got.h[0])


def test_the_steps_of_a_network_that_shares_no_weights_have_the_same_gradients(x64):
    cell = OURS["learned"]
    params, xs = drawn(cell, "float64")
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], TIME, 0), params)

    def unshared(copies):
        start = cell.initial_state(jax.tree.map(lambda leaf: leaf[0], copies))
        return weighted(
            jax.vmap(lambda x: jax.lax.scan(lambda s, px: cell.step(px[0], s, px[1]), start, (copies, x))[1])(xs)
        )

    assert_close(taken_apart(cell, params, xs)[1], jax.jit(jax.grad(unshared))(copies))


def test_a_detached_state_keeps_its_numbers_and_cuts_the_gradient(x64):
    cell = OURS["lstm"]
    params, xs = drawn(cell, "float64")

    def two_chunks(params, cut):
        state, _ = sj.unroll(cell, params, xs[:, :3])
        return weighted(sj.unroll(cell, params, xs[:, 3:], state=cut(state))[1])

    value, gradient = jax.value_and_grad(two_chunks)(params, sj.detach)
    constant, _ = sj.unroll(cell, params, xs[:, :3])
    expected = jax.value_and_grad(lambda p: two_chunks(p, lambda _: constant))(params)
    assert_close((value, gradient), expected)
    assert not np.allclose(gradient.W_hh, jax.grad(two_chunks)(params, lambda state: state).W_hh)
