"""One check for sizes, counts and numbers of steps, so that all of them accept and refuse the same values."""

from __future__ import annotations

import operator

import numpy as np


def whole_number(
    name: str, value: object, least: int = 1, most: int | None = None, hint: str = "", *, expected: str = ""
) -> int:
    """Returns `value` as a plain integer.

    Args:
        name: what the number is, for the message.
        value: any whole number, also one of numpy or a JAX array of size one; a boolean is not a number.
        least, most: the range, both ends included; None for no upper end.
        hint: the likely fix, which ends the message.
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
    number = _as_integer(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        expected = expected or f"{name} to be a whole number {limits}"
        raise ValueError(f"expected {expected}, got {value!r}{hint and ': ' + hint}")
    return number


def _as_integer(value: object) -> int | None:
    if isinstance(value, bool | np.bool_):  # Python's True has an index, 1
        return None
    # `hasattr(value, "__index__")` is no test: every array has the method, and arrays of fractions raise in it.
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None
