"""The contract: what a recurrent cell is.

A recurrent network is one function applied at every time step,

    s_t, o_t = step(theta, s_{t-1}, x_t),

with the same parameters theta at every t. A *cell* is any object with the three methods of `Cell`. Nobody inherits
from it: a class of ten lines that has them works everywhere in seqjax, and so does an adapter around another library's
cell (`seqjax.from_linen`, `seqjax.from_nnx`, `seqjax.from_equinox`).

The shape rule: **a step is one example at one time; a sequence call is (batch, time, feature).** `step` never sees a
batch axis; `jax.vmap` adds it outside.

What a cell promises, and what `seqjax.testing.check_cell` checks:

- `step` is pure, and the state that it returns has the type of the state that it got: the same tree, shapes and dtypes.
- The state's dtype follows the parameters.
- A cell is immutable. One that hashes by value, as every frozen dataclass does, compiles once however often it is
  rebuilt.

Nothing else is needed for anything. How a cell is unrolled fast, its gradients and its Jacobian are derived from the
program of `step` (`seqjax.sequence._partition`); `seqjax.explain` prints what was found. A cell may also have:

- `input_shape`: the shape of one input, `(8,)` for eight features and `()` for a token. Sequence calls then check `xs`
  before anything compiles.
- `gates(params, state, x)`: the gate activations of one step by name, for `seqjax.gates`.
- `gate_roles`: what each gate does, by the same names: "keeps" (multiplies the old value), "replaces" (1 - gate keeps),
  "writes", "reads" or "candidate"; and `memory`, the name of the state field that the keeping gate multiplies. A
  subclass with a step of its own must declare these three anew, unless its step computes the same new state.
- `state_names`: the names of the leaves of the state, if its tree does not name them, for analyses and reports: "h" for
  one array, and ("c", "h") for a tuple of two.
- `noise(key)`: the randomness of one step. `unroll` with a key draws it for all steps before the loop and calls
  `step(params, state, x, noise)`. Without a key it calls `step(params, state, x)`, which is deterministic. So
  randomness is an input and never hidden in the state. `seqjax.with_noise` draws it for functions without a key.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cells.arguments import as_array

# What cannot change after it was made. A function counts: rebinding what it closes over is not seen by jax.jit either.
IMMUTABLE = (bool, int, float, complex, str, bytes, type, np.dtype, types.FunctionType, types.BuiltinFunctionType)

PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep

Params = PyTree
State = PyTree
Output = PyTree


@runtime_checkable
class Cell(Protocol):
    """One step of a recurrent network, `s_t, o_t = step(theta, s_{t-1}, x_t)`.

    Example:
        The running sum is a cell, although it inherits from nothing.

        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> class RunningSum:
        ...     def init(self, key): return {}
        ...     def initial_state(self, params): return jnp.zeros(())
        ...     def step(self, params, state, x): return state + x, state + x
        >>> isinstance(RunningSum(), sj.Cell)
        True
        >>> sj.unroll(RunningSum(), {}, jnp.ones((1, 4)))[1].tolist()
        [[1.0, 2.0, 3.0, 4.0]]
    """

    def init(self, key: Array) -> Params:
        """Draws parameters; the sizes come from the cell's own fields."""
        ...

    def initial_state(self, params: Params) -> State:
        """The state before the first step, for one example. May depend on the parameters, so it may be learned."""
        ...

    def step(self, params: Params, state: State, x: PyTree) -> tuple[State, Output]:
        """One example at one time, in the order of `lax.scan`: the new state first, then what is observed."""
        ...


def strong_type(tree: PyTree) -> PyTree:
    """Every leaf as an array without a weak type, so that its dtype does not depend on the operations that follow."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(jnp.asarray(leaf), jnp.asarray(leaf).dtype), tree)


def output_of(cell: Cell, stepped: Any) -> tuple[State, Output]:
    """Returns what a step returned, if it is a new state and an output.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(stepped, tuple) or len(stepped) != 2:
        raise TypeError(
            f"expected {type(cell).__name__}.step to return (new_state, output), got {type(stepped).__name__}"
            f"{_at_line(cell.step)}: a cell whose output is its state returns it twice"
        )
    return stepped


def same_state_type(cell: Cell, new: State, old: State) -> State:
    """Returns `new` if it has the tree, shapes and dtypes of `old`; otherwise raises, naming the leaf.

    A state that changes its type cannot be carried by `lax.scan`. Caught here, the message can name the cell's step.

    Raises:
        TypeError: the step returned a state of another structure, shape or dtype than it was given.
    """
    name = type(cell).__name__
    new_leaves, new_tree = jax.tree_util.tree_flatten_with_path(new)
    old_leaves, old_tree = jax.tree_util.tree_flatten_with_path(old)
    if new_tree != old_tree:
        raise TypeError(
            f"expected {name}.step to return a state of the structure that it got, {old_tree}, got {new_tree}"
            f"{_at_line(cell.step)}: return (new_state, output), in this order, with new_state built like "
            f"initial_state(params)"
        )
    for (path, new_leaf), (_, old_leaf) in zip(new_leaves, old_leaves, strict=True):
        got, expected = jnp.asarray(new_leaf).aval, jnp.asarray(old_leaf).aval
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise TypeError(
                f"expected {name}.step to keep the type of its state{jax.tree_util.keystr(path)}, "
                f"{expected.str_short()}, got {got.str_short()}{_at_line(cell.step)}: cast it to the state's dtype, or "
                f"start from an initial_state of the type that the step returns"
            )
    return strong_type(new)


