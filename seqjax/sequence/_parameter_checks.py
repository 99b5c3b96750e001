"""The parameters of a cell, compared with those that its `init` draws.

The parameters of seqjax's own cells must have the shapes that `init` gives them. Any other cell decides for itself what
it accepts, so its parameters are compared only to explain an error that its `step` has raised.
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
import numpy as np
from jaxtyping import PyTree

from seqjax.cell import Cell, Params, layers

METHODS = ("init", "initial_state", "step")
ANOTHER_CELL = "the parameters belong to another cell or size, and cell.init(key) draws those of this one"


def check_params(cell: Cell, params: Params, name: str = "params") -> None:
    """Checks the parameters of seqjax's own cells, also inside a stack or a learned state.

    Every leaf must have the shape that `cell.init` gives it, because a broadcast would hide a wrong one. Any dtype is
    accepted. An optional leaf, such as `GRUParams.b_hn`, may be None. The parameters of any other cell are not checked.

    Args:
        cell: any cell.
        params: its parameters: arrays, tracers or shapes.
        name: the name of the parameters in the error message.

    Raises:
        ValueError: a leaf has another shape, or a stack has another number of layers.
        TypeError: the parameters are another tree.

    Example:
        >>> import jax, seqjax as sj
        >>> from seqjax.sequence._parameter_checks import check_params
        >>> check_params(sj.LSTM(3, 5), sj.LSTM(3, 4).init(jax.random.key(0)))
        Traceback (most recent call last):
        ...
        ValueError: expected params.W_xh (20, 3) for LSTM(input_size=3, hidden_size=5), got (16, 3): ...
    """
    inner = layers(cell)
    if _class_name(cell) == "Stack":
        count = len(inner)
        if not isinstance(params, Sequence) or _are_of_model(params):
            raise _wrong_tree(cell, params, f"a tuple of the parameters of {count} layers", tuple, name)
        if len(params) != count:
            got = f"{len(params)}, {described(params)}"
            raise ValueError(f"expected {name} with one entry per layer, {count}, got {got}: {ANOTHER_CELL}")
        for layer, (layer_cell, layer_params) in enumerate(zip(inner, params, strict=True)):
            check_params(layer_cell, layer_params, f"{name}[{layer}]")
    elif _class_name(cell) == "LearnedState":
        if type(params).__name__ != "LearnedStateParams":
            like = shapes_of_init(cell)
            raise _wrong_tree(cell, params, "LearnedStateParams(cell, state)", type(like), name)
        check_params(inner[0], params.cell, f"{name}.cell")
        like = shapes_of_init(cell) if _is_ours(cell) else None
        if like is not None:
            _check_like(cell, params.state, like.state, f"{name}.state")
    elif _is_ours(cell):
        like = shapes_of_init(cell)
        if like is not None:
            _check_like(cell, params, like, name)


def _is_ours(cell: Cell) -> bool:
    """Whether a cell and all cells inside it are classes of seqjax. A subclass is the user's."""
    return bool(_class_name(cell)) and all(map(_is_ours, layers(cell)))


def _class_name(cell: Cell) -> str:
    """The name of a cell's class if it is a class of seqjax, otherwise "".

    Classes are compared by name, because the modules of the cells need not know this one, nor this one them.
    """
    return type(cell).__name__ if type(cell).__module__.startswith("seqjax.cells.") else ""


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
    shape = getattr(leaf, "shape", None)
    return type(leaf).__name__ if shape is None else tuple(shape)


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    with contextlib.suppress(ValueError):
        return np.broadcast_shapes(shape, wanted) == wanted
    return False


def described(tree: PyTree, of: str = "an array ") -> str:
    """A tree with the shapes of its leaves, on one line."""
    if jax.tree_util.all_leaves([tree]):
        return f"{of}{_shape(tree)}" if hasattr(tree, "shape") else kind_of(tree)
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
