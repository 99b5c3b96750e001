"""Weights of other libraries as our cells and back: the same outputs, and the same bits of what is not rounded."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from hypothesis import given, settings
from hypothesis import strategies as st

import seqjax as sj

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SIZES = [(4, 4), (2, 5), (3, 1), (1, 3)]  # d = n first: there, the shapes do not show a transposed matrix
BATCH, TIME = 2, 5
GRU_BEFORE = partial(sj.GRU, reset="before")


class Way(NamedTuple):
    """One kind of layer of a library, as functions of its weights in the library's own layout."""

    shapes: Any  # (d, n) to a tree of shapes
    run: Any  # (weights, xs) to the library's own outputs (batch, time, n)
    read: Any  # weights to (cell, params)
    write: Any  # (cell, params) to weights
    cell: Any  # (d, n, dtype=) to our cell


def numbers(shape, dtype, seed):
    """Numbers of order one, the biases too: zeros would hide where they go."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def library(name):
    """A library, or the test is skipped."""
    return pytest.importorskip(name, reason=f"{name} is not installed: its parity is measured where it is")


def is_shape(part):
    return isinstance(part, tuple) and all(isinstance(size, int) for size in part)


def drawn(shapes, dtype, seed=0):
    leaves, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    return jax.tree.unflatten(structure, [numbers(leaf, dtype, [seed, j]) for j, leaf in enumerate(leaves)])


def drawn_params(cell, dtype, seed=0):
    """Random parameters of our cell."""
    like = jax.eval_shape(cell.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(like)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=leaf.shape), dtype) for leaf in leaves])


def assert_bits(got, expected):
    """The same tree, shapes, dtypes and bits, the signs of zeros and the bits of NaN included."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def assert_close(got, expected, dtype):
    scale = max(1, abs(expected).max())  # ReLU has no bound
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@contextlib.contextmanager
def lenient():
    """JAX and warnings as users have them: other libraries rely on promotion, and warn of their own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outputs_agree(way, d, n, dtype, seed=0):
    """The library's outputs with random weights are those of the cell that is made from them."""
    weights, xs = drawn(way.shapes(d, n), dtype, seed), numbers((BATCH, TIME, d), dtype, 99)
    with jax.enable_x64(dtype == "float64"):
        cell, params = way.read(weights)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(cell.init, jax.random.key(0)))
        _, outputs = sj.unroll(cell, params, jnp.asarray(xs))
        with lenient():
            expected = np.asarray(way.run(weights, xs))
        assert_close(outputs, expected, dtype)


def round_trip(way, d, n, dtype, exact=True):
    """Random parameters of ours give their outputs in the library, and come back as the same bits."""
    with jax.enable_x64(dtype == "float64"):
        cell = way.cell(d, n, dtype=dtype)
        params, xs = drawn_params(cell, dtype), numbers((BATCH, TIME, d), dtype, 99)
        written = way.write(cell, params)
        again, back = way.read(written)
        if exact:
            assert again == cell
            assert_bits(back, params)
        with lenient():
            theirs = np.asarray(way.run(written, xs))
        assert_close(sj.unroll(cell, params, jnp.asarray(xs))[1], theirs, dtype)


def every(kinds):
    """Kinds, dtypes and sizes; conftest leaves all but the first case to the thorough tests."""
    precisions = [("float64", size) for size in SIZES] + [("float32", size) for size in SIZES[:2]]
    cases = [(kind, dtype, *size) for dtype, size in precisions for kind in kinds]
    return pytest.mark.parametrize(("kind", "dtype", "d", "n"), cases)


TORCH = {"gru": ("GRU", 3, sj.GRU), "lstm": ("LSTM", 4, sj.LSTM), "tanh": ("RNN", 1, sj.VanillaRNN)}
TORCH |= {"relu": ("RNN", 1, partial(sj.VanillaRNN, activation="relu"))}


def torch_shapes(blocks, d, n, layers=1, bias=True):
    shapes = {}
    for layer in range(layers):
        shapes |= {f"weight_ih_l{layer}": (blocks * n, n if layer else d), f"weight_hh_l{layer}": (blocks * n, n)}
        shapes |= {f"bias_{part}_l{layer}": (blocks * n,) for part in ("ih", "hh")} if bias else {}
    return shapes


def torch_module(name, weights, **options):
    torch = library("torch")
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in weights.items()}
    layers = 1 + max(int(key.rpartition("_l")[2]) for key in weights)
    d, n = weights["weight_ih_l0"].shape[1], weights["weight_hh_l0"].shape[1]
    module = getattr(torch.nn, name)(d, n, layers, batch_first=True, dtype=tensors["weight_ih_l0"].dtype, **options)
    module.load_state_dict(tensors)
    return module


def torch_way(kind, layers=1, bias=True):
    name, blocks, ours = TORCH[kind]
    options = {"nonlinearity": "relu"} if kind == "relu" else {}

    def run(weights, xs):
        torch = library("torch")
        module = torch_module(name, weights, bias=bias, **options)
        return module(torch.from_numpy(xs))[0].detach().numpy()

    def cell(d, n, dtype):
        cells = [ours(n if layer else d, n, dtype=dtype) for layer in range(layers)]
        return sj.stack(cells) if layers > 1 else cells[0]

    shapes = partial(torch_shapes, blocks, layers=layers, bias=bias)
    return Way(shapes, run, partial(sj.from_torch, **options), partial(sj.to_torch, bias=bias), cell)


@every(TORCH)
def test_the_weights_of_torch_give_the_outputs_of_torch(kind, dtype, d, n):
    outputs_agree(torch_way(kind), d, n, dtype)


