"""The long short-term memory (Hochreiter and Schmidhuber 1997; forget gate by Gers, Schmidhuber and Cummins 2000).

The update of the cell state is additive, c_t = f * c_{t-1} + i * c~. While the forget gate is near one, the gradient
therefore passes through many steps without a product of weight matrices.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.cell import as_feature
from seqjax.cells.arguments import check_recurrent
from seqjax.cells.fields import check_chrono, check_fields
from seqjax.cells.product import product
from seqjax.initializers import Glorot, Initializer, Orthogonal, chrono_bias, gate_matrices


class LSTMParams(NamedTuple):
    """Parameters of `lstm_step`; d inputs, n hidden units, four blocks of n rows in the order i, f, g, o."""

    W_xh: Float[Array, "4n d"]
    W_hh: Float[Array, "4n n"]
    b_h: Float[Array, " 4n"]


class LSTMState(NamedTuple):
    """The hidden state and the cell state: both are part of the state, and of every Jacobian."""

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
        compute_dtype: the dtype of the operands of the products, such as "bfloat16"; None for no conversion.

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
    check_recurrent("LSTM", 4, params, state, ("h", "c"))
    W_xh, W_hh, b_h = params
    x = as_feature(x, W_xh.shape[1], W_xh.dtype, "LSTM")
    # W_xh x + b_h is added first: it does not depend on the state, so it is computed for all steps before the loop.
    a = product(W_xh, x, compute_dtype) + b_h + product(W_hh, state.h, compute_dtype)
    i, f, g, o = jnp.split(a, 4)
    return LSTMGates(jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o))


def lstm_step(
    params: LSTMParams, state: LSTMState, x: Float[Array, " d"], compute_dtype: DTypeLike | None = None
) -> tuple[LSTMState, Float[Array, " n"]]:
    """One step of the LSTM.

        c_t = f * c_{t-1} + i * c~    h_t = o * tanh(c_t)

    Args:
        params: W_xh (4n, d), W_hh (4n, n), b_h (4n,), rows in the order i, f, c~, o.
        state: h_{t-1} and c_{t-1}, (n,) each.
        x: x_t (d,).
        compute_dtype: the dtype of the operands of the products, such as "bfloat16"; None for no conversion.

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
    i, f, g, o = lstm_gates(params, state, x, compute_dtype)
    c = f * state.c + i * g
    h = o * jnp.tanh(c)
    return LSTMState(h, c), h


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LSTM:
    """The LSTM cell, c_t = f * c_{t-1} + i * c~ and h_t = o * tanh(c_t).

    Each gate has one bias, as in the equations. The two biases of torch add up to this one.

    Args:
        input_size: d, features of one input.
        hidden_size: n, hidden units.
        forget_bias: the initial b_f; with 1, the forget gate starts near sigma(1) = 0.73 (Jozefowicz et al. 2015).
        chrono: the longest span to remember, in steps. If set, b_f ~ ln U[1, chrono - 1] and b_i = -b_f, and
            `forget_bias` is not used (Tallec and Ollivier 2018).
        input_init: draws the input matrix of each gate.
        recurrent_init: draws the recurrent matrix of each gate.
        dtype: the dtype of the parameters and of the state.
        compute_dtype: the dtype of the operands of the matrix products, such as "bfloat16". The sums of the products
            and the state have `dtype`. None for `dtype` everywhere.

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
        """Draws the matrices of each gate separately, and the biases."""
        key_x, key_h, key_b = jax.random.split(key, 3)
        d, n = self.input_size, self.hidden_size
        if self.chrono is None:
            b_f, b_i = jnp.full(n, self.forget_bias, self.dtype), jnp.zeros(n, self.dtype)
        else:
            b_f = chrono_bias(key_b, n, self.chrono, self.dtype)
            b_i = -b_f  # so that i = 1 - f at first, as in a leaky integrator
        return LSTMParams(
            W_xh=gate_matrices(self.input_init, key_x, 4, (n, d), self.dtype),
            W_hh=gate_matrices(self.recurrent_init, key_h, 4, (n, n), self.dtype),
            b_h=jnp.concatenate([b_i, b_f, jnp.zeros(2 * n, self.dtype)]),
        )

    def initial_state(self, params: LSTMParams) -> LSTMState:
        """h_0 = c_0 = 0."""
        # Not self.dtype: the parameters may have been cast since, and the state must have their dtype.
        zero = jnp.zeros_like(params.W_hh, shape=params.W_hh.shape[1])
        return LSTMState(zero, zero)

    def step(self, params: LSTMParams, state: LSTMState, x: Float[Array, " d"]) -> tuple[LSTMState, Float[Array, " n"]]:
        """`lstm_step`."""
        return lstm_step(params, state, x, self.compute_dtype)

    @property
    def gate_roles(self) -> dict[str, str]:
        """The roles of the gates, by the names that `gates` uses.

        The forget gate "keeps" c_{t-1}, and the output gate "reads" c_t. The input gate "writes" the "candidate", which
        is signed: a new value and not a switch. The input gate is independent of the forget gate: i is not 1 - f.
        """
        return {"input": "writes", "forget": "keeps", "candidate": "candidate", "output": "reads"}

    @property
    def memory(self) -> str:
        """The field of the state that the forget gate multiplies."""
        return "c"

    def gates(self, params: LSTMParams, state: LSTMState, x: Float[Array, " d"]) -> dict[str, Array]:
        """The gate activations by name: input, forget, candidate, output."""
        return lstm_gates(params, state, x, self.compute_dtype)._asdict()
