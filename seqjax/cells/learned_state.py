"""A learned initial state for any cell: h_0 is an ordinary parameter and has a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from seqjax.cell import Output, Params, State, inherited, strong_type


class LearnedStateParams(NamedTuple):
    """The cell's own parameters, and its initial state."""

    cell: Params
    state: State


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LearnedState:
    """A cell whose initial state is a parameter. It starts as the initial state of the inner cell.

    Args:
        cell: the inner cell; its state must be floating-point so that the gradient exists.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LearnedState(sj.GRU(3, 5))
        >>> params = cell.init(jax.random.key(0))
        >>> loss = lambda params: sj.unroll(cell, params, jnp.ones((2, 7, 3)))[1].sum()
        >>> bool((jax.grad(loss)(params).state.h != 0).all())
        True
    """

    cell: Any  # a cell; Any, because `Cell` does not declare the optional attributes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The input shape of the inner cell."""
        return inherited(self.cell, "input_shape")

    @property
    def hidden_size(self) -> int:
        """The hidden size of the inner cell."""
        return inherited(self.cell, "hidden_size")

    @property
    def input_size(self) -> int:
        """The input size of the inner cell."""
        return inherited(self.cell, "input_size")

    def init(self, key: Array) -> LearnedStateParams:
        """Draws the parameters of the inner cell, and adds its initial state to them."""
        params = self.cell.init(key)
        # A weakly typed parameter would change its type in the first optimizer update and compile training twice.
        return LearnedStateParams(params, strong_type(self.cell.initial_state(params)))

    def initial_state(self, params: LearnedStateParams) -> State:
        """The learned state."""
        return params.state

    def step(self, params: LearnedStateParams, state: State, x: PyTree, *noise: PyTree) -> tuple[State, Output]:
        """The step of the inner cell."""
        return self.cell.step(params.cell, state, x, *noise)

    @property
    def state_names(self) -> PyTree:
        """The names of the inner cell's state, if it declares them."""
        return inherited(self.cell, "state_names")

    @property
    def noise(self) -> Callable[[Array], PyTree]:
        """The noise of the inner cell, if it draws some."""
        return inherited(self.cell, "noise")

    @property
    def gates(self) -> Callable[[LearnedStateParams, State, PyTree], dict[str, Array]]:
        """The gates of the inner cell, if it names them."""
        gates = inherited(self.cell, "gates")
        return lambda params, state, x: gates(params.cell, state, x)

    @property
    def gate_roles(self) -> dict[str, str]:
        """The roles of the inner cell's gates, if it declares them, by the same names."""
        return inherited(self.cell, "gate_roles")
