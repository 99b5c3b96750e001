"""Sizes that are unknown when a program is traced: `jax.export` traces it for any batch and time."""

from __future__ import annotations

from typing import Any

from jax.export import is_symbolic_dim


def is_known(*sizes: Any) -> bool:
    """Whether all sizes are numbers. A comparison of a symbol with a number raises where it depends on the symbol."""
    return not any(map(is_symbolic_dim, sizes))
