"""`jax.jit` with a cache, for functions whose first arguments are cells, models and options."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.core import Tracer

from seqjax.cell import is_value
from seqjax.sequence._step_errors import NOT_THE_USERS


class IdentityWarning(UserWarning):
    """An object compares by identity, so every call compiles again."""


def cached_jit(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """`jax.jit` of a function whose first arguments are static.

    Cells, models and options that compare by value reuse compiled code. An object that compares by identity is compiled
    again at every call, because it may have changed, and a warning says so once for its class.

    Args:
        function: a function of a module, which is the same object at every call.
        *static: its first arguments: cells, models, options.

    Returns:
        A function of the other arguments, which are arrays or trees of arrays.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> from seqjax.sequence._cached_jit import cached_jit
        >>> def units(cell, params): return params.W_hh.shape[1] + 0 * jnp.sum(params.b_h)
        >>> cell = sj.GRU(2, 3)
        >>> cached_jit(units, cell) is cached_jit(units, sj.GRU(2, 3))
        True
    """
    if all(map(is_value, static)):
        return _cached(function, static)
    compiled = jax.jit(partial(function, *static))

    def run(*args: Any) -> Any:
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)):  # a trace around it compiles anyway
            for part in static:
                _warn_of_identity(part)
        return compiled(*args)

    return run


def precise_jit(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """`cached_jit` with products in float32, for measurements of a network.

    JAX multiplies float32 matrices in TF32 on a GPU, with a relative error of 1e-3, and in whatever
    `jax.default_matmul_precision` says. A product of Jacobians over many steps would not survive that. A step that
    names a precision for itself keeps it.
    """
    compiled = cached_jit(function, *static)

    def run(*args: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            return compiled(*args)

    return run


# A bound for a loop that makes a new function in every iteration. 1024 is more than a program needs otherwise.
@functools.lru_cache(maxsize=1024)
def _cached(function: Callable[..., Any], static: tuple[Any, ...]) -> Callable[..., Any]:
    return jax.jit(partial(function, *static))


_warned: weakref.WeakSet[type] = weakref.WeakSet()


def _warn_of_identity(part: Any) -> None:
    kind = type(_part_by_identity(part))
    if is_value(part) or kind in _warned:
        return
    _warned.add(kind)
    message = (
        f"{kind.__name__} compares by identity, so every call compiles again: put @dataclasses.dataclass(frozen=True) "
        f"above the class, or call it inside your own jax.jit"
    )
    warnings.warn_explicit(message, IdentityWarning, *_users_line())


def _users_line() -> tuple[str, int]:
    """The file and the line of the user's own code that led here."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*NOT_THE_USERS, "<")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _part_by_identity(part: Any) -> Any:
    """The innermost part that compares by identity: the cell of a model, or the layer of a stack."""
    inner = part if isinstance(part, tuple) else tuple(getattr(part, "__dict__", {}).values())
    return next((_part_by_identity(each) for each in inner if not is_value(each)), part)
