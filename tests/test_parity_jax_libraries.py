"""flax linen, flax nnx and equinox, by hand and through the adapters; and haiku, by its formulae."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import seqjax as sj

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SIZES = st.tuples(*[st.integers(1, 4)] * 4)  # batch, time, features, hidden units


def random_like(tree, seed=0):
    """Every array anew, biases too: at its initialisation a library's zero biases would hide where they go."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def by_layer(params, kind, x_names, h_names):
    """The kernels of named dense layers above one another, as rows, and likewise their biases, where they have any."""
    layers = params.get("params", params)
    x, h = ([layers[name] for name in names.split()] for names in (x_names, h_names))
    kernels = (np.concatenate([layer["kernel"].T for layer in part]) for part in (x, h))
    biases = ([layer["bias"] for layer in part if "bias" in layer] for part in (x, h))
    return kind(*kernels, *(np.concatenate(bias) for bias in biases if bias))


def equinox_weights(module):
    biases = [module.bias, module.bias_n] if isinstance(module, eqx.nn.GRUCell) else [module.bias]
    return (sj.LSTMParams, sj.GRUParams)[len(biases) - 1](module.weight_ih, module.weight_hh, *biases)


simple = partial(by_layer, kind=sj.VanillaParams, x_names="i", h_names="h")
lstm = partial(by_layer, kind=sj.LSTMParams, x_names="ii if ig io", h_names="hi hf hg ho")
gru = partial(by_layer, kind=sj.GRUParams, x_names="ir iz in", h_names="hr hz hn")
fused = partial(by_layer, x_names="dense_i", h_names="dense_h")
KINDS = {  # name: (the library's cell, ours, its parameters as ours)
    "linen-simple": (nn.SimpleCell, sj.VanillaRNN, simple),
    "linen-lstm": (nn.LSTMCell, sj.LSTM, lstm),
    "linen-optimized-lstm": (nn.OptimizedLSTMCell, sj.LSTM, lstm),
    "linen-gru": (nn.GRUCell, sj.GRU, gru),
    "nnx-simple": (nnx.SimpleCell, sj.VanillaRNN, partial(fused, kind=sj.VanillaParams)),
    "nnx-lstm": (nnx.LSTMCell, sj.LSTM, partial(lstm, x_names="ii if_ ig io")),
    "nnx-optimized-lstm": (nnx.OptimizedLSTMCell, sj.LSTM, partial(fused, kind=sj.LSTMParams)),
    "nnx-gru": (nnx.GRUCell, sj.GRU, partial(fused, kind=sj.GRUParams)),  # it has no b_hn
    "equinox-lstm": (eqx.nn.LSTMCell, sj.LSTM, equinox_weights),
    "equinox-gru": (eqx.nn.GRUCell, sj.GRU, equinox_weights),
}


def library(name, d, n, dtype, seed=0):
    """A library's cell with random weights: its adapter, its parameters, and its own unrolling of them."""
    kind, dtype = KINDS[name][0], jnp.dtype(dtype)
    if name.startswith("linen"):
        cell = sj.from_linen(kind(n, param_dtype=dtype), d)
        params = random_like(jax.eval_shape(cell.init, jax.random.key(0)), seed)

        def unroll(params, xs, state, **options):
            rnn = nn.RNN(kind(n, param_dtype=dtype), return_carry=True)
            return rnn.apply({"params": {"cell": params["params"]}}, xs, initial_carry=state, **options)

    elif name.startswith("nnx"):
        options = {"dtype": dtype, "param_dtype": dtype}
        cell = sj.from_nnx(kind, d, n, **options)
        module = nnx.eval_shape(lambda: kind(d, n, **options, rngs=nnx.Rngs(0)))
        nnx.update(module, random_like(nnx.state(module, nnx.Param), seed))
        params = cell.params_from(module)

        def unroll(_, xs, state, **options):
            copy = nnx.clone(module)  # a module must not cross into a compiled function
            return nnx.RNN(copy, return_carry=True)(xs, initial_carry=state, **options)

    else:
        cell = sj.from_equinox(kind, d, n, dtype=dtype)
        module = random_like(eqx.filter_eval_shape(partial(kind, d, n, dtype=dtype), key=jax.random.key(0)), seed)
        params = cell.params_from(module)

        def unroll(_, xs, state):
            def step(state, x):
                return (state := module(x, state)), jax.tree.leaves(state)[0]

            return jax.vmap(lambda state, xs: jax.lax.scan(step, state, xs))(state, xs)

    return cell, params, unroll


def as_our_state(name, state):
    if "lstm" in name:
        h, c = state if name.startswith("equinox") else reversed(state)  # flax carries (c, h)
        return sj.LSTMState(h, c)
    return (sj.GRUState if "gru" in name else sj.VanillaState)(state)


def assert_close(got, expected, dtype):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=2)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_a_library_its_adapter_and_our_cell_with_its_weights_agree(name, dtype, sizes, seed):
    batch, time, d, n = sizes
    with jax.enable_x64(dtype == "float64"):
        cell, params, unroll = library(name, d, n, dtype, seed)
        xs = random_like(jnp.zeros((batch, time, d), dtype), seed + 1)
        state = random_like(jax.tree.map(lambda leaf: jnp.zeros((batch, n), dtype), cell.initial_state(params)), seed)
        ours, our_params = KINDS[name][1](d, n, dtype=dtype), jax.tree.map(jnp.asarray, KINDS[name][2](params))

        @jax.jit  # once for all three, since compiling is what takes the time
        def run(params, our_params, xs, state):
            adapted = sj.unroll(cell, params, xs, state=state)
            our_state = as_our_state(name, state)
            return unroll(params, xs, state), adapted, sj.unroll(ours, our_params, xs, state=our_state)

        (final, outputs), adapted, ours_run = run(params, our_params, xs, state)
        assert_close(adapted, (final, outputs), dtype)
        assert_close(ours_run, (as_our_state(name, final), outputs), dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["linen-lstm", "nnx-gru"])
