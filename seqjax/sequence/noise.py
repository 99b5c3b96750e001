"""The noise of a cell as an input, so that every function runs a noisy cell with the noise that was drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State, optional
from seqjax.sequence._checks import check_sequences
from seqjax.sequence._masked_step import Inputs, draw_noise


def with_noise(cell: Cell, xs: PyTree, key: Array) -> tuple[Cell, PyTree]:
    """Draws the noise of a cell for every step, and returns a deterministic cell that reads it as an input.

        step'(theta, s, (x, e)) = step(theta, s, x, e)

    `unroll` of the result equals `unroll` of the cell with this key. The functions that take no key, such as
    `trajectory`, `state_gradients` and the analyses, then see the noisy trajectory and its derivatives.

    Args:
        cell: any cell. One without a method `noise` is returned as it is, with its `xs`.
        xs: inputs, leaves (batch, time, ...).
        key: a random key.

    Returns:
        The cell, which has the same parameters and states, and its inputs (xs, noise), leaves (batch, time, ...). It
        does not name gates, because the gates of a step without noise are others.

    Raises:
        ValueError: a shape does not match.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.stack([sj.Dropout(2, 0.5), sj.VanillaRNN(2, 3)])
        >>> params, xs, key = cell.init(jax.random.key(0)), jnp.ones((1, 20, 2)), jax.random.key(1)
        >>> dropped, inputs = sj.with_noise(cell, xs, key)
        >>> bool((sj.unroll(dropped, params, inputs)[1] == sj.unroll(cell, params, xs, key=key)[1]).all())
        True
        >>> sj.trajectory(dropped, params, inputs)[1].h.shape  # of the second layer
        (1, 21, 3)
    """
    inputs = check_sequences(cell, Inputs(xs))
    noise = draw_noise(cell, key, inputs.batch, inputs.time)
    return (cell, inputs.x) if noise is None else (NoiseAsInput(cell), (inputs.x, noise))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoiseAsInput:
    """A cell whose input is the pair of another cell's input and noise."""

    cell: Cell

    @property
    def state_names(self) -> Any:
        """Those of the cell, or None."""
        return optional(self.cell, "state_names")

    def init(self, key: Array) -> Params:
        """The parameters of the cell."""
        return self.cell.init(key)

    def initial_state(self, params: Params) -> State:
        """The initial state of the cell."""
        return self.cell.initial_state(params)

    def step(self, params: Params, state: State, x: tuple[PyTree, PyTree]) -> tuple[State, Output]:
        """The step of the cell with its noise."""
        step: Any = self.cell.step
        return step(params, state, *x)
