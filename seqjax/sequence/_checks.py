"""Checks of the arguments of sequence calls, before anything compiles.

Every message says what was expected, what came, and the likely fix.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Params, State, optional, strong_type
from seqjax.cells.arguments import as_array, as_arrays, check_arrays
from seqjax.cells.whole_numbers import as_integer
from seqjax.sequence._masked_step import Inputs
from seqjax.sequence._parameter_checks import METHODS, check_params, is_cell, kind_of
from seqjax.sequence._step_errors import errors_of_step

ADAPTERS = {"flax.linen": "sj.from_linen", "flax.nnx": "sj.from_nnx", "equinox": "sj.from_equinox"}


def check_methods(cell: Cell) -> None:
    """Checks that the first argument is a cell, and not a class, a function, a model or the parameters.

    Raises:
        TypeError: `cell` is not an object with the methods `init`, `initial_state` and `step`.
    """
    missing = [name for name in METHODS if not callable(getattr(cell, name, None))]
    if not missing and (not isinstance(cell, type) or _is_namespace(cell)):
        return
    got = kind_of(cell)
    # From the most specific explanation to the most general one.
    if adapter := _adapter(cell):
        fix = f"{adapter} makes a cell of it"
    elif isinstance(cell, type):
        fix = f"{cell.__name__}(...) builds one" if not missing else "build a cell and pass the object"
    elif inspect.isroutine(cell):
        fix = "make it the step of a class that also has init and initial_state"
    elif isinstance(cell, tuple | list | dict) or _holds_arrays(cell):
        fix = "the order of the arguments is (cell, params, xs)"
    elif is_cell(getattr(cell, "cell", None)):
        fix = "pass model.cell with params.cell"
    else:
        got, fix = f"{got} without {', '.join(missing)}", "add the missing methods, see seqjax.cell"
    raise TypeError(f"expected a cell, an object with the methods init, initial_state and step, got {got}: {fix}")


def _is_namespace(cell: type) -> bool:
    """Whether a class is used without an object, as a namespace of functions."""
    methods = [inspect.getattr_static(cell, name) for name in METHODS]
    return all(isinstance(method, staticmethod | classmethod) for method in methods)


def _adapter(value: Any) -> str | None:
    """The adapter for the library of a module, or of the class of a module."""
    bases = value.__mro__ if isinstance(value, type) else type(value).__mro__
    for library, adapter in ADAPTERS.items():
        if any(f"{base.__module__}.".startswith(f"{library}.") for base in bases):
            return adapter
    return None


def _holds_arrays(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def check_inputs(cell: Cell, xs: PyTree) -> tuple[PyTree, int, int]:
    """Returns `xs` as arrays, its batch and its time.

    Raises:
        ValueError: there is no input, a leaf has no (batch, time), the leaves disagree, or the cell has another
            `input_shape`.
        TypeError: `cell` is not a cell.
    """
    check_methods(cell)
    xs = as_arrays("xs", xs)
    leaves = jax.tree_util.tree_leaves_with_path(xs)
    shape = optional(cell, "input_shape")
    expected = "(batch, time, ...)" if shape is None else f"({', '.join(['batch', 'time', *map(str, shape)])})"
    if not leaves:
        raise ValueError(
            f"expected xs {expected}, got no array: "
            f"a cell without inputs still needs its time, xs of shape (batch, time, 0)"
        )
    for path, leaf in leaves:
        fits = leaf.ndim >= 2 if shape is None else leaf.ndim == 2 + len(shape) and leaf.shape[2:] == shape
        if not fits:
            fix = _missing_axis(leaf.shape, shape) or f"the cell is {cell!r}"
            raise ValueError(f"expected xs{jax.tree_util.keystr(path)} {expected}, got {leaf.shape}: {fix}")
    # Only now, because a leaf that lacks an axis would also disagree, and the missing axis is the better explanation.
    sizes = {leaf.shape[:2] for _, leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(f"expected one (batch, time) for every leaf of xs, got {sorted(sizes)}: they run in step")
    batch, time = sizes.pop()
    return xs, batch, time


def check_sequences(cell: Cell, inputs: Inputs) -> Inputs:
    """Returns the inputs of a batch of sequences as arrays.

    Raises:
        ValueError, TypeError: as for `check_inputs` and `check_flags`.
    """
    xs, batch, time = check_inputs(cell, inputs.x)
    mask, reset = (check_flags(name, getattr(inputs, name), batch, time) for name in ("mask", "reset"))
    return Inputs(xs, mask, reset, inputs.noise)


def _missing_axis(got: tuple[int, ...], shape: tuple[int, ...] | None) -> str | None:
    """The likely fix for an input with a missing or an extra axis."""
    rank = 0 if shape is None else len(shape)
    tail = got[len(got) - rank :]
    if len(got) == 1 + rank and shape in (None, tail):
        return "add the missing axis, xs[None] for one sequence or xs[:, None] for one time step"
    if len(got) == rank and shape == tail:
        return "add a batch and a time axis, xs[None, None]"
    if shape is not None and len(shape) == 1 and len(got) == 2:
        return "add a feature axis, xs[..., None], or look tokens up with sj.Embedding"
    if shape is not None and len(got) == 3 + rank and shape == tail:
        return "jax.vmap adds a second batch axis, jax.vmap(lambda xs: sj.unroll(cell, params, xs))(xs)"
    return None


def check_floating_state(cell: Cell, states: State) -> None:
    """Refuses a state that cannot be differentiated.

    Raises:
        TypeError: a leaf of the state is not floating-point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"expected a floating-point state to differentiate, got {leaf.dtype} in "
                f"{type(cell).__name__}'s state{jax.tree_util.keystr(path)}: carry it as an input instead"
            )


