"""The cells that tests run over: ours, wrapped ones, a user's own, and other libraries' through adapters.

`EVERY` holds the cells that the whole library is tested on. `ZOO` holds more kinds of recurrence: the fast unroll must
give the derivatives of a plain `lax.scan` for each of them. `zoo(d, n)` builds the same cells in other sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import seqjax as sj
from seqjax.cells.stack import Stack

D, N = 3, 4  # features of one input, hidden units
TOKENS = 7  # size of the vocabulary of the cells that read tokens


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
    """A subclass of the LSTM whose step doubles the output."""

    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return state, 2 * output


@dataclasses.dataclass(frozen=True)
class Sized:
    """The base of the cells below: two sizes, parameters drawn from their shapes, and n zeros as the initial state.

    Subclasses define `step` and, if W (n, n) and U (n, d) are not their parameters, `shapes`. The cells are frozen
    dataclasses, so equal cells share compiled code.
    """

    input_size: int
    hidden_size: int

    @property
    def input_shape(self):
        return (self.input_size,)

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d)}

    def init(self, key):
        shapes = self.shapes(self.input_size, self.hidden_size)
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(k, shape) / shape[-1] ** 0.5
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def initial_state(self, params):
        return self.zeros(params)

    def zeros(self, params, *shape):
        """Zeros in the dtype of the parameters; n of them if there is no shape."""
        return jnp.zeros(shape or self.hidden_size, jax.tree.leaves(params)[0].dtype)


def affine(params, h, x):
    """W h + U x, with x in the dtype of the parameters."""
    return params["W"] @ h + params["U"] @ x.astype(params["U"].dtype)


class PeepholeLSTM(Sized):
    """An LSTM whose gates also read the cell state (Gers and Schmidhuber 2000). The output gate reads the new one."""

    def shapes(self, d, n):
        return {"W": (4 * n, n), "U": (4 * n, d), "b": (4 * n,), "p": (3, n)}

    def initial_state(self, params):
        return {"h": self.zeros(params), "c": self.zeros(params)}

    def step(self, params, state, x):
        i, f, g, o = jnp.split(affine(params, state["h"], x) + params["b"], 4)
        p_i, p_f, p_o = params["p"]
        c = jax.nn.sigmoid(f + p_f * state["c"]) * state["c"] + jax.nn.sigmoid(i + p_i * state["c"]) * jnp.tanh(g)
        h = jax.nn.sigmoid(o + p_o * c) * jnp.tanh(c)
        return {"h": h, "c": c}, h


class CoupledLSTM(Sized):
    """An LSTM of three gates, i = 1 - f (Greff et al. 2017)."""

    def shapes(self, d, n):
        return {"W": (3 * n, n), "U": (3 * n, d), "b": (3 * n,)}

    def initial_state(self, params):
        return self.zeros(params), self.zeros(params)

    def step(self, params, state, x):
        h, c = state
        f, g, o = jnp.split(affine(params, h, x) + params["b"], 3)
        f = jax.nn.sigmoid(f)
        c = f * c + (1 - f) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h


def layer_norm(z, scale):
    """Mean 0 and variance 1 over the features, then one scale per feature."""
    return scale * (z - z.mean()) * jax.lax.rsqrt(z.var() + 1e-3)


class LayerNormLSTM(Sized):
    """An LSTM that normalizes both products and the cell state (Ba, Kiros and Hinton 2016)."""

    def shapes(self, d, n):
        return {"W": (4 * n, n), "U": (4 * n, d), "b": (4 * n,), "s_h": (4 * n,), "s_x": (4 * n,), "s_c": (n,)}

    def initial_state(self, params):
        return self.zeros(params), self.zeros(params)

    def step(self, params, state, x):
        h, c = state
        u = layer_norm(params["U"] @ x.astype(h.dtype), params["s_x"])
        i, f, g, o = jnp.split(layer_norm(params["W"] @ h, params["s_h"]) + u + params["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(layer_norm(c, params["s_c"]))
        return (h, c), h


class MinGRU(Sized):
    """A gate and a candidate that read only the input; the recurrence has no product (Feng et al. 2024)."""

    def shapes(self, d, n):
        return {"U": (2 * n, d), "b": (2 * n,)}

    def step(self, params, h, x):
        z, candidate = jnp.split(params["U"] @ x.astype(h.dtype) + params["b"], 2)
        z = jax.nn.sigmoid(z)
        h = (1 - z) * h + z * candidate
        return h, h


class FastWeights(Sized):
    """A state with a matrix, A_t = 0.9 A_{t-1} + 0.3 h h^T, which multiplies h (Ba et al. 2016)."""

    def initial_state(self, params):
        return {"A": self.zeros(params, self.hidden_size, self.hidden_size), "h": self.zeros(params)}

    def step(self, params, state, x):
        h = state["h"]
        A = 0.9 * state["A"] + 0.3 * jnp.outer(h, h)
        h = jnp.tanh(affine(params, h, x) + A @ h)
        return {"A": A, "h": h}, h


class Convolutional(Sized):
    """A convolution in place of the product; the input is a signal of d positions, the state has n channels."""

    def shapes(self, d, n):
        return {"W": (3, n, n), "U": (3, 1, n), "b": (1, n)}

    def initial_state(self, params):
        return self.zeros(params, self.input_size, self.hidden_size)

    def step(self, params, h, x):
        def convolve(signal, kernel):
            layout = ("NWC", "WIO", "NWC")
            return jax.lax.conv_general_dilated(signal[None], kernel, (1,), "SAME", dimension_numbers=layout)[0]

        b = jnp.broadcast_to(params["b"], h.shape)
        h = jnp.tanh(convolve(h, params["W"]) + convolve(x[:, None].astype(h.dtype), params["U"]) + b)
        return h, h.mean(0)


class ComplexDiagonal(Sized):
    """A complex state with a diagonal recurrence and a real readout, as the LRU (Orvieto et al. 2023)."""

    def shapes(self, d, n):
        return {"rate": (n,), "angle": (n,), "B_re": (n, d), "B_im": (n, d), "C_re": (n, n), "C_im": (n, n)}

    def initial_state(self, params):
        return jax.lax.complex(self.zeros(params), self.zeros(params))

    def step(self, params, h, x):
        x = x.astype(params["rate"].dtype)
        h = jnp.exp(jax.lax.complex(-jnp.exp(params["rate"]), params["angle"])) * h
        h = h + jax.lax.complex(params["B_re"] @ x, params["B_im"] @ x)
        return h, params["C_re"] @ h.real - params["C_im"] @ h.imag


class ComplexMatrix(Sized):
    """Complex weights: z = W h + U x, h = z / sqrt(1 + |z|^2)."""

    def init(self, key):
        real, imaginary = (Sized.init(self, k) for k in jax.random.split(key))
        return jax.tree.map(jax.lax.complex, real, imaginary)

    def step(self, params, h, x):
        z = affine(params, h, x)
        h = z * jax.lax.rsqrt(1 + z.real**2 + z.imag**2).astype(z.dtype)
        return h, (h, h.real)


class Attention(Sized):
    """The newest of three remembered states attends to all three; the result becomes the next newest one."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "V": (n, n), "B": (n, d)}

    def initial_state(self, params):
        return self.zeros(params, 3, self.hidden_size)

    def step(self, params, memory, x):
        weights = jax.nn.softmax(memory @ affine(params, memory[-1], x))
        h = jnp.tanh(params["V"] @ (weights @ memory) + params["B"] @ x.astype(memory.dtype))
        return jnp.concatenate([memory[1:], h[None]]), (h, weights)


