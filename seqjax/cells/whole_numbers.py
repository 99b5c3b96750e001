"""One check for sizes, counts and numbers of steps, so that all of them accept and reject the same values."""

from __future__ import annotations

import operator

import numpy as np


def whole_number(
    name: str, value: object, least: int = 1, most: int | None = None, hint: str = "", *, expected: str = ""
) -> int:
    """Returns `value` as a plain integer.

    Args:
        name: the name of the number in the message.
        value: an integer of Python or numpy, or a JAX array of size one. A boolean is not accepted.
        least, most: the limits of the range, both included; None for no upper limit.
        hint: the likely fix, at the end of the message.
        expected: replaces the part of the message that describes the number and its range.

    Raises:
        ValueError: `value` is not a whole number, or it is out of range.

    Example:
        >>> import numpy as np
        >>> from seqjax.cells.whole_numbers import whole_number
        >>> whole_number("k", np.int64(3), most=5)
        3
        >>> whole_number("k", 2.5, most=5, hint="k=5 gives all")
        Traceback (most recent call last):
        ValueError: expected k to be a whole number from 1 to 5, got 2.5: k=5 gives all
    """
    number = as_integer(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        expected = expected or f"{name} to be a whole number {limits}"
        raise ValueError(f"expected {expected}, got {value!r}{hint and ': ' + hint}")
    return number


def as_integer(value: object) -> int | None:
    """`value` as a plain integer, or None if it is not a whole number."""
    if isinstance(value, bool | np.bool_):  # operator.index(True) is 1
        return None
    # `hasattr(value, "__index__")` is not enough: every array has this method, but floating-point arrays raise in it.
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None
