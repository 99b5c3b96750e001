"""The parameters of a cell, compared with those that its `init` draws.

The parameters of seqjax's own cells must have the shapes that `init` gives them. A cell of the user decides for itself
what it accepts, except for the sizes that it declares. The parameters must not contradict these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from seqjax.cell import Cell, Params, is_value, layers
from seqjax.cells.whole_numbers import as_integer

METHODS = ("init", "initial_state", "step")
ANOTHER_CELL = "the parameters belong to another cell or size, and cell.init(key) draws those of this one"


def check_params(cell: Cell, params: Params, name: str = "params") -> None:
    """Checks that parameters belong to a cell, also inside a stack or a learned state.

    For seqjax's own cells, and subclasses with the same three methods, every leaf must have the shape that `cell.init`
    gives it, because a broadcast would hide a wrong one, and it must be floating-point, in any precision. An optional
    leaf, such as `GRUParams.b_hn`, may be None.

    A cell of the user may accept other parameters than those that its `init` draws. They are refused only if they
    contradict a size that a frozen dataclass declares: the tree is that of `init`, a leaf has another shape, and an
    axis of the initial state, whose size with the parameters of `init` is a number in a field of the cell, has another
    size. Nothing is compared if `init` cannot be traced.

    Args:
        cell: any cell.
        params: its parameters: arrays, tracers or shapes.
        name: the name of the parameters in the error message.

    Raises:
        ValueError: a leaf has another shape, or a stack has another number of layers.
        TypeError: the parameters are another tree, or a leaf has no floating-point dtype.

    Example:
        >>> import jax, seqjax as sj
        >>> from seqjax.sequence._parameter_checks import check_params
        >>> check_params(sj.LSTM(3, 5), sj.LSTM(3, 4).init(jax.random.key(0)))
        Traceback (most recent call last):
        ...
        ValueError: expected params.W_xh (20, 3) for LSTM(input_size=3, hidden_size=5), got (16, 3): ...
    """
    leaves, tree = jax.tree.flatten(params)
    try:
        found = cell, tree, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        if found in _accepted:
            return
    except (AttributeError, TypeError):  # a leaf is not an array, or the cell has no hash
        found = None
    _check(cell, params, name)
    # A cell that compares by identity may change between two calls.
    if found is not None and is_value(cell):
        if len(_accepted) >= 1024:
            _accepted.clear()
        _accepted.add(found)


# The cells with the trees, shapes and dtypes that they accept, because every call checks its parameters.
_accepted: set[tuple[Any, ...]] = set()


def _check(cell: Cell, params: Params, name: str) -> None:
    inner = layers(cell)
    if _class_name(cell) == "Stack":
        count = len(inner)
        if not isinstance(params, Sequence) or _are_of_model(params):
            raise _wrong_tree(cell, params, f"a tuple of the parameters of {count} layers", tuple, name)
        if len(params) != count:
            got = f"{len(params)}, {described(params)}"
            raise ValueError(f"expected {name} with one entry per layer, {count}, got {got}: {ANOTHER_CELL}")
        for layer, (layer_cell, layer_params) in enumerate(zip(inner, params, strict=True)):
            _check(layer_cell, layer_params, f"{name}[{layer}]")
    elif _class_name(cell) == "LearnedState":
        if type(params).__name__ != "LearnedStateParams":
            like = shapes_of_init(cell)
            raise _wrong_tree(cell, params, "LearnedStateParams(cell, state)", type(like), name)
        _check(inner[0], params.cell, f"{name}.cell")
        like = shapes_of_init(cell) if _is_ours(cell) else None
        if like is not None:
            _check_like(cell, params.state, like.state, f"{name}.state")
    elif _is_ours(cell):
        like = shapes_of_init(cell)
        if like is not None:
            _check_like(cell, params, like, name)
    else:
        _check_declared_sizes(cell, params, name)


def _is_ours(cell: Cell) -> bool:
    """Whether seqjax defines the three methods of a cell and of all cells inside it."""
    return bool(_class_name(cell)) and all(map(_is_ours, layers(cell)))


def _class_name(cell: Cell) -> str:
    """The name of the class of seqjax that defines the methods of a cell; "" for a cell of the user.

    Classes are compared by name, because the modules of the cells need not know this one, nor this one them.
    """
    if any(name in getattr(cell, "__dict__", {}) for name in METHODS):
        return ""
    definers = {next((kind for kind in type(cell).__mro__ if name in vars(kind)), object) for name in METHODS}
    kind = definers.pop()
    return kind.__name__ if not definers and kind.__module__.startswith("seqjax.cells.") else ""


def _check_declared_sizes(cell: Cell, params: Params, name: str) -> None:
    """Refuses parameters of a user's cell that change a declared size of the initial state."""
    # Only immutable cells, because the `init` of another one may store what it draws in the cell.
    fields = getattr(cell, "__dict__", {}) if is_value(cell) else {}
    sizes = {as_integer(value) for value in fields.values()} - {None}
    like = shapes_of_init(cell) if sizes else None
    if like is None or jax.tree.structure(params) != jax.tree.structure(like):
        return
    other = next(differences(params, like, name), None)
    if other is None:
        return
    for declared, got in zip(*(_shapes_of_state(cell, p) for p in (like, params)), strict=False):
        if len(declared) == len(got) and any(a != b and a in sizes for a, b in zip(declared, got, strict=True)):
            path, wanted, instead = other
            raise ValueError(
                f"expected {path} {wanted} for {_short(cell)} with a state {declared}, got {instead} with a state "
                f"{got}: {ANOTHER_CELL}"
            )


