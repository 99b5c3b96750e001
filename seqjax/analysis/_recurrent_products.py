"""The matrices that multiply the state in the program of a step, with names from the parameters and the gates.

In each loop of the step (`seqjax.sequence._partition.loops`), these are the weights W of the products W v whose operand
v depends on the state of the loop, and whose weights depend on parameters only. So the input weights of an upper layer
are not among them, nor is a readout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from seqjax.cell import Cell, Params, strong_type
from seqjax.sequence._declared import declared
from seqjax.sequence._masked_step import emit_nothing
from seqjax.sequence._partition.loops import stages
from seqjax.sequence._partition.normalize import share_equal, split_concatenated
from seqjax.sequence._partition.program import (
    Dependencies,
    Eqn,
    Var,
    contracted_axis,
    evaluate,
    inline,
    is_product,
    is_slice,
    starts_of_slices,
)
from seqjax.sequence._partition.tracing import traced_one
from seqjax.sequence.unroll import GatesOfStep


class _Origin(NamedTuple):
    """The part of one leaf of the parameters that a variable is.

    Attributes:
        name: of the leaf.
        shape: of the leaf.
        ranges: (start, stop) along each axis of the leaf.
        axes: the axis of the leaf for each axis of the variable.
    """

    name: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    axes: tuple[int, ...]

    def part(self, axis: int, start: int, stop: int) -> _Origin:
        """The indices start..stop-1 along an axis of the variable."""
        k = self.axes[axis]
        first = self.ranges[k][0]
        return self._replace(ranges=(*self.ranges[:k], (first + start, first + stop), *self.ranges[k + 1 :]))

    @property
    def is_whole(self) -> bool:
        """Whether the variable is the whole leaf."""
        return self.ranges == tuple((0, size) for size in self.shape)

    def __str__(self) -> str:
        if self.is_whole:
            return self.name
        indices = [
            ":" if (start, stop) == (0, size) else f"{start}:{stop}" if k in self.axes else str(start)
            for k, ((start, stop), size) in enumerate(zip(self.ranges, self.shape, strict=True))
        ]
        while indices[-1] == ":":
            indices.pop()
        return f"{self.name}[{', '.join(indices)}]"


def recurrent_products(cell: Cell, params: Params, x: PyTree) -> dict[str, Float[np.ndarray, "out in"]]:
    """The matrices W of the products W v in the loops of a step, as they multiply v.

    A product whose result is only read in slices, as the gates of an LSTM, counts as one matrix per slice.

    Args:
        cell, params: any cell.
        x: one input of one example, as arrays or shapes.

    Returns:
        Matrices by name: the path of the leaf that W is, with indices if it is a part of one, or with the gate that
        this part feeds. "product 1", "product 2", ... if W is computed in another way. Empty if the step cannot be
        divided into loops. A product inside a `lax.cond` or a loop of the step is not found.
    """
    state = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    emit = emit_nothing if declared(cell, "gates") is None else GatesOfStep(cell)
    traced = traced_one(cell, emit, params, state, (x, None, None, None))
    if traced.program.effects:
        return {}
    n_params, n_state = traced.n_params, traced.n_state
    try:
        program = inline(traced.program)
        program = share_equal(program, Dependencies(program, n_params, n_state))
        loops = stages(program, n_params, n_state)
    except Exception:  # noqa: BLE001 - jaxprs differ between releases of JAX, as for `plan_of`
        return {}
    named = jax.tree_util.tree_leaves_with_path(traced.trees[1].unflatten(program.jaxpr.outvars[n_state:]))
    gates = {v: str(path[-1].key).rpartition("/")[2] for path, v in named if isinstance(v, Var)}
    matrices: dict[str, Any] = {}
    for stage in loops:
        if stage.leaves:
            n = len(stage.leaves)
            loop = split_concatenated(stage.program, Dependencies(stage.program, n_params, n))
            results = zip(stage.outputs, loop.jaxpr.outvars[n:], strict=True)
            own = {new: gates[old] for old, new in results if isinstance(old, Var) and old in gates}
            for name, W in _Loop(loop, params, n, own).matrices(len(matrices)):
                matrices[_unique(name, matrices)] = W
    return matrices


def _unique(name: str, taken: dict[str, Any]) -> str:
    """The name with a number if it is taken, because a step may use one matrix twice."""
    count = sum(other == name or other.startswith(f"{name} (") for other in taken)
    return f"{name} ({count + 1})" if count else name


class _Loop:
    """The products of one loop, (params.., state.., x..) -> (new_state.., outputs..)."""

    def __init__(self, program: Any, params: Params, n_state: int, gates: dict[Var, str]) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self.depends, self.gates, jaxpr = Dependencies(program, len(leaves), n_state), gates, program.jaxpr
        self.leaf_of = {
            v: (jax.tree_util.keystr(path, simple=True, separator=".") or "params", np.shape(leaf))
            for v, (path, leaf) in zip(jaxpr.invars, leaves, strict=False)
        }
        self.made_by = {v: e for e in self.depends.eqns for v in e.outvars}
        once = [e for e in self.depends.eqns if all(map(self.depends.only_on_params, e.outvars))]
        values = [*program.consts, *(leaf for _, leaf in leaves)]
        self.read = evaluate(once, dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=False)))

    def matrices(self, before: int) -> Iterator[tuple[str, np.ndarray]]:
        """Names and matrices; `before` is the number of matrices in earlier loops."""
        for e in self.depends.eqns:
            if not is_product(e, 1, 2) or not self.depends.on_state(e.invars[0]):
                continue
            weights = e.invars[1]
            if self.depends.only_on_params(weights):
                rows = 1 - contracted_axis(e, 1)
                W = np.moveaxis(np.asarray(self.read(weights)), rows, 0)
                for start, stop, out in self._blocks(e.outvars[0]):
                    before += 1
                    yield self._name(self._block(weights, rows, start, stop), out, before), W[start:stop]

    def _name(self, part: _Origin | None, out: Var, number: int) -> str:
        gate = self._gate(out)
        if part is None:
            return f"product {number}"
        return f"{part.name}.{gate}" if gate is not None and not part.is_whole else str(part)

    def _block(self, v: Var, axis: int, start: int, stop: int) -> _Origin | None:
        """The origin of the indices start..stop-1 along an axis of a matrix, which may be a concatenation of leaves."""
        e = self.made_by.get(v)
        if e is not None and e.primitive.name == "concatenate" and e.params["dimension"] == axis:
            for part in e.invars:
                size = part.aval.shape[axis]
                if start < size:
                    return self._block(part, axis, start, stop) if stop <= size else None
                start, stop = start - size, stop - size
        origin = self._origin(v)
        return None if origin is None else origin.part(axis, start, stop)

    def _origin(self, v: Var) -> _Origin | None:
        """The part of a leaf that a matrix is; None if it is computed in another way."""
        if v in self.leaf_of:
            name, shape = self.leaf_of[v]
            return _Origin(name, shape, tuple((0, size) for size in shape), tuple(range(len(shape))))
        e = self.made_by.get(v)
        origin = None if e is None or not e.invars or not isinstance(e.invars[0], Var) else self._origin(e.invars[0])
        if e is None or origin is None:
            return None
        return _part_by(e, v, origin)

    def _blocks(self, out: Var) -> Sequence[tuple[int, int, Var]]:
        """The rows of a product that are read apart, as (start, stop, the variable that they are)."""
        size, found = out.aval.shape[0], self._slices(out)
        ends = [0, *(stop for _, stop, _ in found)]
        tiled = ends[-1] == size and [start for start, _, _ in found] == ends[:-1]
        return found if tiled and len(found) > 1 else [(0, size, out)]

    def _slices(self, v: Var) -> list[tuple[int, int, Var]]:
        by = [e for e in self.depends.readers.get(v, []) if e is not None]
        if by and all(map(is_slice, by)):
            return sorted(
                ((start, start + part.aval.shape[0], part) for e in by for start, part in starts_of_slices(e)),
                key=lambda block: block[:2],
            )
        # A bias or another product may be added before the result is divided.
        same = len(by) == 1 and by[0].primitive.name in ("add", "sub", "convert_element_type")
        return self._slices(by[0].outvars[0]) if same and by[0].outvars[0].aval.shape == v.aval.shape else []

    def _gate(self, v: Var) -> str | None:
        """The only gate that a value reaches without passing through another gate."""
        reached, gates = {v}, {self.gates[v]} if v in self.gates else set()
        for e in self.depends.eqns:
            if any(isinstance(a, Var) and a in reached for a in e.invars):
                gates |= {self.gates[out] for out in e.outvars if out in self.gates}
                reached |= {out for out in e.outvars if out not in self.gates}
        return gates.pop() if len(gates) == 1 else None


def _part_by(e: Eqn, v: Var, origin: _Origin) -> _Origin | None:
    """The origin of a result of an equation that selects or reorders entries; None for another equation."""
    name = e.primitive.name
    if name == "transpose":
        return origin._replace(axes=tuple(origin.axes[axis] for axis in e.params["permutation"]))
    if name in ("convert_element_type", "copy"):
        return origin
    if name == "squeeze":
        kept = [axis for k, axis in enumerate(origin.axes) if k not in e.params["dimensions"]]
        return origin._replace(axes=tuple(kept))
    if name == "slice" and set(e.params["strides"] or ()) <= {1}:
        for axis, (start, stop) in enumerate(zip(e.params["start_indices"], e.params["limit_indices"], strict=True)):
            origin = origin.part(axis, start, stop)
        return origin
    if name == "split":
        start = next(start for start, out in starts_of_slices(e) if out is v)
        axis = e.params["axis"]
        return origin.part(axis, start, start + v.aval.shape[axis])
    return None
