"""A learned initial state for any cell: h_0 as an ordinary parameter with a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from seqjax.cell import closed_form_jacobian, in_parts, native_loop, recalled, recalled_step, strong_type


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
    def drive(self) -> Callable[[Any, Any], PyTree]:
        """The input half of the cell's step, where it offers its parts."""
        drive = self._part("drive")
        return lambda params, x: drive(params.cell, x)

    @property
    def recur(self) -> Callable[[Any, Any], PyTree]:
        """The recurrent product of the cell's step, where it offers its parts."""
        recur = self._part("recur")
        return lambda params, state: recur(params.cell, state)

    @property
    def advance(self) -> Callable[[Any, Any, Any], tuple[PyTree, PyTree]]:
        """The rest of the cell's step, where it offers its parts."""
        return self._part("advance")

    @property
    def inner(self) -> Callable[[Any, Any, Any], PyTree]:
        """What a second product inside the cell's step takes, where there is one."""
        return self.cell.inner

    @property
    def recur_inner(self) -> Callable[[Any, Any], PyTree]:
        """The second product inside the cell's step, where there is one."""
        recur_inner = self.cell.recur_inner
        return lambda params, v: recur_inner(params.cell, v)

    @property
    def recalled(self) -> Callable[[Any], PyTree]:
        """The cell's output as a state, where that is enough for its recurrent product."""
        return _offered(recalled(self.cell), "recalled")

    @property
    def recalled_step(self) -> Callable[[Any, Any, Any], PyTree]:
        """What finds the rest of a recalled state."""
        return recalled_step(self.cell)

    @property
    def native_loop(self) -> Callable[[Any], tuple[int, Array, Array | None]] | None:
        """What `seqjax.native` runs of the cell, where it does."""
        loop = native_loop(self.cell)
        return None if loop is None else lambda params: loop(params.cell)

    @property
    def noise(self) -> Callable[[Array], PyTree]:
        """The cell's noise, where it draws some."""
        return self.cell.noise

    @property
    def gates(self) -> Callable[[Any, Any, Any], dict[str, Array]]:
        """The cell's gates, where it names them."""
        gates = self.cell.gates
        return lambda params, state, x: gates(params.cell, state, x)

    @property
    def jacobian(self) -> Callable[[Any, Any, Any], Array]:
        """The cell's closed form of ds_t/ds_{t-1}, where it has one."""
        jacobian = _offered(closed_form_jacobian(self.cell), "jacobian")
        return lambda params, state, x: jacobian(params.cell, state, x)

    def _part(self, name: str) -> Callable[..., Any]:
        return _offered(getattr(self.cell, name) if in_parts(self.cell) else None, name)


def _offered(part: Callable[..., Any] | None, name: str) -> Callable[..., Any]:
    """A part of the cell; where it has none, neither has the cell with a learned state."""
    if part is None:
        raise AttributeError(f"the cell offers no {name} for its step")
    return part