@every(TORCH)
def test_our_parameters_give_our_outputs_in_torch_and_come_back_as_the_same_bits(kind, dtype, d, n):
    round_trip(torch_way(kind), d, n, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", TORCH)
@settings(max_examples=3)
@given(sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(2, 3)), seed=st.integers(0, 99))
def test_layers_of_torch_are_a_stack(kind, dtype, sizes, seed):
    d, n, layers = sizes
    outputs_agree(torch_way(kind, layers), d, n, dtype, seed)
    round_trip(torch_way(kind, layers), d, n, dtype)


@pytest.mark.parametrize("kind", TORCH)
def test_a_layer_of_torch_without_biases_has_zeros_and_goes_back_without_them(kind):
    way, weights = torch_way(kind, bias=False), drawn(torch_shapes(TORCH[kind][1], 2, 3, bias=False), "float32")
    outputs_agree(way, 2, 3, "float32")
    cell, params = way.read(weights)
    assert not any(np.any(b) for b in params[2:])
    assert_bits(sj.to_torch(cell, params, bias=False), weights)
    with raises(ValueError, "expected b_h = 0 in layer 0", "got up to 1", "leave out bias=False"):
        sj.to_torch(cell, params._replace(b_h=params.b_h.at[0].set(1)), bias=False)


def test_the_matrices_of_torch_come_back_as_the_same_bits_and_the_biases_as_their_sum():
    weights = drawn(torch_shapes(3, 2, 4, layers=2), "float32")
    back = sj.to_torch(*sj.from_torch(weights))
    assert back.keys() == weights.keys()
    matrices = [name for name in weights if name.startswith("weight")]
    assert_bits([back[name] for name in matrices], [weights[name] for name in matrices])
    for layer in (0, 1):
        (b_ih, b_hh), (got, rest) = ([w[f"bias_{part}_l{layer}"] for part in ("ih", "hh")] for w in (weights, back))
        assert_bits(got, np.concatenate([(b_ih + b_hh)[:8], b_ih[8:]]))
        assert_bits(rest, np.concatenate([np.zeros(8, "float32"), b_hh[8:]]))  # b_hn is not part of the sum


def test_where_one_bias_is_zero_the_sum_has_the_bits_of_the_other():
    special = np.array([-0.0, 0.0, np.nan, -np.inf, 1e-45, 3.0, -0.0, 7.0], "float32")
    weights = drawn(torch_shapes(4, 1, 2), "float32") | {"bias_ih_l0": special, "bias_hh_l0": np.zeros(8, "float32")}
    assert_bits(sj.from_torch(weights)[1].b_h, special)
    special = np.where(special == 0, np.float32(0), special)  # 0 + -0 is 0
    assert_bits(sj.from_torch(weights | {"bias_hh_l0": special, "bias_ih_l0": np.zeros(8, "float32")})[1].b_h, special)


class Sources:
    """The same LSTM of two layers as every kind of source, inside a larger model of torch."""

    def __init__(self, path):
        torch = library("torch")
        self.weights = drawn(torch_shapes(4, 3, 4, layers=2), "float32")
        self.layer = torch_module("LSTM", self.weights)
        self.model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"rnn": self.layer})})
        self.model["head"] = torch.nn.Linear(4, 2)
        self.path, self.torch = path, torch

    def file(self, content, name="weights.pt"):
        self.torch.save(content, self.path / name)
        return self.path / name

    def safetensors(self, content):
        pytest.importorskip("safetensors.torch").save_file(content, self.path / "weights.safetensors")
        return str(self.path / "weights.safetensors")


