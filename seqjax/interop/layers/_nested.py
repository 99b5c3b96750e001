"""The parameters of a cell as nested dictionaries, which the trees of flax are made of."""

from __future__ import annotations

from typing import Any

import jax
from flax import serialization

from seqjax.cell import Cell, Params


def nested(params: Params) -> Any:
    """The parameters with a dictionary in place of every NamedTuple, tuple and list."""
    return serialization.to_state_dict(params)


def from_nested(cell: Cell, tree: Any) -> Params:
    """The parameters that `nested` wrote, in the containers that the cell draws."""
    return serialization.from_state_dict(jax.eval_shape(lambda: cell.init(jax.random.key(0))), tree)
