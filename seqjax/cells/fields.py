"""Checks on the fields of a cell, shared by every cell: wrong options are refused when the cell is built."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp


def check_fields(cell: Any, sizes: tuple[str, ...], **choices: tuple[str, ...]) -> None:
    """Refuses sizes that are not positive whole numbers and options that are not among their choices.

    Sizes are kept as plain integers and dtypes as their names, so that equal cells are equal however they were spelled:
    `LSTM(2, 3, dtype=jnp.float32) == LSTM(2, 3)`.

    Raises:
        ValueError: a size or an option is wrong.
        TypeError: a dtype is not a floating-point one.
    """
    kind = type(cell).__name__
    check_sizes(cell, *sizes)
    for name, allowed in choices.items():
        value = getattr(cell, name)
        if value not in allowed:
            raise ValueError(f"expected {kind} {name} to be one of {', '.join(allowed)}, got {value!r}")
    for name in ("dtype", "compute_dtype"):
        if getattr(cell, name, None) is None:
            continue
        dtype = jnp.dtype(getattr(cell, name))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"expected {kind} {name} to be floating-point, got {dtype.name}: use float32, float64 or bfloat16"
            )
        object.__setattr__(cell, name, dtype.name)


def check_sizes(cell: Any, *sizes: str) -> None:
    """Refuses sizes that are not positive whole numbers, and keeps them as plain integers."""
    for name in sizes:
        value = getattr(cell, name)
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"expected {type(cell).__name__} {name} to be a whole number of at least 1, got {value!r}")
        object.__setattr__(cell, name, operator.index(value))


def check_chrono(cell: Any) -> None:
    """Refuses a longest time span that leaves chrono initialisation nothing to draw from."""
    if cell.chrono is not None and cell.chrono < 3:
        raise ValueError(
            f"expected {type(cell).__name__} chrono, the longest span to remember, to be at least 3 steps, "
            f"got {cell.chrono!r}"
        )
