"""A cell as a layer of flax.linen, flax.nnx and equinox: the bits of `unroll`, and the training loop of the library."""

from __future__ import annotations

import io
import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cells import OURS, D, Leaky, N
from errors import raises
from flax import nnx, serialization
from flax.training.train_state import TrainState
from oracles import BATCH, MASK, RESET, TIME, drawn_states

import seqjax as sj

XS = jax.random.normal(jax.random.key(1), (BATCH, TIME, D))
TARGETS = jnp.cumsum(XS[..., :1], axis=1)
CELLS = {name: OURS[name] for name in ("lstm", "gru-after", "learned-stack")} | {"user": Leaky()}
LIBRARIES = ["linen", "nnx", "equinox"]


def layer_of(library, cell):
    """The parameters, the layer as a function of its weights and of the arguments of `unroll`, and the weights."""
    if library == "linen":
        layer = sj.as_linen(cell)
        variables = layer.init(jax.random.key(0), XS)
        return layer.params_from(variables), layer.apply, variables
    if library == "nnx":
        layer = sj.as_nnx(cell, rngs=nnx.Rngs(0))
        graph, weights = nnx.split(layer)
        return layer.params, lambda weights, *args, **options: nnx.merge(graph, weights)(*args, **options), weights
    layer = sj.as_equinox(cell, key=jax.random.key(0))
    return layer.params, type(layer).__call__, layer


def same_bits(got, expected):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_returns_the_bits_of_unroll_and_its_gradient(library, name):
    cell = CELLS[name]
    params, call, weights = layer_of(library, cell)
    same_bits(call(weights, XS), sj.unroll(cell, params, XS))
    options = {"mask": MASK, "reset": RESET, "reverse": True}
    state = drawn_states(cell, params)
    same_bits(
        jax.jit(lambda w: call(w, XS, state, **options))(weights), sj.unroll(cell, params, XS, state=state, **options)
    )

    def loss(run, weights):
        return (run(weights)[1] ** 2).sum()

    gradient = jax.jit(jax.grad(lambda w: loss(lambda w: call(w, XS), w)))(weights)
    expected = jax.jit(jax.grad(lambda p: loss(lambda p: sj.unroll(cell, p, XS), p)))(params)
    in_order = [sorted(jax.tree.leaves(tree), key=lambda leaf: repr(leaf.tolist())) for tree in (gradient, expected)]
    same_bits(*in_order)  # flax orders the leaves by their names


@pytest.mark.parametrize("library", LIBRARIES)
def test_parameters_are_drawn_from_the_key_of_the_library(library):
    params, *_ = layer_of(library, sj.LSTM(D, N))
    drawn = sj.LSTM(D, N).init(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(drawn)
    np.testing.assert_allclose(params.W_hh[:N] @ params.W_hh[:N].T, np.eye(N), atol=1e-5)  # orthogonal per gate


def mean_squares(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, xs):
        return nn.Dense(1)(sj.as_linen(sj.GRU(D, 8))(xs)[1])


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.recurrent, self.head = sj.as_nnx(sj.GRU(D, 8), rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.recurrent(xs)[1])


class EquinoxModel(eqx.Module):
    recurrent: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, key):
        self.recurrent, self.head = sj.as_equinox(sj.GRU(D, 8), key=key), eqx.nn.Linear(8, 1, key=key)

    def __call__(self, xs):
        return jax.vmap(jax.vmap(self.head))(self.recurrent(xs)[1])


def losses_of_linen():
    model = LinenModel()
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), XS)["params"], tx=optax.adam(1e-2)
    )

    @jax.jit
    def update(state):
        loss, grads = jax.value_and_grad(lambda p: mean_squares(state.apply_fn({"params": p}, XS)))(state.params)
        return state.apply_gradients(grads=grads), loss

    for _ in range(30):
        state, loss = update(state)
        yield loss


