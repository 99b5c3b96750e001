"""The networks of the bank, by groups of one cell and one shape, so that each group compiles once.

Every network follows from its seed. Comments after a family name what most of its members do; the truth decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import seqjax as sj

ROWS = 3
PADDINGS = ("none", "end", "beginning", "every other", "ragged", "one row")


@dataclasses.dataclass(frozen=True)
class Network:
    """One case of the bank: the arguments of a verdict, and what a long run needs.

    Attributes:
        name, seed: unique.
        cell, params, xs, mask, reset, state: the arguments of `seqjax.verdict`.
        scale: the standard deviation of the inputs.
        starts: draws other initial states of a given shape (..., n).
    """

    name: str
    seed: int
    cell: Any
    params: Any
    xs: np.ndarray
    mask: np.ndarray | None = None
    reset: np.ndarray | None = None
    state: Any = None
    scale: float = 1.0
    starts: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = lambda rng, shape: rng.normal(size=shape)

    def draw(self, rng, shape):
        """Fresh inputs of the same distribution."""
        return self.scale * rng.normal(size=shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Leaky:
    """A user's cell, s' = (1 - a) s + a tanh(W s + U x), with an output that is not its state."""

    input_size: int
    hidden_size: int

    @property
    def input_shape(self):
        return (self.input_size,)

    def init(self, key):
        n = self.hidden_size
        return {"W": jnp.eye(n), "U": jnp.ones((n, self.input_size)), "a": jnp.full(n, 0.5)}

    def initial_state(self, params):
        return {"s": jnp.zeros_like(params["a"])}

    def step(self, params, state, x):
        a, s = params["a"], state["s"]
        s = (1 - a) * s + a * jnp.tanh(params["W"] @ s + params["U"] @ x.astype(s.dtype))
        return {"s": s}, s.sum()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Logistic:
    """x' = r x (1 - x) in each unit."""

    input_shape = (1,)

    def init(self, key):
        return jnp.full(2, 4.0)

    def initial_state(self, r):
        return jnp.full_like(r, 0.3)

    def step(self, r, s, x):
        s = r * s * (1 - s)
        return s, s


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Henon:
    """x' = 1 - a x^2 + y and y' = b x, with the parameters (a, b)."""

    input_shape = (1,)

    def init(self, key):
        return jnp.array([1.4, 0.3])

    def initial_state(self, ab):
        return jnp.full_like(ab, 0.1)

    def step(self, ab, s, x):
        s = jnp.stack([1 - ab[0] * s[0] ** 2 + s[1], ab[1] * s[0]])
        return s, s


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Quantised:
    """s' = round(4 (w s + x)) / 4, whose derivative is zero everywhere."""

    input_shape = (1,)

    def init(self, key):
        return jnp.full(3, 0.9)

    def initial_state(self, w):
        return jnp.zeros_like(w)

    def step(self, w, s, x):
        s = jnp.round(4 * (w * s + x.astype(s.dtype))) / 4
        return s, s