SOURCES = {
    "module": lambda s: s.layer,
    "model": lambda s: s.model,
    "tensors": lambda s: s.layer.state_dict(),
    "parameters": lambda s: dict(s.layer.named_parameters()),
    "arrays": lambda s: s.weights,
    "arrays of JAX": lambda s: jax.tree.map(jnp.asarray, s.weights),
    "state_dict of the model": lambda s: s.model.state_dict(),
    ".pt": lambda s: s.file(s.model.state_dict()),
    ".pth": lambda s: s.file(s.layer.state_dict(), "weights.pth"),
    "checkpoint": lambda s: s.file({"model": s.model.state_dict(), "optimizer": {"state": {}}, "epoch": 3}),
    ".safetensors": lambda s: s.safetensors(s.model.state_dict()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_torch_gives_the_same_bits(source, tmp_path):
    sources = Sources(tmp_path)
    expected = sj.from_torch(sources.weights)
    source = SOURCES[source](sources)
    cell, params = sj.from_torch(source)
    assert cell == expected[0]
    assert_bits(params, expected[1])
    if source is sources.model:
        for prefix in ("encoder.rnn", "encoder.rnn."):
            assert_bits(sj.from_torch(source, prefix=prefix)[1], params)
            assert_bits(sj.from_torch(source.state_dict(), prefix=prefix)[1], params)
            back = sj.to_torch(cell, params, prefix=prefix)
            assert set(back) < set(source.state_dict())


def test_the_module_decides_its_nonlinearity_and_its_dropout():
    torch = library("torch")
    relu, _ = sj.from_torch(torch.nn.RNN(2, 3, nonlinearity="relu"))
    assert relu.activation == "relu"
    module = torch.nn.LSTM(2, 3, num_layers=3, dropout=0.25, batch_first=True).eval()
    cell, params = sj.from_torch(module)
    ours = [sj.LSTM(2, 3), sj.Dropout(3, 0.25), sj.LSTM(3, 3), sj.Dropout(3, 0.25), sj.LSTM(3, 3)]
    assert cell == sj.stack(ours)
    xs = numbers((BATCH, TIME, 2), "float32", 1)
    expected = module(torch.from_numpy(xs))[0].detach().numpy()
    np.testing.assert_allclose(sj.unroll(cell, params, xs)[1], expected, atol=1e-5)
    assert sj.to_torch(cell, params).keys() == module.state_dict().keys()


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_of_torch_is_one_layer(name):
    torch = library("torch")
    module = getattr(torch.nn, name)(2, 3)
    cell, params = sj.from_torch(module)
    x = numbers((1, 2), "float32", 1)
    h = module(torch.from_numpy(x))
    h = h[0] if isinstance(h, tuple) else h
    np.testing.assert_allclose(
        cell.step(params, cell.initial_state(params), jnp.asarray(x[0]))[1], h[0].detach(), atol=1e-6
    )


def test_bfloat16_goes_through_float32_without_rounding():
    torch = library("torch")
    module = torch.nn.GRU(2, 3, dtype=torch.bfloat16)
    cell, params = sj.from_torch(module)
    assert cell == sj.GRU(2, 3, dtype="bfloat16")
    written = sj.to_torch(cell, params)
    fresh = torch.nn.GRU(2, 3, dtype=torch.bfloat16)
    fresh.load_state_dict({name: torch.from_numpy(array) for name, array in written.items()})
    assert_bits(sj.from_torch(fresh)[1], params)


def test_what_torch_changes_later_does_not_reach_the_parameters_nor_the_other_way():
    weights = drawn(torch_shapes(4, 2, 2), "float32")
    cell, params = sj.from_torch(weights)
    before = jax.tree.map(np.array, params)
    weights["weight_hh_l0"][...] = 0
    assert_bits(params, before)
    sj.to_torch(cell, params)["weight_hh_l0"][...] = 0
    assert_bits(params, before)


def test_a_gate_that_writes_is_the_negated_gate_that_keeps():
    way = torch_way("gru")._replace(cell=partial(sj.GRU, update="writes"))
    round_trip(way, 3, 4, "float32", exact=False)


KERAS = {"gru": (3, sj.GRU), "gru before": (3, partial(GRU_BEFORE, update="keeps")), "lstm": (4, sj.LSTM)}
KERAS |= {"tanh": (1, sj.VanillaRNN), "relu": (1, partial(sj.VanillaRNN, activation="relu"))}
KERAS |= {"linear": (1, partial(sj.VanillaRNN, activation="identity"))}


def keras_layer(kind, n, dtype="float32", **options):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = library("keras")
    options |= {"dtype": dtype, "return_sequences": True}
    if kind.startswith("gru"):
        return keras.layers.GRU(n, reset_after=kind == "gru", **options)
    if kind == "lstm":
        return keras.layers.LSTM(n, **options)
    return keras.layers.SimpleRNN(n, activation=kind, **options)


def keras_way(kind):
    blocks, ours = KERAS[kind]

    def shapes(d, n):
        return [(d, blocks * n), (n, blocks * n), (2, 3 * n) if kind == "gru" else (blocks * n,)]

    def run(weights, xs):
        layer = keras_layer(kind, weights[1].shape[0], xs.dtype.name)
        layer.build(xs.shape)
        layer.set_weights(weights)
        if kind not in ("relu", "linear"):
            layer.cell.activation = jnp.tanh  # that of Keras computes in float32, even in a layer of float64
        return np.asarray(layer(jnp.asarray(xs)))

    options = {} if kind in ("gru", "gru before", "lstm") else {"activation": kind}
    return Way(shapes, run, partial(sj.from_keras, **options), sj.to_keras, ours)


@every(KERAS)
def test_the_weights_of_keras_give_the_outputs_of_keras(kind, dtype, d, n):
    outputs_agree(keras_way(kind), d, n, dtype)


@every(KERAS)
def test_our_parameters_give_our_outputs_in_keras_and_come_back_as_the_same_bits(kind, dtype, d, n):
    round_trip(keras_way(kind), d, n, dtype)


@pytest.mark.parametrize("kind", KERAS)
def test_every_source_of_keras_gives_the_same_bits(kind):
    layer, way = keras_layer(kind, 4), keras_way(kind)
    with lenient():
        layer.build((BATCH, TIME, 3))
        weights = drawn(way.shapes(3, 4), "float32")
        layer.set_weights(weights)
        expected = way.read(weights)
        named = dict(zip(["kernel", "recurrent_kernel", "bias"], weights, strict=True))
        paths = {variable.path: variable for variable in layer.weights}
        for source in (layer, layer.cell):
            assert sj.from_keras(source)[0] == expected[0]
            assert_bits(sj.from_keras(source)[1], expected[1])
        for source in (layer.get_weights(), tuple(layer.weights), named, paths):
            assert way.read(source)[0] == expected[0]
            assert_bits(way.read(source)[1], expected[1])


def test_layers_of_keras_are_a_stack_and_stacked_cells_too():
    keras_layer("lstm", 1)
    import keras

    with lenient():
        layers = [keras_layer("lstm", 3), keras_layer("gru", 2)]
        network = keras.Sequential(layers)
        network.build((BATCH, TIME, 4))
        xs = numbers((BATCH, TIME, 4), "float32", 1)
        cell, params = sj.from_keras(layers)
        assert cell == sj.stack([sj.LSTM(4, 3), sj.GRU(3, 2)])
        np.testing.assert_allclose(sj.unroll(cell, params, xs)[1], network(xs), atol=1e-5)
        for layer, weights in zip(layers, sj.to_keras(cell, params), strict=True):
            layer.set_weights(weights)
        np.testing.assert_allclose(sj.unroll(cell, params, xs)[1], network(xs), atol=1e-5)
        stacked = keras.layers.RNN([keras.layers.LSTMCell(3), keras.layers.GRUCell(2, reset_after=False)])
        stacked.build((BATCH, TIME, 4))
        cell, params = sj.from_keras(stacked)
        np.testing.assert_allclose(sj.unroll(cell, params, xs)[1][:, -1], stacked(xs), atol=1e-5)


def test_layers_of_keras_without_a_bias():
    for kind in ("lstm", "gru", "gru before"):
        layer = keras_layer(kind, 3, use_bias=False)
        with lenient():
            layer.build((BATCH, TIME, 2))
            cell, params = sj.from_keras(layer)
            xs = numbers((BATCH, TIME, 2), "float32", 1)
            np.testing.assert_allclose(sj.unroll(cell, params, xs)[1], layer(xs), atol=1e-5)
            assert_bits(sj.to_keras(cell, params, bias=False), layer.get_weights())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"activation": "relu"}, ["tanh", "got relu and sigmoid", "wrap"]),
        ({"recurrent_activation": "hard_sigmoid"}, ["got tanh and hard_sigmoid"]),
        ({"go_backwards": True}, ["got go_backwards=True", "layer.get_weights()", "reverse=True"]),
    ],
)
def test_a_layer_of_keras_that_no_cell_of_ours_equals_is_refused(options, parts):
    layer = keras_layer("lstm", 3, **options)
    with lenient():
        layer.build((BATCH, TIME, 2))
        with raises(ValueError, "expected a layer", *parts):
            sj.from_keras(layer)


