"""The unroll of a cell that offers its step in three parts:

    d_t = drive(params, x_t)                the input half, which needs no state
    r_t = recur(params, s_{t-1})            the recurrent product
    s_t, o_t = advance(s_{t-1}, d_t, r_t)    the rest, without parameters

or with a second product inside, v_t = inner(s_{t-1}, d_t, r_t), so that `advance` gets (r_t, recur_inner(params, v_t)).

Forward, d_t comes for a whole chunk of time from one matrix product (`seqjax.split.forward`). Backward, where all
states are known, so does r_t, and the gradients of all weights are products over a whole chunk
(`seqjax.split.backward`). Nothing but states is kept of the forward pass.

The mathematics is that of the plain scan over `step`. It serves for `jvp` and for second derivatives, so that every
kind of derivative is there (`seqjax.linear_map`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State, in_parts
from seqjax.guarded import last_output
from seqjax.linear_map import Direction, linear_map
from seqjax.split.backward import backward, pick, put
from seqjax.split.chunks import Recurrence
from seqjax.split.forward import forward

Inputs = tuple[Params, State, PyTree, Any, Any]  # params, state, xs, mask, reset


def is_split(cell: Any, params: Params, state: State, xs: PyTree) -> bool:
    """Whether a cell offers the three parts of its step, and all that passes between them is differentiable.

    Of a cell that holds a value which is being traced, such as a time constant to be learned, `custom_jvp` would not
    see the derivative.
    """
    if not in_parts(cell) or not jax.tree.leaves(state):
        return False
    if 0 in jax.tree.leaves(xs)[0].shape[:2]:  # there is no step to take apart
        return False
    x = jax.tree.map(lambda leaf: leaf[0, 0], xs)
    s = jax.tree.map(lambda leaf: leaf[0], state)

    def run(params: Params, state: State, x: PyTree) -> Any:
        drive = cell.drive(params, x)
        passed = state, drive, Recurrence(cell, last_output).recurrent(params, state, drive)
        return passed, cell.advance(*passed), cell.initial_state(params)

    program, (passed, *_) = jax.make_jaxpr(run, return_shape=True)(params, s, x)
    if any(isinstance(const, Tracer) for const in program.consts):
        return False
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(passed))


def run_split(how: Recurrence, plain: Callable[..., Any], inputs: Inputs) -> tuple[State, PyTree]:
    """Unrolls a split cell over a batch.

    Args:
        how: the cell and all that is fixed.
        plain: the same function of the inputs as a scan over `step`, for the derivatives that need it.
        inputs: (params, state, xs, mask, reset), as `unroll` checked them.

    Returns:
        The final state and what is kept of the steps, (batch, time, ...).
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, inputs))

    @jax.custom_jvp
    def run(*leaves: Array) -> tuple[Any, Any]:
        return forward(how, *jax.tree.unflatten(tree, leaves))

    def tangent(primals: Any, tangents: Any) -> Any:
        out, saved = run(*primals)
        wanted = jax.tree.unflatten(tree, [not isinstance(t, SymbolicZero) for t in tangents])
        push, pull = _directions(how, plain, tree, wanted, saved, out)
        residuals = [*primals, *jax.tree.leaves(saved)]
        moving = pick(jax.tree.unflatten(tree, tangents), wanted)
        kinds = [jax.typeof(leaf).to_tangent_aval() for leaf in jax.tree.leaves(out)]
        moved = linear_map(residuals, moving, push, pull, like=kinds)
        # What is saved is a function of the same inputs, and nothing that reads it needs its tangent.
        still = jax.tree.map(jnp.zeros_like, saved)
        return (out, saved), (jax.tree.unflatten(jax.tree.structure(out), moved), still)

    run.defjvp(tangent, symbolic_zeros=True)
    return run(*leaves)[0]


def _directions(
    how: Recurrence, plain: Callable[..., Any], tree: Any, wanted: PyTree, saved: PyTree, out: PyTree
) -> tuple[Direction, Direction]:
    """The tangent map of `plain` with respect to the inputs that are wanted, and its transpose."""
    saved_tree, out_tree = jax.tree.structure(saved), jax.tree.structure(out)

    def split(residuals: list[Array]) -> tuple[Inputs, PyTree]:
        inputs, saved = residuals[: tree.num_leaves], residuals[tree.num_leaves :]
        return jax.tree.unflatten(tree, inputs), jax.tree.unflatten(saved_tree, saved)

    def along(inputs: Inputs) -> Callable[..., list[Array]]:
        return lambda *values: jax.tree.leaves(plain(*put(inputs, wanted, values)))

    def push(residuals: list[Array], tangents: list[Array]) -> list[Array]:
        inputs, _ = split(residuals)
        return jax.jvp(along(inputs), pick(inputs, wanted), tangents)[1]

    def pull_plainly(residuals: list[Array], cotangents: list[Array]) -> list[Array]:
        inputs, _ = split(residuals)
        return list(jax.vjp(along(inputs), *pick(inputs, wanted))[1](cotangents))

    def pull(residuals: list[Array], cotangents: list[Array]) -> list[Array]:
        return backward(how, *split(residuals), jax.tree.unflatten(out_tree, cotangents), wanted)

    return Direction(push, push), Direction(pull, pull_plainly)
