"""The cells that property tests run over: ours, wrapped ones, a user's own, and other libraries' through adapters."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import seqjax as sj

D, N = 3, 4  # features of one input, hidden units


class Leaky:
    """A user's own cell, h_t = 0.9 h_{t-1} + 0.1 tanh(W h_{t-1} + U x_t), with an output that is not its state."""

    input_shape = (D,)

    def init(self, key):
        return {"W": jax.random.normal(key, (N, N)), "U": jax.random.normal(key, (N, D))}

    def initial_state(self, params):
        return jnp.zeros_like(params["W"][0])

    def step(self, params, h, x):
        h = 0.9 * h + 0.1 * jnp.tanh(params["W"] @ h + params["U"] @ x.astype(h.dtype))
        return h, 2 * h


class Doubled(sj.LSTM):
    """A subclass whose output is not h."""

    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return state, 2 * output


OURS = {
    "vanilla": sj.VanillaRNN(D, N),
    "vanilla-relu": sj.VanillaRNN(D, N, activation="relu"),
    "vanilla-identity": sj.VanillaRNN(D, N, activation="identity"),
    "lstm": sj.LSTM(D, N),
    "lstm-chrono": sj.LSTM(D, N, chrono=20),
    "gru-after": sj.GRU(D, N),
    "gru-before": sj.GRU(D, N, reset="before"),
    "gru-before-keeps": sj.GRU(D, N, reset="before", update="keeps"),
    "stack": sj.stack([sj.LSTM(D, 5), sj.GRU(5, N)]),
    "learned": sj.LearnedState(sj.LSTM(D, N)),
    "learned-stack": sj.LearnedState(sj.stack([sj.LSTM(D, 5), sj.VanillaRNN(5, N)])),
}
FOREIGN = {
    "user": Leaky(),
    "linen-lstm": sj.from_linen(nn.LSTMCell(N), D),
    "linen-gru": sj.from_linen(nn.GRUCell(N), D),
    "nnx-lstm": sj.from_nnx(nnx.LSTMCell, D, N),
    "nnx-simple": sj.from_nnx(nnx.SimpleCell, D, N),
    "equinox-lstm": sj.from_equinox(eqx.nn.LSTMCell, D, N),
    "equinox-gru": sj.from_equinox(eqx.nn.GRUCell, D, N),
}
EVERY = OURS | FOREIGN
