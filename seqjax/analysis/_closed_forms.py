"""Analyses whose result is a closed form or a published number: the cases of `seqjax.testing.check_analysis`.

Each function yields (case, expected, got, tolerance). The tolerance is for the difference of two numbers, and 0 for
words. Functions of `seqjax.analysis` are looked up when a case runs, so that a replaced one is tested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax import analysis
from seqjax.cells.gru import GRU
from seqjax.cells.lstm import LSTM
from seqjax.cells.vanilla import VanillaParams, VanillaRNN, VanillaState
from seqjax.sequence.unroll import trajectory

Row = tuple[str, float | str, float | str, float]
LONG = 20_000  # steps of the maps whose exponents are limits


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Map:
    """A map s' = F(s, x) of a vector without parameters; `first` is its initial state."""

    function: Callable[[Array, Array], Array]
    first: tuple[float, ...]
    dtype: DTypeLike

    def init(self, key: Array | None) -> tuple[()]:
        """No parameters."""
        return ()

    def initial_state(self, params: tuple[()]) -> Float[Array, " n"]:
        """`first`."""
        return jnp.asarray(self.first, self.dtype)

    def step(
        self, params: tuple[()], state: Float[Array, " n"], x: Float[Array, "..."]
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """F(s, x), which is also the output."""
        state = self.function(state, x)
        return state, state


def _henon(s: Array, x: Array) -> Array:
    return jnp.stack([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]])


def _logistic(s: Array, x: Array) -> Array:
    return 4 * s * (1 - s)


def _product(s: Array, x: Array) -> Array:
    return x @ s


def _rotation(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]


def _linear(W: np.ndarray, dtype: DTypeLike) -> tuple[VanillaRNN, VanillaParams]:
    """h' = W h, with an input that has no effect."""
    n = len(W)
    cell = VanillaRNN(1, n, activation="identity", dtype=dtype)
    return cell, VanillaParams(jnp.zeros((n, 1), dtype), jnp.asarray(W, dtype), jnp.zeros(n, dtype))


def _no_input(time: int, dtype: DTypeLike, features: int = 1, batch: int = 1) -> Array:
    return jnp.zeros((batch, time, features), dtype)


def exact_exponents(dtype: DTypeLike, tolerance: float) -> Iterator[Row]:
    """Exponents that are exact at every length."""
    cell, params = _linear(0.8 * _rotation(3), dtype)
    found = analysis.lyapunov_exponents(cell, params, _no_input(60, dtype)).exponents[0]
    worst = max(found, key=lambda value: abs(value - math.log(0.8)))
    yield "exponents of 0.8 times a rotation, the worst of 3", math.log(0.8), float(worst), tolerance
    for name, cell, size, expected in (
        ("LSTM of zero weights, forget bias 1: ln sigmoid(1)", LSTM(1, 2, dtype=dtype), 2, 1.0),
        ("GRU of zero weights, update bias 2: ln sigmoid(2)", GRU(1, 2, dtype=dtype), 2, 2.0),
    ):
        params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        params = params._replace(b_h=params.b_h.at[size : 2 * size].set(expected))
        found = analysis.lyapunov_exponents(cell, params, _no_input(60, dtype)).exponents[0, 0]
        yield name, -math.log1p(math.exp(-expected)), float(found), tolerance


def sum_rule(dtype: DTypeLike, tolerance: float) -> Iterator[Row]:
    """The sum of all exponents is the mean of ln|det J_t|, for tanh ln|det W| plus the sum of ln tanh'."""
    cell = VanillaRNN(2, 6, dtype=dtype)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (1, 200, 2), dtype)
    found = analysis.lyapunov_exponents(cell, params, xs, burn_in=0, frame_burn_in=0).exponents[0].sum()
    h = np.asarray(trajectory(cell, params, xs).h[0, 1:], np.float64)
    W = np.asarray(params.W_hh, np.float64)
    expected = np.linalg.slogdet(W)[1] + np.log1p(-(h**2)).sum(axis=1).mean()
    yield "sum of all exponents: the mean of ln |det J|", float(expected), float(found), 100 * tolerance


