"""Bad input as a user gives it: with the annotations unchecked, so that the library's own message is what comes."""

from __future__ import annotations

import contextlib

import jaxtyping
import pytest


@contextlib.contextmanager
def raises(kind, *parts):
    """Expects `kind` with every one of `parts` in its message, on one line."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(kind) as caught:
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message, message
