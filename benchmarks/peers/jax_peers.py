"""Every JAX library as a function from parameters and inputs (B, T, D) to outputs (B, T, H), as its users write it.

Each builder imports its library when it is called, so the others still run if a library is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.rows import Row, Weights, blocks

OURS = {"lstm": "ifgo", "gru": "rzn", "gru before": "rzn", "vanilla": "h", "relu": "h"}


class Peer(NamedTuple):
    """A library's network with the common weights."""

    params: Any
    unroll: Callable[[Any, jax.Array], jax.Array]
    recurrent: Callable[[Any], np.ndarray]  # parameters, or their gradient, to W_hh in seqjax's layout


def seqjax(kind: str, row: Row, w: Weights) -> Peer:
    import seqjax as sj

    cell, params = {
        "vanilla": (sj.VanillaRNN, sj.VanillaParams),
        "relu": (partial(sj.VanillaRNN, activation="relu"), sj.VanillaParams),
        "lstm": (sj.LSTM, sj.LSTMParams),
        "gru": (sj.GRU, sj.GRUParams),
        "gru before": (partial(sj.GRU, reset="before", update="writes"), sj.GRUParams),
    }[kind]
    cell = cell(row.features, row.hidden)
    params = params(*(w if kind == "gru" else w[:3]))
    return Peer(params, lambda params, xs: sj.unroll(cell, params, xs)[1], lambda params: params.W_hh)


def linen(kind: str, row: Row, w: Weights, optimized: bool = False) -> Peer:
    import flax.linen as nn

    lstm = nn.OptimizedLSTMCell if optimized else nn.LSTMCell
    cell, gates = {"vanilla": (nn.SimpleCell, [""]), "lstm": (lstm, "ifgo"), "gru": (nn.GRUCell, "rzn")}[kind]
    module = nn.RNN(cell(row.hidden))
    # flax puts the bias of an LSTM's gate into the recurrent layer, and that of the other cells into the input layer.
    layers = {f"i{gate}": {"kernel": W.T} for gate, W in zip(gates, np.split(w.W_xh, len(gates)), strict=True)}
    layers |= {f"h{gate}": {"kernel": W.T} for gate, W in zip(gates, np.split(w.W_hh, len(gates)), strict=True)}
    for gate, b in zip(gates, np.split(w.b_h, len(gates)), strict=True):
        layers[f"{'h' if kind == 'lstm' else 'i'}{gate}"]["bias"] = b
    if w.b_hn is not None:
        layers["hn"]["bias"] = w.b_hn

    def recurrent(params):
        return np.concatenate([params["params"]["cell"][f"h{gate}"]["kernel"].T for gate in gates])

    return Peer({"params": {"cell": layers}}, module.apply, recurrent)


