"""What training minimises: from the outputs of a cell and the targets of a batch to one number.

An objective is a function of (head, head's parameters, outputs, targets, mask). It holds no parameters, so your own is
one function; a frozen dataclass where it has options, so that it compiles once. It is a mean over valid steps, unless
it has a true attribute `per_sequence`: `evaluate` weights batches accordingly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.models.heads import Head
from seqjax.models.losses import sequence_loss
from seqjax.models.model import head_log_probs
from seqjax.models.pooling import last_valid

Objective = Callable[[Any, PyTree, PyTree, PyTree, Any], Array]


def every_step(head: Head, params: PyTree, outputs: PyTree, targets: PyTree, mask: Any) -> Array:
    """The mean of -log p(y_t | h_t) over valid steps: many-to-many, and language models.

    Args:
        head, params: the readout and its parameters.
        outputs: of the cell, leaves (batch, time, ...).
        targets: leaves (batch, time, ...).
        mask: valid steps, or None.

    Returns:
        One number, in nats.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> round(float(sj.every_step(head, zero, jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int), None)), 4)  # ln 4
        1.3863
    """
    return sequence_loss(-head_log_probs(head, params, outputs, targets, mask), mask)


@dataclasses.dataclass(frozen=True)
class ManyToOne:
    """The mean over sequences of -log p(y | pool(h_1..h_T)): one target a sequence.

    Args:
        pool: from outputs and mask to one vector a sequence: `last_valid`, `masked_mean` or `masked_max`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> loss = sj.ManyToOne(sj.last_valid)
        >>> round(float(loss(head, zero, jnp.ones((2, 5, 3)), jnp.zeros(2, int), None)), 4)  # ln 4
        1.3863
    """

    pool: Callable[..., PyTree] = last_valid
    per_sequence: ClassVar[bool] = True

    def __call__(self, head: Head, params: PyTree, outputs: PyTree, targets: PyTree, mask: Any) -> Array:
        h, y = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], (self.pool(outputs, mask), targets))
        return -jnp.mean(head_log_probs(head, params, h, y))  # as sequences of one step