def losses_of_nnx():
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: mean_squares(model(XS)))(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(30):
        yield update(model, optimizer)


def losses_of_equinox():
    model, optimizer = EquinoxModel(jax.random.key(0)), optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def update(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda model: mean_squares(model(XS)))(model)
        changes, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, changes), state, loss

    for _ in range(30):
        model, state, loss = update(model, state)
        yield loss


@pytest.mark.parametrize("losses", [losses_of_linen, losses_of_nnx, losses_of_equinox])
def test_the_training_loop_of_the_library_lowers_a_loss(losses):
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # the layers of the libraries promote
        found = [float(loss) for loss in losses()]
    assert found[-1] < 0.7 * found[0]


def test_weights_survive_the_files_of_each_library():
    cell = OURS["learned-stack"]
    params, call, variables = layer_of("linen", cell)
    zeros = jax.tree.map(jnp.zeros_like, variables)
    same_bits(call(serialization.from_bytes(zeros, serialization.to_bytes(variables)), XS), sj.unroll(cell, params, XS))
    layer = sj.as_nnx(cell, rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(layer))
    other = sj.as_nnx(cell, rngs=nnx.Rngs(1))
    nnx.update(other, serialization.msgpack_restore(serialization.msgpack_serialize(serialization.to_state_dict(pure))))
    same_bits(other(XS), layer(XS))
    layer, file = sj.as_equinox(cell, key=jax.random.key(0)), io.BytesIO()
    eqx.tree_serialise_leaves(file, layer)
    file.seek(0)
    other = eqx.tree_deserialise_leaves(file, sj.as_equinox(cell, key=jax.random.key(1)))
    same_bits(other(XS), layer(XS))
    assert pickle.loads(pickle.dumps(sj.as_linen(cell))) == sj.as_linen(cell)


def test_an_ensemble_of_layers_is_that_of_their_cells():
    cell, keys = OURS["lstm"], jax.random.split(jax.random.key(2), 3)
    linen = sj.as_linen(cell)
    variables = jax.vmap(lambda key: linen.init(key, XS))(keys)
    runs = {
        "linen": (jax.vmap(lambda v: linen.apply(v, XS))(variables), linen.params_from(variables)),
    }
    layers = eqx.filter_vmap(lambda key: sj.as_equinox(cell, key=key))(keys)
    runs["equinox"] = eqx.filter_vmap(lambda layer: layer(XS))(layers), layers.params
    layers = nnx.vmap(lambda rngs: sj.as_nnx(cell, rngs=rngs))(nnx.Rngs(0).split(3))
    runs["nnx"] = nnx.vmap(lambda layer: layer(XS))(layers), layers.params
    for found, params in runs.values():
        same_bits(found, jax.vmap(lambda p: sj.unroll(cell, p, XS))(params))


def test_noise_comes_from_the_randomness_of_the_library():
    cell = sj.stack([sj.GRU(D, N), sj.Dropout(N, 0.5)])
    linen = sj.as_linen(cell)
    variables = linen.init(jax.random.key(0), XS)
    plain = linen.apply(variables, XS)[1]
    same_bits(plain, linen.apply(variables, XS)[1])
    first, again = (linen.apply(variables, XS, rngs={"dropout": jax.random.key(3)})[1] for _ in range(2))
    same_bits(first, again)
    layer, eqx_layer = sj.as_nnx(cell, rngs=nnx.Rngs(0)), sj.as_equinox(cell, key=jax.random.key(0))
    dropped = [first, layer(XS, rngs=nnx.Rngs(3))[1], eqx_layer(XS, key=jax.random.key(3))[1]]
    for outputs in dropped:
        assert 0.2 < float((outputs == 0).mean()) < 0.8
    for outputs in (plain, layer(XS)[1], eqx_layer(XS)[1]):
        assert float((outputs == 0).mean()) == 0


def test_something_that_is_no_cell_is_refused_at_once():
    for build in (sj.as_linen, lambda cell: sj.as_nnx(cell, rngs=nnx.Rngs(0)), lambda c: sj.as_equinox(c, key=None)):
        with raises(TypeError, "expected a cell, an object with the methods init, initial_state and step"):
            build(nn.LSTMCell(N))
