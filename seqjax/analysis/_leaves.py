"""The parameters that can be differentiated, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Params


def floating_leaves(params: Params) -> dict[str, Array]:
    """The floating-point leaves with something in them, by their place: "W_hh", "0.W_hh", or "params" for an array."""
    named = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "params": jnp.asarray(leaf)
        for path, leaf in named
        if _counts(leaf)
    }


def with_leaves(params: Params, leaves: Sequence[Array]) -> Params:
    """The parameters with other floating-point leaves, in the order of `floating_leaves`."""
    remaining = iter(leaves)
    return jax.tree.map(lambda leaf: next(remaining) if _counts(leaf) else leaf, params)


def _counts(leaf: Any) -> bool:
    leaf = jnp.asarray(leaf)
    return leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
