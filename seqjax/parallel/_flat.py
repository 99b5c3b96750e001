"""A cell as a map of flat states, s_t = f(s_{t-1}, at_t), with its Jacobians at every step at once.

A held step (mask False) has the identity as its Jacobian, and a reset step has zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State, strong_type
from seqjax.parallel._algebra import DENSE, Algebra
from seqjax.parallel._layers import LoopCell
from seqjax.sequence._execution.jacobian import step_jacobian
from seqjax.sequence._masked_step import guarded_step
from seqjax.sequence._partition.plan import shapes_of_one

AT_ONCE = 2**22  # numbers of Jacobians that are held at once where only their diagonals are wanted

At = tuple[PyTree, Array | None, Array | None, PyTree]  # x_t, valid, restart and noise of one example at one time


@dataclasses.dataclass(frozen=True)
class FlatCell:
    """The cell's guarded step on states of n numbers in one dtype, at least float32.

    Attributes:
        cell: any cell.
        like: its state, as shapes and dtypes.
    """

    cell: Cell
    like: PyTree

    @property
    def name(self) -> str:
        """The class of the user's cell."""
        return type(self.cell.cell if isinstance(self.cell, LoopCell) else self.cell).__name__

    @property
    def size(self) -> int:
        """n, the numbers in one state."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.like))

    @property
    def dtype(self) -> Any:
        """Of the flat state: half precision is too coarse for products of Jacobians."""
        wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(self.like))
        return jnp.float64 if wide else jnp.float32

    @property
    def epsilon(self) -> float:
        """The rounding error of the coarsest part of the state."""
        return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(self.like)), default=0.0)

    def ravel(self, state: State) -> Array:
        """One state as a vector (n,), in the order of its leaves."""
        parts = [jnp.ravel(leaf).astype(self.dtype) for leaf in jax.tree.leaves(state)]
        return jnp.concatenate([jnp.zeros(0, self.dtype), *parts])

    def unravel(self, v: Array) -> State:
        """The cell's own state from a vector (n,)."""
        leaves, tree = jax.tree.flatten(self.like)
        ends = np.cumsum([int(np.prod(leaf.shape)) for leaf in leaves])[:-1]
        parts = jnp.split(v, ends) if leaves else []
        return tree.unflatten(p.reshape(leaf.shape).astype(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True))

    def run(self, params: Params, v: Array, at: At) -> tuple[State, Output]:
        """One step, with what it gives as the cell gives it."""
        return guarded_step(self.cell, params, self.unravel(v), *at)

    def step(self, params: Params, v: Array, at: At) -> Array:
        """f(s_{t-1}, at_t), (n,)."""
        return self.ravel(self.run(params, v, at)[0])

    def steps(self, params: Params, before: Array, inputs: At) -> Array:
        """Every step at once, from s_0..s_{T-1} (time, n)."""
        return jax.vmap(self.step, (None, 0, 0))(params, before, inputs)

    def start(self, params: Params) -> Array:
        """The cell's initial state, (n,)."""
        return self.ravel(strong_type(self.cell.initial_state(params)))

    def jacobian(self, params: Params, like: tuple[Any, PyTree]) -> Callable[[Array, At], Array]:
        """A function of a state and a step's inputs that computes df/ds_{t-1}, (n, n); `like` has their shapes."""
        v, at = like
        of_one = step_jacobian(self.cell, params, jax.eval_shape(self.unravel, v), at)
        return lambda v, at: of_one(self.unravel(v), at).astype(v.dtype)

    def jacobians(self, algebra: Algebra, params: Params, before: Array, inputs: At) -> Array:
        """Those of every step, (time, n, n), or their diagonals, (time, n), without ever holding all the matrices."""
        jacobian = self.jacobian(params, shapes_of_one((before, inputs), 1))
        if algebra is DENSE:
            return jax.vmap(jacobian)(before, inputs)

        def diagonal(step: tuple[Array, At]) -> Array:
            return jnp.diagonal(jacobian(*step))

        at_once = max(1, AT_ONCE // self.size**2)
        if len(before) <= at_once:
            return jax.vmap(diagonal)((before, inputs))
        return jax.lax.map(diagonal, (before, inputs), batch_size=at_once)


def flat_cell(cell: Cell, states: State) -> FlatCell:
    """The flat map of a cell, from states of a batch."""
    return FlatCell(cell, shapes_of_one(states, 1))


def check_differentiable(flat: FlatCell, method: str, params: Params, first: Array, inputs: At) -> None:
    """Refuses a step that has no derivative in forward mode, naming the method that needs one.

    Raises:
        TypeError: JAX cannot push a perturbation through the step.
    """

    def push(params: Params, first: Array, inputs: At) -> Array:
        at = jax.tree.map(lambda leaf: leaf[0, 0], inputs)
        return jax.jacfwd(lambda v: flat.step(params, v, at))(first[0])

    def step(params: Params, first: Array, inputs: At) -> Array:
        return flat.step(params, first[0], jax.tree.map(lambda leaf: leaf[0, 0], inputs))

    jax.eval_shape(step, params, first, inputs)  # an error of the step itself is the cell's
    try:
        jax.eval_shape(push, params, first, inputs)
    except Exception as error:
        name = flat.name
        raise TypeError(
            f"expected a step with a derivative in forward mode for {method}, which needs ds_t/ds_(t-1), got "
            f"{name}.step, of which JAX says: {next(iter(str(error).splitlines()), type(error).__name__)}; give the "
            f"part that lacks one a jax.custom_jvp rule, or use sj.unroll"
        ) from error
