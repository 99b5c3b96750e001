"""A noisy cell under every function: its drawn noise is an input like any other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import D, N
from jax.flatten_util import ravel_pytree

import seqjax as sj

CELL = sj.stack([sj.Dropout(D, 0.4), sj.GRU(D, N, dtype="float64"), sj.Dropout(N, 0.4), sj.LSTM(N, N, dtype="float64")])


@pytest.fixture
def drawn(x64):
    params, key = CELL.init(jax.random.key(0)), jax.random.key(1)
    xs = jax.random.normal(jax.random.key(2), (2, 7, D), jnp.float64)
    return params, xs, key, *sj.with_noise(CELL, xs, key)


def test_the_unroll_is_that_with_the_key(drawn):
    params, xs, key, cell, inputs = drawn
    mask = sj.length_mask([7, 4], 7)
    for options in ({}, {"mask": mask}, {"reset": ~mask}):
        found, expected = sj.unroll(cell, params, inputs, **options), sj.unroll(CELL, params, xs, key=key, **options)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_gradients_of_states_are_those_of_the_noisy_trajectory(drawn):
    params, xs, key, cell, inputs = drawn
    found = sj.state_gradients(cell, params, inputs, lambda states: states[3].h[:, -1].sum())
    initial = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, *leaf.shape)), CELL.initial_state(params))
    expected = jax.grad(lambda state: sj.unroll(CELL, params, xs, state=state, key=key)[0][3].h.sum())(initial)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=1e-12), found, expected)


def test_an_analysis_measures_the_noisy_trajectory(drawn):
    params, _, _, cell, inputs = drawn
    found = sj.analysis.step_jacobians(cell, params, inputs)
    states = sj.trajectory(cell, params, inputs)
    v, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[1, 3], states))
    x, noise = jax.tree.map(lambda leaf: leaf[1, 3], inputs)
    expected = jax.jacfwd(lambda v: ravel_pytree(CELL.step(params, unravel(v), x, noise)[0])[0])(v)
    np.testing.assert_allclose(found.by_state[1, 3], expected, rtol=1e-12, atol=1e-15)


def test_a_cell_without_noise_stays_as_it_is():
    cell, xs = sj.GRU(D, N), jnp.ones((2, 3, D))
    same, inputs = sj.with_noise(cell, xs, jax.random.key(0))
    assert same is cell
    np.testing.assert_array_equal(inputs, xs)
