"""The training loop of `seqjax.training.fit` and `seqjax.command.job.work`: updates, validated when it is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from seqjax.models.model import ModelParams

if TYPE_CHECKING:
    from seqjax.training.loop import Metrics, TrainState
else:  # needed only in annotations
    Metrics = TrainState = Any


class Update(NamedTuple):
    """One update of a training loop.

    Attributes:
        number: the number of updates so far, this one included.
        state: the training state after the update.
        metrics: its measurements.
        seconds: of training up to the update, with the validations before it.
        last: whether the loop ends with this update, because its limit is reached.
        validation: the mean validation loss after the update; None if it was not due.
    """

    number: int
    state: TrainState
    metrics: Metrics
    seconds: float
    last: bool
    validation: Any


def validated(
    updates: Iterable[tuple[TrainState, Metrics]],
    *,
    is_last: Callable[[int, float], bool],
    validate: Callable[[ModelParams], Any] | None,
    validate_every: int,
    done: int = 0,
    seconds: float = 0.0,
) -> Iterator[Update]:
    """Runs updates up to the last one, and validates every `validate_every` updates and after the last one.

    Args:
        updates: from `seqjax.training.updates`.
        is_last: whether to stop after an update, from its number and the seconds of training.
        validate: the mean loss on the validation data for some parameters; None does not validate.
        validate_every: updates between two validations.
        done, seconds: the number of updates and the seconds of an earlier part of the training.

    Yields:
        An `Update` for each of the updates, before the next one is read.
    """
    began = time.monotonic() - seconds
    for number, (state, metrics) in enumerate(updates, done + 1):
        seconds = time.monotonic() - began
        last = is_last(number, seconds)
        validation = None
        if validate is not None and (last or number % validate_every == 0):
            validation = validate(state.params)
        yield Update(number, state, metrics, seconds, last, validation)
        if last:
            return
