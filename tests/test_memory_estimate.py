import jax
import jax.numpy as jnp
import pytest

import seqjax as sj
from tests.errors import raises


def test_estimate_is_what_the_compiled_gradient_takes():
    cell = sj.GRU(3, 8)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((2, 300, 3))
    used = jax.jit(jax.grad(lambda p, x: sj.unroll(cell, p, x)[1].sum())).lower(params, xs).compile().memory_analysis()
    estimate = sj.memory_estimate(cell, 2, 300)
    assert estimate.temporaries == used.temp_size_in_bytes
    assert estimate.arguments == sum(leaf.nbytes for leaf in jax.tree.leaves((params, xs)))
    assert estimate.total == sum(estimate)


def test_estimate_of_what_no_machine_could_hold_runs_nothing():
    estimate = sj.memory_estimate(sj.LSTM(8, 64), 1024, 10_000_000)
    assert estimate.temporaries > 2 * 1024 * 10_000_000 * 64 * 4  # h and c of every step
    assert "TB" in str(estimate)


def test_tokens_are_whole_numbers():
    cell = sj.stack([sj.Embedding(50, 4), sj.GRU(4, 8)])
    assert sj.memory_estimate(cell, 2, 20, gradient=False).arguments > 0


def test_wrong_calls_say_what_was_expected():
    class Nameless:
        def init(self, key):
            return {}

        def initial_state(self, params):
            return jnp.zeros(())

        def step(self, params, state, x):
            return state + x, state

    with raises(TypeError, "expected a cell that says its input_shape, got Nameless"):
        sj.memory_estimate(Nameless(), 1, 10)
    with pytest.raises(ValueError, match=r"expected time to be a whole number from 1 to .*, got 0"):
        sj.memory_estimate(sj.GRU(1, 1), 1, 0)
