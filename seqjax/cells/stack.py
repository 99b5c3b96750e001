"""Cells above one another: the output of each is the input of the next, at the same time step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, output_of, same_state_type


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers as one cell; parameters and states are tuples with one entry for each layer. Built by `stack`."""

    cells: tuple[Any, ...]  # of cells

    @property
    def input_shape(self) -> tuple[int, ...]:
        """That of the first layer."""
        return self.cells[0].input_shape

    @property
    def hidden_size(self) -> int | None:
        """The length of the last layer's output."""
        return features_given(self.cells[-1])

    def init(self, key: Array) -> tuple[PyTree, ...]:
        """Each layer's parameters, from a key of its own."""
        return tuple(cell.init(k) for cell, k in zip(self.cells, jax.random.split(key, len(self.cells)), strict=True))

    def initial_state(self, params: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """Each layer's initial state."""
        return tuple(cell.initial_state(p) for cell, p in zip(self.cells, params, strict=True))

    def step(
        self, params: tuple[PyTree, ...], state: tuple[PyTree, ...], x: PyTree, noise: tuple[PyTree, ...] | None = None
    ) -> tuple[tuple[PyTree, ...], PyTree]:
        """All layers at one time; the output is that of the last."""
        new_state = []
        noise = (None,) * len(self.cells) if noise is None else noise
        for cell, p, s, drawn in zip(self.cells, params, state, noise, strict=True):
            new_s, x = output_of(cell, cell.step(p, s, x) if drawn is None else cell.step(p, s, x, drawn))
            new_state.append(same_state_type(cell, new_s, s))
        return tuple(new_state), x

    @property
    def noise(self) -> Callable[[Array], tuple[PyTree, ...]]:
        """The noise of every layer that draws some, None for the others."""
        if not any(hasattr(cell, "noise") for cell in self.cells):
            raise AttributeError("no layer of this stack draws noise")
        return self._noise

    def _noise(self, key: Array) -> tuple[PyTree, ...]:
        keys = jax.random.split(key, len(self.cells))
        return tuple(
            cell.noise(k) if hasattr(cell, "noise") else None for cell, k in zip(self.cells, keys, strict=True)
        )

    @property
    def gates(self) -> Callable[[Any, Any, Any], dict[str, Array]]:
        """The gates of every layer that has some, by names such as "0/forget"."""
        if not any(hasattr(cell, "gates") for cell in self.cells):
            raise AttributeError("no layer of this stack names its gates")
        return self._gates

    def _gates(self, params: tuple[PyTree, ...], state: tuple[PyTree, ...], x: PyTree) -> dict[str, Array]:
        named = {}
        for layer, (cell, p, s) in enumerate(zip(self.cells, params, state, strict=True)):
            if hasattr(cell, "gates"):
                named |= {f"{layer}/{name}": gate for name, gate in cell.gates(p, s, x).items()}
            _, x = cell.step(p, s, x)
        return named


def features_given(cell: Cell) -> int | None:
    """The length of a cell's output, where the cell says it."""
    return getattr(cell, "hidden_size", None) or getattr(cell, "features", None)


def stack(cells: Sequence[Cell]) -> Stack:
    """Puts cells above one another, x_t -> cell 1 -> ... -> cell L, as one cell.

    Args:
        cells: from the input upwards; each reads the output of the one below.

    Returns:
        A cell whose parameters and state are tuples with one entry for each layer.

    Raises:
        ValueError: there is no cell, or one layer reads another number of features than the one below gives.
        TypeError: an entry is not a cell.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.stack([sj.Embedding(10, 4), sj.LSTM(4, 6), sj.GRU(6, 5)])
        >>> state, outputs = sj.unroll(cell, cell.init(jax.random.key(0)), jnp.zeros((2, 7), int))
        >>> outputs.shape, len(state)
        ((2, 7, 5), 3)
    """
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
        gives, reads = features_given(below), getattr(above, "input_shape", None)
        if gives is not None and reads is not None and reads != (gives,):
            raise ValueError(
                f"expected layer {layer + 1} of the stack to read the {gives} features that layer {layer} gives, "
                f"got {above!r}: set its input_size to {gives}"
            )
    return Stack(cells)
