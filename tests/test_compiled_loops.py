"""What is read from a compiled loop is what the source says that a step does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from cells import zoo

import seqjax as sj
from benchmarks.hlo import loops, weight_shapes

BATCH, TIME, FEATURES, HIDDEN = 3, 20, 5, 11  # no length is a multiple of another
CELLS = {"vanilla": sj.VanillaRNN, "lstm": sj.LSTM, "gru": sj.GRU}


@pytest.fixture(autouse=True)
def optimised(compile_quickly):
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def xlas_own_loops(optimised, monkeypatch):
    """Without the kernel in C++, inside of which there would be nothing to see."""
    monkeypatch.setattr("seqjax.sequence._execution.run.kernel_for", lambda parts: None)
    jax.clear_caches()
    yield
    jax.clear_caches()


def compiled_loops(function, *arguments):
    return loops(jax.jit(function).lower(*arguments).compile().as_text())


def plainly(name):
    """The cell in a scan over time, and its arguments."""
    cell = CELLS[name](FEATURES, HIDDEN)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((BATCH, TIME, FEATURES))

    def unroll(params, xs):
        first = jax.vmap(lambda _: cell.initial_state(params))(xs)
        step = jax.vmap(lambda state, x: cell.step(params, state, x))
        return jax.lax.scan(step, first, xs.swapaxes(0, 1))[1]

    return unroll, params, xs


@pytest.mark.parametrize("name", CELLS)
def test_a_plain_scan_has_one_loop_with_the_product_of_the_input_and_that_of_the_state(name):
    unroll, params, xs = plainly(name)
    (loop,) = compiled_loops(unroll, params, xs)
    assert loop.steps == TIME
    assert loop.innermost
    assert len(loop.products) == 2
    assert not loop.makes(weight_shapes(jax.tree.leaves(params)))
    assert loop.kernels.total() >= 3


@pytest.mark.parametrize("name", CELLS)
def test_the_gradient_of_a_plain_scan_sums_up_the_weights_gradients_in_its_loop(name):
    unroll, params, xs = plainly(name)
    found = compiled_loops(jax.grad(lambda params, xs: unroll(params, xs).sum()), params, xs)
    summing = [loop for loop in found if loop.makes(weight_shapes(jax.tree.leaves(params)))]
    assert len(summing) == 1
    assert len(summing[0].products) == 3  # back through the state, and the gradients of W_hh and W_xh
    assert {params.W_hh.shape, params.W_xh.shape} <= set(summing[0].changed)


def ours(name, time):
    cell = CELLS[name](FEATURES, HIDDEN)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((BATCH, time, FEATURES))
    return lambda params, xs: sj.unroll(cell, params, xs)[1], params, xs


# 23 steps are one chunk; 203 are two and a remainder.
@pytest.mark.parametrize("time", [23, 203])
@pytest.mark.parametrize("name", CELLS)
def test_a_step_forward_has_the_recurrent_product_alone(name, time, xlas_own_loops):
    unroll, params, xs = ours(name, time)
    innermost = [loop for loop in compiled_loops(unroll, params, xs) if loop.innermost]
    assert innermost
    for loop in innermost:
        assert len(loop.products) == 1, loop
        assert sorted(loop.products[0]) == sorted((BATCH, params.W_hh.shape[0])), loop
        assert not loop.makes(weight_shapes(jax.tree.leaves(params))), loop


@pytest.mark.parametrize("time", [23, 203])
@pytest.mark.parametrize("name", CELLS)
def test_a_step_backward_has_one_product_and_sums_up_no_weights_gradient(name, time, xlas_own_loops):
    unroll, params, xs = ours(name, time)
    found = compiled_loops(jax.grad(lambda params, xs: unroll(params, xs).sum()), params, xs)
    innermost = [loop for loop in found if loop.innermost]
    assert len(innermost) >= 2  # forward and backward
    assert any(sorted(p) == sorted((BATCH, HIDDEN)) for loop in innermost for p in loop.products)
    for loop in innermost:
        assert len(loop.products) <= 1, loop
        assert not loop.makes(weight_shapes(jax.tree.leaves(params))), loop


@pytest.mark.parametrize("name", ["linen-lstm", "nnx-gru", "equinox-gru", "peephole-lstm", "coupled-lstm"])
def test_any_cell_has_one_product_per_step_forward_and_backward(name, xlas_own_loops):
    cell = zoo(FEATURES, HIDDEN)[name]
    params, xs = cell.init(jax.random.key(0)), jnp.ones((BATCH, 23, FEATURES))
    gradient = jax.grad(lambda params, xs: sj.unroll(cell, params, xs)[1].sum())
    innermost = [loop for loop in compiled_loops(gradient, params, xs) if loop.innermost]
    assert max(len(loop.products) for loop in innermost) == 1
    weights = weight_shapes([leaf for leaf in jax.tree.leaves(params) if leaf.size >= FEATURES * HIDDEN])
    assert not any(loop.makes(weights) for loop in innermost)


def test_the_gates_of_a_stack_cost_no_second_product(xlas_own_loops):
    cell = sj.stack([sj.LSTM(FEATURES, HIDDEN), sj.GRU(HIDDEN, HIDDEN)])
    params, xs = cell.init(jax.random.key(0)), jnp.ones((BATCH, 23, FEATURES))
    found = compiled_loops(lambda params, xs: sj.gates(cell, params, xs), params, xs)
    products = [sorted(product) for loop in found if loop.innermost for product in loop.products]
    assert products == [sorted((BATCH, 4 * HIDDEN)), sorted((BATCH, 3 * HIDDEN))]


def test_a_loop_in_a_loop_is_counted_for_itself():
    def nested(x):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=7)[0] @ x @ x, None

        return jax.lax.scan(outer, x, length=4)[0]

    found = {loop.steps: loop for loop in compiled_loops(nested, jnp.eye(HIDDEN))}
    assert {steps: (len(loop.products), loop.innermost) for steps, loop in found.items()} == {
        7: (1, True),
        4: (2, False),
    }


def test_weights_that_a_loop_only_reads_are_not_taken_for_a_sum():
    W = jnp.eye(HIDDEN)
    (loop,) = compiled_loops(lambda W, h: jax.lax.fori_loop(0, TIME, lambda _, h: jnp.tanh(h @ W), h), W, W[:BATCH])
    assert loop.products == [(BATCH, HIDDEN)]
    assert not loop.makes(weight_shapes([W]))
