"""For which platforms a program is traced, which an export knows before it is compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """Where an exported program runs.

    Attributes:
        platforms: such as ("cpu",) or ("cpu", "cuda").
        kernel: whether the program may contain the compiled kernel.
    """

    platforms: tuple[str, ...]
    kernel: bool


# JAX traces again when the value changes, so a program that was traced for a call is not exported, nor the reverse.
_target: Any = jax.make_user_context(None)


def exporting_to(target: Target) -> Any:
    """A context in which programs are traced for an export."""
    return _target(target)


def target() -> Target | None:
    """Where the program that is being traced will run; None if this process runs it."""
    return _target.value
