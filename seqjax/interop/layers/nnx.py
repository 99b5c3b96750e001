"""The module of flax.nnx that unrolls a cell. `seqjax.as_nnx` builds it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from seqjax.cell import Cell, Output, Params, State
from seqjax.interop.layers._nested import from_nested, nested
from seqjax.sequence.unroll import unroll


class CellLayer(nnx.Module):
    """Unrolls a cell; `weights` are its parameters as `nnx.Param`s in nested dictionaries."""

    def __init__(self, cell: Cell, rngs: nnx.Rngs) -> None:
        self.cell = nnx.static(cell)
        self.weights = nnx.data(jax.tree.map(nnx.Param, nested(cell.init(rngs.params()))))

    def __call__(
        self,
        xs: PyTree,
        state: State | None = None,
        *,
        mask: Any = None,
        reset: Any = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> tuple[State, Output]:
        """`unroll`. The options are its other keyword arguments."""
        if rngs is not None:
            options = {"key": rngs.dropout(), **options}
        return unroll(self.cell, self.params, xs, state=state, mask=mask, reset=reset, **options)

    @property
    def params(self) -> Params:
        """The parameters of the cell."""
        values = jax.tree.map(lambda p: p[...], self.weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
        return from_nested(self.cell, values)