def nnx(kind: str, row: Row, w: Weights) -> Peer:
    from flax import nnx

    cell = {"vanilla": nnx.SimpleCell, "lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}[kind]
    module = nnx.RNN(cell(row.features, row.hidden, rngs=nnx.Rngs(0)))
    structure, params, rest = nnx.split(module, nnx.Param, ...)
    bias = "dense_h" if kind == "lstm" else "dense_i"
    layers = {"dense_i": {"kernel": w.W_xh.T}, "dense_h": {"kernel": w.W_hh.T}}
    layers[bias]["bias"] = w.b_h
    nnx.replace_by_pure_dict(params, {"cell": layers})

    def unroll(params, xs):
        return nnx.merge(structure, params, rest, copy=True)(xs)  # a copy, because the call changes the RNN's key

    return Peer(params, unroll, lambda params: nnx.to_pure_dict(params)["cell"]["dense_h"]["kernel"].T)


def haiku(kind: str, row: Row, w: Weights) -> Peer:
    import haiku as hk

    cores = {"lstm": hk.LSTM, "gru before": hk.GRU, "relu": partial(hk.VanillaRNN, double_bias=False)}

    def network(xs):
        core = cores[kind](row.hidden)
        outputs, _ = hk.dynamic_unroll(core, xs.swapaxes(0, 1), core.initial_state(xs.shape[0]))
        return outputs.swapaxes(0, 1)

    unroll = hk.without_apply_rng(hk.transform(network)).apply
    if kind == "relu":
        params = {"vanilla_rnn/linear": {"w": w.W_xh.T, "b": w.b_h}, "vanilla_rnn/linear_1": {"w": w.W_hh.T}}
        return Peer(params, unroll, lambda params: params["vanilla_rnn/linear_1"]["w"].T)
    ours, theirs = OURS[kind], {"lstm": "igfo", "gru before": "zrn"}[kind]
    W_xh, W_hh, b = (blocks(part, theirs, ours) for part in w[:3])
    if kind == "gru before":
        params = {"gru": {"w_i": W_xh.T, "w_h": W_hh.T, "b": b}}
        return Peer(params, unroll, lambda params: blocks(params["gru"]["w_h"].T, ours, theirs))
    b[2 * row.hidden : 3 * row.hidden] -= 1  # haiku adds 1 to the forget gate at run time
    params = {"lstm/linear": {"w": np.concatenate([W_xh, W_hh], axis=1).T, "b": b}}
    return Peer(params, unroll, lambda params: blocks(params["lstm/linear"]["w"][row.features :].T, ours, theirs))


def equinox(kind: str, row: Row, w: Weights) -> Peer:
    import equinox as eqx

    cell = {"lstm": eqx.nn.LSTMCell, "gru": eqx.nn.GRUCell}[kind]
    module = cell(row.features, row.hidden, key=jax.random.key(0))
    arrays = w if kind == "gru" else w[:3]
    names = ("weight_ih", "weight_hh", "bias", "bias_n")[: len(arrays)]
    module = eqx.tree_at(lambda m: [getattr(m, name) for name in names], module, list(arrays))

    def unroll(module, xs):
        def step(state, x):
            state = module(x, state)
            return state, state[0] if kind == "lstm" else state

        zero = jnp.zeros(row.hidden)
        first = (zero, zero) if kind == "lstm" else zero
        return jax.vmap(lambda x: jax.lax.scan(step, first, x)[1])(xs)

    return Peer(module, unroll, lambda module: module.weight_hh)


def keras(kind: str, row: Row, w: Weights) -> Peer:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError(f"Keras runs on {keras.backend.backend()} here, KERAS_BACKEND=jax puts it on JAX")
    layer = {"vanilla": keras.layers.SimpleRNN, "lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[kind]
    layer = layer(row.hidden, return_sequences=True)
    layer.build((row.batch, row.time, row.features))
    ours, theirs = OURS[kind], "zrn" if kind == "gru" else OURS[kind]
    W_xh, W_hh, b = (blocks(part, theirs, ours) for part in w[:3])
    if kind == "gru":
        b = np.stack([b, np.concatenate([np.zeros(2 * row.hidden, b.dtype), w.b_hn])])
    rest = [variable.value for variable in layer.non_trainable_variables]

    def unroll(params, xs, **options):
        return layer.stateless_call(params, rest, xs, **options)[0]

    return Peer([W_xh.T, W_hh.T, b], unroll, lambda params: blocks(params[1].T, ours, theirs))


class Way(NamedTuple):
    """A library's package, the cells that it has, and its builder."""

    package: str
    kinds: tuple[str, ...]
    build: Callable[[str, Row, Weights], Peer]


WAYS = {
    "seqjax": Way("seqjax", ("vanilla", "lstm", "gru", "relu", "gru before"), seqjax),
    "flax RNN": Way("flax", ("vanilla", "lstm", "gru"), linen),
    "flax RNN, optimized cell": Way("flax", ("lstm",), partial(linen, optimized=True)),
    "flax nnx": Way("flax", ("vanilla", "lstm", "gru"), nnx),
    "haiku": Way("dm-haiku", ("lstm", "relu", "gru before"), haiku),
    "equinox": Way("equinox", ("lstm", "gru"), equinox),
    "keras": Way("keras", ("vanilla", "lstm", "gru"), keras),
}


def build(way: str, kind: str, row: Row, w: Weights) -> Peer:
    """Builds a peer and puts its parameters on the device."""
    peer = WAYS[way].build(kind, row, w)
    return peer._replace(params=jax.tree.map(jnp.asarray, peer.params))


def call(peer: Peer, direction: str) -> Callable:
    """The function to compile: (params, xs, of_outputs) to the outputs, or to the loss and its parameter gradient."""

    def forward(params, xs, of_outputs):
        return peer.unroll(params, xs)

    def loss(params, xs, of_outputs):
        return jnp.sum(peer.unroll(params, xs) * of_outputs)

    return forward if direction == "forward" else jax.value_and_grad(loss)
