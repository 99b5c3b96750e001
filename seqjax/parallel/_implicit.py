"""Derivatives of the trajectory by the implicit function theorem, which do not pass through Newton's iterations.

At a solution s_t = f(theta, s_{t-1}, x_t), a change of the arguments changes the states by

    ds_t = J_t ds_{t-1} + b_t,    b_t = df/dtheta dtheta + df/dx dx.

This is one linear recurrence for forward mode. Its transpose, lambda_t = J_{t+1}^T lambda_{t+1} + g_t, is one reverse
linear recurrence for gradients. All b_t are computed at once, so the gradient of the weights is one matrix product over
all steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Params
from seqjax.parallel._algebra import DENSE, Algebra
from seqjax.parallel._flat import At, NewtonCell
from seqjax.parallel._linear_scan import linear_scan, next_matrices, previous_states

Arguments = tuple[Params, Array, At]  # theta, s_0 and the inputs of one sequence


def implicit(flat: NewtonCell, algebra: Algebra, arguments: Arguments, states: Array, sequential: Array) -> Array:
    """Returns `states` with the derivatives by `arguments` of the trajectory that solves the equation.

    Args:
        flat: the cell.
        algebra: `DENSE` stores the Jacobians and solves by an associative scan. `DIAGONAL` stores no Jacobian and goes
            through the steps one after another, in memory T n. Both derivatives are exact.
        arguments: params, s_0 (n,) and inputs, leaves (time, ...).
        states: s_1..s_T (time, n).
        sequential: whether `DENSE` solves step by step too.

    Returns:
        The states (time, n).
    """

    # A custom_jvp and not a custom_vjp, because JAX derives reverse mode and higher orders from it.
    @jax.custom_jvp
    def attach(arguments: Arguments, states: Array, sequential: Array) -> Array:
        return states

    @attach.defjvp
    def rule(primals: tuple[Arguments, Array, Array], tangents: tuple[PyTree, PyTree, PyTree]) -> tuple[Array, Array]:
        arguments, states, sequential = primals
        states = attach(arguments, states, sequential)  # so that a derivative of the rule uses the rule again
        b = _direct_changes(flat, arguments, states, tangents[0])
        return states, _solve(flat, algebra, arguments, states, sequential, b)

    return attach(arguments, states, sequential)


def _direct_changes(flat: NewtonCell, arguments: Arguments, states: Array, tangents: PyTree) -> Array:
    """b_1..b_T: the change of each step by its own arguments, with the state before it fixed."""
    leaves, tree = jax.tree.flatten(arguments)
    # Whole numbers and keys have no tangents.
    indices = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    directions = jax.tree.leaves(tangents)

    def steps(floats: list[Array]) -> Array:
        replaced = dict(zip(indices, floats, strict=True))
        params, first, inputs = tree.unflatten(replaced.get(i, leaf) for i, leaf in enumerate(leaves))
        return flat.steps(params, previous_states(first, states), inputs)

    return jax.jvp(steps, ([leaves[i] for i in indices],), ([directions[i] for i in indices],))[1]


def _solve(
    flat: NewtonCell, algebra: Algebra, arguments: Arguments, states: Array, sequential: Array, b: Array
) -> Array:
    """Solves d_t = J_t d_{t-1} + b_t, as a linear system that JAX can transpose and differentiate again."""
    params, first, inputs = arguments
    before, zero = previous_states(first, states), jnp.zeros_like(first)
    if algebra is not DENSE:

        def matvec(d: Array) -> Array:
            tangent = previous_states(zero, d)
            return d - jax.jvp(lambda v: flat.steps(params, v, inputs), (before,), (tangent,))[1]

        def push(d: Array, step: tuple[Array, At, Array]) -> tuple[Array, Array]:
            v, at, b = step
            d = jax.jvp(lambda v: flat.step(params, v, at), (v,), (d,))[1] + b
            return d, d

        def pull(cotangent: Array, step: tuple[Array, At, Array]) -> tuple[Array, Array]:
            v, at, g = step
            g = g + cotangent
            return jax.vjp(lambda v: flat.step(params, v, at), v)[1](g)[0], g

        # `custom_linear_solve` calls both solvers with `matvec` first, which they do not need.
        def solve(_: object, b: Array) -> Array:
            return jax.lax.scan(push, zero, (before, inputs, b))[1]

        def solve_transposed(_: object, g: Array) -> Array:
            return jax.lax.scan(pull, zero, (before, inputs, g), reverse=True)[1]

    else:
        J = flat.jacobians(DENSE, params, before, inputs)

        def matvec(d: Array) -> Array:
            return d - jax.vmap(DENSE.apply)(J, previous_states(zero, d))

        def solve(_: object, b: Array) -> Array:
            return jax.lax.cond(sequential, _solve_stepwise, _solve_at_once, J, b)

        def solve_transposed(_: object, g: Array) -> Array:
            J_next = next_matrices(jax.vmap(DENSE.transpose)(J))
            return jax.lax.cond(sequential, _solve_stepwise_reverse, _solve_at_once_reverse, J_next, g)

    return jax.lax.custom_linear_solve(matvec, b, solve, solve_transposed)


def _solve_at_once(A: Array, b: Array) -> Array:
    return linear_scan(DENSE, A, b)


def _solve_at_once_reverse(A: Array, b: Array) -> Array:
    return linear_scan(DENSE, A, b, reverse=True)


def _solve_stepwise(A: Array, b: Array, reverse: bool = False) -> Array:
    def advance(d: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        d = DENSE.apply(step[0], d) + step[1]
        return d, d

    return jax.lax.scan(advance, jnp.zeros_like(b[0]), (A, b), reverse=reverse)[1]


def _solve_stepwise_reverse(A: Array, b: Array) -> Array:
    return _solve_stepwise(A, b, reverse=True)
