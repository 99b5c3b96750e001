"""Whether what a class declares of its step, such as `gates`, holds for a subclass with a step of its own."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from seqjax.cell import Cell, cached_check, layers, optional, output_of
from seqjax.sequence._parameter_checks import shapes_of_init
from seqjax.sequence._partition.normalize import share_equal
from seqjax.sequence._partition.program import Dependencies, inline


def declared(cell: Cell, name: str) -> Any:
    """What a cell declares of its step, `gates`, `gate_roles` or `memory`; None if there is none for this step."""
    value = optional(cell, name)
    return None if value is None or undeclared_step(cell, name) is not None else value


def undeclared_step(cell: Cell, name: str) -> Cell | None:
    """The cell, or the layer inside it, that inherits `name` from a class with another step; None if there is none.

    An inherited declaration holds if both steps compute the new state by the same equations. So a subclass may change
    the output. This is only known if `init` can be traced and the cell has an `input_shape`.
    """
    if optional(cell, name) is None:
        return None
    definer, stepper = (_definer(cell, each) for each in (name, "step"))
    if definer is None:
        return None
    if not (stepper is not None and issubclass(definer, stepper)) and not _has_step_of(cell, definer):
        return cell
    # A wrapper of seqjax passes on what its layers declare.
    inner = layers(cell) if definer.__module__.startswith("seqjax.cells.") else ()
    return next(filter(None, (undeclared_step(each, name) for each in inner)), None)


def _has_step_of(cell: Cell, kind: type) -> bool:
    if not hasattr(kind, "step"):  # a class without a step declares something for its subclasses
        return True
    return _same_recurrence(cell, kind)


def _definer(cell: Cell, name: str) -> type | None:
    """The class that defines an attribute of a cell; None if the object itself does."""
    if name in getattr(cell, "__dict__", {}):
        return None
    return next((kind for kind in type(cell).__mro__ if name in vars(kind)), None)


@cached_check
def _same_recurrence(cell: Any, kind: type) -> bool:
    """Whether the step of a cell computes its new state by the equations of the step of one of its base classes."""
    params, shape = shapes_of_init(cell), optional(cell, "input_shape")
    if params is None or shape is None:
        return False
    x = jax.ShapeDtypeStruct(shape, jnp.result_type(float if shape else int))

    def new_states(params: PyTree, x: Any) -> tuple[PyTree, PyTree]:
        state, inherited = cell.initial_state(params), inspect.getattr_static(kind, "step").__get__(cell, type(cell))
        return output_of(cell, cell.step(params, state, x))[0], output_of(cell, inherited(params, state, x))[0]

    try:
        program = inline(jax.make_jaxpr(new_states)(params, x))
        variables = share_equal(program, Dependencies(program, 0, 0)).jaxpr.outvars
    except Exception:  # noqa: BLE001 - a step that fails reports its error when it runs
        return False
    half = len(variables) // 2
    return all(a is b for a, b in zip(variables[:half], variables[half:], strict=True))