def test_other_objects_of_keras_are_refused():
    keras_layer("lstm", 3)
    import keras

    with lenient():
        both = keras.layers.Bidirectional(keras.layers.LSTM(3))
        for layer, kind, parts in (
            (keras.layers.LSTM(3), TypeError, ["got LSTM", "build it with its input shape"]),
            (keras.layers.Dense(3), TypeError, ["got Dense", "SimpleRNN, LSTM or GRU"]),
            (both, ValueError, ["Bidirectional", "layer.forward_layer", "reverse=True"]),
        ):
            with raises(kind, "expected", *parts):
                sj.from_keras(layer)


DENSE = {"lstm": ("ii if ig io", "hi hf hg ho"), "gru": ("ir iz in", "hr hz hn"), "tanh": ("i", "h")}
WITH_BIAS = {"lstm": "hi hf hg ho", "gru": "ir iz in hn", "tanh": "i"}
LINEN = {"gru": ("GRUCell", sj.GRU), "lstm": ("LSTMCell", sj.LSTM), "optimized lstm": ("OptimizedLSTMCell", sj.LSTM)}
LINEN |= {"tanh": ("SimpleCell", sj.VanillaRNN)}


def per_gate(kind, d, n):
    kind = kind.removeprefix("optimized ")
    x, h = (part.split() for part in DENSE[kind])
    shapes = {name: {"kernel": (d, n)} for name in x} | {name: {"kernel": (n, n)} for name in h}
    for name in WITH_BIAS[kind].split():
        shapes[name]["bias"] = (n,)
    return shapes


def linen_way(kind):
    from flax import linen

    name, ours = LINEN[kind]

    def run(weights, xs):
        n = jax.tree.leaves(weights)[0].shape[-1]
        module = linen.RNN(getattr(linen, name)(n, param_dtype=xs.dtype))
        return module.apply({"params": {"cell": weights["params"]}}, xs)

    read, write = sj.weights.from_linen, sj.weights.to_linen
    return Way(lambda d, n: {"params": per_gate(kind, d, n)}, run, read, write, ours)


@every(LINEN)
def test_the_variables_of_linen_give_the_outputs_of_linen(kind, dtype, d, n):
    outputs_agree(linen_way(kind), d, n, dtype)


@every(LINEN)
def test_our_parameters_give_our_outputs_in_linen_and_come_back_as_the_same_bits(kind, dtype, d, n):
    round_trip(linen_way(kind), d, n, dtype)


def test_the_variables_of_an_rnn_of_linen_and_a_list_of_them_are_read():
    from flax import linen

    weights = drawn(per_gate("lstm", 4, 4), "float32")
    expected = sj.weights.from_linen({"params": weights})
    for variables in (weights, {"params": {"cell": weights}}):
        assert_bits(sj.weights.from_linen(variables)[1], expected[1])
    both = [{"params": weights}, {"params": drawn(per_gate("gru", 4, 2), "float32")}]
    cell, params = sj.weights.from_linen(both)
    assert cell == sj.stack([sj.LSTM(4, 4), sj.GRU(4, 2)])
    assert_bits(sj.weights.to_linen(cell, params), jax.tree.map(jnp.asarray, both))
    relu = linen.SimpleCell(4, activation_fn=linen.relu)
    variables = drawn(per_gate("tanh", 4, 4), "float32")
    assert sj.weights.from_linen(variables, module=relu)[0].activation == "relu"


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("SimpleCell", {"residual": True}, ["residual"]),
        ("GRUCell", {"activation_fn": jax.nn.gelu}, ["got gelu"]),
        ("LSTMCell", {"gate_fn": jnp.tanh}, ["sigmoid in its gates", "got tanh and tanh"]),
    ],
)
def test_a_cell_of_flax_that_no_cell_of_ours_equals_is_refused(name, options, parts):
    from flax import linen, nnx

    with raises(ValueError, f"expected a cell {name} of flax", *parts):
        sj.weights.from_linen({}, module=getattr(linen, name)(3, **options))
    with raises(ValueError, f"expected a cell {name} of flax", *parts):
        sj.weights.from_nnx(getattr(nnx, name)(2, 3, rngs=nnx.Rngs(0), **options))


