"""The long short-term memory (Hochreiter and Schmidhuber 1997; forget gate by Gers, Schmidhuber and Cummins 2000).

The cell state moves by addition, c_t = f * c_{t-1} + i * c~, so where the forget gate stays near one the gradient
passes through many steps without a product of weight matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.cell import as_feature
from seqjax.cells.fields import check_chrono, check_fields
from seqjax.cells.gates import sigmoids
from seqjax.cells.product import product, rounded
from seqjax.initializers import Glorot, Initializer, Orthogonal, chrono_bias, gate_matrices


class LSTMParams(NamedTuple):
    """Parameters of `lstm_step`; d inputs, n hidden units, four blocks of n rows in the order i, f, g, o."""

    W_xh: Float[Array, "4n d"]
    W_hh: Float[Array, "4n n"]
    b_h: Float[Array, " 4n"]


class LSTMState(NamedTuple):
    """The hidden state and the cell state: both are carried, and both belong to every Jacobian."""

    h: Float[Array, " n"]
    c: Float[Array, " n"]


class LSTMGates(NamedTuple):
    """The gate activations of one step; the candidate lies in (-1, 1), the others in (0, 1)."""

    input: Float[Array, " n"]
    forget: Float[Array, " n"]
    candidate: Float[Array, " n"]
    output: Float[Array, " n"]


def lstm_gates(
    params: LSTMParams, state: LSTMState, x: Float[Array, " d"], compute_dtype: DTypeLike | None = None
) -> LSTMGates:
    """The gates of one step.

        i = sigma(W_i [x, h] + b_i)    f = sigma(W_f [x, h] + b_f)
        c~ = tanh(W_c [x, h] + b_c)    o = sigma(W_o [x, h] + b_o)

    Args:
        params: W_xh (4n, d), W_hh (4n, n), b_h (4n,), rows in the order i, f, c~, o.
        state: h_{t-1} and c_{t-1}, (n,) each.
        x: x_t (d,).
        compute_dtype: of the operands of the products, such as "bfloat16"; None leaves them as they are.

    Returns:
        `LSTMGates`, (n,) each.

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Source: Gers, Schmidhuber and Cummins 2000, "Learning to forget".

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.LSTMParams(jnp.zeros((4, 1)), jnp.zeros((4, 1)), jnp.array([0.0, 1.0, 0.0, 0.0]))
        >>> gates = sj.lstm_gates(params, sj.LSTMState(jnp.zeros(1), jnp.ones(1)), jnp.ones(1))
        >>> round(float(gates.forget[0]), 4)  # sigma(1)
        0.7311
    """
    return _gates(_drive(params, x, compute_dtype) + product(params.W_hh, state.h, compute_dtype))


def lstm_step(
    params: LSTMParams, state: LSTMState, x: Float[Array, " d"], compute_dtype: DTypeLike | None = None
) -> tuple[LSTMState, Float[Array, " n"]]:
    """One step of the LSTM.

        c_t = f * c_{t-1} + i * c~    h_t = o * tanh(c_t)

    Args:
        params: W_xh (4n, d), W_hh (4n, n), b_h (4n,), rows in the order i, f, c~, o.
        state: h_{t-1} and c_{t-1}, (n,) each.
        x: x_t (d,).
        compute_dtype: of the operands of the products, such as "bfloat16"; None leaves them as they are.

    Returns:
        The new state (h_t, c_t) and the output, which is h_t (n,).

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Source: Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.LSTMParams(jnp.zeros((4, 1)), jnp.zeros((4, 1)), jnp.zeros(4))
        >>> state, output = sj.lstm_step(params, sj.LSTMState(jnp.zeros(1), jnp.ones(1)), jnp.ones(1))
        >>> float(state.c[0]), round(float(output[0]), 4)  # every gate is 1/2
        (0.5, 0.2311)
    """
    return _advance(state, lstm_gates(params, state, x, compute_dtype))


def _drive(params: LSTMParams, x: Float[Array, " d"], compute_dtype: DTypeLike | None) -> Float[Array, " gates"]:
    W_xh, _, b_h = params
    return product(W_xh, as_feature(x, W_xh.shape[1], W_xh.dtype, "LSTM"), compute_dtype) + b_h


def _gates(a: Float[Array, " gates"]) -> LSTMGates:
    # One sigma over the whole block and then its parts: on a CPU half the time of sigma on each part.
    i, f, _, o = jnp.split(jax.nn.sigmoid(a), 4)
    return LSTMGates(i, f, jnp.tanh(jnp.split(a, 4)[2]), o)


def _gates_without_output(a: Float[Array, " gates"]) -> LSTMGates:
    """`_gates`, for where nobody reads the output gate: there the one sigma above falls apart again, this one not."""
    i, f, g, o = jnp.split(a, 4)
    i, f, o = sigmoids(i, f, o)
    return LSTMGates(i, f, jnp.tanh(g), o)


def _advance(state: LSTMState, gates: LSTMGates) -> tuple[LSTMState, Float[Array, " n"]]:
    i, f, g, o = gates
    c = f * state.c + i * g
    h = o * jnp.tanh(c)
    return LSTMState(h, c), h


def lstm_jacobian(
    params: LSTMParams, state: LSTMState, x: Float[Array, " d"], compute_dtype: DTypeLike | None = None
) -> Float[Array, "m m"]:
    """d(h_t, c_t)/d(h_{t-1}, c_{t-1}) in closed form.

        dc_t/dc = diag(f)    dc_t/dh = diag(c~ i') W_i + diag(c f') W_f + diag(i c~') W_c
        dh_t/dc = diag(o tanh'(c_t) f)    dh_t/dh = diag(o tanh'(c_t)) dc_t/dh + diag(tanh(c_t) o') W_o

    Args:
        params, state, x, compute_dtype: as for `lstm_step`.

    Returns:
        The matrix (m, m) over (h, c), m = 2n, without the product of matrices that automatic differentiation would do.

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.LSTMParams(jnp.zeros((4, 1)), jnp.zeros((4, 1)), jnp.zeros(4))
        >>> J = sj.lstm_jacobian(params, sj.LSTMState(jnp.zeros(1), jnp.zeros(1)), jnp.ones(1))
        >>> J.tolist()  # every gate is 1/2, and nothing reads h
        [[0.0, 0.25], [0.0, 0.5]]
    """
    i, f, g, o = lstm_gates(params, state, x, compute_dtype)
    c_tanh = jnp.tanh(f * state.c + i * g)
    # Each term over the columns (h, c) at once, so that the matrix is written in one pass and not put together.
    n = f.size
    W_i, W_f, W_c, W_o = (jnp.pad(W, ((0, 0), (0, n))) for W in jnp.split(rounded(params.W_hh, compute_dtype), 4))
    by_c = jnp.eye(n, 2 * n, n, dtype=f.dtype)
    by_i, by_f, by_g, by_o = g * i * (1 - i), state.c * f * (1 - f), i * (1 - g**2), c_tanh * o * (1 - o)
    of_c = by_i[:, None] * W_i + by_f[:, None] * W_f + by_g[:, None] * W_c + f[:, None] * by_c
    of_h = (o * (1 - c_tanh**2))[:, None] * of_c + by_o[:, None] * W_o
    return jnp.concatenate([of_h, of_c])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LSTM:
    """The LSTM cell, c_t = f * c_{t-1} + i * c~ and h_t = o * tanh(c_t).

    There is one bias a gate, as in the equations; torch keeps two, whose sum is this one.

    Args:
        input_size: d, features of one input.
        hidden_size: n, hidden units.
        forget_bias: b_f at the start; 1 keeps the forget gate open at sigma(1) = 0.73 (Jozefowicz et al. 2015).
        chrono: the longest span to remember, in steps; then b_f ~ ln U[1, chrono - 1] and b_i = -b_f, and
            `forget_bias` is not used (Tallec and Ollivier 2018).
        input_init: draws the input matrix of each gate.
        recurrent_init: draws the recurrent matrix of each gate.
        dtype: of the parameters, and so of the state.
        compute_dtype: of the operands of the matrix products, such as "bfloat16"; their sums, and so the state, keep
            `dtype`. None computes in `dtype` throughout.

    Raises:
        ValueError: a size is not positive, or `chrono` is below 3.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(3, 5)
        >>> state, outputs = sj.unroll(cell, cell.init(jax.random.key(0)), jnp.ones((2, 7, 3)))
        >>> outputs.shape, bool((outputs[:, -1] == state.h).all())
        ((2, 7, 5), True)
    """

    input_size: int
    hidden_size: int
    forget_bias: float = 1.0
    chrono: int | None = None
    input_init: Initializer = Glorot()
    recurrent_init: Initializer = Orthogonal()
    dtype: DTypeLike = "float32"
    compute_dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_fields(self, ("input_size", "hidden_size"))
        check_chrono(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,)"""
        return (self.input_size,)

    def init(self, key: Array) -> LSTMParams:
        """Draws each gate's matrices on its own, and the biases."""
        key_x, key_h, key_b = jax.random.split(key, 3)
        d, n = self.input_size, self.hidden_size
        if self.chrono is None:
            b_f, b_i = jnp.full(n, self.forget_bias, self.dtype), jnp.zeros(n, self.dtype)
        else:
            b_f = chrono_bias(key_b, n, self.chrono, self.dtype)
            b_i = -b_f
        return LSTMParams(
            W_xh=gate_matrices(self.input_init, key_x, 4, (n, d), self.dtype),
            W_hh=gate_matrices(self.recurrent_init, key_h, 4, (n, n), self.dtype),
            b_h=jnp.concatenate([b_i, b_f, jnp.zeros(2 * n, self.dtype)]),
        )

    def initial_state(self, params: LSTMParams) -> LSTMState:
        """h_0 = c_0 = 0."""
        zero = jnp.zeros_like(params.W_hh, shape=params.W_hh.shape[1])
        return LSTMState(zero, zero)

    def step(self, params: LSTMParams, state: LSTMState, x: Float[Array, " d"]) -> tuple[LSTMState, Float[Array, " n"]]:
        """`lstm_step`."""
        return lstm_step(params, state, x, self.compute_dtype)

    def drive(self, params: LSTMParams, x: Float[Array, " d"]) -> Float[Array, " gates"]:
        """The input half of the step, W_xh x_t + b_h."""
        return _drive(params, x, self.compute_dtype)

    def recur(self, params: LSTMParams, state: LSTMState) -> Float[Array, " gates"]:
        """The recurrent product, W_hh h_{t-1}."""
        return product(params.W_hh, state.h, self.compute_dtype)

    def advance(
        self, state: LSTMState, drive: Float[Array, " gates"], recurrent: Float[Array, " gates"]
    ) -> tuple[LSTMState, Float[Array, " n"]]:
        """The rest of the step: the gates of drive + recurrent, then c_t and h_t."""
        return _advance(state, _gates(drive + recurrent))

    def recalled(self, output: Float[Array, " n"]) -> LSTMState:
        """The output as a state: as good as the state for `recur`, which reads no c."""
        return LSTMState(output, jnp.zeros_like(output))

    def recalled_step(
        self, state: LSTMState, drive: Float[Array, " gates"], recurrent: Float[Array, " gates"]
    ) -> LSTMState:
        """The state of `advance`, where only c_t is wanted of it."""
        return _advance(state, _gates_without_output(drive + recurrent))[0]

    @property
    def native_loop(self) -> Callable[[LSTMParams], tuple[int, Array, None]] | None:
        """What `seqjax.native` runs: four gates, their recurrent weights, and no bias beside them."""
        return None if self.compute_dtype is not None else lambda params: (4, params.W_hh, None)

    def jacobian(self, params: LSTMParams, state: LSTMState, x: Float[Array, " d"]) -> Float[Array, "m m"]:
        """`lstm_jacobian`."""
        return lstm_jacobian(params, state, x, self.compute_dtype)

    def gates(self, params: LSTMParams, state: LSTMState, x: Float[Array, " d"]) -> dict[str, Array]:
        """The activations by name: input, forget, candidate, output."""
        return lstm_gates(params, state, x, self.compute_dtype)._asdict()