class NotOffered(AttributeError):
    """A wrapper's property raises it when no inner cell has this optional part."""


def optional(cell: object, name: str) -> Any:
    """An optional part of a cell, such as `gates`, or None if the cell does not have it.

    An AttributeError that is raised inside a property of the user's own class is an error of the user and propagates.
    """
    try:
        return getattr(cell, name)
    except NotOffered:
        return None
    except AttributeError as error:
        # Python notes in the error which object was asked. If that object defines the attribute, its property failed.
        if error.name != name or inspect.getattr_static(error.obj, name, None) is not None:
            raise
        return None


def inherited(cell: object, name: str) -> Any:
    """An optional part of a wrapped cell.

    Raises:
        NotOffered: the wrapped cell does not have it.
    """
    value = optional(cell, name)
    if value is None:
        raise NotOffered(f"{type(cell).__name__} has no {name}")
    return value


def names_of_state(cell: object, state: State) -> list[str]:
    """The name of each leaf of a state: from `state_names` if the cell declares it, otherwise its path.

    Returns:
        Names such as "h" or, in a stack, "0.h"; "state" if the state is one array without a name.
    """
    names, paths = [], [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    for path in paths:
        name = optional(cell, "state_names")
        for key in path:
            name = name[key.idx] if isinstance(name, tuple) and getattr(key, "idx", len(name)) < len(name) else name
        names.append(name if isinstance(name, str) else jax.tree_util.keystr(path, simple=True, separator="."))
    if len(set(names)) < len(names):  # the declaration does not fit this state
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    return [name or "state" for name in names]


def layers(cell: object) -> tuple[Any, ...]:
    """The cells inside a cell: those of a stack, the one inside a wrapper, or none."""
    inner = optional(cell, "cells")
    if inner is None:
        wrapped = optional(cell, "cell")
        inner = () if wrapped is None else (wrapped,)
    return tuple(inner)


def line_of(method: Any) -> str | None:
    """Where a method of a user begins, as "file:line"; None for one of seqjax, or one that is not written in Python."""
    code = getattr(method, "__code__", None)
    if code is None or os.path.abspath(code.co_filename).startswith(PACKAGE):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"


def _at_line(method: Any) -> str:
    line = line_of(method)
    return f" from the method at {line}" if line else ""


def as_feature(x: Any, size: int, dtype: DTypeLike, cell: str) -> Array:
    """One step's input as a vector of the parameters' dtype, so that no input can change the type of the state.

    Raises:
        ValueError: `x` is not one vector of `size` features.
        TypeError: `x` does not hold floating-point numbers.
    """
    x = as_array("x", x)
    if x.shape != (size,):
        raise ValueError(
            f"expected one example at one time, x ({size},), in {cell}.step, got {x.shape}: "
            f"call sj.unroll for (batch, time, {size}), or jax.vmap over the batch"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"expected floating-point x in {cell}.step, got {x.dtype}: "
            f"convert with x.astype(float), or look tokens up with sj.Embedding"
        )
    return x.astype(dtype)


def is_value(part: Any) -> bool:
    """Whether a cell, head, model, objective or option compares by value all the way down.

    Compiled code may be cached for such an object. An object that compares by identity may change between two calls,
    and cached code would then compute with its former fields.
    """
    if isinstance(part, tuple):
        return all(map(is_value, part))
    if isinstance(part, types.MethodType):
        return is_value(part.__self__)
    if isinstance(part, functools.partial):
        return is_value((part.func, part.args, tuple(part.keywords.values())))
    if part is None or isinstance(part, IMMUTABLE) or type(part).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return True
    if type(part).__hash__ in (None, object.__hash__):
        return False
    try:
        hash(part)
    except TypeError:
        return False
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    return all(field.compare and is_value(getattr(part, field.name)) for field in fields)


def cached_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a cell and other hashable arguments with a cache, for cells that compare by value.

    A cell that compares by identity may have changed since the last call, so the function is called again.

    Example:
        >>> import seqjax as sj
        >>> from seqjax.cell import cached_check
        >>> calls = []
        >>> size = cached_check(lambda cell: calls.append(cell) or cell.hidden_size)
        >>> size(sj.GRU(2, 3)), size(sj.GRU(2, 3)), len(calls)
        (3, 3, 1)
    """
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def run(cell: Any, *args: Any) -> Any:
        return (cached if is_value(cell) else function)(cell, *args)

    return run