def long_run_exponents(dtype: DTypeLike, tolerance: float) -> Iterator[Row]:
    """Exponents that are limits, so that their tolerance is the fluctuation of a run of this length."""
    henon = Map(_henon, (0.1, 0.1), dtype)
    found = analysis.lyapunov_exponents(henon, (), _no_input(LONG, dtype)).exponents[0]
    yield "Henon map, largest exponent", 0.41922, float(found[0]), 0.01
    yield "Henon map, sum of the exponents: ln 0.3", math.log(0.3), float(found.sum()), 10 * tolerance
    logistic = Map(_logistic, (0.3,), dtype)
    found = analysis.lyapunov_exponents(logistic, (), _no_input(LONG, dtype)).exponents[0]
    yield "logistic map, r = 4: ln 2", math.log(2), float(found[0]), 0.01
    product = Map(_product, (1.0, 1.0), dtype)
    xs = jax.random.normal(jax.random.key(0), (1, LONG, 2, 2), dtype) / math.sqrt(2)
    found = analysis.lyapunov_exponents(product, (), xs).exponents[0]
    for i, expected in enumerate((-0.288608, -0.981755)):  # Newman 1986
        yield f"independent Gaussian matrices, exponent {i + 1} of 2", expected, float(found[i]), 0.03


def gradients(dtype: DTypeLike, tolerance: float) -> Iterator[Row]:
    """Norms by lag."""
    found = analysis.gradient_by_lag(*_linear(0.8 * _rotation(3), dtype), _no_input(60, dtype))
    yield "gradient at lag 20 of the gain 0.8", 0.8**20, float(np.exp(found.log_expected[20])), tolerance
    yield "lag of memory of the gain 0.8", 21.0, float(found.horizon), 0.0
    shear = np.array([[0.9, 10.0], [0.0, 0.9]])
    found = analysis.gradient_by_lag(*_linear(shear, dtype), _no_input(60, dtype))
    yield "lag of the largest norm of [[0.9, 10], [0, 0.9]]", 9.0, float(np.argmax(found.log_worst)), 0.0
    yield "largest norm of [[0.9, 10], [0, 0.9]]", 38.746, float(np.exp(found.log_worst.max())), 1e-3 + 100 * tolerance


def fixed_points(dtype: DTypeLike, tolerance: float) -> Iterator[Row]:
    """The three fixed points of h' = tanh(2 h); the search always runs in float64."""
    cell, params = VanillaRNN(1, 1, dtype=dtype), _linear(2 * np.eye(1), dtype)[1]
    found = analysis.fixed_points(cell, params)
    points = sorted(float(h) for h in found.points[:, 0])
    yield "number of fixed points of tanh(2 h)", 3.0, float(len(points)), 0.0
    yield "smallest fixed point of tanh(2 h)", -0.957504024, points[0], 1e-8
    yield "largest fixed point of tanh(2 h)", 0.957504024, points[-1], 1e-8


def verdicts(dtype: DTypeLike, tolerance: float) -> Iterator[Row]:
    """Regimes of networks whose regime follows from one number."""
    Q = _rotation(3)
    for gain, expected in ((0.8, "vanishing"), (1.0, "stable"), (1.2, "exploding")):
        cell, params = _linear(gain * Q, dtype)
        state = VanillaState(0.01 * jnp.ones((1, 3), dtype))
        found = analysis.verdict(cell, params, _no_input(60, dtype), state=state).regime
        yield f"regime of {gain} times a rotation", expected, found, 0.0
    found = analysis.verdict(Map(_logistic, (0.3,), dtype), (), _no_input(400, dtype)).regime
    yield "regime of the logistic map, r = 4", "chaotic", found, 0.0


CASES: tuple[Any, ...] = (exact_exponents, sum_rule, long_run_exponents, gradients, fixed_points, verdicts)
