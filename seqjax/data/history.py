"""The column names of a training history, which training writes and analysis reads."""

from __future__ import annotations

import jax
from jaxtyping import PyTree

LEAF_PREFIX = "grad_norm/"  # of the columns with the gradient norm of one leaf of the parameters


def leaf_names(params: PyTree) -> list[str]:
    """The path of every leaf, such as "cell.W_hh" or "cell.1.W_hh", in the order of the leaves."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    if len(set(names)) == len(names):
        return names
    # Simple paths can be equal: {"a": {"b": _}, "a.b": _} would have the name "a.b" twice.
    return [jax.tree_util.keystr(path) for path in paths]
