"""Cells in layers: the output of each layer is the input of the next one, at the same time step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, NotOffered, Output, Params, State, inherited, optional, output_of, same_state_type
from seqjax.cells.arguments import described


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stack:
    """Several layers as one cell. Parameters and states are tuples with one entry per layer. Built by `stack`."""

    cells: tuple[Any, ...]  # of cells; Any, because `Cell` does not declare the optional attributes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The input shape of the first layer."""
        return inherited(self.cells[0], "input_shape")

    @property
    def hidden_size(self) -> int | None:
        """The length of the last layer's output; None if that layer does not declare it."""
        return output_size(self.cells[-1])

    def init(self, key: Array) -> tuple[Params, ...]:
        """Draws the parameters of each layer from its own key."""
        return tuple(cell.init(k) for cell, k in zip(self.cells, jax.random.split(key, len(self.cells)), strict=True))

    def initial_state(self, params: tuple[Params, ...]) -> tuple[State, ...]:
        """The initial state of each layer."""
        return tuple(cell.initial_state(p) for cell, p in zip(self.cells, params, strict=True))

    def step(
        self, params: tuple[Params, ...], state: tuple[State, ...], x: PyTree, noise: tuple[PyTree, ...] | None = None
    ) -> tuple[tuple[State, ...], Output]:
        """One step of all layers; the output is that of the last layer."""
        new_state = []
        noise = (None,) * len(self.cells) if noise is None else noise
        for cell, p, s, drawn in zip(self.cells, params, state, noise, strict=True):
            new_s, x = output_of(cell, cell.step(p, s, x) if drawn is None else cell.step(p, s, x, drawn))
            # Checked per layer, so that the message names the layer's class and not Stack.
            new_state.append(same_state_type(cell, new_s, s))
        return tuple(new_state), x

    @property
    def state_names(self) -> tuple[PyTree, ...]:
        """The names of the states of the layers that declare them, with the number of the layer, such as "0.h"."""
        declared = [optional(cell, "state_names") for cell in self.cells]
        if all(names is None for names in declared):
            raise NotOffered("no layer of this stack names its state")
        return tuple(
            jax.tree.map(lambda name, layer=layer: f"{layer}.{name}", names) for layer, names in enumerate(declared)
        )

    # A property that returns a method, because a stack of layers without noise must not have the attribute at all.
    @property
    def noise(self) -> Callable[[Array], tuple[PyTree, ...]]:
        """Draws the noise of every layer that has some; None for the other layers."""
        if all(optional(cell, "noise") is None for cell in self.cells):
            raise NotOffered("no layer of this stack draws noise")
        return self._noise

    def _noise(self, key: Array) -> tuple[PyTree, ...]:
        keys = jax.random.split(key, len(self.cells))
        draws = [optional(cell, "noise") for cell in self.cells]
        return tuple(None if draw is None else draw(k) for draw, k in zip(draws, keys, strict=True))

    @property
    def gates(self) -> Callable[[Params, State, PyTree], dict[str, Array]]:
        """The gates of every layer that names them, by names such as "0/forget"."""
        if all(optional(cell, "gates") is None for cell in self.cells):
            raise NotOffered("no layer of this stack names its gates")
        return self._gates

    def _gates(self, params: tuple[Params, ...], state: tuple[State, ...], x: PyTree) -> dict[str, Array]:
        named = {}
        for layer, (cell, p, s) in enumerate(zip(self.cells, params, state, strict=True)):
            gates = optional(cell, "gates")
            if gates is not None:
                named |= {f"{layer}/{name}": gate for name, gate in gates(p, s, x).items()}
            _, x = cell.step(p, s, x)
        return named

    @property
    def gate_roles(self) -> dict[str, str]:
        """The roles of the gates of every layer that declares them, by the names that `gates` uses: "0/forget"."""
        declared = [optional(cell, "gate_roles") for cell in self.cells]
        if all(roles is None for roles in declared):
            raise NotOffered("no layer of this stack declares the roles of its gates")
        return {f"{layer}/{name}": role for layer, roles in enumerate(declared) for name, role in (roles or {}).items()}


def output_size(cell: Cell) -> int | None:
    """The length of a cell's output, if the cell declares it as `hidden_size` or, without a state, as `features`."""
    return optional(cell, "hidden_size") or optional(cell, "features")


def stack(cells: Sequence[Cell]) -> Stack:
    """Combines several layers into one cell, x_t -> cell 1 -> ... -> cell L.

    Args:
        cells: the layers, starting at the input. Each layer reads the output of the layer below it.

    Returns:
        A cell whose parameters and state are tuples with one entry per layer.

    Raises:
        ValueError: there is no cell, or the input size of a layer is not the output size of the layer below it.
        TypeError: an entry is not a cell.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.stack([sj.Embedding(10, 4), sj.LSTM(4, 6), sj.GRU(6, 5)])
        >>> state, outputs = sj.unroll(cell, cell.init(jax.random.key(0)), jnp.zeros((2, 7), int))
        >>> outputs.shape, len(state)
        ((2, 7, 5), 3)
    """
    if not isinstance(cells, Iterable) or hasattr(cells, "ndim"):
        raise TypeError(f"expected a list of cells, got {described(cells)}: stack([LSTM(8, 64), GRU(64, 32)])")
    cells = tuple(cells)
    if not cells:
        raise ValueError("expected at least one cell in a stack, got none: stack([LSTM(8, 64)])")
    for layer, cell in enumerate(cells):
        if isinstance(cell, type) or not isinstance(cell, Cell):
            got = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
            raise TypeError(
                f"expected cells in a stack, got {got} as entry {layer}: "
                f"a cell has the methods init, initial_state and step"
            )
    for layer, (below, above) in enumerate(itertools.pairwise(cells)):
        size, shape = output_size(below), optional(above, "input_shape")
        # A cell need not declare its sizes; the first step then reports a mismatch.
        if size is not None and shape is not None and shape != (size,):
            raise ValueError(
                f"expected layer {layer + 1} of the stack to read the {size} features that layer {layer} gives, "
                f"got {above!r}: set its input_size to {size}"
            )
    return Stack(cells)
