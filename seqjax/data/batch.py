"""One batch of sequences with what is to be predicted from them; an iterable of batches is a stream."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Bool, PyTree


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of sequences and what is to be predicted from them.

    Args:
        xs: inputs, leaves (batch, time, ...).
        targets: y, leaves (batch, time, ...), or (batch, ...) for a loss that reads one output a sequence.
        mask: valid steps (batch, time); None where all are.
        reset: steps before which the state starts anew (batch, time); None for no such step.
        continues: whether these sequences go on where those of the batch before stopped.
    """

    xs: PyTree
    targets: PyTree
    mask: Bool[Any, "batch time"] | None = None
    reset: Bool[Any, "batch time"] | None = None
    continues: bool = False


def check_batch(batch: Any, carried: Any) -> Any:
    """Returns the state that a batch goes on from: the one carried over, or None where it starts afresh.

    Raises:
        TypeError: it is not a batch.
        ValueError: it continues, and there is nothing to continue.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"expected a stream of sj.Batch, got {type(batch).__name__}: sj.Batch(xs, targets)")
    if batch.continues and carried is None:
        raise ValueError("expected a batch that starts afresh first, got one that continues: continues=False")
    return carried if batch.continues else None
