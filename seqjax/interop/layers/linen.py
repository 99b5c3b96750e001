"""The module of flax.linen that unrolls a cell. `seqjax.as_linen` builds it."""

from __future__ import annotations

from typing import Any

from flax import linen
from jaxtyping import PyTree

from seqjax.cell import Output, Params, State, optional
from seqjax.interop.layers._nested import from_nested, nested
from seqjax.sequence.unroll import unroll


class CellLayer(linen.Module):
    """Unrolls a cell; its only parameter is "cell", the parameters of the cell as nested dictionaries."""

    cell: Any

    @linen.compact
    def __call__(
        self, xs: PyTree, state: State | None = None, *, mask: Any = None, reset: Any = None, **options: Any
    ) -> tuple[State, Output]:
        """`unroll`. The options are its other keyword arguments."""
        drawn = self.param("cell", lambda key: nested(self.cell.init(key)))
        if optional(self.cell, "noise") is not None and self.has_rng("dropout"):
            options = {"key": self.make_rng("dropout"), **options}
        return unroll(self.cell, from_nested(self.cell, drawn), xs, state=state, mask=mask, reset=reset, **options)

    def params_from(self, variables: Any) -> Params:
        """The parameters of the cell from the variables of this layer, {"params": {"cell": ...}}."""
        return from_nested(self.cell, variables["params"]["cell"])
