"""Checks on the fields of a cell, shared by every cell and head: wrong options are refused when the cell is built."""

from __future__ import annotations

import operator

import jax.numpy as jnp


def check_fields(part: object, sizes: tuple[str, ...], **choices: tuple[str, ...]) -> None:
    """Refuses sizes that are not positive whole numbers and options that are not among their choices.

    Sizes are kept as plain integers and dtypes as their names, so that equal cells are equal however they were spelled:
    `LSTM(2, 3, dtype=jnp.float32) == LSTM(2, 3)`.

    Raises:
        ValueError: a size or an option is wrong.
        TypeError: a dtype is not a floating-point one.
    """
    kind = type(part).__name__
    check_sizes(part, *sizes)
    for name, allowed in choices.items():
        value = getattr(part, name)
        if value not in allowed:
            raise ValueError(f"expected {kind} {name} to be one of {', '.join(allowed)}, got {value!r}")
    for name in ("dtype", "compute_dtype"):
        if getattr(part, name, None) is None:
            continue
        dtype = jnp.dtype(getattr(part, name))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"expected {kind} {name} to be floating-point, got {dtype.name}: use float32, float64 or bfloat16"
            )
        object.__setattr__(part, name, dtype.name)


def check_sizes(part: object, *sizes: str) -> None:
    """Refuses sizes that are not positive whole numbers, and keeps them as plain integers."""
    for name in sizes:
        value = getattr(part, name)
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"expected {type(part).__name__} {name} to be a whole number of at least 1, got {value!r}")
        object.__setattr__(part, name, operator.index(value))


def check_chrono(part: object) -> None:
    """Refuses a longest time span that leaves chrono initialisation nothing to draw from."""
    chrono = getattr(part, "chrono", None)
    if chrono is not None and chrono < 3:
        raise ValueError(
            f"expected {type(part).__name__} chrono, the longest span to remember, to be at least 3 steps, "
            f"got {chrono!r}"
        )
