"""Cells of other libraries: their own answers, value equality, dtypes, composition, and clear refusals."""

from __future__ import annotations

import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY
from errors import raises
from flax import nnx

import seqjax as sj
from seqjax.cell import names_of_state

D, N = 3, 4
ZERO = jnp.zeros(N)
TRACES = []


def counting_tanh(a):
    TRACES.append(1)  # runs when the step is traced, and not when compiled code is run again
    return jnp.tanh(a)


class LeakyModule(eqx.Module):
    """A user's equinox cell, h + r (tanh(W h + U x) - h), that says itself where it begins."""

    W: jax.Array
    U: jax.Array
    rate: float = eqx.field(static=True)

    def __init__(self, d, n, rate=0.5, *, key):
        self.W, self.U, self.rate = jax.random.normal(key, (n, n)), jax.random.normal(key, (n, d)), rate

    def initial_state(self):
        return jnp.full(self.W.shape[0], 0.25)

    def __call__(self, x, h):
        return h + self.rate * (counting_tanh(self.W @ h + self.U @ x) - h)


class Counter(nnx.Module):
    """An nnx cell that remembers something outside its carry."""

    def __init__(self, *, rngs):
        self.in_features, self.cell, self.calls = D, nnx.SimpleCell(D, N, rngs=rngs), nnx.BatchStat(jnp.zeros(()))


BUILD = {  # each call builds the adapter anew, from new objects of the library
    "linen": lambda: sj.from_linen(nn.LSTMCell(N, activation_fn=counting_tanh), D),
    "nnx": lambda: sj.from_nnx(nnx.GRUCell, D, N, activation_fn=counting_tanh),
    "equinox": lambda: sj.from_equinox(LeakyModule, D, N, rate=0.1),
}
PLAIN = {
    "linen": sj.from_linen(nn.GRUCell(N), D),
    "nnx": sj.from_nnx(nnx.OptimizedLSTMCell, D, N),
    "equinox": sj.from_equinox(eqx.nn.LSTMCell, D, N),
}


def random_like(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def random_params(cell, seed=0):
    return random_like(jax.eval_shape(cell.init, jax.random.key(0)), seed)


def close(got, expected, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=atol)


XS = random_like(jnp.zeros((2, 5, D)), 1)


def test_the_weights_of_a_trained_nnx_module_give_the_module_s_own_outputs():
    module = nnx.LSTMCell(D, N, rngs=nnx.Rngs(0))
    nnx.update(module, random_like(nnx.state(module, nnx.Param)))
    cell = sj.from_nnx(nnx.LSTMCell, D, N)
    final, outputs = sj.unroll(cell, cell.params_from(module), XS)
    carry = (jnp.stack([ZERO, ZERO]),) * 2
    for t in range(5):
        carry, y = module(carry, XS[:, t])
        close(outputs[:, t], y, 1e-6)
    close(final, carry, 1e-6)


@pytest.mark.parametrize("kind", [eqx.nn.GRUCell, eqx.nn.LSTMCell, LeakyModule])
def test_the_weights_of_a_trained_equinox_module_give_the_module_s_own_outputs(kind):
    module = random_like(eqx.filter_eval_shape(lambda key: kind(D, N, key=key), jax.random.key(0)))
    cell = sj.from_equinox(kind, D, N)
    final, outputs = sj.unroll(cell, cell.params_from(module), XS)
    begin = {eqx.nn.GRUCell: ZERO, eqx.nn.LSTMCell: (ZERO, ZERO), LeakyModule: ZERO + 0.25}[kind]
    for b in range(2):
        state = begin
        for t in range(5):
            state = module(XS[b, t], state)
            close(outputs[b, t], jax.tree.leaves(state)[0], 1e-6)
        close(jax.tree.map(lambda leaf: leaf[b], final), state, 1e-6)  # noqa: B023


@pytest.mark.parametrize("name", BUILD)
def test_rebuilt_adapters_are_equal_by_value_and_compile_once(name):
    cell, params = BUILD[name](), random_params(BUILD[name]())
    assert cell == BUILD[name]()
    assert hash(cell) == hash(BUILD[name]())
    first = sj.unroll(cell, params, XS)
    traced = len(TRACES)
    assert traced > 0
    for _ in range(3):
        close(sj.unroll(BUILD[name](), params, XS), first, 0)
    assert len(TRACES) == traced


def test_adapters_with_other_arguments_are_not_equal():
    cells = [
        sj.from_linen(nn.GRUCell(N), D),
        sj.from_linen(nn.GRUCell(N), D + 1),
        sj.from_linen(nn.GRUCell(N + 1), D),
        sj.from_nnx(nnx.GRUCell, D, N),
        sj.from_nnx(nnx.GRUCell, D, N + 1),
        sj.from_nnx(nnx.LSTMCell, D, N),
        sj.from_equinox(eqx.nn.GRUCell, D, N),
        sj.from_equinox(eqx.nn.GRUCell, D, N, use_bias=False),
    ]
    assert len(set(cells)) == len(cells)
    by_name = [{"in_features": D, "hidden_features": N}, {"hidden_features": N, "in_features": D}]
    assert len({sj.from_nnx(nnx.GRUCell, **names) for names in by_name}) == 1
    for cell in cells[3:]:
        assert pickle.loads(pickle.dumps(cell)) == cell


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float64", 1e-5)])
@pytest.mark.parametrize("name", PLAIN)
def test_the_state_and_the_output_take_the_dtype_of_the_parameters(name, dtype, tolerance, x64):
    cell = PLAIN[name]
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), random_params(cell))  # the same numbers in every dtype
    single = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    got = sj.unroll(cell, jax.tree.map(lambda leaf: leaf.astype(dtype), params), XS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {dtype}
    close(got, sj.unroll(cell, single, XS), tolerance)


def test_a_module_that_computes_in_a_dtype_of_its_own_leaves_the_state_in_that_of_its_parameters():
    cell = sj.from_nnx(nnx.SimpleCell, D, N)  # its `dtype` is float32 whatever its parameters are
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), random_params(cell))
    final, _ = sj.unroll(cell, params, XS)
    assert final.dtype == "bfloat16"
    close(final, sj.unroll(cell, jax.tree.map(lambda leaf: leaf.astype("float32"), params), XS)[0], 0.1)


