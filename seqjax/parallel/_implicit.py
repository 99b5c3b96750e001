"""Derivatives of a trajectory that was found by iteration, by the equation that it solves and not through the search.

At a solution s_t = f(theta, s_{t-1}, x_t), a change of the arguments moves the states by

    ds_t = J_t ds_{t-1} + b_t,    b_t = df/dtheta dtheta + df/dx dx,

one linear recurrence for forward mode, and its transpose, lambda_t = J_{t+1}^T lambda_{t+1} + g_t, one reverse linear
recurrence for gradients. All b_t are taken at once, so the gradient of the weights is one product over all steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Params
from seqjax.parallel._algebra import DENSE, Algebra
from seqjax.parallel._flat import At, FlatCell
from seqjax.parallel._linear_scan import advanced, delayed, linear_scan

Arguments = tuple[Params, Array, At]  # theta, s_0 and the inputs of one sequence


def implicit(flat: FlatCell, algebra: Algebra, arguments: Arguments, states: Array, in_turn: Array) -> Array:
    """The states, with the derivatives by `arguments` of the trajectory that they are.

    Args:
        flat: the cell.
        algebra: `DENSE` keeps the Jacobians and solves by an associative scan; `DIAGONAL` keeps none, and pushes and
            pulls through the steps one after another, in memory T n.
        arguments: params, s_0 (n,) and inputs, leaves (time, ...).
        states: s_1..s_T (time, n).
        in_turn: True for one step after another in any case.

    Returns:
        The states (time, n).
    """

    @jax.custom_jvp
    def attached(arguments: Arguments, states: Array, in_turn: Array) -> Array:
        return states

    @attached.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        arguments, states, in_turn = primals
        states = attached(arguments, states, in_turn)
        b = _moved(flat, arguments, states, tangents[0])
        return states, _solve(flat, algebra, arguments, states, in_turn, b)

    return attached(arguments, states, in_turn)


def _moved(flat: FlatCell, arguments: Arguments, states: Array, tangents: PyTree) -> Array:
    """b_1..b_T: what every step moves by, from a state before it that does not. Whole numbers and keys do not move."""
    leaves, tree = jax.tree.flatten(arguments)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    directions = jax.tree.leaves(tangents)

    def steps(floats: list[Array]) -> Array:
        given = dict(zip(moving, floats, strict=True))
        params, first, inputs = tree.unflatten(given.get(i, leaf) for i, leaf in enumerate(leaves))
        return flat.steps(params, delayed(first, states), inputs)

    return jax.jvp(steps, ([leaves[i] for i in moving],), ([directions[i] for i in moving],))[1]


def _solve(flat: FlatCell, algebra: Algebra, arguments: Arguments, states: Array, in_turn: Array, b: Array) -> Array:
    """d_t = J_t d_{t-1} + b_t as a linear system, which JAX then knows how to transpose and to differentiate again."""
    params, first, inputs = arguments
    before, none = delayed(first, states), jnp.zeros_like(first)
    if algebra is not DENSE:

        def remainder(d: Array) -> Array:
            pushed = jax.jvp(lambda v: flat.steps(params, v, inputs), (before,), (delayed(none, d),))[1]
            return d - pushed

        def push(d: Array, step: PyTree) -> tuple[Array, Array]:
            v, at, b = step
            d = jax.jvp(lambda v: flat.step(params, v, at), (v,), (d,))[1] + b
            return d, d

        def pull(carried: Array, step: PyTree) -> tuple[Array, Array]:
            v, at, g = step
            g = g + carried
            return jax.vjp(lambda v: flat.step(params, v, at), v)[1](g)[0], g

        def solve(_: Any, b: Array) -> Array:
            return jax.lax.scan(push, none, (before, inputs, b))[1]

        def solve_transposed(_: Any, g: Array) -> Array:
            return jax.lax.scan(pull, none, (before, inputs, g), reverse=True)[1]

    else:
        J = flat.jacobians(DENSE, params, before, inputs)

        def remainder(d: Array) -> Array:
            return d - jax.vmap(DENSE.apply)(J, delayed(none, d))

        def solve(_: Any, b: Array) -> Array:
            return jax.lax.cond(in_turn, _one_by_one, _at_once, J, b)

        def solve_transposed(_: Any, g: Array) -> Array:
            turned = advanced(jax.vmap(DENSE.transpose)(J))
            return jax.lax.cond(in_turn, _one_by_one_back, _at_once_back, turned, g)

    return jax.lax.custom_linear_solve(remainder, b, solve, solve_transposed)


def _at_once(A: Array, b: Array) -> Array:
    return linear_scan(DENSE, A, b)


def _at_once_back(A: Array, b: Array) -> Array:
    return linear_scan(DENSE, A, b, reverse=True)


def _one_by_one(A: Array, b: Array, reverse: bool = False) -> Array:
    def advance(d: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        d = DENSE.apply(step[0], d) + step[1]
        return d, d

    return jax.lax.scan(advance, jnp.zeros_like(b[0]), (A, b), reverse=reverse)[1]


def _one_by_one_back(A: Array, b: Array) -> Array:
    return _one_by_one(A, b, reverse=True)