NNX = {"optimized lstm": ("OptimizedLSTMCell", 4, sj.LSTM), "gru": ("GRUCell", 3, sj.GRU)}
NNX |= {"lstm": ("LSTMCell", 4, sj.LSTM), "tanh": ("SimpleCell", 1, sj.VanillaRNN)}


def nnx_module(kind, weights, dtype):
    from flax import nnx

    names = ("ii", "hi") if kind == "lstm" else ("dense_i", "dense_h")
    d, n = (weights[name]["kernel"].shape[0] for name in names)
    module = getattr(nnx, NNX[kind][0])(d, n, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    nnx.update(module, jax.tree.map(jnp.asarray, weights))
    return module


def nnx_way(kind):
    from flax import nnx

    _, blocks, ours = NNX[kind]

    def shapes(d, n):
        if kind == "lstm":
            return {"if_" if name == "if" else name: layer for name, layer in per_gate(kind, d, n).items()}
        bias = {"bias": (blocks * n,)}
        i, h = {"kernel": (d, blocks * n)}, {"kernel": (n, blocks * n)}
        return {"dense_i": i, "dense_h": h | bias} if "lstm" in kind else {"dense_i": i | bias, "dense_h": h}

    def run(weights, xs):
        return nnx.RNN(nnx_module(kind, weights, xs.dtype))(xs)

    def write(cell, params):
        params = params._replace(b_hn=None) if kind == "gru" else params  # nnx has none
        return sj.weights.to_nnx(cell, params, optimized=kind.startswith("optimized"))

    return Way(shapes, run, sj.weights.from_nnx, write, ours)


@every(NNX)
def test_the_weights_of_nnx_give_the_outputs_of_nnx(kind, dtype, d, n):
    way = nnx_way(kind)
    outputs_agree(way, d, n, dtype)
    with jax.enable_x64(dtype == "float64"):
        weights = drawn(way.shapes(d, n), dtype)
        module = nnx_module(kind, weights, dtype)
        assert_bits(sj.weights.from_nnx(module), way.read(weights))


@every(["optimized lstm", "lstm", "tanh"])
def test_our_parameters_give_our_outputs_in_nnx_and_come_back_as_the_same_bits(kind, dtype, d, n):
    round_trip(nnx_way(kind), d, n, dtype)


def test_a_bias_that_the_gru_of_nnx_does_not_have_is_refused_by_name():
    weights = drawn(nnx_way("gru").shapes(2, 3), "float32")
    cell, params = sj.weights.from_nnx(weights)
    assert_bits(params.b_hn, jnp.zeros(3))
    assert_bits(sj.weights.to_nnx(cell, params), jax.tree.map(jnp.asarray, weights))
    with raises(ValueError, "expected b_hn = 0 in layer 0 for GRUCell of flax.nnx", "got up to 2"):
        sj.weights.to_nnx(cell, params._replace(b_hn=params.b_hn.at[1].set(-2)))


def test_the_state_and_the_rnn_of_nnx_are_read():
    from flax import nnx

    module = nnx.GRUCell(2, 3, rngs=nnx.Rngs(0))
    expected = sj.weights.from_nnx(module)
    for source in (nnx.RNN(module), nnx.state(module), nnx.to_pure_dict(nnx.state(module, nnx.Param))):
        assert_bits(sj.weights.from_nnx(source), expected)


HAIKU = {"lstm": sj.LSTM, "gru": GRU_BEFORE, "relu": partial(sj.VanillaRNN, activation="relu")}


def haiku_way(kind, double_bias=False):
    def shapes(d, n):
        if kind == "lstm":
            return {"lstm/linear": {"w": (d + n, 4 * n), "b": (4 * n,)}}
        if kind == "gru":
            return {"gru": {"w_i": (d, 3 * n), "w_h": (n, 3 * n), "b": (3 * n,)}}
        second = {"w": (n, n)} | ({"b": (n,)} if double_bias else {})
        return {"vanilla_rnn/linear": {"w": (d, n), "b": (n,)}, "vanilla_rnn/linear_1": second}

    def run(weights, xs):
        hk = library("haiku")
        core = {"lstm": hk.LSTM, "gru": hk.GRU, "relu": partial(hk.VanillaRNN, double_bias=double_bias)}[kind]
        n = next(iter(weights.values()))["b"].size // {"lstm": 4, "gru": 3, "relu": 1}[kind]

        def network(xs):
            module = core(n)
            state = jax.tree.map(lambda leaf: leaf.astype(xs.dtype), module.initial_state(xs.shape[0]))
            return hk.dynamic_unroll(module, xs.swapaxes(0, 1), state)[0].swapaxes(0, 1)

        return hk.without_apply_rng(hk.transform(network)).apply(weights, jnp.asarray(xs))

    return Way(shapes, run, sj.weights.from_haiku, sj.weights.to_haiku, HAIKU[kind])


@every(HAIKU)
def test_the_parameters_of_haiku_give_the_outputs_of_haiku(kind, dtype, d, n):
    outputs_agree(haiku_way(kind, double_bias=True), d, n, dtype)
    outputs_agree(haiku_way(kind), d, n, dtype)


@every(HAIKU)
def test_our_parameters_give_our_outputs_in_haiku(kind, dtype, d, n):
    round_trip(haiku_way(kind), d, n, dtype, exact=kind != "lstm")


def test_only_the_forget_bias_is_rounded_on_the_way_through_haiku():
    cell = sj.LSTM(2, 3)
    params = drawn_params(cell, "float32")
    _, back = sj.weights.from_haiku(sj.weights.to_haiku(cell, params))
    other = np.delete(np.arange(12), [3, 4, 5])
    assert_bits((back.W_xh, back.W_hh, back.b_h[other]), (params.W_xh, params.W_hh, params.b_h[other]))
    np.testing.assert_allclose(back.b_h, params.b_h, atol=1e-6)


def test_cores_of_haiku_are_found_by_name_and_stacked_in_the_given_order():
    first, second = (
        drawn(haiku_way("lstm").shapes(d, 3), "float32", seed)["lstm/linear"] for d, seed in ((2, 0), (3, 1))
    )
    params = {"net/~/lstm/linear": first, "net/~/core/linear": second, "net/~/mlp/linear": {"b": first["b"]}}
    alone = sj.weights.from_haiku({"lstm/linear": first})
    assert_bits(sj.weights.from_haiku(params), alone)
    cell, both = sj.weights.from_haiku(params, prefix=["net/~/lstm", "net/~/core"])
    assert cell == sj.stack([sj.LSTM(2, 3), sj.LSTM(3, 3)])
    assert_bits(both[0], alone[1])
    assert list(sj.weights.to_haiku(cell, both)) == ["lstm/linear", "lstm_1/linear"]
    assert list(sj.weights.to_haiku(cell, both, names=["a", "b"])) == ["a/linear", "b/linear"]
    with raises(ValueError, "expected one name for each of 2 cores", "got ['a']"):
        sj.weights.to_haiku(cell, both, names="a")
    with raises(ValueError, "expected the parameters of one core", "got lstm, lstm_1", "prefix"):
        sj.weights.from_haiku({"lstm/linear": first, "lstm_1/linear": second})


EQUINOX = {"gru": ("GRUCell", 3, sj.GRU), "lstm": ("LSTMCell", 4, sj.LSTM)}


def equinox_module(kind, weights, **options):
    eqx = library("equinox")
    d, n, dtype = weights["weight_ih"].shape[1], weights["weight_hh"].shape[1], weights["weight_hh"].dtype
    module = getattr(eqx.nn, EQUINOX[kind][0])(d, n, dtype=dtype, key=jax.random.key(0), **options)
    arrays = jax.tree.map(jnp.asarray, weights)
    return eqx.tree_at(lambda m: [getattr(m, name) for name in arrays], module, list(arrays.values()))


def equinox_way(kind):
    _, blocks, ours = EQUINOX[kind]

    def shapes(d, n):
        shapes = {"weight_ih": (blocks * n, d), "weight_hh": (blocks * n, n), "bias": (blocks * n,)}
        return shapes | ({"bias_n": (n,)} if kind == "gru" else {})

    def run(weights, xs):
        module = equinox_module(kind, weights)

        def step(state, x):
            state = module(x, state)
            return state, jax.tree.leaves(state)[0]

        zero = jnp.zeros(module.hidden_size, xs.dtype)
        return jax.vmap(lambda xs: jax.lax.scan(step, (zero, zero) if kind == "lstm" else zero, xs)[1])(xs)

    return Way(shapes, run, sj.weights.from_equinox, sj.weights.to_equinox, ours)


@every(EQUINOX)
def test_the_weights_of_equinox_give_the_outputs_of_equinox(kind, dtype, d, n):
    way = equinox_way(kind)
    outputs_agree(way, d, n, dtype)
    with jax.enable_x64(dtype == "float64"):
        weights = drawn(way.shapes(d, n), dtype)
        assert_bits(sj.weights.from_equinox(equinox_module(kind, weights)), way.read(weights))


@every(EQUINOX)
def test_our_parameters_give_our_outputs_in_equinox_and_come_back_as_the_same_bits(kind, dtype, d, n):
    round_trip(equinox_way(kind), d, n, dtype)


def test_a_cell_of_equinox_without_a_bias_and_a_list_of_cells():
    weights = drawn({"weight_ih": (9, 2), "weight_hh": (9, 3)}, "float32")
    cell, params = sj.weights.from_equinox(equinox_module("gru", weights, use_bias=False))
    assert_bits((params.b_h, params.b_hn), (jnp.zeros(9), jnp.zeros(3)))
    assert_bits(sj.weights.to_equinox(cell, params, bias=False), jax.tree.map(jnp.asarray, weights))
    both = [weights, drawn(equinox_way("lstm").shapes(3, 2), "float32")]
    cell, params = sj.weights.from_equinox(both)
    assert cell == sj.stack([sj.GRU(2, 3), sj.LSTM(3, 2)])
    assert [set(arrays) for arrays in sj.weights.to_equinox(cell, params)][1] == set(both[1])


@pytest.mark.parametrize(
    ("name", "reset", "update"),
    [
        ("keras", "after", "writes"),
        ("keras", "before", "writes"),
        ("linen", "after", "writes"),
        ("nnx", "after", "writes"),
        ("equinox", "after", "writes"),
        ("haiku", "before", "keeps"),
    ],
)
def test_every_library_takes_a_gate_with_the_other_meaning_negated(name, reset, update):
    cell = sj.GRU(3, 4, reset, update)
    params = drawn_params(cell, "float32")
    params = params._replace(b_hn=None) if name == "nnx" else params
    written = getattr(sj.weights, f"to_{name}")(cell, params)
    other, back = getattr(sj.weights, f"from_{name}")(written)
    assert (other.reset, other.update) == (reset, "writes" if update == "keeps" else "keeps")
    xs = numbers((BATCH, TIME, 3), "float32", 1)
    assert_close(sj.unroll(other, back, xs)[1], np.asarray(sj.unroll(cell, params, xs)[1]), "float32")


LSTM = torch_shapes(4, 3, 5)


def changed(shapes=LSTM, dtype="float32", drop=(), **changes):
    """A state_dict with entries left out, added or replaced."""
    weights = drawn({name: shape for name, shape in shapes.items() if name not in drop}, dtype)
    return weights | {name: drawn(value, dtype) if is_shape(value) else value for name, value in changes.items()}


REVERSED = {f"{name}_reverse": shape for name, shape in LSTM.items()}
TWO = {f"a.{name}": shape for name, shape in LSTM.items()} | {f"b.{name}": shape for name, shape in LSTM.items()}


@pytest.mark.parametrize(
    ("weights", "options", "parts"),
    [
        # Every difference of names in one message, a renamed one with its name.
        (
            changed(drop=["bias_hh_l0", "weight_ih_l0"], weight_ih_10=(20, 3), gamma=(5,)),
            {},
            ["no weight_ih_l0, bias_hh_l0", "unknown weight_ih_10, gamma", "rename weight_ih_10 to weight_ih_l0"],
        ),
        (changed(drop=["bias_hh_l0"]), {}, ["no bias_hh_l0", "add bias_hh_l0"]),
        (changed(weight_ih_l1=(20, 5)), {}, ["no weight_hh_l1, bias_ih_l1, bias_hh_l1"]),
        (
            changed({"kernel": (3, 20), "recurrent_kernel": (5, 20)}),
            {},
            ["no weight_ih_l0, weight_hh_l0", "unknown kernel, recurrent_kernel"],
        ),
        # Every wrong shape in one message, with the expected mapping.
        (
            changed(weight_ih_l0=(3, 20), bias_hh_l0=(15,)),
            {},
            ["weight_ih_l0 (4n, d) = (20, 3)", "pass weight_ih_l0.T", "bias_hh_l0 (4n) = (20,)", "(15,)"],
        ),
        (changed(weight_hh_l0=(5, 20)), {}, ["weight_hh_l0 (4n, n)", "got (5, 20)", "transposed, pass weight_hh_l0.T"]),
        (
            changed(weight_ih_l0=(20, 7, 7)),
            {},
            ["n = 5 hidden units and d inputs", "(4n, d), got (20, 7, 7)"],
        ),
        (changed(weight_hh_l0=(11, 5)), {}, ["weight_hh_l0 (4n, n), (3n, n) or (n, n)", "got (11, 5)"]),
        (changed(), {"cell": "gru"}, ['cell="gru"', 'got the shapes of cell="lstm"']),
        (changed(), {"cell": "mgu"}, ['"lstm", "gru" or "rnn"', "'mgu'"]),
        (changed(bias_hh_l0=np.zeros(20)), {}, ["in one dtype", "float64 in bias_hh_l0"]),
        (changed(dtype="float64"), {}, ["float64", "jax_enable_x64", "convert the weights to float32"]),
        (changed(LSTM | REVERSED), {}, ["one direction", "weight_ih_l0_reverse", 'removesuffix("_reverse")']),
        (changed(weight_hr_l0=(2, 5)), {}, ["not projected", "got weight_hr_l0", "proj_size=0"]),
        (changed(TWO), {}, ["got layers at 'a', 'b'", "prefix='a'"]),
        (changed(TWO), {"prefix": "c"}, ["prefix='c'", "got layers at 'a', 'b'"]),
        (changed({}), {}, ["expected the weights of torch.nn.RNN"]),
    ],
)
def test_weights_that_are_no_layer_of_torch_are_refused_in_one_sentence(weights, options, parts):
    with raises(ValueError, "expected", ", got ", *parts):
        sj.from_torch(weights, **options)


@pytest.mark.parametrize(
    "wrong", [42, None, sj.LSTM(2, 3), {"weight_ih_l0": "text"}, changed(bias_hh_l0=np.zeros(20, int))]
)
def test_what_is_no_array_or_module_is_refused_by_its_type(wrong):
    with raises(TypeError, "expected", ", got "):
        sj.from_torch(wrong)


def test_the_fix_for_a_bidirectional_module_of_torch_is_each_direction_for_itself():
    torch = library("torch")
    module = torch.nn.GRU(3, 4, bidirectional=True, batch_first=True)
    with raises(ValueError, "got a bidirectional GRU", "reverse=True"):
        sj.from_torch(module)
    with raises(ValueError, "LSTM with proj_size=2"):
        sj.from_torch(torch.nn.LSTM(3, 4, proj_size=2))
    state_dict, xs = module.state_dict(), numbers((BATCH, TIME, 3), "float32", 1)
    backward = {k.removesuffix("_reverse"): v for k, v in state_dict.items() if k.endswith("_reverse")}
    forward = {k: v for k, v in state_dict.items() if not k.endswith("_reverse")}
    parts = [sj.unroll(*sj.from_torch(w), xs, reverse=w is backward)[1] for w in (forward, backward)]
    expected = module(torch.from_numpy(xs))[0].detach().numpy()
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), expected, atol=1e-5)


