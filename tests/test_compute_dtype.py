import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import seqjax as sj
from seqjax.cells.product import product
from seqjax.sequence._masked_step import Inputs, emit_output
from seqjax.sequence.unroll import _run_plainly
from tests.errors import raises

CELLS = [sj.VanillaRNN, sj.LSTM, sj.GRU, lambda *sizes, **how: sj.GRU(*sizes, reset="before", **how)]


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("make", CELLS)
def test_rounded_operands_stay_near_float32_in_value_and_gradient(make):
    """Eight bits of an operand are 2^-9 of a term; over 40 steps of a contracting cell a few times that stays."""
    cell, rounded = make(8, 32), make(8, 32, compute_dtype="bfloat16")
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 40, 8))
    weights = jax.random.normal(jax.random.key(2), (4, 40, 32))

    @jax.jit
    def run(params):
        def loss(cell):
            return lambda params: jnp.vdot(sj.unroll(cell, params, xs)[1], weights)

        outputs = [sj.unroll(each, params, xs) for each in (rounded, cell)]
        return outputs, [jax.grad(loss(each))(params) for each in (rounded, cell)]

    ((state, got), (_, expected)), (got_gradient, expected_gradient) = run(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state, got, got_gradient)))
    assert 1e-4 < relative(got, expected) < 1e-2
    for name, a, b in zip(params._fields, got_gradient, expected_gradient, strict=True):
        assert a is None or relative(a, b) < 3e-2, name


@pytest.mark.parametrize("make", CELLS)
def test_fast_and_plain_unroll_agree_on_rounded_operands(make):
    cell = make(3, 5, compute_dtype="bfloat16")
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 20, 3))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, *leaf.shape)), cell.initial_state(params))
    plain = _run_plainly(cell, emit_output, False, params, state, Inputs(xs))[1]
    np.testing.assert_allclose(sj.unroll(cell, params, xs)[1], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", CELLS)
def test_the_jacobian_is_that_of_the_rounded_step(make):
    cell = make(3, 5, compute_dtype="bfloat16")
    params, x = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (3,))
    state, restore = ravel_pytree(cell.step(params, cell.initial_state(params), x)[0])
    expected = jax.jacfwd(lambda v: ravel_pytree(cell.step(params, restore(v), x)[0])[0])(state)
    batched = jax.tree.map(lambda leaf: leaf[None], restore(state))
    got = sj.analysis.step_jacobians(cell, params, x[None, None], state=batched).by_state[0, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)  # jacfwd rounds tangents too
    assert cell == make(3, 5, compute_dtype=jnp.bfloat16)
    assert params.W_hh.dtype == jnp.float32


def test_sums_keep_what_operands_cannot_hold():
    v = jnp.full(4096, 1.0)
    assert product(jnp.full((1, 4096), 1.0), v, "bfloat16").item() == 4096.0  # 256 + 1 is 256 in bfloat16
    assert product(jnp.ones((1, 2)), jnp.array([1.0, 2.0**-9]), "bfloat16").item() == 1 + 2.0**-9


def test_products_of_whole_numbers_are_refused():
    with raises(TypeError, "expected LSTM compute_dtype to be floating-point, got int8"):
        sj.LSTM(1, 1, compute_dtype="int8")