def padding(kind: str, rows: int, time: int) -> np.ndarray:
    """The mask of one kind of padding."""
    mask = np.ones((rows, time), bool)
    t = np.arange(time)
    if kind == "end":
        mask[:] = t < 3 * time // 4
    elif kind == "beginning":
        mask[:] = t >= time // 4
    elif kind == "every other":
        mask[:] = t % 2 == 0
    elif kind == "ragged":
        mask[:] = t < np.linspace(time, max(time // 4, 2), rows).astype(int)[:, None]
    elif kind == "one row":
        mask[rows // 2] = False
    return mask


def _orthogonal(rng, n):
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    return q * np.sign(np.diag(r))


def _gaussian(rng, n):
    return rng.normal(size=(n, n)) / np.sqrt(n)


def _chain(rng, n, rho, coupling):
    """A non-normal chain: rho on the diagonal and the coupling beside it, in a rotated basis."""
    q = _orthogonal(rng, n)
    return q @ (rho * np.eye(n) + coupling * np.eye(n, k=1)) @ q.T


class Builder:
    """Numbers and seeds the networks of one group."""

    def __init__(self, group: str, number: int, cell: Any, time: int, dtype: str = "float32", rows: int = ROWS):
        self.group, self.number, self.cell, self.time = group, number, cell, time
        self.dtype, self.rows, self.count = dtype, rows, 0

    def rng(self) -> np.random.Generator:
        """The generator of the next network's parameters."""
        return np.random.default_rng([self.number, self.count])

    def cast(self, tree):
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), self.dtype), tree)

    def network(self, what: str, params: Any, *, scale=1.0, size=None, pad=None, xs=None, **rest) -> Network:
        """A network with normal inputs; `size` draws normal initial states, `pad` is one of `PADDINGS`."""
        rng = np.random.default_rng([self.number, self.count, 1])
        kind = PADDINGS[self.count % len(PADDINGS)] if pad is None else pad
        if xs is None:
            xs = scale * rng.normal(size=(self.rows, self.time, *self.cell.input_shape))
        mask = padding(kind, self.rows, self.time)
        xs = np.where(mask[..., None], xs, np.nan)  # what stands in padding must not count
        params = self.cast(params)
        state = None
        if size is not None:
            start = self.cell.initial_state(params)
            drawn = [size * rng.normal(size=ravel_pytree(start)[0].shape) for _ in range(self.rows)]
            state = self.cast(
                jax.tree.map(lambda *s: np.stack(s), *(ravel_pytree(start)[1](jnp.asarray(v)) for v in drawn))
            )
        name = f"{self.group}-{self.count:02d} {what}" + ("" if kind == "none" else f", padding {kind}")
        self.count += 1
        rest = {"state": state} | rest
        seed = 1000 * self.number + self.count
        return Network(name, seed, self.cell, params, np.asarray(xs), mask, scale=scale, **rest)


def _vanilla(U, W, b=None):
    return sj.VanillaParams(U, W, np.zeros(len(W)) if b is None else b)