def test_files_that_hold_no_weights_of_torch_are_refused_in_one_sentence(tmp_path):
    torch = library("torch")
    torch.save(torch.nn.LSTM(2, 3), tmp_path / "module.pt")  # a pickled class is code
    (tmp_path / "text.pt").write_text("hello")
    for name, part in (("module.pt", "pickled code"), ("text.pt", "state_dict"), ("none.pth", "not there")):
        with raises(ValueError, "expected", str(tmp_path / name), part):
            sj.from_torch(tmp_path / name)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([(20, 3), (5, 20)], ["kernel (d, 4n) = (3, 20)", "got (20, 3)", "kernel.T"]),
        ([(20, 3), (20, 5), (20,)], ["recurrent_kernel (n, 4n)", "got (20, 5)", "transposed"]),
        ([(3, 20), (5, 20), (2, 20)], ["bias (4n) = (20,)", "got (2, 20)"]),
        ([(3, 15), (5, 15)], ["reset_after=True or reset_after=False"]),
        ({"kernel": (3, 20), "recurrent": (5, 20), "bias": (20,)}, ["rename recurrent to recurrent_kernel"]),
        ([(3, 20)], ["got 1 arrays", "layer.get_weights()"]),
    ],
)
def test_weights_that_are_no_layer_of_keras_are_refused_in_one_sentence(weights, parts):
    weights = drawn(weights, "float32")
    with raises(ValueError, "expected the weights of a recurrent layer of Keras", ", got ", *parts):
        sj.from_keras(weights)


