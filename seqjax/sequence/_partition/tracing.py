"""The program of a cell's masked step: the step is traced once, for one example at one time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import PyTree

from seqjax.cell import Cell, Output, Params, State
from seqjax.sequence._masked_step import Emit, Inputs, emit_output, masked_step
from seqjax.sequence._partition.normalize import normalized
from seqjax.sequence._partition.program import inline
from seqjax.sequence._step_errors import check_effects, errors_of_step


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """The program of a cell's masked step for one example at one time.

    Attributes:
        program: (params.., state.., inputs..) -> (new_state.., outputs..).
        n_params, n_state: the numbers of leaves of the first two.
        trees: the tree structures of the new state and of the outputs.
    """

    program: ClosedJaxpr
    n_params: int
    n_state: int
    trees: tuple[Any, Any]


def traced_step(cell: Cell, emit: Emit, params: Params, state: State, inputs: PyTree) -> Traced:
    """Traces the masked step.

    Args:
        cell: any cell.
        emit: selects the outputs of a step.
        params: the parameters.
        state: states (batch, ...).
        inputs: (xs, mask, reset, noise), leaves (batch, time, ...).
    """
    return traced_one(cell, emit, params, shapes_of_one(state, 1), shapes_of_one(inputs, 2))


def shapes_of_one(tree: PyTree, axes: int) -> PyTree:
    """The shapes and dtypes of one example at one time: those of the leaves without the first axes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), tree)


def traced_one(cell: Cell, emit: Emit, params: Params, state: State, at: PyTree) -> Traced:
    """`traced_step` for the state and the inputs of one example at one time, as arrays or shapes.

    Raises:
        Exception: the step raises, or has ordered side effects. The message names the user's line.
    """

    def step(params: Params, state: State, at: PyTree) -> tuple[State, PyTree]:
        return masked_step(cell, params, state, Inputs(*at), emit)

    params = jax.tree.map(lambda p: p if isinstance(p, jax.ShapeDtypeStruct) else jnp.asarray(p), params)
    with errors_of_step(cell, params, shapes_of_one(at[0], 0)):
        program, out = jax.make_jaxpr(step, return_shape=True)(params, state, at)
    check_effects(cell, program)
    sizes = len(jax.tree.leaves(params)), len(jax.tree.leaves(state))
    return Traced(program, *sizes, (jax.tree.structure(out[0]), jax.tree.structure(out[1])))


def normal_step(cell: Cell, params: Params, state: State, at: PyTree) -> tuple[State, Output]:
    """`masked_step` by the normal form of its program, in which the products of one vector are one product.

    Args:
        cell, params: any cell.
        state: the state of one example.
        at: (x_t, mask_t, reset_t, noise_t) of one example at one time.

    Returns:
        The new state and the output.
    """
    traced = traced_one(cell, emit_output, params, state, at)
    # Sigmoids are not merged, because the caller differentiates one example and does not run a loop over a batch.
    program = normalized(inline(traced.program), traced.n_params, traced.n_state)
    leaves = jaxpr_as_fun(program)(*map(jnp.asarray, jax.tree.leaves((params, state, at))))
    new_state, output = traced.trees
    return new_state.unflatten(leaves[: traced.n_state]), output.unflatten(leaves[traced.n_state :])
