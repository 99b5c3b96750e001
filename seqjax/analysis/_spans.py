"""Checks of lags and time steps, in one place so that they mean the same in every analysis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from seqjax.cells.whole_numbers import as_integer, whole_number


def check_horizon(horizon: int | None, default: int, time: int) -> int:
    """Returns the largest lag K, from 0 to the number of steps `time`; None means `default`.

    Raises:
        ValueError: `horizon` is not a whole number, or it is larger than `time`.
    """
    if horizon is None:
        return default
    expected = f"a horizon from 0 to T = {time} steps"
    return whole_number("horizon", horizon, 0, time, "use longer sequences", expected=expected)


def check_times(times: Sequence[int] | Int[np.ndarray | Array, "..."] | None, first: int, time: int) -> np.ndarray:
    """Returns steps t from 1 to `time`; None means up to 8 steps, evenly spread from `first` to `time`.

    Raises:
        ValueError: there is no step, or a step is outside the sequences.
    """
    chosen = np.unique(np.linspace(first, time, 8).round()) if times is None else times
    chosen = np.asarray(chosen, int)
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 1 or chosen.max() > time:
        raise ValueError(f"expected times from 1 to T = {time}, got {chosen.tolist()}: the state after step t is s_t")
    return chosen


def check_span(start: int, stop: int | None, time: int) -> tuple[int, int]:
    """Returns the span of the steps start+1..stop, with 0 <= start <= stop <= time; None means `time`.

    Raises:
        ValueError: the limits are not whole numbers in this order.
    """
    first, last = as_integer(start), as_integer(time if stop is None else stop)
    if first is None or last is None or not 0 <= first <= last <= time:
        raise ValueError(f"expected 0 <= start <= stop <= time = {time}, got start {start} and stop {stop}")
    return first, last
