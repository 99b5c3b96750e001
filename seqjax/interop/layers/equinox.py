"""The module of equinox that unrolls a cell. `seqjax.as_equinox` builds it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from seqjax.cell import Output, Params, State
from seqjax.sequence.unroll import unroll


class CellLayer(eqx.Module):
    """Unrolls a cell.

    Attributes:
        params: the parameters of the cell.
        cell: the cell.
    """

    params: Params
    cell: Any = eqx.field(static=True)

    def __call__(
        self, xs: PyTree, state: State | None = None, *, mask: Any = None, reset: Any = None, **options: Any
    ) -> tuple[State, Output]:
        """`unroll`. The options are its other keyword arguments."""
        return unroll(self.cell, self.params, xs, state=state, mask=mask, reset=reset, **options)
