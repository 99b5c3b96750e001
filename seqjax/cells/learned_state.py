"""A learned initial state for any cell: h_0 as an ordinary parameter with a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from seqjax.cell import strong_type


class LearnedStateParams(NamedTuple):
    """The cell's own parameters, and its initial state."""

    cell: PyTree
    state: PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LearnedState:
    """Any cell, with its initial state among the parameters. It begins at the cell's own initial state.

    Args:
        cell: the cell; its state must hold floating-point numbers for the gradient to exist.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LearnedState(sj.GRU(3, 5))
        >>> params = cell.init(jax.random.key(0))
        >>> loss = lambda params: sj.unroll(cell, params, jnp.ones((2, 7, 3)))[1].sum()
        >>> bool((jax.grad(loss)(params).state.h != 0).all())
        True
    """

    cell: Any

    @property
    def input_shape(self) -> tuple[int, ...]:
        """That of the cell."""
        return self.cell.input_shape

    @property
    def hidden_size(self) -> int:
        """That of the cell."""
        return self.cell.hidden_size

    @property
    def input_size(self) -> int:
        """That of the cell."""
        return self.cell.input_size

    def init(self, key: Array) -> LearnedStateParams:
        """The cell's parameters, and its initial state as one more."""
        params = self.cell.init(key)
        return LearnedStateParams(params, strong_type(self.cell.initial_state(params)))

    def initial_state(self, params: LearnedStateParams) -> PyTree:
        """The learned one."""
        return params.state

    def step(self, params: LearnedStateParams, state: PyTree, x: PyTree, *noise: PyTree) -> tuple[PyTree, PyTree]:
        """The cell's step."""
        return self.cell.step(params.cell, state, x, *noise)

    @property
    def noise(self) -> Callable[[Array], PyTree]:
        """The cell's noise, where it draws some."""
        return self.cell.noise

    @property
    def gates(self) -> Callable[[Any, Any, Any], dict[str, Array]]:
        """The cell's gates, where it names them."""
        gates = self.cell.gates
        return lambda params, state, x: gates(params.cell, state, x)