def test_weights_that_are_no_cell_of_flax_haiku_or_equinox_are_refused_in_one_sentence():
    lstm = drawn(per_gate("lstm", 2, 3), "float32")
    for read, weights, parts in (
        (
            sj.weights.from_linen,
            {**lstm, "ii": {"kernel": lstm["ii"]["kernel"].T}},
            ["ii.kernel (d, n) = (2, 3)", "transposed"],
        ),
        (sj.weights.from_linen, {"params": {"Dense_0": {}}}, ["no ii.kernel", "hf.bias"]),
        (sj.weights.from_nnx, {"dense_i": {"kernel": lstm["hi"]["kernel"]}}, ["no dense_h.kernel, dense_i.bias"]),
        (sj.weights.from_haiku, {"mlp/linear": lstm["hi"]}, ["one core of haiku", "got the modules mlp/linear"]),
        (sj.weights.from_haiku, {"lstm/linear": {"w": lstm["hi"]["kernel"]}}, ["no linear/b"]),
        (sj.weights.from_equinox, {"weight_ih": lstm["hi"]["kernel"]}, ["no weight_hh, bias"]),
        (sj.weights.from_equinox, {"weight_hh": lstm["hi"]["kernel"]}, ["an LSTMCell or a GRUCell"]),
    ):
        with raises(ValueError, "expected", ", got ", *parts):
            read(weights)


