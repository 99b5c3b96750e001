"""A cell as a map of vectors for Newton's method, s_t = f(s_{t-1}, at_t), with its Jacobians at all steps at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Cell, Params, State
from seqjax.parallel._algebra import DENSE, Algebra
from seqjax.parallel._layers import LoopCell
from seqjax.sequence._flat_cell import At, FlatCell
from seqjax.sequence._partition.tracing import shapes_of_one
from seqjax.sequence._sizes import is_known

AT_ONCE = 2**22  # numbers in the Jacobians that are in memory at once if only their diagonals are needed


@dataclasses.dataclass(frozen=True)
class NewtonCell(FlatCell):
    """The shared flat view of a cell, with the Jacobians of all steps."""

    @property
    def name(self) -> str:
        """The class of the user's cell."""
        return type(self.cell.cell if isinstance(self.cell, LoopCell) else self.cell).__name__

    def jacobians(self, algebra: Algebra, params: Params, before: Array, inputs: At) -> Array:
        """The Jacobians of all steps, (time, n, n), or their diagonals, (time, n).

        Diagonals are computed a few steps at a time, so that not all matrices are in memory at once.
        """
        jacobian = self.jacobian(params, shapes_of_one((before, inputs), 1))
        if algebra is DENSE:
            return jax.vmap(jacobian)(before, inputs)

        def diagonal(step: tuple[Array, At]) -> Array:
            return jnp.diagonal(jacobian(*step))

        at_once, time = max(1, AT_ONCE // self.size**2), before.shape[0]
        if not is_known(time) or time <= at_once:
            return jax.vmap(diagonal)((before, inputs))
        return jax.lax.map(diagonal, (before, inputs), batch_size=at_once)


def newton_cell(cell: Cell, states: State) -> NewtonCell:
    """The flat view of a cell with states of the shapes of `states`, which are those of a batch."""
    return NewtonCell(cell, shapes_of_one(states, 1))


def check_differentiable(flat: NewtonCell, method: str, params: Params, first: Array, inputs: At) -> None:
    """Raises an error if the step has no forward-mode derivative, which Newton's method needs.

    Raises:
        TypeError: JAX cannot push a perturbation through the step.
    """

    def push(params: Params, first: Array, inputs: At) -> Array:
        at = jax.tree.map(lambda leaf: leaf[0, 0], inputs)
        return jax.jacfwd(lambda v: flat.step(params, v, at))(first[0])

    def step(params: Params, first: Array, inputs: At) -> Array:
        return flat.step(params, first[0], jax.tree.map(lambda leaf: leaf[0, 0], inputs))

    # First without a derivative, so that an error of the step itself reaches the user as it is.
    jax.eval_shape(step, params, first, inputs)
    try:
        jax.eval_shape(push, params, first, inputs)
    except Exception as error:
        name = flat.name
        raise TypeError(
            f"expected a step with a derivative in forward mode for {method}, which needs ds_t/ds_(t-1), got "
            f"{name}.step, for which JAX reports: {next(iter(str(error).splitlines()), type(error).__name__)}; "
            f"define a jax.custom_jvp rule for the part without a derivative, or use sj.unroll"
        ) from error