class NestedJit(Sized):
    """The step calls a jitted function, which calls another one."""

    def step(self, params, h, x):
        @jax.jit
        def squash(z):
            return jnp.tanh(z)

        @jax.jit
        def update(params, h, x):
            return squash(affine(params, h, x))

        h = update(params, h, x)
        return h, h


class Rematerialized(Sized):
    """`jax.checkpoint` inside the step, around two products."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "V": (n, n)}

    def step(self, params, h, x):
        @jax.checkpoint
        def block(params, h, x):
            return jnp.tanh(params["V"] @ jnp.tanh(affine(params, h, x)))

        h = 0.5 * h + block(params, h, x)
        return h, h


class Conditional(Sized):
    """`lax.cond` on the state, with a product in each branch."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "V": (n, n)}

    def step(self, params, h, x):
        high = lambda h: jnp.tanh(affine(params, h, x))  # noqa: E731
        low = lambda h: 0.5 * h + jnp.cos(params["V"] @ h)  # noqa: E731
        h = jax.lax.cond(h.sum() > 0, high, low, h)
        return h, h


class InnerLoop(Sized):
    """`lax.fori_loop` inside the step, with a product in its body."""

    def step(self, params, h, x):
        u = params["U"] @ x.astype(h.dtype)
        h = jax.lax.fori_loop(0, 3, lambda _, h: 0.5 * h + 0.5 * jnp.tanh(params["W"] @ h + u), h)
        return h, h