@pytest.mark.parametrize("name", ["torch", "keras", "linen", "nnx", "haiku", "equinox"])
@pytest.mark.parametrize("wrong", [42, None, "text"])
def test_what_holds_no_weights_is_refused_by_every_library(name, wrong):
    with raises((TypeError, ValueError), "expected", ", got "):
        getattr(sj.weights, f"from_{name}")(wrong)


class Doubled(sj.LSTM):
    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return state, 2 * output


@pytest.mark.parametrize(
    ("write", "cell", "parts"),
    [
        (sj.to_torch, sj.GRU(2, 3, reset="before"), ['reset="after"', 'got reset="before"']),
        (sj.to_torch, sj.VanillaRNN(2, 3, activation="identity"), ["tanh or relu", "got identity"]),
        (sj.to_torch, sj.stack([sj.LSTM(2, 3), sj.LSTM(3, 4)]), ["one kind and hidden size", "lstm of 3, lstm of 4"]),
        (sj.to_torch, sj.Dropout(3), ["at least one recurrent layer"]),
        (sj.weights.to_linen, sj.GRU(2, 3, reset="before"), ["flax.linen"]),
        (sj.weights.to_haiku, sj.GRU(2, 3), ['reset="before"', 'got reset="after"']),
        (sj.weights.to_haiku, sj.VanillaRNN(2, 3), ["relu for haiku", "got tanh"]),
        (sj.weights.to_equinox, sj.VanillaRNN(2, 3), ["no such cell"]),
        (sj.to_torch, sj.LearnedState(sj.LSTM(2, 3)), ["got LearnedState", "params.cell"]),
        (sj.to_keras, sj.stack([sj.Embedding(9, 2), sj.LSTM(2, 3)]), ["got Embedding", "the layers above it"]),
        (sj.to_torch, Doubled(2, 3), ["got Doubled"]),
    ],
)
def test_a_cell_that_a_library_does_not_have_is_refused_in_one_sentence(write, cell, parts, key):
    with raises((ValueError, TypeError), "expected", ", got ", *parts):
        write(cell, cell.init(key))


def test_the_other_libraries_are_not_imported_for_arrays_and_the_message_for_a_missing_one_says_so(tmp_path):
    program = """
import sys, numpy as np, seqjax as sj
sj.from_torch({"weight_ih_l0": np.ones((4, 1), "float32"), "weight_hh_l0": np.ones((4, 1), "float32")})
cell, params = sj.from_keras([np.ones((1, 4), "float32"), np.ones((1, 4), "float32"), np.ones(4, "float32")])
for library in ("linen", "nnx", "haiku", "equinox"):
    read, write = (getattr(sj.weights, f"{way}_{library}") for way in ("from", "to"))
    read(write(cell, params))
print(*sorted({"torch", "keras", "haiku", "equinox", "safetensors", "orbax"} & set(sys.modules)))
sys.modules |= {"torch": None, "safetensors": None, "safetensors.numpy": None}
open(sys.argv[1], "w").close()
for path in (sys.argv[1], "a.safetensors"):
    try:
        sj.from_torch(path)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.pt"], capture_output=True, text=True, check=True
    )
    imported, *messages = done.stdout.splitlines()
    assert imported == ""
    for message, fix in zip(messages, ["pip install torch", 'pip install "seqjax[files]"'], strict=True):
        assert fix in message


def test_all_arrays_that_are_no_numbers_are_named_at_once():
    weights = drawn(torch_shapes(4, 2, 3), "float32")
    weights |= {"weight_ih_l0": weights["weight_ih_l0"].astype(int), "bias_hh_l0": weights["bias_hh_l0"].astype(bool)}
    with raises(
        TypeError, "arrays of floating-point numbers as bias_hh_l0, weight_ih_l0, got bool (12,), int64 (12, 2)"
    ):
        sj.from_torch(weights)
