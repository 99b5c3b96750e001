"""Checks on the fields of a cell, shared by all cells and heads. They reject wrong options when the cell is built."""

from __future__ import annotations

import jax.numpy as jnp

from seqjax.cells.arguments import as_dtype
from seqjax.cells.whole_numbers import whole_number


def check_fields(part: object, sizes: tuple[str, ...], **choices: tuple[str, ...]) -> None:
    """Checks the sizes, options and dtypes of a cell or head.

    Stores sizes as plain integers and dtypes as their names, so that cells with the same options are equal and share
    compiled code: `LSTM(2, 3, dtype=jnp.float32) == LSTM(2, 3)`.

    Args:
        part: the cell or head, a frozen dataclass.
        sizes: the names of the fields that are sizes.
        **choices: the allowed values of each field that is an option.

    Raises:
        ValueError: a size is not a positive whole number, or an option is not one of its choices.
        TypeError: a dtype is not floating-point.
    """
    kind = type(part).__name__
    check_sizes(part, *sizes)
    for name, allowed in choices.items():
        value = getattr(part, name)
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"expected {kind} {name} to be one of {', '.join(allowed)}, got {value!r}")
    for name in ("dtype", "compute_dtype"):
        if getattr(part, name, None) is None:
            continue
        dtype = as_dtype(f"{kind} {name}", getattr(part, name))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"expected {kind} {name} to be floating-point, got {dtype.name}: use float32, float64 or bfloat16"
            )
        object.__setattr__(part, name, dtype.name)  # the dataclass is frozen


def check_sizes(part: object, *sizes: str) -> None:
    """Checks that sizes are positive whole numbers, and stores them as plain integers."""
    for name in sizes:
        value = getattr(part, name)
        object.__setattr__(part, name, whole_number(f"{type(part).__name__} {name}", value))


def check_chrono(part: object) -> None:
    """Checks that `chrono` is at least 3."""
    # The biases are ln U[1, chrono - 1], and this interval is empty or a point for a smaller value.
    chrono = getattr(part, "chrono", None)
    if chrono is not None and chrono < 3:
        raise ValueError(
            f"expected {type(part).__name__} chrono, the longest span to remember, to be at least 3 steps, "
            f"got {chrono!r}"
        )