def check_flags(name: str, flags: Any, batch: int, time: int) -> Array | None:
    """Returns a mask or a reset as a boolean array (batch, time); None if there is none.

    Raises:
        ValueError: it has another shape than (batch, time).
        TypeError: it is not boolean.
    """
    if flags is None:
        return None
    flags = as_array(name, flags)
    if flags.shape != (batch, time):
        raise ValueError(f"expected {name} (batch, time) = ({batch}, {time}) as in xs, got {flags.shape}")
    if flags.dtype != jnp.bool_:
        raise TypeError(f"expected a boolean {name}, got {flags.dtype}: {name} != 0, or sj.length_mask(lengths, time)")
    return flags


def check_steps(name: str, steps: Any) -> int:
    """Returns a number of steps as a plain integer.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is less than one.
    """
    whole = as_integer(steps)
    if whole is None:
        raise TypeError(f"expected {name} as a whole number of steps, got {steps!r}: about sqrt(time), or None")
    if whole < 1:
        raise ValueError(f"expected {name} of at least one step, got {steps}: about sqrt(time), or None")
    return whole


def batch_of_states(cell: Cell, params: Params, state: State | None, batch: int) -> State:
    """The state before the first step for the whole batch: `state`, or the cell's initial state for each sequence.

    Raises:
        ValueError: a parameter has another shape than the cell's, or the state has another structure, batch or shape.
        TypeError: the parameters are another tree, or the state has another dtype.
    """
    # The check of the shapes is remembered, and a masked array has the shape of an array.
    check_arrays("params", params)
    check_params(cell, params)
    with errors_of_step(cell, params, method="initial_state"):
        if state is None:
            own = strong_type(cell.initial_state(params))
        else:
            # Only its shapes are compared with the state, so nothing is computed.
            own = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    if state is None:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (batch, *leaf.shape)), own)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    own_leaves, own_tree = jax.tree.flatten(own)
    if tree != own_tree:
        raise ValueError(
            f"expected a state of {type(cell).__name__}, {own_tree}, got {tree}: "
            f"pass the final state of an earlier call, or leave it out to start anew"
        )
    for (path, leaf), like in zip(leaves, own_leaves, strict=True):
        name = f"state{jax.tree_util.keystr(path)}"
        got = as_array(name, leaf)
        if got.shape != (batch, *like.shape):
            raise ValueError(
                f"expected {name} (batch, ...) = {(batch, *like.shape)} as in xs, got {got.shape}: "
                f"every sequence of the batch has a state of its own"
            )
        if got.dtype != like.dtype:
            raise TypeError(
                f"expected {name} of the parameters' dtype {like.dtype}, got {got.dtype}: {name}.astype(...)"
            )
    return strong_type(state)
