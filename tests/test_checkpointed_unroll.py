"""An unroll in checkpointed pieces is the same function, in less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import OURS, D, Leaky, N
from errors import raises
from oracles import assert_close, drawn, drawn_states, weighted

import seqjax as sj

TIME = 7


def value_and_gradient(cell, params, xs, state, every, **options):
    def value(params, xs, state):
        result = sj.unroll(cell, params, xs, state=state, checkpoint_every=every, **options)
        return weighted(result), result

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(params, xs, state)


def test_pieces_of_any_length_give_the_same_values_and_gradients(x64):
    mask = np.arange(TIME) % 3 != np.array([[0], [1]])
    reset = np.arange(TIME) == np.array([[4], [0]])
    for cell, options in (
        (OURS["lstm"], dict(mask=mask, reset=reset)),
        (OURS["learned"], dict(reverse=True, reset=reset)),
        (Leaky(), dict(mask=mask, reset=reset, reverse=True)),
    ):
        params, xs = drawn(cell, "float64", time=TIME)
        state = drawn_states(cell, params)
        whole = value_and_gradient(cell, params, xs, state, None, **options)
        for every in (1, 3) if cell is OURS["lstm"] else (3, 100):  # each step, not a divisor, more than there are
            assert_close(value_and_gradient(cell, params, xs, state, every, **options), whole)


def test_the_noise_of_a_stack_is_the_same_in_pieces(key):
    cell = sj.stack([sj.Dropout(D, 0.5), sj.GRU(D, 5), sj.Dropout(5, 0.5), sj.VanillaRNN(5, N)])
    params, xs = drawn(cell, "float32", time=TIME)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf + 0.5] * 2), cell.initial_state(params))
    whole = value_and_gradient(cell, params, xs, state, None, key=key)
    assert_close(value_and_gradient(cell, params, xs, state, 3, key=key), whole)
    assert not np.allclose(whole[0][1][1], sj.unroll(cell, params, xs, state=state)[1])


def test_no_steps_in_pieces_return_the_state():
    cell = OURS["lstm"]
    params, xs = drawn(cell, "float32", time=0)
    assert_close(sj.unroll(cell, params, xs, checkpoint_every=4), sj.unroll(cell, params, xs))


def test_second_derivatives_pass_through_the_pieces(x64):
    cell = OURS["lstm"]
    params, xs = drawn(cell, "float64", time=TIME)

    def curvature(every):
        gradient = jax.grad(lambda p: weighted(sj.unroll(cell, p, xs, checkpoint_every=every)))
        return jax.jit(lambda p: jax.jvp(gradient, (p,), (p,))[1])(params)

    assert_close(curvature(3), curvature(None))


@pytest.mark.parametrize("cell", [Leaky(), sj.LSTM(D, N)])
def test_a_gradient_in_pieces_needs_a_fraction_of_the_memory(cell):
    jax.config.update("jax_disable_most_optimizations", False)
    params, xs = drawn(cell, "float32", time=4096)

    def temporaries(every):
        gradient = jax.jit(jax.grad(lambda p: weighted(sj.unroll(cell, p, xs, checkpoint_every=every)[0])))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) < 0.25 * temporaries(None)


def test_a_wrong_number_of_steps_is_refused():
    cell = OURS["lstm"]
    params, xs = drawn(cell, "float32")
    for every in (0, -3):
        with raises(ValueError, "expected checkpoint_every of at least one step", str(every), "sqrt(time)"):
            sj.unroll(cell, params, xs, checkpoint_every=every)
    for every in (True, np.True_, 2.5, "8"):
        with raises(TypeError, "expected checkpoint_every as a whole number", repr(every), "sqrt(time)"):
            sj.unroll(cell, params, xs, checkpoint_every=every)
