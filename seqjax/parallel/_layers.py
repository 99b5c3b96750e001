"""The loops of a cell as cells of their own, so that each is searched by itself, with smaller Jacobians.

A stack, whoever built it, has one loop per layer (`seqjax.sequence._partition.loops`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Params
from seqjax.sequence._masked_step import last_output
from seqjax.sequence._partition.loops import Stage, stages
from seqjax.sequence._partition.plan import traced_step
from seqjax.sequence._partition.program import inline

Leaves = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LoopCell:
    """One loop of a cell's step. Its state and its inputs are tuples of leaves.

    Attributes:
        cell: the whole cell.
        stage: the loop.
    """

    cell: Cell
    stage: Stage

    def init(self, key: Array) -> Params:
        """The whole cell's parameters."""
        return self.cell.init(key)

    def initial_state(self, params: Params) -> Leaves:
        """The leaves of the cell's initial state that this loop carries."""
        leaves = jax.tree.leaves(self.cell.initial_state(params))
        return tuple(leaves[i] for i in self.stage.leaves)

    def step(self, params: Params, state: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        """The loop's part of the step; the outputs are what later loops or the caller read."""
        arguments = [*map(jnp.asarray, jax.tree.leaves(params)), *state, *x]
        found = tuple(jaxpr_as_fun(self.stage.program)(*arguments))
        return found[: len(state)], found[len(state) :]


def loops_of(
    cell: Cell, params: Params, state: PyTree, x: PyTree, noise: PyTree
) -> tuple[list[LoopCell], list[Any], Any]:
    """The loops of a cell.

    Args:
        cell, params: any cell.
        state, x, noise: of a batch, leaves (batch, ...), (batch, time, ...) and (batch, time, ...) or None.

    Returns:
        The loops in their order, the last without a state; the variables of the leaves of (x, noise); and the tree of
        the output.
    """

    traced = traced_step(cell, last_output, params, state, (x, None, None, noise))
    program, sizes = inline(traced.program), (traced.params, traced.state)
    loops = [LoopCell(cell, stage) for stage in stages(program, *sizes)]
    return loops, list(program.jaxpr.invars[sum(sizes) :]), traced.trees[1]