class Readout(Sized):
    """The step has a second product, which only the output reads."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "V": (n, n)}

    def step(self, params, h, x):
        h = jnp.tanh(affine(params, h, x))
        return h, params["V"] @ h


class Counter(Sized):
    """An integer in the state counts the steps; the input fades as it grows. The output contains the integer."""

    def initial_state(self, params):
        return {"h": self.zeros(params), "count": jnp.zeros((), int)}

    def step(self, params, state, x):
        count = state["count"] + 1
        h = jnp.tanh(affine(params, state["h"], x / count.astype(x.dtype)))
        return {"h": h, "count": count}, (h, count)


class DelayLine(Sized):
    """Reads the state of three steps ago from a ring buffer, whose position is an integer in the state."""

    def initial_state(self, params):
        return self.zeros(params, 3, self.hidden_size), jnp.zeros((), "int32")

    def step(self, params, state, x):
        slots, position = state
        h = jnp.tanh(affine(params, slots[position % 3], x))
        return (slots.at[position % 3].set(h), position + 1), h


class NoisyState(Sized):
    """A random key in the state; every step splits it and adds noise to h."""

    def initial_state(self, params):
        return {"h": self.zeros(params), "key": jax.random.key(0)}

    def step(self, params, state, x):
        key, now = jax.random.split(state["key"])
        h = jnp.tanh(affine(params, state["h"], x)) + 0.1 * jax.random.normal(now, state["h"].shape, state["h"].dtype)
        return {"h": h, "key": key}, h


class WeakState(Sized):
    """The initial state is weakly typed: an array filled with a Python number, and a Python number."""

    def initial_state(self, params):
        return jnp.full(self.hidden_size, 0.1), 0.5

    def step(self, params, state, x):
        h, level = state
        h = jnp.tanh(affine(params, h, x)) * level
        return (h, 0.9 * level + 0.1 * h.sum()), h


class Symmetric(Sized):
    """Two products with one matrix, h_t = h - 0.2 W^T tanh(W h + U x)."""

    def step(self, params, h, x):
        h = h - 0.2 * params["W"].T @ jnp.tanh(affine(params, h, x))
        return h, h


class Squared(Sized):
    """The product is with W W, which does not depend on the state."""

    def step(self, params, h, x):
        h = jnp.tanh((params["W"] @ params["W"]) @ h + params["U"] @ x.astype(h.dtype))
        return h, h


class WeightNorm(Sized):
    """The rows of W have unit norm times a learned scale (Salimans and Kingma 2016)."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "g": (n, 1)}

    def step(self, params, h, x):
        W = params["W"] * params["g"] / jnp.linalg.norm(params["W"], axis=1, keepdims=True)
        h = jnp.tanh(affine(params | {"W": W}, h, x))
        return h, h


