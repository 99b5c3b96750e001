"""A cell as a map of vectors, s_t = f(s_{t-1}, x_t), with its derivatives by the state.

The state of any cell is written as one vector of n numbers: (h, c) for an LSTM, the states of all layers for a stack.
With J_t = ds_t/ds_{t-1}, perturbations are pushed forward, v <- J_t v, and gradients are pulled back, g <- J_t^T g.
J_t is the identity at a masked step, and zero at a reset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, Params, State, names_of_state, strong_type
from seqjax.sequence._execution.jacobian import step_jacobian
from seqjax.sequence._execution.push import differentiable_step
from seqjax.sequence._masked_step import Inputs, emit_nothing, masked_step
from seqjax.sequence._partition.tracing import normal_step, traced_one

# The inputs of one example at one time: x_t, valid, restart and noise, as a tuple or as `Inputs`.
At = tuple[PyTree, Array | None, Array | None, PyTree]


@dataclasses.dataclass(frozen=True)
class FlatCell:
    """The cell's masked step on states of n real numbers in one dtype, at least float32.

    A complex leaf of the state counts as two: its real parts come first, then its imaginary parts.

    Attributes:
        cell: any cell.
        like: one state, as shapes and dtypes.
        normal_form: whether the step runs by the normal form of its program, which merges the matrix products that read
            the same vector. Derivatives of many columns then cost fewer products. The values may differ from those of
            `unroll` by rounding errors.
    """

    cell: Cell
    like: PyTree
    normal_form: bool = False

    @property
    def size(self) -> int:
        """n, the number of values in one state."""
        return sum(map(_numbers, jax.tree.leaves(self.like)))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of vectors: float64 if any leaf has it, and float32 otherwise."""
        # Half precision is too coarse for products of Jacobians, so its states are widened.
        wide = any(leaf.dtype in (jnp.float64, jnp.complex128) for leaf in jax.tree.leaves(self.like))
        return np.dtype(np.float64 if wide else np.float32)

    @property
    def epsilon(self) -> float:
        """The rounding error of the state's coarsest leaf."""
        return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(self.like)), default=0.0)

    @property
    def parts(self) -> dict[str, slice]:
        """The position of each field of the state in the vector, by name; "state" if the state is one array."""
        parts, start = {}, 0
        for name, leaf in zip(names_of_state(self.cell, self.like), jax.tree.leaves(self.like), strict=True):
            stop = start + _numbers(leaf)
            parts[name] = slice(start, stop)
            start = stop
        return parts

    def ravel(self, state: State) -> Array:
        """One state as a vector (n,), in the order of its leaves."""
        parts = [part.astype(self.dtype) for leaf in jax.tree.leaves(state) for part in _real_parts(leaf)]
        # The empty vector is for a cell without a state, because `jnp.concatenate` needs at least one array.
        return jnp.concatenate([jnp.zeros(0, self.dtype), *parts])

    def unravel(self, v: Array) -> State:
        """The cell's own state from a vector (n,)."""
        leaves, tree = jax.tree.flatten(self.like)
        ends = np.cumsum(list(map(_numbers, leaves)))[:-1]
        parts = jnp.split(v, ends) if leaves else []
        return tree.unflatten(_leaf_of(p, leaf) for p, leaf in zip(parts, leaves, strict=True))

    def start(self, params: Params) -> Array:
        """The cell's initial state as a vector, (n,)."""
        return self.ravel(strong_type(self.cell.initial_state(params)))

    def run(self, params: Params, v: Array, at: At) -> tuple[State, Output]:
        """One step from a vector to the cell's own state and output."""
        one_step = normal_step if self.normal_form else masked_step
        return one_step(self.cell, params, self.unravel(v), Inputs(*at))

    def step(self, params: Params, v: Array, at: At) -> Array:
        """f(s_{t-1}, x_t), (n,)."""
        return self.ravel(self.run(params, v, at)[0])

    def steps(self, params: Params, before: Array, inputs: At) -> Array:
        """All steps at once, from the states s_0..s_{T-1}, (time, n)."""
        return jax.vmap(self.step, (None, 0, 0))(params, before, inputs)

    def jacobian(self, params: Params, like: tuple[PyTree, PyTree]) -> Callable[[Array, At], Array]:
        """A function (v, at) that computes J_t (n, n); `like` is its arguments, as shapes and dtypes."""
        v, at = like
        if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in jax.tree.leaves(self.like)):
            return jax.jacfwd(lambda v, at: self.step(params, v, at))  # the parts of a step are real
        of_state = step_jacobian(
            traced_one(self.cell, emit_nothing, params, jax.eval_shape(self.unravel, v), at), params
        )
        return lambda v, at: of_state(self.unravel(v), at).astype(v.dtype)

    def push(self, params: Params, v: Array, frame: Array, at: At) -> tuple[Array, Array]:
        """One step of a state and of its perturbations: s_t = f(s_{t-1}) and V_t = J_t V_{t-1}.

        Args:
            params: of the cell.
            v: s_{t-1}, (n,).
            frame: k perturbations as rows, (k, n).
            at: the inputs of one example at one time.

        Returns:
            s_t (n,), and J_t times each perturbation, (k, n).
        """
        return _pushed(lambda s: self.step(params, s, at), v, frame)

    def pusher(self, params: Params, rows: int, like: PyTree) -> Callable[[Array, Array, At], tuple[Array, Array]]:
        """`push` of `rows` perturbations for a loop over steps; `like` is the inputs of one step, as shapes and dtypes.

        What depends on the parameters only is computed here, once.
        """
        if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in jax.tree.leaves(self.like)):
            return lambda v, frame, at: self.push(params, v, frame, at)
        step = differentiable_step(traced_one(self.cell, emit_nothing, params, self.like, like), params, rows)
        return lambda v, frame, at: _pushed(lambda s: self.ravel(step(self.unravel(s), at)), v, frame)

    def pull(self, params: Params, v: Array, frame: Array, at: At) -> Array:
        """Pulls gradients with respect to s_t back to s_{t-1}: G_{t-1} = J_t^T G_t, rows (k, n)."""
        _, cotangent = jax.vjp(lambda s: self.step(params, s, at), v)
        return jax.vmap(lambda g: cotangent(g)[0])(frame)


def flat_cell(cell: Cell, params: Params, *, normal_form: bool = False) -> FlatCell:
    """The map of vectors of a cell whose state has the type of its initial state."""
    like = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    return FlatCell(cell, like, normal_form)


def _pushed(step: Callable[[Array], Array], v: Array, frame: Array) -> tuple[Array, Array]:
    after, tangent = jax.linearize(step, v)
    return after, jax.vmap(tangent)(frame)


def _numbers(leaf: Any) -> int:
    """The number of real values in a leaf."""
    return int(np.prod(leaf.shape)) * (2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1)


def _real_parts(leaf: Array) -> list[Array]:
    flat = jnp.ravel(leaf)
    return [flat.real, flat.imag] if jnp.iscomplexobj(flat) else [flat]


def _leaf_of(values: Array, like: Any) -> Array:
    """A leaf of the shape and dtype of `like` from its real values."""
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        real, imaginary = jnp.split(values, 2)
        values = jax.lax.complex(real, imaginary)
    return values.reshape(like.shape).astype(like.dtype)
