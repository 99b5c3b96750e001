"""The parameters that can be differentiated, by name."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from seqjax.cell import Params


def floating_leaves(params: Params) -> dict[str, Array]:
    """The non-empty floating-point leaves by their path, such as "W_hh" or "0.W_hh"; "params" for a single array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "params": jnp.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if _is_differentiable(leaf)
    }


def with_leaves(params: Params, leaves: Sequence[Array]) -> Params:
    """The parameters with other floating-point leaves, in the order of `floating_leaves`."""
    remaining = iter(leaves)
    return jax.tree.map(lambda leaf: next(remaining) if _is_differentiable(leaf) else leaf, params)


def _is_differentiable(leaf: ArrayLike) -> bool:
    leaf = jnp.asarray(leaf)
    return leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
