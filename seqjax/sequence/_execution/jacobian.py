"""The Jacobian ds_t/ds_{t-1} of any cell from the parts of its step, if possible without a product of matrices.

    J = D_s + sum_i D_i W_i

This holds if the rest acts unit by unit: D_s and D_i, its derivatives by the state and by the cuts, are then diagonal,
and W_i is the same at every step. If another leaf reads a leaf of the new state, such as c_t in an LSTM, that leaf
contributes D_c J_c, so its rows are used again. A cut whose operand depends on another cut needs one product. If the
rest does not act unit by unit, the rows of the W_i are tangents that are pushed through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State
from seqjax.sequence._execution.chunks import Leaves
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.program import inline
from seqjax.sequence._partition.units import Formula, NotUnitwise, Symbol, Terms, Units

if TYPE_CHECKING:  # only annotations need it
    from seqjax.sequence._partition.tracing import Traced
else:
    Traced = Any

Matrices = dict[Symbol, Array]  # the derivatives of symbols by the state, one row per unit


def step_jacobian(traced: Traced, params: Params) -> Callable[[State, PyTree], Array]:
    """A function that computes the Jacobian of one masked step.

    Args:
        traced: the masked step of a cell with a floating-point state, which emits nothing.
        params: the parameters. What depends only on them is computed here, once.

    Returns:
        A function of a state and of (x_t, mask_t, reset_t, noise_t) of one example at one time. It returns the matrix
        (n, n), over the leaves of the state in their order.
    """
    parts = Parts(inline(traced.program), traced.n_params, traced.n_state, merge_sigmoids=False)
    leaves = [*parts.consts, *map(jnp.asarray, jax.tree.leaves(params))]
    units = units_of(parts)
    jacobian = _ByColumns(parts, leaves) if units is None else _ByUnits(parts, units, leaves)
    return lambda state, at: jacobian(jax.tree.leaves(state), jax.tree.leaves(at))


def units_of(parts: Parts) -> Units | None:
    """The formulas of a rest that acts unit by unit on leaves of one dtype; None for another rest."""
    if len({v.aval.dtype for v in parts.state}) != 1:
        return None
    try:
        return Units(parts, Terms())
    except NotUnitwise:
        return None


class _StepJacobian:
    """What both methods share: the flat state, and the rows of the weights over it."""

    def __init__(self, parts: Parts, params: Leaves) -> None:
        self.parts, self.hoisted = parts, parts.hoist(params)
        sizes = [v.aval.size for v in parts.state]
        self.starts = [int(start) for start in np.cumsum([0, *sizes])]
        self.dtype = jnp.result_type(*(v.aval.dtype for v in parts.state))

    @property
    def size(self) -> int:
        """The total size of one state."""
        return self.starts[-1]

    def over_state(self, rows: ArrayLike, leaf: int) -> Array:
        """Rows over one leaf of the state as rows over the whole state, (m, size)."""
        after = self.size - self.starts[leaf + 1]
        return jnp.pad(jnp.asarray(rows).astype(self.dtype), ((0, 0), (self.starts[leaf], after)))


class _ByUnits(_StepJacobian):
    """The Jacobian of a rest that acts unit by unit."""

    def __init__(self, parts: Parts, units: Units, params: Leaves) -> None:
        super().__init__(parts, params)
        self.units, self.terms = units, units.terms
        leaves = map(self._state_leaf, units.operands)
        rows = [
            None if leaf is None else self.over_state(W, leaf)
            for (W, _), leaf in zip(self.hoisted.weights, leaves, strict=True)
        ]
        # Without the barrier XLA computes the rows again at every step, from matrices that it stacks and transposes.
        self.rows = lax.optimization_barrier(rows)

    def _state_leaf(self, blocks: list[Formula]) -> int | None:
        """The leaf of the state that is the operand of a cut; None if it is another value."""
        states = [self.terms.symbol(*self.units.rename(("state", k))) for k in range(len(self.parts.state))]
        return states.index(blocks[0]) if len(blocks) == 1 and blocks[0] in states else None

    def __call__(self, state: Leaves, x: Leaves) -> Array:
        values: dict[Symbol, Any] = {}
        drives = self.parts.compute_drives(self.hoisted, x)
        for kind, arrays in (("drive", drives), ("parameter", self.hoisted.values), ("state", state)):
            for k, array in enumerate(arrays):
                values |= self._blocks(kind, k, array)
        matrices: Matrices = {}
        for k in range(len(state)):
            matrices["state", k] = jnp.eye(self.units.size, self.size, self.starts[k], dtype=self.dtype)

        def cut_value(i: int, v: Array) -> Array:
            """The value of a cut. Its derivative is added here, because later cuts may depend on it."""
            result = self.parts.cuts[i].value(self.hoisted.weights[i], v)
            values.update(self._blocks("cut", i, result))
            rows = self.rows[i]
            matrices.update(self._blocks("cut", i, self._behind_cut(i, values, matrices, v) if rows is None else rows))
            return result

        self.parts.run_rest(self.hoisted, state, drives, cut_value)
        for k in self.units.order:
            self._add_new_leaf(k, values, matrices)
        return jnp.concatenate([matrices["after", k] for k in range(len(state))])

    def _add_new_leaf(self, k: int, values: dict[Symbol, Any], matrices: Matrices) -> None:
        """Adds a leaf of the new state and its rows of the Jacobian, if they are not known yet."""
        if ("after", k) not in matrices:
            formula, like = self.units.new_state[k], values["state", k]
            for name in self.terms.symbols(formula):
                if name[0] == "after":
                    self._add_new_leaf(name[1], values, matrices)
            values["after", k] = self.terms.value(formula, values, {}, like)
            matrices["after", k] = self._derivative(formula, values, matrices, like)

    def _blocks(self, kind: str, index: int, array: Array) -> dict[Symbol, Any]:
        if array.ndim == 0 or kind == "state":
            return {(kind, index): array}
        n = self.units.size
        return {(kind, index, k): array[k * n : (k + 1) * n] for k in range(array.shape[0] // n)}

    def _derivative(self, formula: Formula, values: dict[Symbol, Any], matrices: Matrices, like: ArrayLike) -> Array:
        """d formula / d state, (n, size): a sum of scaled rows."""
        # Sorted, because the order of a set of strings differs between processes, and with it the last digit of a sum.
        moving = sorted(s for s in self.terms.symbols(formula) if s[0] in ("state", "cut", "after"))
        for _, k in (s for s in moving if s[0] == "after"):
            self._add_new_leaf(k, values, matrices)
        scaled = [self._by_symbol(formula, s, values, like).astype(self.dtype)[:, None] * matrices[s] for s in moving]
        return sum(scaled[1:], scaled[0]) if scaled else jnp.zeros((self.units.size, self.size), self.dtype)

    def _by_symbol(self, formula: Formula, symbol: Symbol, values: dict[Symbol, Any], like: ArrayLike) -> Array:
        """The derivative of a formula by a symbol, for each unit."""

        def value(block: Array) -> Array:
            return self.terms.value(formula, values | {symbol: block}, {}, like)

        return jax.jvp(value, (values[symbol],), (jnp.ones_like(values[symbol]),))[1]

    def _behind_cut(self, i: int, values: dict[Symbol, Any], matrices: Matrices, v: Array) -> Array:
        """d(W v)/d state for an operand v that is not a leaf of the state."""
        W = self.hoisted.weights[i][0]
        like = v[: self.units.size]
        dv = jnp.concatenate([self._derivative(block, values, matrices, like) for block in self.units.operands[i]])
        axes = (((1,), (0,)), ((), ()))
        return lax.dot_general(W, dv.astype(v.dtype), axes, preferred_element_type=self.dtype)


class _ByColumns(_StepJacobian):
    """The Jacobian of any rest: one tangent of the rest per entry of the state.

    The tangents of a cut that reads a leaf of the state are the rows of W, so they need no product.
    """

    def __init__(self, parts: Parts, params: Leaves) -> None:
        super().__init__(parts, params)
        self.rows = [
            self.over_state(W, parts.state.index(c.operand)) if c.is_matrix and c.operand in parts.state else None
            for c, (W, _) in zip(parts.cuts, self.hoisted.weights, strict=True)
        ]

    def __call__(self, state: Leaves, x: Leaves) -> Array:
        parts, drives = self.parts, self.parts.compute_drives(self.hoisted, x)

        def rest(state: Leaves, increments: Leaves) -> Array:
            def cut_value(i: int, v: Array) -> Array:
                weights = self.hoisted.weights[i]
                if self.rows[i] is None:
                    return parts.cuts[i].value(weights, v)
                return parts.cuts[i].value(weights, lax.stop_gradient(v)) + increments[i]

            new_state, _ = parts.run_rest(self.hoisted, state, drives, cut_value)
            return jnp.concatenate([leaf.ravel().astype(self.dtype) for leaf in new_state])

        cuts = list(zip(parts.cuts, self.rows, strict=True))
        zeros = [None if rows is None else jnp.zeros(c.out.aval.shape, c.out.aval.dtype) for c, rows in cuts]
        ds = self._unit_tangents(state)
        dr = [None if rows is None else rows.T.astype(c.out.aval.dtype) for c, rows in cuts]
        # `out_axes=1`, because each tangent gives one column of the Jacobian.
        return jax.vmap(lambda ds, dr: jax.jvp(rest, (state, zeros), (ds, dr))[1], out_axes=1)(ds, dr)

    def _unit_tangents(self, state: Sequence[Array]) -> Leaves:
        """The columns of the identity over the state, as leaves (size, ...)."""
        eye = jnp.eye(self.size, dtype=self.dtype)
        return [
            eye[:, start : start + leaf.size].reshape(-1, *leaf.shape).astype(leaf.dtype)
            for start, leaf in zip(self.starts, state, strict=False)
        ]