def _shapes_of_state(cell: Cell, params: Params) -> list[tuple[int, ...]]:
    """The shapes of the leaves of the initial state; none if it cannot be traced, which is reported later."""
    try:
        state = jax.eval_shape(cell.initial_state, params)
    except Exception:  # noqa: BLE001 - the cell may compute its state in any way
        return []
    return [leaf.shape for leaf in jax.tree.leaves(state)]


def _check_like(cell: Cell, params: Params, like: PyTree, name: str) -> None:
    defaults = getattr(like, "_field_defaults", {})
    for path, wanted, got in differences(params, like, name):
        if path == name:
            raise _wrong_tree(cell, params, described(like), type(like), name)
        if got is None and defaults.get(path.removeprefix(f"{name}."), 0) is None:
            continue  # an optional leaf
        fix = ANOTHER_CELL
        if isinstance(got, tuple) and wanted is not None:
            if len(got) == 2 and got == wanted[::-1]:
                fix = f"transpose it, {path}.T"
            elif _broadcasts(got, wanted):
                fix = f"write every entry out, jnp.broadcast_to({path}, {wanted})"
        raise ValueError(f"expected {path} {wanted} for {_short(cell)}, got {got}: {fix}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", np.dtype(float))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"expected floating-point {name}{jax.tree_util.keystr(path)} for {_short(cell)}, got {dtype}: convert "
                f"it with .astype(float)"
            )


