"""Pooling: one vector from all outputs of a sequence, for a many-to-one readout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.cells.arguments import as_arrays
from seqjax.sequence._checks import check_flags


def last_valid(outputs: PyTree, mask: Bool[Any, "batch time"] | None = None) -> PyTree:
    """The output of each sequence's last valid step, h_{T_b}.

    Args:
        outputs: leaves (batch, time, ...).
        mask: True at valid steps, in any pattern; by default all steps are valid.

    Returns:
        Leaves (batch, ...); zero for a sequence without a valid step.

    Raises:
        ValueError: (batch, time) differs between mask and outputs.
        TypeError: the mask is not boolean.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> sj.last_valid(jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[True, True, False]])).tolist()
        [[2.0]]
    """

    def one(mask: Array | None, leaf: Array) -> Array:
        if not leaf.shape[0]:
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        if mask is None:
            return leaf[-1]
        # argmax returns the first True, so on the reversed mask it finds the last one.
        last = leaf.shape[0] - 1 - jnp.argmax(mask[::-1])
        return jnp.where(jnp.any(mask), leaf[last], jnp.zeros_like(leaf[last]))

    return _pool(one, outputs, mask)


def masked_mean(outputs: PyTree, mask: Bool[Any, "batch time"] | None = None) -> PyTree:
    """The mean output over each sequence's valid steps, sum_t M_t h_t / sum_t M_t.

    Args:
        outputs: leaves (batch, time, ...).
        mask: True at valid steps; by default all steps are valid.

    Returns:
        Leaves (batch, ...); zero for a sequence without a valid step.

    Raises:
        ValueError, TypeError: as for `last_valid`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> sj.masked_mean(jnp.array([[[1.0], [2.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
        [[1.5]]
    """

    def one(mask: Array | None, leaf: Array) -> Array:
        if mask is None:
            return jnp.sum(leaf, axis=0) / max(leaf.shape[0], 1)
        total = jnp.sum(_where_valid(mask, leaf, 0.0), axis=0)
        return total / jnp.maximum(jnp.sum(mask), 1).astype(leaf.dtype)

    return _pool(one, outputs, mask)


def masked_max(outputs: PyTree, mask: Bool[Any, "batch time"] | None = None) -> PyTree:
    """The largest output of each feature over each sequence's valid steps, max_{t: M_t} h_t.

    Args:
        outputs: leaves (batch, time, ...).
        mask: True at valid steps; by default all steps are valid.

    Returns:
        Leaves (batch, ...); zero for a sequence without a valid step.

    Raises:
        ValueError, TypeError: as for `last_valid`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> sj.masked_max(jnp.array([[[-1.0], [-2.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
        [[-1.0]]
    """

    def one(mask: Array | None, leaf: Array) -> Array:
        if not leaf.shape[0]:  # jnp.max refuses an empty axis
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        if mask is None:
            return jnp.max(leaf, axis=0)
        largest = jnp.max(_where_valid(mask, leaf, -jnp.inf), axis=0, initial=-jnp.inf)
        return jnp.where(jnp.any(mask), largest, jnp.zeros_like(largest))

    return _pool(one, outputs, mask)


def _where_valid(mask: Array, leaf: Float[Array, "time ..."], otherwise: float) -> Array:
    return jax.vmap(lambda valid, at_t: jnp.where(valid, at_t, jnp.full_like(at_t, otherwise)))(mask, leaf)


def _pool(one: Callable[[Array | None, Array], Array], outputs: PyTree, mask: ArrayLike | None) -> PyTree:
    """Maps `one`, which pools one leaf of one sequence, over leaves and batch."""
    outputs = as_arrays("outputs", outputs)
    if not jax.tree.leaves(outputs):
        raise ValueError("expected outputs (batch, time, ...), got no array: pool the outputs of unroll")
    for leaf in jax.tree.leaves(outputs):
        if leaf.ndim < 2:
            raise ValueError(f"expected outputs (batch, time, ...), got {leaf.shape}: pool the outputs of unroll")
    batch, time = jax.tree.leaves(outputs)[0].shape[:2]
    mask = check_flags("mask", mask, batch, time)
    return jax.vmap(lambda row, out: jax.tree.map(lambda leaf: one(row, leaf), out))(mask, outputs)