def test_a_mask_equals_sequence_lengths_of_flax_and_goes_on_to_length_zero(name, reverse, x64):
    cell, params, unroll = library(name, 2, 3, "float64")
    xs, lengths = random_like(jnp.zeros((4, 5, 2))), np.array([5, 3, 1, 0])
    state = random_like(jax.tree.map(lambda leaf: jnp.zeros((4, 3)), cell.initial_state(params)), 1)
    final, outputs = unroll(params, xs, state, seq_lengths=jnp.array(lengths), reverse=reverse, keep_order=reverse)
    ours = KINDS[name][1](2, 3, dtype="float64"), jax.tree.map(jnp.asarray, KINDS[name][2](params))
    mask, state = sj.length_mask(lengths, 5), as_our_state(name, state)
    padded = jnp.where(mask[..., None], xs, jnp.nan)  # a backward pass that began on padding would carry it along
    our_final, our_outputs = sj.unroll(*ours, padded, state=state, mask=mask, reverse=reverse)
    assert_close(our_outputs, np.where(mask[..., None], outputs, 0), "float64")
    # In flax a length of 0 selects the last padded step; nothing was read, so the state before is the state after.
    expected = jax.tree.map(lambda after, before: after.at[3].set(before[3]), as_our_state(name, final), state)
    assert_close(our_final, expected, "float64")


sigmoid = scipy.special.expit


def haiku_lstm(W, b, x, h, c):
    i, g, f, o = np.split(np.concatenate([x, h]) @ W + b, 4)
    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def haiku_gru(w_i, w_h, b, x, h):
    n = len(h)
    z, r = np.split(sigmoid(x @ w_i[:, : 2 * n] + h @ w_h[:, : 2 * n] + b[: 2 * n]), 2)
    a = np.tanh(x @ w_i[:, 2 * n :] + (r * h) @ w_h[:, 2 * n :] + b[2 * n :])
    return (1 - z) * h + z * a


@settings(max_examples=3)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_haiku_s_formulae_are_ours_with_its_blocks_put_in_our_order(sizes, seed):
    _, time, d, n = sizes
    rng = np.random.default_rng(seed)
    x, h, c = rng.normal(size=(time, d)), rng.normal(size=n), rng.normal(size=n)
    W, b = rng.normal(size=(d + n, 4 * n)), rng.normal(size=4 * n)
    w_i, w_h, b_3 = rng.normal(size=(d, 3 * n)), rng.normal(size=(n, 3 * n)), rng.normal(size=3 * n)

    def reordered(array, *order):  # columns by gate, ours as rows
        blocks = np.split(array.T, len(order))
        return np.concatenate([blocks[j] for j in order])

    bias = reordered(b, 0, 2, 1, 3)
    bias[n : 2 * n] += 1  # the forget bias that haiku adds at run time
    lstm = sj.LSTMParams(reordered(W[:d], 0, 2, 1, 3), reordered(W[d:], 0, 2, 1, 3), bias)
    gru = sj.GRUParams(reordered(w_i, 1, 0, 2), reordered(w_h, 1, 0, 2), reordered(b_3, 1, 0, 2))
    vanilla = sj.VanillaParams(w_i[:, :n].T, w_h[:, :n].T, b_3[:n])
    their_h, their_c, gru_h, relu_h = h, c, h, h
    for t in range(time):
        their_h, their_c = haiku_lstm(W, b, x[t], their_h, their_c)
        gru_h = haiku_gru(w_i, w_h, b_3, x[t], gru_h)
        relu_h = np.maximum(x[t] @ w_i[:, :n] + relu_h @ w_h[:, :n] + b_3[:n], 0)
    with jax.enable_x64(True):
        for cell, params, state, expected in (
            (sj.LSTM(d, n, dtype="float64"), lstm, sj.LSTMState(h, c), (their_h, their_c)),
            (sj.GRU(d, n, reset="before", dtype="float64"), gru, sj.GRUState(h), (gru_h,)),
            (sj.VanillaRNN(d, n, activation="relu", dtype="float64"), vanilla, sj.VanillaState(h), (relu_h,)),
        ):
            state = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
            final, _ = sj.unroll(cell, jax.tree.map(jnp.asarray, params), jnp.asarray(x)[None], state=state)
            assert_close(final, type(state)(*(leaf[None] for leaf in expected)), "float64")


@pytest.mark.parametrize(("cell", "gates", "fused"), [(sj.LSTM(1, 128), 4, 0.52), (sj.GRU(1, 128), 3, 0.60)])
def test_each_gate_begins_orthogonal_where_one_fused_draw_does_not(cell, gates, fused):
    for block in np.split(np.asarray(cell.init(jax.random.key(0)).W_hh), gates):
        np.testing.assert_allclose(block @ block.T, np.eye(128), atol=1e-5)
    draw, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(gates * 128, 128)))
    np.testing.assert_allclose(draw.T @ draw, np.eye(128), atol=1e-12)  # orthogonal as a whole, but not gate by gate
    assert max(abs(np.linalg.eigvals(draw[:128]))) == pytest.approx(fused, abs=0.05)