def differences(tree: PyTree, like: PyTree, name: str) -> Iterator[tuple[str, Any, Any]]:
    """The differences between a tree and expected shapes: the path, the expected shape, and the shape in the tree.

    If the structures differ, there is one difference, at the path `name`.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_none)
    shapes, expected = jax.tree.flatten(like, is_leaf=_is_none)
    got, wanted = list(map(_shape, leaves)), list(map(_shape, shapes))
    if structure != expected:
        if any(leaf is not None for leaf in (*leaves, *shapes)):  # all empty trees are the same parameters
            yield name, described(like), described(tree)
    elif got != wanted:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(like, is_leaf=_is_none)]
        for path, a, b in zip(paths, wanted, got, strict=True):
            if a != b:
                yield name + jax.tree_util.keystr(path), a, b


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _shape(leaf: Any) -> Any:
    """The shape of a leaf; None for None, and the name of the type for a leaf that is not an array."""
    if leaf is None or isinstance(leaf, bool | int | float | complex):
        return None if leaf is None else ()
    # The class of an array has a shape too, and a masked array is none that JAX takes.
    shape = None if isinstance(leaf, type | np.ma.MaskedArray) else getattr(leaf, "shape", None)
    return type(leaf).__name__ if shape is None else tuple(shape)


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    with contextlib.suppress(ValueError):
        return np.broadcast_shapes(shape, wanted) == wanted
    return False


def described(tree: PyTree, of: str = "an array ") -> str:
    """A tree with the shapes of its leaves, on one line."""
    if jax.tree_util.all_leaves([tree]):
        return f"{of}{_shape(tree)}" if isinstance(_shape(tree), tuple) else kind_of(tree)
    try:
        text = repr(jax.tree.map(_shape, tree, is_leaf=_is_none))
    except Exception:  # noqa: BLE001 - a container of the user may refuse shapes
        text = type(tree).__name__
    text = " ".join(text.split())
    return text if len(text) <= 240 else f"{text[:240]}..."


def _short(cell: Cell) -> str:
    """The cell with its sizes but without its other options."""
    fields = [field.name for field in dataclasses.fields(cell)] if dataclasses.is_dataclass(cell) else []
    sizes = [name for name in fields if name in ("input_size", "hidden_size", "vocabulary", "features")]
    arguments = ", ".join(f"{name}={getattr(cell, name)}" for name in sizes)
    return f"{name_of(cell)}({arguments})" if sizes else name_of(cell)


def _are_of_model(params: Params) -> bool:
    # By name, because the module of `ModelParams` imports this one.
    return type(params).__module__ == "seqjax.models.model"


def _wrong_tree(cell: Cell, params: Params, wanted: str, kind: type, name: str) -> TypeError:
    fields = getattr(kind, "_fields", None)
    if _are_of_model(params):
        fix = f"pass {name}.cell"
    elif is_cell(params):
        fix = "the order of the arguments is (cell, params, xs)"
    elif fields and isinstance(params, dict) and set(params) == set(fields):
        fix = f"{kind.__name__}(**{name})"
    elif fields and type(params) in (tuple, list) and len(params) == len(fields):
        fix = f"{kind.__name__}(*{name})"
    else:
        fix = ANOTHER_CELL
    return TypeError(f"expected {name} of {_short(cell)}, {wanted}, got {described(params)}: {fix}")


def shapes_of_init(cell: Cell) -> PyTree | None:
    """The shapes of the parameters that a cell draws; None if its `init` cannot be traced."""
    # Cached for seqjax's cells only, which are immutable. Another cell may change between two calls.
    try:
        return _shapes_by_value(cell) if _is_ours(cell) else _trace_init(cell)
    except TypeError:  # an initializer without a hash
        return _trace_init(cell)


def _trace_init(cell: Cell) -> PyTree | None:
    try:
        with warnings.catch_warnings():  # only the shapes are wanted, and the user did not call `init` here
            warnings.simplefilter("ignore")
            return jax.eval_shape(lambda: cell.init(jax.random.key(0)))
    except Exception:  # noqa: BLE001 - the cell may draw its parameters in any way
        return None


_shapes_by_value = functools.lru_cache(maxsize=256)(_trace_init)


def differences_from_init(cell: Cell, params: Params) -> Iterator[tuple[str, Any, Any]]:
    """The differences between the parameters of any cell and those that its `init` draws; none if these are unknown."""
    like = None if params is None else shapes_of_init(cell)
    return iter(()) if like is None else differences(params, like, "params")


def is_cell(value: Any) -> bool:
    """Whether an object has the methods of a cell."""
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in METHODS)


def kind_of(value: Any) -> str:
    """A short description of a wrong argument."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', '')}".strip()
    return type(value).__name__


def name_of(cell: Cell) -> str:
    """The name of the cell's class."""
    return cell.__name__ if isinstance(cell, type) else type(cell).__name__
