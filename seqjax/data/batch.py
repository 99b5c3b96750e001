"""One batch of sequences with their targets. An iterable of batches is a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree

from seqjax.cell import State
from seqjax.cells.arguments import check_arrays, described


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("xs", "targets", "mask", "reset"),
    meta_fields=("continues",),
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of sequences and their targets.

    A batch is a pytree: `jax.device_put(batch, sharding)`, `jax.tree.map`, `jax.jit` and `jax.vmap` accept it.
    `continues` is static.

    Args:
        xs: inputs, leaves (batch, time, ...).
        targets: y, leaves (batch, time, ...), or (batch, ...) for a loss that reads one output per sequence.
        mask: valid steps (batch, time); None if all steps are valid.
        reset: steps before which the state starts anew (batch, time); None if there is no such step.
        continues: whether these sequences continue those of the previous batch.
    """

    # `PyTree` for the flags too, because JAX also builds batches of shapes, shardings and stacked arrays.
    xs: PyTree
    targets: PyTree
    mask: PyTree = None
    reset: PyTree = None
    continues: bool = False


def as_stream(stream: Any) -> Iterable[Batch]:
    """A stream from what a user passes as one: an iterable of batches, or one batch, which is a stream of one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(stream, Batch):
        return [stream]
    if not isinstance(stream, Iterable):
        raise TypeError(
            f"expected a stream of sj.Batch, got {described(stream)}: an iterable such as [sj.Batch(xs, targets)]"
        )
    return stream


def check_batch(batch: Any, carried: State | None) -> State | None:
    """Returns the state from which a batch starts: the carried one if it continues, otherwise None.

    Raises:
        TypeError: `batch` is not a `Batch`.
        ValueError: the batch continues, and no state is carried.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"expected a stream of sj.Batch, got {type(batch).__name__}: sj.Batch(xs, targets)")
    for name in ("xs", "targets", "mask", "reset"):
        check_arrays(f"{name} of a batch", getattr(batch, name))
    if not jax.tree.leaves(batch.xs):
        raise ValueError("expected xs of a batch (batch, time, ...), got no array: sj.Batch(xs, targets)")
    if batch.continues and carried is None:
        raise ValueError("expected a batch that starts afresh first, got one that continues: continues=False")
    return carried if batch.continues else None
