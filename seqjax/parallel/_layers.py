"""The loops of a cell as separate cells, so that Newton's method solves each with smaller Jacobians.

A stack has one loop per layer (`seqjax.sequence._partition.loops`), even if it is a cell of the user or of another
library.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Params, State
from seqjax.sequence._masked_step import emit_output
from seqjax.sequence._partition.loops import Stage, stages
from seqjax.sequence._partition.program import inline
from seqjax.sequence._partition.tracing import traced_step

Leaves = tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LoopCell:
    """One loop of a cell's step, as a cell whose state and inputs are tuples of leaves.

    Attributes:
        cell: the whole cell.
        stage: the loop.
    """

    cell: Cell
    stage: Stage

    def init(self, key: Array) -> Params:
        """The parameters of the whole cell."""
        return self.cell.init(key)

    def initial_state(self, params: Params) -> Leaves:
        """The leaves of the cell's initial state that this loop carries."""
        leaves = jax.tree.leaves(self.cell.initial_state(params))
        return tuple(leaves[i] for i in self.stage.leaves)

    def step(self, params: Params, state: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        """The part of the step in this loop. Its outputs are values that later loops or the caller read."""
        arguments = [*map(jnp.asarray, jax.tree.leaves(params)), *state, *x]
        results = tuple(jaxpr_as_fun(self.stage.program)(*arguments))
        return results[: len(state)], results[len(state) :]


def split_loops(
    cell: Cell, params: Params, state: State, x: PyTree, noise: PyTree
) -> tuple[list[LoopCell], list[Any], Any]:
    """Splits a cell into its loops.

    Args:
        cell, params: any cell and its parameters.
        state: states of a batch, leaves (batch, ...).
        x: inputs, leaves (batch, time, ...).
        noise: the noise, leaves (batch, time, ...), or None.

    Returns:
        The loops in their order, the last of which has no state; the variables of the leaves of (x, noise), which the
        loops' `stage.inputs` refer to; and the tree structure of the output.
    """
    # Without mask and reset, because Newton's method applies them to each loop.
    traced = traced_step(cell, emit_output, params, state, (x, None, None, noise))
    program, sizes = inline(traced.program), (traced.n_params, traced.n_state)
    loops = [LoopCell(cell, stage) for stage in stages(program, *sizes)]
    return loops, list(program.jaxpr.invars[sum(sizes) :]), traced.trees[1]
