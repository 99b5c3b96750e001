"""Cells as a user writes them: `init`, `initial_state` and `step`, and no help for the fast unroll.

Gates are blocks of rows: W (k n, n), U (k n, d) and b (k n,) for k gates, n units and d inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class UserCell:
    """The sizes of a user's cell."""

    inputs: int
    hidden: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.inputs,)

    def matrices(self, key, gates: int) -> dict[str, jax.Array]:
        key_W, key_U = jax.random.split(key)
        n, d = self.hidden, self.inputs
        return {
            "W": jax.random.normal(key_W, (gates * n, n)) / n**0.5,
            "U": jax.random.normal(key_U, (gates * n, d)) / d**0.5,
        }


class Leaky(UserCell):
    """The cell of the README for d inputs: h_t = 0.9 h_{t-1} + 0.1 tanh(W h_{t-1} + U x_t)."""

    def init(self, key):
        return self.matrices(key, gates=1)

    def initial_state(self, params):
        return jnp.zeros_like(params["W"][0])

    def step(self, params, h, x):
        h = 0.9 * h + 0.1 * jnp.tanh(params["W"] @ h + params["U"] @ x.astype(h.dtype))
        return h, h


class UserLSTM(UserCell):
    """The base of the three LSTMs below: the state (h, c), which starts at zero."""

    gates = 4

    def init(self, key):
        return self.matrices(key, self.gates) | {"b": jnp.zeros(self.gates * self.hidden)}

    def initial_state(self, params):
        zero = jnp.zeros_like(params["W"][0])
        return zero, zero


class Peephole(UserLSTM):
    """LSTM whose gates also read the cell state (Gers and Schmidhuber, 2000).

    i = sigma(z_i + p_i c_{t-1}), f = sigma(z_f + p_f c_{t-1}), o = sigma(z_o + p_o c_t), where z = W h + U x + b.
    """

    def init(self, key):
        return super().init(key) | {name: jnp.zeros(self.hidden) for name in ("p_i", "p_f", "p_o")}

    def step(self, params, state, x):
        h, c = state
        i, f, g, o = jnp.split(params["W"] @ h + params["U"] @ x.astype(h.dtype) + params["b"], 4)
        i = jax.nn.sigmoid(i + params["p_i"] * c)
        f = jax.nn.sigmoid(f + params["p_f"] * c)
        c = f * c + i * jnp.tanh(g)
        h = jax.nn.sigmoid(o + params["p_o"] * c) * jnp.tanh(c)
        return (h, c), h


class Coupled(UserLSTM):
    """LSTM with coupled gates, i = 1 - f (Greff et al., 2017): c_t = f c_{t-1} + (1 - f) tanh(g)."""

    gates = 3

    def step(self, params, state, x):
        h, c = state
        f, g, o = jnp.split(params["W"] @ h + params["U"] @ x.astype(h.dtype) + params["b"], 3)
        f = jax.nn.sigmoid(f)
        c = f * c + (1 - f) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h


class LayerNorm(UserLSTM):
    """LSTM with layer normalization (Ba, Kiros and Hinton, 2016, supplementary material).

    z = a_h LN(W h) + a_x LN(U x) + b, c_t = sigma(f) c_{t-1} + sigma(i) tanh(g),
    h_t = sigma(o) tanh(a_c LN(c_t) + b_c).
    """

    def init(self, key):
        # The recurrent gain starts at 0.1 (Cooijmans et al., 2017). With 1 the recurrence amplifies rounding
        # errors: at (32, 128, 128, 128) the outputs in float32 differ from those in float64 by 1e-2.
        n = self.hidden
        gains = {"a_h": jnp.full(4 * n, 0.1), "a_x": jnp.ones(4 * n), "a_c": jnp.ones(n)}
        return super().init(key) | gains | {"b_c": jnp.zeros(self.hidden)}

    def step(self, params, state, x):
        h, c = state
        z = params["a_h"] * normalize(params["W"] @ h) + params["a_x"] * normalize(params["U"] @ x.astype(h.dtype))
        i, f, g, o = jnp.split(z + params["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(params["a_c"] * normalize(c) + params["b_c"])
        return (h, c), h


def normalize(z: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """(z - mean) / sqrt(variance + epsilon), over the last axis."""
    centered = z - z.mean()
    return centered * jax.lax.rsqrt(jnp.square(centered).mean() + epsilon)


class HaikuLSTM(UserCell):
    """`hk.LSTM` as a cell. seqjax has no adapter for haiku, so a user writes these lines."""

    def init(self, key):
        state = (jnp.zeros(self.hidden), jnp.zeros(self.hidden))
        return self._transformed().init(key, jnp.zeros(self.inputs), _haiku_state(*state))

    def initial_state(self, params):
        zero = jnp.zeros_like(params["lstm/linear"]["b"][: self.hidden])
        return _haiku_state(zero, zero)

    def step(self, params, state, x):
        output, state = self._transformed().apply(params, x, state)
        return state, output

    def _transformed(self) -> Any:
        import haiku as hk

        return hk.without_apply_rng(hk.transform(lambda x, state: hk.LSTM(self.hidden)(x, state)))


def _haiku_state(h: jax.Array, c: jax.Array) -> Any:
    import haiku as hk

    return hk.LSTMState(hidden=h, cell=c)
