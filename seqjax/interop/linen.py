"""flax-linen cells: `module.apply(variables, carry, x)` already has the signature of `step`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Output, Params, State
from seqjax.interop.common import as_input, carry_names, cast_like, kind_of, like_parameters


def from_linen(module: Any, input_size: int) -> LinenCell:
    """Adapts a flax-linen recurrent cell, such as `flax.linen.LSTMCell(64)`.

    Args:
        module: a `flax.linen.RNNCellBase`; its variables, `module.init(...)`, are the parameters.
        input_size: features of one input.

    Returns:
        A cell whose step is `module.apply`.

    Raises:
        TypeError: `module` is not a linen recurrent cell.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, seqjax as sj
        >>> cell = sj.from_linen(nn.GRUCell(6), input_size=3)
        >>> state, outputs = sj.unroll(cell, cell.init(jax.random.key(0)), jnp.ones((2, 4, 3)))
        >>> outputs.shape, state.shape
        ((2, 4, 6), (2, 6))
    """
    from flax import linen

    if not isinstance(module, linen.RNNCellBase):
        raise TypeError(
            f"expected a flax.linen cell such as flax.linen.LSTMCell(64), got {kind_of(module)}: "
            f"for a flax.nnx or an equinox cell use sj.from_nnx or sj.from_equinox"
        )
    return LinenCell(module, input_size)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LinenCell:
    """A flax-linen cell; the parameters are its variables. Built by `from_linen`."""

    module: Any
    input_size: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,)"""
        return (self.input_size,)

    @property
    def state_names(self) -> str | tuple[str, str]:
        """(c, h) for an LSTM cell, and h for other cells of flax."""
        return carry_names(type(self.module), "flax.linen")

    def init(self, key: Array) -> Params:
        """The initialization of the module."""
        key_params, key_carry = jax.random.split(key)
        carry = self.module.initialize_carry(key_carry, self.input_shape)
        return self.module.init(key_params, carry, like_parameters(jnp.zeros(self.input_size), carry))

    def initial_state(self, params: Params) -> State:
        """The module's `initialize_carry`, in the dtype of the parameters."""
        return like_parameters(self.module.initialize_carry(jax.random.key(0), (self.input_size,)), params)

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """`module.apply(params, state, x)`."""
        new_state, output = self.module.apply(params, state, as_input(x, params))
        return cast_like(new_state, state), output
