"""What a mask and a reset mean, for every pattern of them: padding is not there, and a reset starts anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import BATCH, TIME, assert_close, drawn, drawn_states, loop, looped, pile, row, scanned

import seqjax as sj

SOME = ["lstm", "learned"]
FLAGS = arrays(bool, (BATCH, TIME))
LENGTHS = st.lists(st.integers(0, TIME), min_size=BATCH, max_size=BATCH).map(np.array)
BAD = st.sampled_from([np.nan, np.inf, -np.inf, 1e30])


@pytest.fixture(params=SOME)
def case(request):
    """A cell, its parameters, inputs and given states, in float64."""
    with jax.enable_x64(True):
        cell = EVERY[request.param]
        params, xs = drawn(cell, "float64")
        yield cell, params, xs, drawn_states(cell, params)


def spoilt(xs, mask, bad):
    """Inputs with something bad wherever the mask is False."""
    return jnp.where(mask[..., None], xs, bad)


def own_states(cell, params):
    """The cell's own initial state for each row."""
    return pile([cell.initial_state(params)] * BATCH)


@settings(max_examples=8)
@given(mask=FLAGS, reset=FLAGS, bad=BAD)
def check_against_the_loop(case, mask, reset, bad):
    cell, params, xs, state = case
    got = scanned(cell, params, spoilt(xs, mask, bad), state=state, mask=mask, reset=reset)
    assert_close(got, looped(cell, params, xs, state=state, mask=mask, reset=reset))


def test_no_pattern_of_masks_and_resets_lets_padding_into_values_or_gradients(case):
    check_against_the_loop(case)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["gru-after", "gru-before", "vanilla-relu", "stack", "user", "linen-lstm", "equinox-gru"]
)
def test_padding_reaches_no_gradient_of_any_kind_of_cell(name, bad):
    cell = EVERY[name]
    params, xs = drawn(cell, "float32")
    state, mask = drawn_states(cell, params), np.arange(TIME) < np.array([[3], [0]])
    clean, (d_params, d_xs, d_state) = scanned(cell, params, jnp.zeros_like(xs) + xs, state=state, mask=mask)
    got, gradients = scanned(cell, params, spoilt(xs, mask, bad), state=state, mask=mask)
    assert_close((got, gradients), (clean, (d_params, d_xs, d_state)))
    assert not np.any(d_xs[~mask])
    assert np.all(np.isfinite(d_xs))


def test_a_row_of_length_zero_returns_its_state_and_zeros(case):
    cell, params, xs, state = case
    mask = sj.length_mask(jnp.array([0, 4]), TIME)
    for given_state, expected in ((state, state), (None, own_states(cell, params))):
        final, outputs = sj.unroll(cell, params, spoilt(xs, mask, np.nan), state=given_state, mask=mask)
        for got, before in zip(jax.tree.leaves(final), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(got[0], before[0])
        assert not np.any(outputs[0])
        assert np.all(outputs[1, :4] != 0)


def test_every_step_padded_holds_the_trajectory_and_passes_its_gradient_through(case):
    cell, params, xs, state = case
    mask = np.zeros((BATCH, TIME), bool)
    states = sj.trajectory(cell, params, xs * np.nan, state=state, mask=mask)
    held = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], TIME + 1, 1), state)
    assert_close(states, held)
    pulled = jax.vjp(lambda s: sj.unroll(cell, params, xs, state=s, mask=mask)[0], state)[1](state)[0]
    assert_close(pulled, state)


@settings(max_examples=8)
@given(lengths=LENGTHS, bad=BAD)
def check_reversed_padding(case, lengths, bad):
    cell, params, xs, _ = case
    mask = np.asarray(sj.length_mask(lengths, TIME))
    final, outputs = sj.unroll(cell, params, spoilt(xs, mask, bad), mask=mask, reverse=True)
    for b, length in enumerate(lengths):
        assert not np.any(outputs[b, length:])
        if not length:
            assert_close(row(final, b), row(own_states(cell, params), b))
            continue
        cut = loop(cell, params, xs[b : b + 1, :length][:, ::-1])
        assert_close((row(final, b), outputs[b, :length]), (row(cut.final, 0), cut.outputs[0, ::-1]))


def test_reverse_over_right_padding_is_the_reverse_of_the_cut_sequence(case):
    check_reversed_padding(case)


def test_a_reset_selects_so_that_a_nan_state_is_gone(case):
    cell, params, xs, state = case
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), state)
    reset = np.zeros((BATCH, TIME), bool)
    reset[:, 0] = True
    got = scanned(cell, params, xs, state=broken, mask=np.ones_like(reset), reset=reset)
    anew, gradient = looped(cell, params, xs)
    assert_close(got, (anew, (*gradient, jax.tree.map(jnp.zeros_like, state))))


@settings(max_examples=8)
@given(reset=FLAGS)
def check_resets(case, reset):
    cell, params, xs, state = case
    final, outputs = sj.unroll(cell, params, xs, state=state, reset=reset)
    for b in range(BATCH):
        starts = np.flatnonzero(reset[b])
        if starts.size:
            anew = loop(cell, params, xs[b : b + 1, starts[-1] :])
            assert_close((row(final, b), outputs[b, starts[-1] :]), (row(anew.final, 0), anew.outputs[0]))


def test_a_reset_is_the_same_as_starting_anew(case):
    check_resets(case)


def test_a_reset_at_a_padded_step_leaves_the_initial_state_held(case):
    cell, params, xs, state = case
    mask, reset = np.ones((BATCH, TIME), bool), np.zeros((BATCH, TIME), bool)
    mask[:, 2:], reset[:, 3] = False, True
    states = sj.trajectory(cell, params, spoilt(xs, mask, np.nan), state=state, mask=mask, reset=reset)
    assert_close(jax.tree.map(lambda leaf: leaf[:, 4], states), own_states(cell, params))
    assert_close(jax.tree.map(lambda leaf: leaf[:, TIME], states), own_states(cell, params))
    final, outputs = sj.unroll(cell, params, spoilt(xs, mask, np.nan), state=state, mask=mask, reset=reset)
    assert_close(final, own_states(cell, params))
    assert not np.any(outputs[:, 2:])


@settings(max_examples=5)
@given(mask=FLAGS, reset=FLAGS, bad=BAD, reverse=st.booleans())
def check_gates(mask, reset, bad, reverse):
    cell = EVERY["lstm"]
    params, xs = drawn(cell, "float32")
    options = dict(mask=mask, reset=reset, reverse=reverse)
    activations = sj.gates(cell, params, spoilt(xs, mask, bad), **options)
    states = loop(cell, params, xs, **options).states
    for b, t in np.ndindex(BATCH, TIME):
        before = cell.initial_state(params) if reset[b, t] else row(states, b, t + 1 if reverse else t)
        expected = cell.gates(params, before, xs[b, t])
        if not mask[b, t]:
            expected = jax.tree.map(jnp.zeros_like, expected)
        assert_close(row(activations, b, t), expected)


def test_gates_are_those_of_each_step_and_zero_where_it_is_padded():
    check_gates()


@given(lengths=LENGTHS)
def test_a_length_mask_is_true_at_the_first_steps_of_each_row(lengths):
    expected = np.array([[t < length for t in range(TIME)] for length in lengths])
    np.testing.assert_array_equal(sj.length_mask(lengths, TIME), expected)
    np.testing.assert_array_equal(jax.jit(sj.length_mask, static_argnums=1)(lengths, TIME), expected)
