"""The objectives of training: one number from the outputs of a cell and the targets of a batch.

An objective is a function of (head, parameters of the head, outputs, targets, mask). It has no parameters of its own.
If it has options, write it as a frozen dataclass, so that it is compiled once. It is a mean over valid steps, or a mean
over sequences if it has the attribute `per_sequence = True`; `evaluate` weights the batches accordingly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from seqjax.models._chunked_loss import loss_in_chunks, steps_in_chunk
from seqjax.models.heads import Head, check_targets, head_log_probs
from seqjax.models.losses import sequence_loss
from seqjax.models.pooling import last_valid
from seqjax.sequence._checks import check_flags

Mask = Bool[Any, "batch time"] | None
Objective = Callable[[Any, PyTree, PyTree, PyTree, Any], Array]  # a Head, and a mask or None


def every_step(head: Head, params: PyTree, outputs: PyTree, targets: PyTree, mask: Mask) -> Array:
    """The mean of -log p(y_t | h_t) over valid steps: many-to-many, and language models.

    Args:
        head, params: the readout and its parameters.
        outputs: the outputs of the cell, leaves (batch, time, ...).
        targets: leaves (batch, time, ...).
        mask: the valid steps (batch, time); None if all steps are valid.

    Returns:
        One number, in nats.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> round(float(sj.every_step(head, zero, jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int), None)), 4)  # ln 4
        1.3863
    """
    targets = check_targets(outputs, targets)
    length = steps_in_chunk(head, params, outputs, targets)
    if length is None:
        return sequence_loss(-head_log_probs(head, params, outputs, targets, mask), mask)
    batch, time = jax.tree.leaves(outputs)[0].shape[:2]
    mask = check_flags("mask", mask, batch, time)
    total = loss_in_chunks(head, length, params, outputs, targets, mask)
    return total / (batch * time if mask is None else jnp.maximum(jnp.sum(mask), 1).astype(total.dtype))


@dataclasses.dataclass(frozen=True)
class ManyToOne:
    """The mean over sequences of -log p(y | pool(h_1..h_T)), with one target per sequence.

    Args:
        pool: maps outputs and mask to one vector per sequence: `last_valid`, `masked_mean` or `masked_max`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> loss = sj.ManyToOne(sj.last_valid)
        >>> round(float(loss(head, zero, jnp.ones((2, 5, 3)), jnp.zeros(2, int), None)), 4)  # ln 4
        1.3863
    """

    pool: Callable[..., PyTree] = last_valid
    per_sequence: ClassVar[bool] = True

    def __call__(self, head: Head, params: PyTree, outputs: PyTree, targets: PyTree, mask: Mask) -> Array:
        # As sequences of one step, for the checks of `head_log_probs`.
        h, y = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], (self.pool(outputs, mask), targets))
        return -jnp.mean(head_log_probs(head, params, h, y))