class Multiplicative(Sized):
    """The input scales the state between two products, W ((V h) * (B x)) (Krause et al. 2016)."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "V": (n, n), "B": (n, d)}

    def step(self, params, h, x):
        mixed = (params["V"] @ h) * (params["B"] @ x.astype(h.dtype))
        h = jnp.tanh(affine(params, mixed, x))
        return h, h


class Bilinear(Sized):
    """A third-order tensor multiplies state and input, sum_jk T_ijk h_j x_k."""

    def shapes(self, d, n):
        return {"T": (n, n, d), "U": (n, d)}

    def step(self, params, h, x):
        x = x.astype(h.dtype)
        h = jnp.tanh(jnp.einsum("ijk,j,k->i", params["T"], h, x) + params["U"] @ x)
        return h, h


class LearnedTime(Sized):
    """Every unit has a learned time constant, which the step reads elementwise: h + sigma(tau) (tanh(...) - h)."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "tau": (n,)}

    def step(self, params, h, x):
        h = h + jax.nn.sigmoid(params["tau"]) * (jnp.tanh(affine(params, h, x)) - h)
        return h, h


class CustomRules(Sized):
    """Functions with derivative rules of their own: softplus, gelu and logsumexp."""

    def step(self, params, h, x):
        h = jax.nn.gelu(affine(params, h, x)) - 0.2 * jax.nn.softplus(h)
        return h, jax.nn.logsumexp(h)