def tanh_short(build: Builder) -> Iterator[Network]:
    """tanh networks of few units, in most regimes but chaos."""
    n, d = build.cell.hidden_size, build.cell.input_size

    def U(rng):
        return rng.normal(size=(n, d)) / np.sqrt(d)

    for g in (0.2, 0.4, 0.6, 0.75, 0.85, 0.9, 0.93):  # vanishing
        rng = build.rng()
        yield build.network(f"orthogonal {g}", _vanilla(U(rng), g * _orthogonal(rng, n)), scale=0.3)
    for g in (0.5, 0.8, 0.95):  # vanishing
        rng = build.rng()
        yield build.network(f"gaussian {g}", _vanilla(U(rng), g * _gaussian(rng, n)), scale=1.0)
    for g in (0.98, 1.0):  # stable: small states, so that tanh' is one
        rng = build.rng()
        yield build.network(f"orthogonal {g}, small", _vanilla(U(rng), g * _orthogonal(rng, n)), scale=1e-3)
    for _ in range(3):  # stable
        rng = build.rng()
        W = np.eye(n) + 0.02 * _gaussian(rng, n)
        yield build.network("near the identity", _vanilla(U(rng), W), scale=1e-3)
    for g in (1.0, 2.0, 3.0):  # vanishing: strong inputs saturate the units
        rng = build.rng()
        yield build.network(f"driven {g}", _vanilla(U(rng), g * _gaussian(rng, n)), scale=4.0)
    for g in (1.5, 2.0, 3.0, 4.0):  # multistable: the states +v and -v
        rng = build.rng()
        v = _orthogonal(rng, n)[0]
        yield build.network(f"one memory {g}", _vanilla(U(rng), g * np.outer(v, v) * n / 4), scale=0.0, size=1.0)
    for g in (1.5, 2.5):  # multistable: two memories and their opposites
        rng = build.rng()
        v = np.sign(rng.normal(size=(2, n)))
        yield build.network(f"two memories {g}", _vanilla(U(rng), g * v.T @ v / n), scale=0.05, size=1.0)
    for g in (1.4, 2.0):  # unstable fixed point: from zero, without inputs
        rng = build.rng()
        v = _orthogonal(rng, n)[0]
        yield build.network(f"from zero {g}", _vanilla(U(rng), g * np.outer(v, v)), scale=0.0, pad="none")
    for rho, coupling in ((0.5, 1.5), (0.6, 1.2), (0.7, 1.0), (0.75, 0.7), (0.8, 0.6)):  # transient growth
        rng = build.rng()
        yield build.network(f"chain {rho} {coupling}", _vanilla(U(rng), _chain(rng, n, rho, coupling)), scale=1e-6)
    for g in (1.3, 1.6, 2.0):  # exploding or an unstable fixed point that is left slowly
        rng = build.rng()
        yield build.network(f"tiny {g}", _vanilla(U(rng), g * _orthogonal(rng, n)), scale=0.0, size=1e-30, pad="none")
    for _ in range(2):  # unknown
        rng = build.rng()
        xs = rng.normal(size=(build.rows, build.time, d))
        xs[0, build.time // 2 :] = np.nan
        yield build.network("NaN input", _vanilla(U(rng), 0.8 * _orthogonal(rng, n)), xs=xs, pad="none")


def tanh_chaos(build: Builder) -> Iterator[Network]:
    """tanh networks of more units; chaotic for large gains, and calmed by strong inputs."""
    n, d = build.cell.hidden_size, build.cell.input_size
    for g, scale in [(g, s) for g in (2.0, 2.5, 3.0, 4.0) for s in (0.0, 0.3)] + [
        (3.0, 0.1),
        (5.0, 0.1),
        (1.5, 3.0),
    ] * 2:
        rng = build.rng()
        params = _vanilla(rng.normal(size=(n, d)), g * _gaussian(rng, n))
        yield build.network(f"gaussian {g}, inputs {scale}", params, scale=scale, size=0.5)
    for g in (3.0, 4.0):
        rng = build.rng()
        params = _vanilla(rng.normal(size=(n, d)), g * _gaussian(rng, n))
        yield build.network(f"from zero {g}", params, scale=0.0, pad="none")


def tanh_few(build: Builder) -> Iterator[Network]:
    """A handful of tanh networks for a length or a dtype."""
    n, d = build.cell.hidden_size, build.cell.input_size
    for g, scale in ((0.3, 1.0), (0.8, 0.3), (1.0, 1e-3), (0.9, 0.5), (1.5, 5.0), (0.6, 1.0)):
        rng = build.rng()
        params = _vanilla(rng.normal(size=(n, d)), g * _orthogonal(rng, n))
        yield build.network(f"orthogonal {g}, inputs {scale}", params, scale=scale)
    rng = build.rng()
    yield build.network("chain", _vanilla(rng.normal(size=(n, d)), _chain(rng, n, 0.5, 1.5)), scale=1e-6)
    rng = build.rng()
    v = _orthogonal(rng, n)[0]
    yield build.network("one memory", _vanilla(np.ones((n, d)), 2.5 * np.outer(v, v)), scale=0.0, size=1.0)


def linear(build: Builder) -> Iterator[Network]:
    """Linear networks, whose products do not depend on the inputs."""
    n = build.cell.hidden_size
    T = build.time

    def make(what, W, scale=1.0, **rest):
        return build.network(what, _vanilla(np.ones((n, 1)), W), scale=scale, **rest)

    for share in (0.1, 0.3, 0.6, 1.5, 4.0):  # the gain that is lost after this share of the row
        g = np.exp(np.log(0.01) / (share * T))
        yield make(f"lost at {share} T", g * _orthogonal(build.rng(), n))
    for share in (0.1, 0.3, 0.6, 2.0):  # the gain that is tenfold after this share of the row
        g = np.exp(np.log(10) / (share * T))
        yield make(f"tenfold at {share} T", g * _orthogonal(build.rng(), n))
    yield make("orthogonal", _orthogonal(build.rng(), n), scale=1e-2)
    for rho, coupling in ((0.5, 1.5), (0.5, 2.5), (0.3, 3.0), (0.6, 1.0)):
        yield make(f"chain {rho} {coupling}", _chain(build.rng(), n, rho, coupling))
    yield make("one direction kept", np.diag(np.r_[1.0, np.full(n - 1, 0.5)]))
    yield make("one direction grows", np.diag(np.r_[np.exp(3 * np.log(10) / T), np.full(n - 1, 0.5)]))
    yield make("two time scales", np.diag(np.r_[np.exp(np.log(0.01) / (0.5 * T)), np.full(n - 1, 0.3)]))
    yield make("nilpotent", np.eye(n, k=1))
    yield make("overflows", np.exp(1.2 * 89 / T * 1.5) * _orthogonal(build.rng(), n), pad="none")
    for row in range(2):
        rng = build.rng()
        xs = rng.normal(size=(build.rows, T, 1))
        xs[row, T // 3] = np.nan
        yield make("NaN input", 0.9 * _orthogonal(rng, n), xs=xs, pad="none")
    rng = build.rng()
    W = 0.9 * _orthogonal(rng, n)
    W[0, 0] = np.nan
    yield make("NaN parameter", W, pad="none")


def relu(build: Builder) -> Iterator[Network]:
    """Rectified networks: vanishing below the gain sqrt(2), exploding above."""
    n, d = build.cell.hidden_size, build.cell.input_size
    for g in (0.4, 0.7, 1.0, 1.2, 2.2, 2.6, 3.0, 4.0):
        rng = build.rng()
        yield build.network(
            f"gaussian {g}", _vanilla(rng.normal(size=(n, d)), g * _gaussian(rng, n)), scale=1.0, size=1.0
        )
    for g in (0.7, 0.9, 1.1, 1.3):
        rng = build.rng()
        W = g * np.eye(n)[rng.permutation(n)]
        yield build.network(f"permutation {g}", _vanilla(np.abs(rng.normal(size=(n, d))), W, np.ones(n)), scale=0.1)
    for row in (0, 2):
        rng = build.rng()
        xs = rng.normal(size=(build.rows, build.time, d))
        xs[row, -5:] = np.nan
        yield build.network("NaN input", _vanilla(np.ones((n, d)), 0.5 * _gaussian(rng, n)), xs=xs, pad="none")


def gru(build: Builder) -> Iterator[Network]:
    """GRUs: the bias of the update gate sets the time constant."""
    n, d = build.cell.hidden_size, build.cell.input_size
    for b, g in (
        (-2, 1),
        (0, 1),
        (1, 1),
        (2, 1),
        (4, 1),
        (7, 1),
        (0, 0),
        (2, 0),
        (6, 0),
        (-1, 3),
        (-1, 5),
        (0, 8),
        (1, 2),
    ):
        rng = build.rng()
        params = sj.GRUParams(
            W_xh=rng.normal(size=(3 * n, d)) / np.sqrt(d),
            W_hh=g * np.concatenate([_gaussian(rng, n) for _ in range(3)]),
            b_h=np.r_[np.zeros(n), np.full(n, b), np.zeros(n)],
            b_hn=np.zeros(n),
        )
        yield build.network(
            f"update bias {b}, gain {g}", params, scale=1.0 if g < 3 else 0.1, size=0.5 if g > 2 else None
        )


def lstm(build: Builder) -> Iterator[Network]:
    """LSTMs: the forget bias sets the time constant, and large matrices make them chaotic or multistable."""
    n, d = build.cell.hidden_size, build.cell.input_size
    settings = (
        (-1, 1),
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (5, 1),
        (7, 0.3),
        (0, 0),
        (1, 0),
        (2, 0),
        (4, 0),
        (8, 0),
        (0, 4),
    )
    for b, g in (*settings, (-1, 8), (1, 3)):
        rng = build.rng()
        params = sj.LSTMParams(
            W_xh=rng.normal(size=(4 * n, d)) / np.sqrt(d),
            W_hh=g * np.concatenate([_gaussian(rng, n) for _ in range(4)]),
            b_h=np.r_[np.zeros(n), np.full(n, b), np.zeros(2 * n)],
        )
        yield build.network(f"forget bias {b}, gain {g}", params, scale=1.0 if g < 3 else 0.1)


def leaky(build: Builder) -> Iterator[Network]:
    """A user's leaky cell: time constants 1/a, several attractors, and units that only integrate."""
    n, d = build.cell.hidden_size, build.cell.input_size
    for a, g in ((0.9, 0.3), (0.5, 0.5), (0.2, 0.5), (0.1, 0.8), (0.02, 0.5), (0.001, 1.0)):
        rng = build.rng()
        params = {"W": g * _orthogonal(rng, n), "U": rng.normal(size=(n, d)), "a": np.full(n, a)}
        yield build.network(f"leak {a}, gain {g}", params, scale=0.5)
    for a, g in ((0.5, 2.0), (0.8, 3.0), (0.3, 2.5)):  # multistable: every unit has two states
        rng = build.rng()
        params = {"W": g * np.eye(n), "U": rng.normal(size=(n, d)), "a": np.full(n, a)}
        yield build.network(f"switches, leak {a}, gain {g}", params, scale=0.02, size=1.0)
    rng = build.rng()
    params = {"W": 3 * np.eye(n), "U": rng.normal(size=(n, d)), "a": np.full(n, 0.5)}
    yield build.network("switches from zero", params, scale=0.0, pad="none")
    rng = build.rng()
    params = {"W": 0 * np.eye(n), "U": rng.normal(size=(n, d)), "a": np.r_[0.001, np.full(n - 1, 0.5)]}
    yield build.network("mixed leaks", params, scale=0.5)


def logistic(build: Builder) -> Iterator[Network]:
    """Logistic maps: chaotic at r = 4 and 3.9, one fixed point below r = 3, and a cycle of two above."""

    def inside(rng, shape):
        return rng.uniform(0.05, 0.95, shape)

    for r in ((4.0, 4.0), (3.9, 3.9), (3.7, 3.8), (2.8, 2.8), (1.5, 2.0), (0.5, 0.8), (4.0, 2.0)):
        rng = build.rng()
        state = build.cast(rng.uniform(0.2, 0.8, (build.rows, 2)))
        yield build.network(f"r = {r[0]}, {r[1]}", np.array(r), scale=0.0, state=state, starts=inside)
    yield build.network(
        "from zero",
        np.array([4.0, 3.9]),
        scale=0.0,
        state=build.cast(np.zeros((build.rows, 2))),
        starts=inside,
        pad="none",
    )


def henon(build: Builder) -> Iterator[Network]:
    """Henon maps: chaotic at (1.4, 0.3), a fixed point at a = 0.2."""

    def near(rng, shape):
        return rng.uniform(-0.3, 0.3, shape)

    for a, b in ((1.4, 0.3), (1.2, 0.3), (1.4, 0.25), (0.2, 0.3), (0.1, -0.5)):
        state = build.cast(near(build.rng(), (build.rows, 2)))
        yield build.network(f"a = {a}, b = {b}", np.array([a, b]), scale=0.0, state=state, starts=near)


def two_layers(build: Builder) -> Iterator[Network]:
    """A stack: the slowest layer decides."""
    (lower, upper), d = build.cell.cells, build.cell.input_shape[0]
    for g_1, g_2, scale in (
        (0.5, 0.5, 1),
        (0.5, 0.9, 0.3),
        (0.9, 0.4, 0.3),
        (0.2, 1.0, 1e-3),
        (1.0, 1.0, 1e-3),
        (0.7, 0.7, 1),
    ):
        rng = build.rng()
        params = (
            _vanilla(rng.normal(size=(lower.hidden_size, d)), g_1 * _orthogonal(rng, lower.hidden_size)),
            _vanilla(0.5 * _gaussian(rng, upper.hidden_size), g_2 * _orthogonal(rng, upper.hidden_size)),
        )
        yield build.network(f"gains {g_1} {g_2}", params, scale=scale)
    rng = build.rng()
    n = upper.hidden_size
    params = (_vanilla(rng.normal(size=(n, d)), 0.5 * _orthogonal(rng, n)), _vanilla(0.1 * np.eye(n), 2.5 * np.eye(n)))
    yield build.network("upper layer switches", params, scale=0.05, size=1.0)


def drawn(build: Builder) -> Iterator[Network]:
    """A cell of another library as its own initialization draws it, with its matrices scaled."""
    for i, g in enumerate((0.5, 1.0, 1.0, 1.0, 2.0, 0.2)):
        params = jax.tree.map(lambda p, g=g: g * p, build.cell.init(jax.random.key(i)))
        yield build.network(f"init {i}, scaled by {g}", params)


def quantised(build: Builder) -> Iterator[Network]:
    """Unknown: the derivative is zero everywhere."""
    for w in (0.5, 0.9, 1.0):
        yield build.network(f"weight {w}", np.full(3, w))


def with_resets(build: Builder) -> Iterator[Network]:
    """Resets every 40 steps."""
    n, d = build.cell.hidden_size, build.cell.input_size
    reset = np.zeros((build.rows, build.time), bool)
    reset[:, 40::40] = True
    for g, scale in ((0.3, 1.0), (0.5, 1.0), (0.7, 1.0), (0.8, 0.3), (1.0, 1e-3), (1.5, 4.0), (1.3, 1e-6), (1.6, 1e-9)):
        rng = build.rng()
        params = _vanilla(rng.normal(size=(n, d)), g * _orthogonal(rng, n))
        yield build.network(f"gain {g}", params, scale=scale, reset=reset, pad="none")


def groups() -> dict[str, Callable[[], list[Network]]]:
    """The groups by name; each makes its networks when it is called."""
    tanh, identity = sj.VanillaRNN(2, 8), sj.VanillaRNN(1, 6, activation="identity")
    stacked = sj.stack([sj.VanillaRNN(2, 4), sj.VanillaRNN(4, 4)])
    wide = "float64"
    table = {
        "tanh-100": (tanh_short, tanh, 100),
        "tanh-24-300": (tanh_chaos, sj.VanillaRNN(1, 24), 300),
        "tanh-20": (tanh_few, tanh, 20),
        "tanh-1": (tanh_few, tanh, 1),
        "tanh-1000": (tanh_few, tanh, 1000),
        "tanh-float64": (tanh_few, sj.VanillaRNN(2, 8, dtype=wide), 60, wide),
        "tanh-bfloat16": (tanh_few, sj.VanillaRNN(2, 8, dtype="bfloat16"), 60, "bfloat16"),
        "linear-100": (linear, identity, 100),
        "linear-1000": (linear, identity, 1000),
        "relu-60": (relu, sj.VanillaRNN(2, 8, activation="relu"), 60),
        "gru-60": (gru, sj.GRU(2, 8), 60),
        "gru-300": (gru, sj.GRU(2, 8), 300),
        "lstm-60": (lstm, sj.LSTM(2, 6), 60),
        "lstm-300": (lstm, sj.LSTM(2, 6), 300),
        "leaky-100": (leaky, Leaky(2, 5), 100),
        "logistic-300": (logistic, Logistic(), 300),
        "henon-300": (henon, Henon(), 300),
        "stack-100": (two_layers, stacked, 100),
        "linen-gru-60": (drawn, sj.from_linen(nn.GRUCell(6), 2), 60),
        "quantised-20": (quantised, Quantised(), 20),
        "resets-100": (with_resets, tanh, 100),
    }

    def maker(number, name, family, cell, time, dtype="float32"):
        def make():
            with jax.enable_x64(dtype == wide):
                return list(family(Builder(name, number, cell, time, dtype)))

        return make

    return {name: maker(number, name, *entry) for number, (name, entry) in enumerate(table.items())}
