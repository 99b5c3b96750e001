"""What the rewrites of a step's program share: which variables depend on what, and slices of vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jax.typing import ArrayLike
from jaxtyping import Array

from seqjax.sequence._partition.program import Atom, Eqn, Var, dependents, inexact, needed, readers


class Dependencies:
    """Which variables of a program depend on what.

    Attributes:
        eqns: the equations that the results need.
        from_state, from_x: the variables that depend on the state, and those that depend on the input.
        readers: for each variable the equations that read it, and None for each time that it is a result.
    """

    def __init__(self, program: ClosedJaxpr, params: int, state: int) -> None:
        """Follows the dependencies of (params.., state.., x..) -> results, with these numbers of leaves."""
        jaxpr = program.jaxpr
        self.eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
        self.from_state = dependents(self.eqns, jaxpr.invars[params : params + state])
        self.from_x = dependents(self.eqns, jaxpr.invars[params + state :])
        self.readers = readers(self.eqns, jaxpr.outvars)

    def on_state(self, v: Atom) -> bool:
        """Whether a variable depends on the state."""
        return not isinstance(v, Literal) and v in self.from_state

    def only_on_params(self, v: Atom) -> bool:
        """Whether a variable depends on parameters only."""
        return not isinstance(v, Literal) and v not in self.from_state and v not in self.from_x

    def only_reader(self, v: Var) -> Eqn | None:
        """The equation that reads a variable, if there is exactly one and the variable is not a result."""
        found = self.readers.get(v, [])
        return found[0] if len(found) == 1 else None

    def added_params(self, v: Var) -> tuple[Eqn, Var] | None:
        """The equation that adds parameters to a variable, and these parameters, if nothing else reads the variable."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if b is not None and self.only_on_params(b) and b.aval.shape == v.aval.shape else None

    def added_number(self, v: Var) -> tuple[Eqn, Literal] | None:
        """Like `added_params`, for a number that is written in the step, such as a forget bias of 1."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b: Any = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if isinstance(b, Literal) and np.shape(b.val) == () else None

    def in_params_first_order(self) -> list[Eqn]:
        """The equations with those first that read parameters only, so that a merged product finds all its matrices."""
        return sorted(self.eqns, key=lambda e: not all(map(self.only_on_params, e.outvars)))

    def slices(self) -> dict[Var, tuple[Var, int]]:
        """For each slice of a vector, that vector and the first index."""
        return {v: (e.invars[0], start) for e in self.eqns if is_slice(e) for start, v in starts_of_slices(e)}


def can_regroup(v: Atom) -> bool:
    """Whether sums of this dtype may be regrouped, which changes the last digit of the result.

    In half precision the last digit matters, so there the order in which the step adds is preserved.
    """
    return inexact(v.aval) and v.aval.dtype.itemsize >= 4


def is_slice(e: Eqn) -> bool:
    """Whether an equation is a slice or a split, without strides."""
    if e.primitive.name == "slice":
        return e.params["strides"] is None
    return e.primitive.name == "split"


def starts_of_slices(e: Eqn) -> list[tuple[int, Var]]:
    """The first index of each result of a slice or a split of a vector."""
    if e.primitive.name == "slice":
        return [(e.params["start_indices"][0], e.outvars[0])]
    sizes = [int(size) for size in e.params["sizes"]]
    return list(zip(itertools.accumulate([0, *sizes[:-1]]), e.outvars, strict=True))


def overlap(ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether two of some ranges (start, stop) have an index in common."""
    return any(start < stop for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)))


def concatenated(parts: Iterable[ArrayLike]) -> ArrayLike:
    """The concatenation of vectors or matrices; a single one is returned without a copy."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def split(whole: Array, sizes: list[int]) -> list[Array]:
    """A vector in parts of these sizes; with a single size it is returned without a copy."""
    return [whole] if len(sizes) == 1 else list(lax.split(whole, sizes))