@jax.custom_jvp
def spike(v):
    """1 above 0, otherwise 0; the derivative is that of a smooth function."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return spike(v), t / (1 + v * v)


class Spiking(Sized):
    """Leaky neurons that emit 0 or 1, differentiated by a surrogate (Neftci, Mostafa and Zenke 2019)."""

    def initial_state(self, params):
        return {"v": self.zeros(params), "s": self.zeros(params)}

    def step(self, params, state, x):
        v = 0.8 * (state["v"] - state["s"]) + affine(params, state["s"], x)
        s = spike(v - 0.3)
        return {"v": v, "s": s}, s


class Lookup(Sized):
    """The state selects a row of the parameters. The output contains the integer; the parameter "spare" is unused."""

    def shapes(self, d, n):
        return {"W": (n, n), "U": (n, d), "E": (n, n), "spare": (n,)}

    def step(self, params, h, x):
        best = jnp.argmax(h)
        h = jnp.tanh(affine(params, h, x) + params["E"][best])
        return h, {"h": h, "best": best}


class EchoState(Sized):
    """The recurrent matrix is a constant of the cell; only the input and the output weights are parameters."""

    def shapes(self, d, n):
        return {"U": (n, d), "V": (n, n)}

    def step(self, params, h, x):
        n = self.hidden_size
        W = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)) / n**0.5, h.dtype)
        h = jnp.tanh(affine(params | {"W": W}, h, x))
        return h, params["V"] @ h


class TimeGap(Sized):
    """The input is a dictionary: features, and the time since the last step, by which the state decays."""

    input_shape = None

    def example_input(self):
        return {"features": jnp.zeros(self.input_size), "gap": jnp.zeros(())}

    def step(self, params, h, x):
        h = jnp.exp(-(x["gap"].astype(h.dtype) ** 2)) * h
        h = jnp.tanh(affine(params, h, x["features"]))
        return h, h


class Residual(Stack):
    """A subclass of `Stack` with its own step: every layer adds its output to its input."""

    def step(self, params, state, x, noise=None):
        new_state = []
        for cell, p, s in zip(self.cells, params, state, strict=True):
            s, output = cell.step(p, s, x)
            x = x.astype(output.dtype) + output
            new_state.append(s)
        return tuple(new_state), x


@dataclasses.dataclass(frozen=True)
class Haiku(Sized):
    """A haiku core such as "LSTM", adapted in ten lines."""

    core: str = "LSTM"

    def transformed(self, call):
        import haiku as hk

        build = lambda *arguments: call(getattr(hk, self.core)(self.hidden_size), *arguments)  # noqa: E731
        return hk.without_apply_rng(hk.transform(build))

    def init(self, key):
        call = lambda core, x: core(x, core.initial_state(None))  # noqa: E731
        return self.transformed(call).init(key, jnp.zeros(self.input_size))

    def initial_state(self, params):
        state = self.transformed(lambda core: core.initial_state(None)).apply({})
        return jax.tree.map(lambda leaf: self.zeros(params, *leaf.shape), state)

    def step(self, params, state, x):
        dtype = jax.tree.leaves(params)[0].dtype
        output, state = self.transformed(lambda core, *call: core(*call)).apply(params, x.astype(dtype), state)
        return state, output


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


def zoo(d, n) -> dict[str, Any]:
    """Cells of every kind by name, with d features in one input and n hidden units."""
    return {
        "vanilla-tanh": sj.VanillaRNN(d, n),
        "vanilla-relu": sj.VanillaRNN(d, n, activation="relu"),
        "lstm": sj.LSTM(d, n),
        "lstm-bfloat16": sj.LSTM(d, n, compute_dtype="bfloat16"),
        "gru-after": sj.GRU(d, n),
        "gru-after-writes": sj.GRU(d, n, update="writes"),
        "gru-before": sj.GRU(d, n, reset="before"),
        "linen-lstm": sj.from_linen(nn.LSTMCell(n), d),
        "linen-optimized-lstm": sj.from_linen(nn.OptimizedLSTMCell(n), d),
        "linen-gru": sj.from_linen(nn.GRUCell(n), d),
        "linen-simple": sj.from_linen(nn.SimpleCell(n), d),
        "nnx-lstm": sj.from_nnx(nnx.LSTMCell, d, n),
        "nnx-gru": sj.from_nnx(nnx.GRUCell, d, n),
        "equinox-lstm": sj.from_equinox(eqx.nn.LSTMCell, d, n),
        "equinox-gru": sj.from_equinox(eqx.nn.GRUCell, d, n),
        "peephole-lstm": PeepholeLSTM(d, n),
        "coupled-lstm": CoupledLSTM(d, n),
        "layer-norm-lstm": LayerNormLSTM(d, n),
        "min-gru": MinGRU(d, n),
        "fast-weights": FastWeights(d, n),
        "convolutional": Convolutional(d, n),
        "complex-diagonal": ComplexDiagonal(d, n),
        "complex-matrix": ComplexMatrix(d, n),
        "attention": Attention(d, n),
        "nested-jit": NestedJit(d, n),
        "rematerialized": Rematerialized(d, n),
        "conditional": Conditional(d, n),
        "inner-loop": InnerLoop(d, n),
        "readout": Readout(d, n),
        "counter": Counter(d, n),
        "delay-line": DelayLine(d, n),
        "noisy-state": NoisyState(d, n),
        "weak-state": WeakState(d, n),
        "symmetric": Symmetric(d, n),
        "squared": Squared(d, n),
        "weight-norm": WeightNorm(d, n),
        "multiplicative": Multiplicative(d, n),
        "bilinear": Bilinear(d, n),
        "learned-time": LearnedTime(d, n),
        "custom-rules": CustomRules(d, n),
        "spiking": Spiking(d, n),
        "lookup": Lookup(d, n),
        "echo-state": EchoState(d, n),
        "time-gap": TimeGap(d, n),
        "stack": sj.stack([sj.LSTM(d, n), sj.GRU(n, n), PeepholeLSTM(n, n)]),
        "learned-stack": sj.LearnedState(sj.stack([sj.LSTM(d, n), sj.VanillaRNN(n, n)])),
        "stack-of-stacks": sj.stack([sj.LearnedState(sj.GRU(d, n)), sj.stack([Readout(n, n), sj.GRU(n, n)])]),
        "residual-stack": Residual((sj.LSTM(d, d), sj.GRU(d, d))),
        "lstm-subclass": Doubled(d, n),
        "embedding": sj.Embedding(TOKENS, n),
        "embedding-stack": sj.stack([sj.Embedding(TOKENS, d), sj.LSTM(d, n)]),
        "dropout-stack": sj.stack([sj.LSTM(d, n), sj.Dropout(n, 0.3), sj.GRU(n, n)]),
        "haiku-lstm": Haiku(d, n),
    }


ZOO = zoo(D, N)
