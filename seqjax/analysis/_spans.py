"""Which steps an analysis looks at: checked in one place, so that they mean the same everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_horizon(horizon: Any, usual: int, time: int) -> int:
    """Returns the largest lag K, 0 to the time of the sequences; by default `usual`.

    Raises:
        ValueError: it is no whole number, or longer than the sequences.
    """
    K = usual if horizon is None else horizon
    if isinstance(K, bool) or not hasattr(K, "__index__") or not 0 <= K <= time:
        raise ValueError(f"expected a horizon from 0 to T = {time} steps, got {horizon!r}: use longer sequences")
    return int(K)


def check_times(times: Any, first: int, time: int) -> np.ndarray:
    """Returns steps t, 1 to the time of the sequences; by default up to 8, spread from `first` to the end.

    Raises:
        ValueError: there is none, or one lies outside the sequences.
    """
    chosen = np.unique(np.linspace(first, time, 8).round()) if times is None else times
    chosen = np.asarray(chosen, int)
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 1 or chosen.max() > time:
        raise ValueError(f"expected times from 1 to T = {time}, got {chosen.tolist()}: the state after step t is s_t")
    return chosen
