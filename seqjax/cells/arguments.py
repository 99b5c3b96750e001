"""Checks of arguments that come from users: arrays, keys, functions, options and real numbers.

Each returns the argument in the form that the rest of the library uses, or raises one sentence with its name.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def described(value: object) -> str:
    """A value in few words: its dtype and shape, or its type, or itself if that is short."""
    if not isinstance(value, type) and hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {tuple(value.shape)}"  # pyright: ignore[reportAttributeAccessIssue]
    if value is None or isinstance(value, str | bytes | bool | numbers.Number | np.generic):
        return repr(value) if len(repr(value)) < 60 else f"{type(value).__name__} of length {len(repr(value))}"
    return value.__name__ if isinstance(value, type) else type(value).__name__


def as_array(name: str, value: Any) -> Array:
    """Returns `value` as an array of numbers.

    Raises:
        TypeError: it is not one.

    Example:
        >>> from seqjax.cells.arguments import as_array
        >>> as_array("xs", [1, 2]).shape
        (2,)
        >>> as_array("xs", [1, [2, 3]])
        Traceback (most recent call last):
        TypeError: expected xs as an array of numbers, got list: pass one array, such as jnp.asarray(...)
    """
    if isinstance(value, jax.Array):
        return value
    try:
        # A masked array would lose its mask in silence.
        if value is None or isinstance(value, np.ma.MaskedArray):
            raise TypeError
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"expected {name} as an array of numbers, got {described(value)}: pass one array, such as jnp.asarray(...)"
        ) from None


def check_arrays(name: str, tree: PyTree) -> None:
    """Checks that the leaves of a tree are arrays of numbers, without converting them.

    Raises:
        TypeError: a leaf is not.
    """
    if all(map(_is_array, jax.tree.leaves(tree))):  # names cost time, and this runs at every call
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _is_array(leaf):
            leaf_name = f"{name}{jax.tree_util.keystr(path)}"
            as_array(leaf_name, leaf)
            if not isinstance(leaf, numbers.Number | np.ndarray | np.generic):  # a range, which jax.jit does not take
                raise TypeError(f"expected {leaf_name} as an array of numbers, got {described(leaf)}: jnp.asarray(...)")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) or (type(leaf) is np.ndarray and leaf.dtype.kind not in "OSU")


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """`as_array` for every leaf of a tree.

    Raises:
        TypeError: a leaf is not an array, or the tree cannot be sorted.
    """
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    except (TypeError, ValueError):
        raise TypeError(
            f"expected {name} as arrays, got {described(tree)}: the keys of a dict must be sortable"
        ) from None
    return structure.unflatten([as_array(f"{name}{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves])


def as_numbers(name: str, value: Any) -> np.ndarray:
    """Returns `value` as an array of real numbers in float64, on the host.

    Raises:
        TypeError: it is not one.
    """
    try:
        array = np.asarray(value)
        if (array.dtype.kind in "OSUVMm" and not jnp.issubdtype(array.dtype, jnp.floating)) or array.dtype.kind == "c":
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as real numbers, got {described(value)}: pass an array or a list") from None


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Checks an option.

    Raises:
        ValueError: it is not one of the allowed words.
    """
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"expected {name} to be one of {words}, got {described(value)}")


def as_dtype(name: str, value: Any) -> np.dtype:
    """Returns a dtype.

    Raises:
        TypeError: there is none of this name.
    """
    try:
        return jnp.dtype(value)
    except (TypeError, ValueError):
        raise TypeError(f'expected {name} as a dtype, got {described(value)}: such as "float32"') from None


def check_key(key: Any, name: str = "key") -> Array:
    """Returns a random key, also one of `jax.random.PRNGKey`, as a typed key.

    Raises:
        TypeError: it is not a random key.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    try:
        if not isinstance(key, jax.Array | np.ndarray) or key.dtype != np.uint32:
            raise TypeError
        return jax.random.wrap_key_data(jnp.asarray(key))
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as a random key, got {described(key)}: jax.random.key(0)") from None


def check_function(name: str, function: Any, hint: str) -> Callable[..., Any]:
    """Returns a function.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(function):
        raise TypeError(f"expected {name} as a function, got {described(function)}: {hint}")
    return function


def real_number(name: str, value: Any, hint: str = "") -> Any:
    """Returns a real number, or a traced one.

    Raises:
        TypeError: it is not one number.
    """
    is_number = isinstance(value, numbers.Real | jax.Array | np.ndarray) and not isinstance(value, bool | np.bool_)
    if not is_number or getattr(value, "ndim", 0) or _not_real(value):
        raise TypeError(f"expected {name} as a number, got {described(value)}{hint and ': ' + hint}")
    return value


def _not_real(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def check_recurrent(kind: str, gates: int, params: Any, state: Any, fields: tuple[str, ...]) -> None:
    """Checks the parameters and the state of one step of a cell with `gates` blocks of n rows.

    Raises:
        TypeError: a field is missing, or is not an array.
        ValueError: a shape does not match.
    """
    names = ("W_xh", "W_hh", "b_h")
    for what, value, expected in (("params", params, names), ("state", state, fields)):
        lacking = [name for name in expected if not hasattr(getattr(value, name, None), "shape")]
        if lacking:
            raise TypeError(
                f"expected {what} of {kind} with the arrays {', '.join(expected)}, got {described(value)} without "
                f"{', '.join(lacking)}: the order of the arguments is (params, state, x)"
            )
    W_xh, W_hh, b_h = (getattr(params, name) for name in names)
    n = W_hh.shape[1] if W_hh.ndim == 2 else 0
    b_hn = getattr(params, "b_hn", None)
    shapes = {
        "params.W_hh": (W_hh, (gates * n, n)),
        "params.W_xh": (W_xh, (gates * n, W_xh.shape[1] if W_xh.ndim == 2 else 0)),
        "params.b_h": (b_h, (gates * n,)),
        **({} if b_hn is None else {"params.b_hn": (b_hn, (n,))}),
        **{f"state.{name}": (getattr(state, name), (n,)) for name in fields},
    }
    for name, (array, shape) in shapes.items():
        if getattr(array, "shape", None) != shape:
            raise ValueError(
                f"expected {name} {shape} in one step of {kind} with {n} hidden units, got "
                f"{getattr(array, 'shape', described(array))}: jax.vmap adds batch and time"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"expected floating-point {name} in {kind}, got {array.dtype}: {name}.astype(float)")
