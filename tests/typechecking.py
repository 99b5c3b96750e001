"""The check of annotations at run time: beartype's, except for cells and heads.

Functions of seqjax check these two themselves, and the tests compare the messages.
"""

from typing import Any

from beartype import beartype

UNCHECKED = {"Cell", "Head"}


def checked(function):
    """The function with its annotations checked at every call."""
    annotations = getattr(function, "__annotations__", {})
    for name, annotation in annotations.items():
        if annotation in UNCHECKED:
            annotations[name] = Any
    return beartype(function)
