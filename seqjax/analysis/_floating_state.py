"""A cell whose state has only the floating-point leaves of another cell's state.

A counter or a random key in the state has no derivative. Its values along the trajectory do not depend on a small
perturbation of the other leaves, so an analysis computes them once and reads them as inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State, inherited
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._masked_step import Inputs, emit_nothing, masked_step


@dataclasses.dataclass(frozen=True)
class FloatingState:
    """`cell` with None for all leaves of the state that are not floating-point; its input is (x, these leaves)."""

    cell: Cell

    @property
    def state_names(self) -> Any:
        """Those of the cell."""
        return inherited(self.cell, "state_names")

    def init(self, key: Array) -> Params:
        """The parameters of the cell."""
        return self.cell.init(key)

    def initial_state(self, params: Params) -> State:
        """The floating-point leaves of the initial state."""
        return _divide(self.cell.initial_state(params))[0]

    def step(self, params: Params, state: State, x: tuple[PyTree, PyTree]) -> tuple[State, Output]:
        """The step of the cell, from both kinds of leaves."""
        x, rest = x
        after, output = self.cell.step(params, merge(state, rest), x)
        return _divide(after)[0], output


def with_floating_state(cell: Cell, params: Params, states: State, inputs: Inputs) -> tuple[Cell, State, Inputs]:
    """Moves the leaves of the state that are not floating-point from the state to the inputs.

    Args:
        cell, params: any cell.
        states: before the first step, leaves (batch, ...).
        inputs: leaves (batch, time, ...).

    Returns:
        The cell, the states and the inputs with the other leaves before each step as part of x.
    """
    rest = precise_jit(_rest_of_states, cell)(params, states, inputs)
    return FloatingState(cell), _divide(states)[0], inputs._replace(x=(inputs.x, rest))


def _rest_of_states(cell: Cell, params: Params, states: State, inputs: Inputs) -> PyTree:
    """The leaves that are not floating-point, before each step and after its reset, (batch, time, ...)."""
    initial = _divide(cell.initial_state(params))[1]

    def of_sequence(state: State, inputs: Inputs) -> PyTree:
        def body(state: State, at: Inputs) -> tuple[State, PyTree]:
            before = _divide(state)[1]
            restart = at.reset
            if restart is not None:
                before = jax.tree.map(lambda new, old: jnp.where(restart, new, old), initial, before)
            return masked_step(cell, params, state, at, emit_nothing)[0], before

        return jax.lax.scan(body, state, inputs)[1]

    return jax.vmap(of_sequence)(states, inputs)


def _divide(state: State) -> tuple[State, State]:
    """The same tree twice: with the floating-point leaves only, and with the other leaves only; None elsewhere."""

    def is_floating(leaf: Any) -> bool:
        return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)

    return (
        jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, state),
        jax.tree.map(lambda leaf: None if is_floating(leaf) else leaf, state),
    )


def merge(floating: State, rest: State) -> State:
    """The whole state from its two parts."""
    return jax.tree.map(lambda a, b: b if a is None else a, floating, rest, is_leaf=lambda leaf: leaf is None)
