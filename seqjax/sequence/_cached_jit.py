"""Compiled once for what compares by value; freshly for what compares by identity, since that may change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from seqjax.cell import is_value


def compiled(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """`jax.jit` of a function whose first arguments are `static`, remembered where these compare by value.

    Args:
        function: one of a module, so that it is the same object at every call.
        *static: its first arguments: cells, models, options.

    Returns:
        A function of the other arguments, which are arrays or trees of them.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> from seqjax.sequence._cached_jit import compiled
        >>> def units(cell, params): return params.W_hh.shape[1] + 0 * jnp.sum(params.b_h)
        >>> cell = sj.GRU(2, 3)
        >>> compiled(units, cell) is compiled(units, sj.GRU(2, 3))
        True
    """
    if all(map(is_value, static)):
        return _remembered(function, static)
    return jax.jit(partial(function, *static))


@functools.lru_cache(maxsize=1024)
def _remembered(function: Callable[..., Any], static: tuple[Any, ...]) -> Callable[..., Any]:
    return jax.jit(partial(function, *static))