@pytest.mark.parametrize("name", PLAIN)
def test_a_learned_state_around_a_foreign_cell_is_its_initial_state_with_the_gradient_of_it(name, x64):
    cell = sj.LearnedState(PLAIN[name])
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), random_params(cell))
    given = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params.state)

    def loss(cell, params, state=None):
        return jnp.sum(jnp.sin(sj.unroll(cell, params, XS, state=state)[1]))

    value, grads = jax.value_and_grad(loss, argnums=1)(cell, params)
    expected, state_grads = jax.value_and_grad(loss, argnums=2)(cell.cell, params.cell, given)
    close(value, expected, 1e-12)
    close(grads.state, jax.tree.map(lambda leaf: leaf.sum(0), state_grads), 1e-12)  # both rows begin from one state
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(grads.state)) > 1e-3


def test_a_stack_of_three_libraries_is_each_over_the_outputs_of_the_one_below():
    layers = [sj.from_linen(nn.LSTMCell(5), D), sj.from_nnx(nnx.GRUCell, 5, 2), sj.from_equinox(eqx.nn.GRUCell, 2, N)]
    params = tuple(random_params(layer, seed) for seed, layer in enumerate(layers))
    final, outputs = sj.unroll(sj.stack(layers), params, XS)
    below = XS
    for layer, p, s in zip(layers, params, final, strict=True):
        own, below = sj.unroll(layer, p, below)
        close(s, own, 1e-6)
    close(outputs, below, 1e-6)


def test_an_nnx_module_with_more_than_parameters_is_refused_by_what_it_holds(key):
    cell = sj.from_nnx(Counter)
    with raises(TypeError, "only parameters", "calls", "carry"):
        sj.unroll(cell, cell.init(key), XS)


@pytest.mark.parametrize(
    ("adapter", "wrong", "parts"),
    [
        (sj.from_linen, lambda: (nn.LSTMCell, D), ["flax.linen cell", "LSTMCell(64)"]),
        (sj.from_linen, lambda: (nnx.GRUCell(D, N, rngs=nnx.Rngs(0)), D), ["linen cell", "GRUCell", "sj.from_nnx"]),
        (sj.from_nnx, lambda: (nnx.GRUCell(D, N, rngs=nnx.Rngs(0)),), ["already built", "GRUCell", "params_from"]),
        (sj.from_nnx, lambda: (nn.GRUCell(N),), ["GRUCell", "sj.from_linen"]),
        (sj.from_equinox, lambda: (eqx.nn.GRUCell(D, N, key=jax.random.key(0)),), ["already built", "params_from"]),
        (sj.from_equinox, lambda: (42,), ["class", "42"]),
    ],
)
def test_an_object_of_the_wrong_kind_is_refused_at_once_in_one_line(adapter, wrong, parts):
    with raises(TypeError, "expected", *parts):
        adapter(*wrong())


@pytest.mark.parametrize("size", [(D, N + 1), (D + 1, N)])
def test_the_weights_of_a_module_of_another_size_are_refused_before_anything_runs(size, key):
    with raises(ValueError, "expected", "GRUCell"):
        sj.from_nnx(nnx.GRUCell, D, N).params_from(nnx.GRUCell(*size, rngs=nnx.Rngs(0)))
    with raises(ValueError, "expected", "GRUCell"):
        sj.from_equinox(eqx.nn.GRUCell, D, N).params_from(eqx.nn.GRUCell(*size, key=key))


NAMES = {
    "linen-lstm": ["c", "h"],
    "linen-gru": ["h"],
    "nnx-lstm": ["c", "h"],
    "nnx-simple": ["h"],
    "equinox-lstm": ["h", "c"],
    "equinox-gru": ["h"],
    "user": ["state"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_fields_of_a_state_have_the_names_of_the_equations(name, key):
    cell, names = EVERY[name], NAMES[name]
    assert list(sj.analysis.state_parts(cell, cell.init(key))) == names
    learned = sj.LearnedState(cell)
    assert list(sj.analysis.state_parts(learned, learned.init(key))) == names
    both = sj.stack([sj.LSTM(D, D), learned])
    expected = ["0.h", "0.c", *(f"1.{name}" if name != "state" else "1" for name in names)]
    assert list(sj.analysis.state_parts(both, both.init(key))) == expected


def test_c_is_the_field_that_the_forget_gate_of_linen_multiplies(key):
    cell = EVERY["linen-lstm"]
    params = jax.tree.map(jnp.zeros_like, cell.init(key))  # every gate is 1/2
    found = sj.analysis.step_jacobians(cell, params, jnp.ones((1, 2, D)))
    np.testing.assert_allclose(found.block("c", "c")[0, 0], 0.5 * np.eye(4), atol=1e-6)
    np.testing.assert_allclose(found.block("c", "h"), 0)


def test_names_that_do_not_fit_the_state_are_not_used():
    class Wrong:
        state_names = "h"

    assert names_of_state(Wrong(), (jnp.zeros(1), jnp.zeros(2))) == ["0", "1"]
    Wrong.state_names = ("a",)
    assert names_of_state(Wrong(), (jnp.zeros(1), jnp.zeros(2))) == ["a", "1"]
