"""The Jacobian ds_t/ds_{t-1} of any cell from the parts of its step, without a product of matrices wherever possible.

    J = D_s + sum_i D_i W_i

if the rest acts unit by unit: D_s and D_i, its derivatives by the state and by the cuts, are diagonal, and W_i is the
same at every step. A new leaf of the state that another one reads, such as c_t in an LSTM, contributes D_c J_c, so its
rows are used again. A cut whose operand depends on another cut costs one product. If the rest does not act unit by
unit, the rows of the W_i are pushed through it as tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.plan import traced_one
from seqjax.sequence._partition.program import inline
from seqjax.sequence._partition.units import Atoms, Formula, NotUnitwise, Symbol, Units

Leaves = list[Any]


def _nothing(params: Params, before: State, x: PyTree, after: State, output: Output) -> tuple[()]:
    """Keeps nothing of a step."""
    return ()


def step_jacobian(cell: Cell, params: Params, state: State, at: PyTree) -> Callable[[State, PyTree], Array]:
    """A function that computes the Jacobian of one masked step.

    Args:
        cell: any cell with a floating-point state.
        params: the parameters. What depends on them only is computed here, once.
        state: a state of one example, as shapes and dtypes.
        at: (x_t, valid, restart, noise) of one example at one time, as shapes and dtypes.

    Returns:
        A function of a state and of `at` that returns the matrix (n, n), over the leaves of the state in their order.
    """
    traced = traced_one(cell, _nothing, params, state, at)
    parts = Parts(inline(traced.program), traced.params, traced.state, with_sigmoids=False)
    leaves = [*parts.consts, *map(jnp.asarray, jax.tree.leaves(params))]
    units = units_of(parts)
    way = _ByColumns(parts, leaves) if units is None else _ByUnits(parts, units, leaves)
    return lambda state, at: way(jax.tree.leaves(state), jax.tree.leaves(at))


def units_of(parts: Parts) -> Units | None:
    """The formulas of a rest that acts unit by unit, all in one dtype; None for another rest."""
    if len({v.aval.dtype for v in parts.state}) != 1:
        return None
    try:
        return Units(parts, Atoms())
    except NotUnitwise:
        return None


class _Way:
    """What both ways share: the flat state, and the rows of the weights over it."""

    def __init__(self, parts: Parts, params: Leaves) -> None:
        self.parts, self.hoisted = parts, parts.hoist(params)
        sizes = [v.aval.size for v in parts.state]
        self.starts = [int(start) for start in np.cumsum([0, *sizes])]
        self.dtype = jnp.result_type(*(v.aval.dtype for v in parts.state))

    @property
    def total(self) -> int:
        """n, the numbers in one state."""
        return self.starts[-1]

    def over_state(self, rows: Array, leaf: int) -> Array:
        """Rows over one leaf of the state as rows over the whole state, (m, n)."""
        after = self.total - self.starts[leaf + 1]
        return jnp.pad(rows.astype(self.dtype), ((0, 0), (self.starts[leaf], after)))


class _ByUnits(_Way):
    """Of a rest that acts unit by unit."""

    def __init__(self, parts: Parts, units: Units, params: Leaves) -> None:
        super().__init__(parts, params)
        self.units, self.atoms = units, units.atoms
        self.direct = [self._state_leaf(blocks) for blocks in units.operands]
        rows = [
            None if leaf is None else self.over_state(W, leaf)
            for (W, _), leaf in zip(self.hoisted[1], self.direct, strict=True)
        ]
        # Without the barrier XLA computes the rows again at every step, from matrices that it stacks and transposes.
        self.rows = lax.optimization_barrier(rows)

    def _state_leaf(self, blocks: list[Formula]) -> int | None:
        """The leaf of the state that a cut reads as it is."""
        states = [self.atoms.symbol(*self.units.rename(("state", k))) for k in range(len(self.parts.state))]
        return states.index(blocks[0]) if len(blocks) == 1 and blocks[0] in states else None

    def __call__(self, state: Leaves, x: Leaves) -> Array:
        parts, units, n = self.parts, self.units, self.units.size
        drives = parts.drives(self.hoisted, x)
        values: dict[Symbol, Any] = {}
        for kind, arrays in (("drive", drives), ("parameter", self.hoisted[0]), ("state", state)):
            for k, array in enumerate(arrays):
                values |= self._blocks(kind, k, array)
        matrices: dict[Symbol, Array] = {}
        for k in range(len(state)):
            matrices["state", k] = jnp.eye(n, self.total, self.starts[k], dtype=self.dtype)
        results: Leaves = [None] * len(parts.cuts)

        def cut(i: int, v: Any) -> Any:
            """Also notes the derivative of the cut by the state."""
            results[i] = parts.cuts[i].value(self.hoisted[1][i], v)
            values.update(self._blocks("cut", i, results[i]))
            M = self.rows[i]
            if M is None:
                M = self._behind(i, values, matrices, v)
            matrices.update(self._blocks("cut", i, M))
            return results[i]

        parts.finish(self.hoisted, state, drives, cut)
        for k in units.order:
            self._add_leaf(k, values, matrices)
        return jnp.concatenate([matrices["after", k] for k in range(len(state))])

    def _add_leaf(self, k: int, values: dict[Symbol, Any], matrices: dict[Symbol, Array]) -> None:
        """Adds a new leaf of the state and its rows of the Jacobian, unless they are there."""
        if ("after", k) not in matrices:
            formula, like = self.units.after[k], values["state", k]
            for name in self.atoms.symbols(formula):
                if name[0] == "after":
                    self._add_leaf(name[1], values, matrices)
            values["after", k] = self.atoms.value(formula, values, {}, like)
            matrices["after", k] = self._derivative(formula, values, matrices, like)

    def _blocks(self, kind: str, index: int, array: Any) -> dict[Symbol, Any]:
        if array.ndim == 0 or kind == "state":
            return {(kind, index): array}
        n = self.units.size
        return {(kind, index, k): array[k * n : (k + 1) * n] for k in range(array.shape[0] // n)}

    def _derivative(
        self, formula: Formula, values: dict[Symbol, Any], matrices: dict[Symbol, Array], like: Any
    ) -> Array:
        """d formula / d state, (n, total): a sum of scaled rows."""
        moving = sorted(s for s in self.atoms.symbols(formula) if s[0] in ("state", "cut", "after"))
        for _, k in (s for s in moving if s[0] == "after"):
            self._add_leaf(k, values, matrices)
        terms = [self._by_symbol(formula, s, values, like).astype(self.dtype)[:, None] * matrices[s] for s in moving]
        return sum(terms[1:], terms[0]) if terms else jnp.zeros((self.units.size, self.total), self.dtype)

    def _by_symbol(self, formula: Formula, symbol: Symbol, values: dict[Symbol, Any], like: Any) -> Array:
        def value(block: Any) -> Any:
            return self.atoms.value(formula, values | {symbol: block}, {}, like)

        return jax.jvp(value, (values[symbol],), (jnp.ones_like(values[symbol]),))[1]

    def _behind(self, i: int, values: dict[Symbol, Any], matrices: dict[Symbol, Array], v: Any) -> Array:
        """d(W v)/d state for an operand v that is not a leaf of the state."""
        W = self.hoisted[1][i][0]
        parts = [self._derivative(block, values, matrices, v[: self.units.size]) for block in self.units.operands[i]]
        dv = jnp.concatenate(parts).astype(v.dtype)
        return lax.dot_general(W, dv, (((1,), (0,)), ((), ())), preferred_element_type=self.dtype)


class _ByColumns(_Way):
    """Of any rest: one tangent of the rest per number of the state, with the tangents of the cuts read off W."""

    def __init__(self, parts: Parts, params: Leaves) -> None:
        super().__init__(parts, params)
        self.rows = [
            self.over_state(W, parts.state.index(c.operand)) if c.is_matrix and c.operand in parts.state else None
            for c, (W, _) in zip(parts.cuts, self.hoisted[1], strict=True)
        ]

    def __call__(self, state: Leaves, x: Leaves) -> Array:
        parts, drives = self.parts, self.parts.drives(self.hoisted, x)

        def rest(state: Leaves, more: Leaves) -> Array:
            def cut(i: int, v: Any) -> Any:
                if self.rows[i] is None:
                    return parts.cuts[i].value(self.hoisted[1][i], v)
                return parts.cuts[i].value(self.hoisted[1][i], lax.stop_gradient(v)) + more[i]

            after, _ = parts.finish(self.hoisted, state, drives, cut)
            return jnp.concatenate([leaf.ravel().astype(self.dtype) for leaf in after])

        cuts = list(zip(parts.cuts, self.rows, strict=True))
        zeros = [None if M is None else jnp.zeros(c.out.aval.shape, c.out.aval.dtype) for c, M in cuts]
        eye = jnp.eye(self.total, dtype=self.dtype)
        units = [
            eye[:, start : start + leaf.size].reshape(-1, *leaf.shape).astype(leaf.dtype)
            for start, leaf in zip(self.starts, state, strict=False)
        ]
        rows = [None if M is None else M.T.astype(c.out.aval.dtype) for c, M in cuts]
        return jax.vmap(lambda ds, dr: jax.jvp(rest, (state, zeros), (ds, dr))[1], out_axes=1)(units, rows)
