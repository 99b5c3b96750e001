"""What the rewrites of a step's program share: which variables depend on what, and slices of vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from seqjax.sequence._partition.program import Eqn, needed, reach, readers


class Kinds:
    """Which variables of a program depend on what."""

    def __init__(self, closed: ClosedJaxpr, params: int, state: int) -> None:
        jaxpr = closed.jaxpr
        self.eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
        self.from_state = reach(self.eqns, jaxpr.invars[params : params + state])
        self.from_x = reach(self.eqns, jaxpr.invars[params + state :])
        self.readers = readers(self.eqns, jaxpr.outvars)

    def is_late(self, v: Any) -> bool:
        """Whether it depends on the state."""
        return not isinstance(v, Literal) and v in self.from_state

    def is_fixed(self, v: Any) -> bool:
        """Whether it depends on parameters only."""
        return not isinstance(v, Literal) and v not in self.from_state and v not in self.from_x

    def only_reader(self, v: Any) -> Eqn | None:
        """The equation that reads a variable, if there is exactly one and it is no result."""
        found = self.readers.get(v, [])
        return found[0] if len(found) == 1 else None

    def added_to(self, v: Any) -> tuple[Eqn, Any] | None:
        """The equation that adds parameters to a variable, and these, if nothing else reads the variable."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if b is not None and self.is_fixed(b) and b.aval.shape == v.aval.shape else None

    def number_added_to(self, v: Any) -> tuple[Eqn, Any] | None:
        """As `added_to`, for a number that is written in the step, such as a forget bias of 1."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b: Any = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if isinstance(b, Literal) and b.aval.shape == () else None


def slices_rows(e: Eqn) -> bool:
    """Whether an equation takes a slice, or splits, without strides."""
    if e.primitive.name == "slice":
        return e.params["strides"] is None
    return e.primitive.name == "split"


def starts_of_slices(e: Eqn) -> list[tuple[int, Any]]:
    """Where each result of a slice or a split of a vector begins."""
    if e.primitive.name == "slice":
        return [(e.params["start_indices"][0], e.outvars[0])]
    sizes = [int(size) for size in e.params["sizes"]]
    return list(zip(itertools.accumulate([0, *sizes[:-1]]), e.outvars, strict=True))


def concatenated(parts: Iterable[Any]) -> Any:
    """The parts side by side; a single one as it is."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def split(whole: Any, sizes: list[int]) -> list[Any]:
    """A vector in parts of these sizes; as it is for a single size."""
    return [whole] if len(sizes) == 1 else list(lax.split(whole, sizes))
