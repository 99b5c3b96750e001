"""The vanilla recurrent network: h_t = phi(W_xh x_t + W_hh h_{t-1} + b_h)  (Elman 1990)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.cell import as_feature
from seqjax.cells.arguments import check_choice, check_recurrent
from seqjax.cells.fields import check_fields
from seqjax.cells.product import product
from seqjax.initializers import Glorot, Initializer, Orthogonal

Activation = Literal["tanh", "relu", "identity"]
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "identity": lambda a: a}


class VanillaParams(NamedTuple):
    """Parameters of `vanilla_step`; d inputs, n hidden units."""

    W_xh: Float[Array, "n d"]
    W_hh: Float[Array, "n n"]
    b_h: Float[Array, " n"]


class VanillaState(NamedTuple):
    """The hidden state."""

    h: Float[Array, " n"]


def vanilla_step(
    params: VanillaParams,
    state: VanillaState,
    x: Float[Array, " d"],
    activation: Activation = "tanh",
    compute_dtype: DTypeLike | None = None,
) -> tuple[VanillaState, Float[Array, " n"]]:
    """One step of the vanilla network, h_t = phi(W_xh x_t + W_hh h_{t-1} + b_h).

    Args:
        params: W_xh (n, d), W_hh (n, n), b_h (n,).
        state: h_{t-1} (n,).
        x: x_t (d,).
        activation: phi, one of "tanh", "relu", "identity".
        compute_dtype: the dtype of the operands of the products, such as "bfloat16"; None for no conversion.

    Returns:
        The new state and the output, which is h_t (n,).

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Source: Elman 1990, "Finding structure in time".

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.VanillaParams(W_xh=jnp.array([[1.0]]), W_hh=jnp.array([[0.5]]), b_h=jnp.array([0.1]))
        >>> state, output = sj.vanilla_step(params, sj.VanillaState(jnp.array([0.4])), jnp.array([0.2]))
        >>> round(float(output[0]), 4)  # tanh(0.2 + 0.5 * 0.4 + 0.1)
        0.4621
    """
    check_recurrent("VanillaRNN", 1, params, state, ("h",))
    check_choice("activation", activation, tuple(ACTIVATIONS))
    W_xh, W_hh, b_h = params
    x = as_feature(x, W_xh.shape[1], W_xh.dtype, "VanillaRNN")
    # W_xh x + b_h is added first: it does not depend on the state, so it is computed for all steps before the loop.
    a = product(W_xh, x, compute_dtype) + b_h + product(W_hh, state.h, compute_dtype)
    h = ACTIVATIONS[activation](a)
    return VanillaState(h), h


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class VanillaRNN:
    """The vanilla recurrent cell, h_t = phi(W_xh x_t + W_hh h_{t-1} + b_h).

    Args:
        input_size: d, features of one input.
        hidden_size: n, hidden units.
        activation: phi, one of "tanh", "relu", "identity".
        input_init: draws W_xh.
        recurrent_init: draws W_hh; `sj.SpectralRadius(0.9)` sets the modulus of its largest eigenvalue.
        dtype: the dtype of the parameters and of the state.
        compute_dtype: the dtype of the operands of the matrix products, such as "bfloat16". The sums of the products
            and the state have `dtype`. None for `dtype` everywhere.

    Raises:
        ValueError: a size is not positive, or the activation is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(3, 5, activation="relu")
        >>> state, outputs = sj.unroll(cell, cell.init(jax.random.key(0)), jnp.ones((2, 7, 3)))
        >>> outputs.shape, float(outputs.min()) >= 0
        ((2, 7, 5), True)
    """

    input_size: int
    hidden_size: int
    activation: Activation = "tanh"
    input_init: Initializer = Glorot()
    recurrent_init: Initializer = Orthogonal()
    dtype: DTypeLike = "float32"
    compute_dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_fields(self, ("input_size", "hidden_size"), activation=tuple(ACTIVATIONS))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,)"""
        return (self.input_size,)

    def init(self, key: Array) -> VanillaParams:
        """Draws W_xh and W_hh; b_h is zero."""
        key_x, key_h = jax.random.split(key)
        d, n = self.input_size, self.hidden_size
        return VanillaParams(
            W_xh=self.input_init(key_x, (n, d), self.dtype),
            W_hh=self.recurrent_init(key_h, (n, n), self.dtype),
            b_h=jnp.zeros(n, self.dtype),
        )

    def initial_state(self, params: VanillaParams) -> VanillaState:
        """h_0 = 0."""
        return VanillaState(jnp.zeros_like(params.b_h))

    def step(
        self, params: VanillaParams, state: VanillaState, x: Float[Array, " d"]
    ) -> tuple[VanillaState, Float[Array, " n"]]:
        """`vanilla_step` with this cell's activation."""
        return vanilla_step(params, state, x, self.activation, self.compute_dtype)
