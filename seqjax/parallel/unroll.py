"""Unrolling a cell with all steps at once: the trajectory is the root of one large equation, found by Newton's method.

Masks, resets and noise mean the same as in `seqjax.sequence.unroll`, because both use the same masked step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from seqjax.cell import Cell, Output, Params, State
from seqjax.cells.whole_numbers import whole_number
from seqjax.parallel._flat import check_differentiable, newton_cell
from seqjax.parallel._implicit import implicit
from seqjax.parallel._layers import split_loops
from seqjax.parallel._linear_scan import previous_states
from seqjax.parallel.contraction import warn_not_contracting
from seqjax.parallel.methods import DEER, Method
from seqjax.parallel.search import Convergence, Limits, Options, combine, empty_search, search
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._checks import batch_of_states, check_sequences
from seqjax.sequence._devices import on_any_mesh
from seqjax.sequence._masked_step import Inputs, draw_noise


def unroll_parallel(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
    reverse: bool = False,
    key: Array | None = None,
    method: Method = DEER(),  # noqa: B008 - immutable
    tolerance: float | None = None,
    max_iterations: int = 100,
    fallback: bool = False,
) -> tuple[tuple[State, Output], Convergence]:
    """Computes the result of `unroll` by iterating on all steps at once, and not step by step.

        s_t = f(s_{t-1}, x_t) for all t    <=    d_t = J_t d_{t-1} + (f(s_{t-1}, x_t) - s_t),    s_t <- s_t + d_t

    Each iteration is a linear scan of depth 16 + log T. This is faster than `unroll` on an accelerator, for long
    sequences, small states and a contracting recurrence. On a CPU `unroll` is faster. Derivatives of first and second
    order are those of the trajectory. They take one linear scan and do not pass through the iterations. If a row has
    not converged, its derivatives are as wrong as its values.

    Args:
        cell, params, xs, state, mask, reset, reverse, key: as for `unroll`.
        method: `DEER()`, `QuasiDEER()`, `ELK()` or `QuasiELK()`.
        tolerance: the largest residual of a converged row, relative to its states; by default eps^(3/4) of the state's
            dtype, 6e-6 in float32 and 2e-12 in float64.
        max_iterations: the largest number of iterations. No cell and no method needs more than the number of steps.
        fallback: whether a row that does not converge gets the values and gradients of the sequential scan. The scan
            runs for the whole batch, but only if a row needs it. Without it, such a row has its last iterate.

    Returns:
        (final state, outputs) as `unroll` returns them, and the `Convergence`.

    Raises:
        ValueError: a shape does not match, or an option is out of range.
        TypeError: a dtype does not match, a part of the state is not differentiable, or `method` is not a method.

    Warns:
        NotContractingWarning: perturbations grow over the sequence. There is no warning under `jax.jit`, in which case
            see `Convergence.exponent`.

    Source: Lim et al. 2024, "Parallelizing non-linear sequential models over the sequence length"; Gonzalez et al.
        2024, "Towards scalable and stable parallelization of nonlinear RNNs".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.GRU(1, 2)
        >>> params, xs = cell.init(jax.random.key(0)), jnp.sin(jnp.arange(1000.0)).reshape(1, 1000, 1)
        >>> (state, outputs), convergence = sj.unroll_parallel(cell, params, xs)
        >>> bool(convergence.converged[0]), bool(convergence.exponent[0] < 0), bool(convergence.iterations[0] < 10)
        (True, True, True)
        >>> float(abs(outputs - sj.unroll(cell, params, xs)[1]).max()) < 1e-5
        True
    """
    inputs = check_sequences(cell, Inputs(xs, mask, reset))
    _check_options(method, tolerance, max_iterations)
    state = batch_of_states(cell, params, state, inputs.batch)
    _check_state(cell, method, state)
    run = cached_jit(_run, cell, Options(method, bool(reverse), bool(fallback)))
    limits = float(tolerance or 0), int(max_iterations)  # 0 for the default, so that no change of them compiles again
    result, convergence = run(params, state, inputs, key, limits)
    warn_not_contracting(method, convergence.exponent, convergence.converged, inputs.time)
    return result, convergence


def _run(
    cell: Cell, options: Options, params: Params, state: State, inputs: Inputs, key: Array | None, limits: Limits
) -> tuple[tuple[State, Output], Convergence]:
    return on_any_mesh(partial(_solve, cell, options), inputs.x, params, state, inputs, key, limits)


def _solve(
    cell: Cell, options: Options, params: Params, state: State, inputs: Inputs, key: Array | None, limits: Limits
) -> tuple[tuple[State, Output], Convergence]:
    # The noise too is reversed below, because `unroll` draws it for the time index and not for the order of the steps.
    inputs = inputs._replace(noise=draw_noise(cell, key, inputs.batch, inputs.time))
    if options.reverse:
        inputs = _reverse_time(inputs)
    (state, outputs), convergence = _solve_loops(cell, options, params, state, inputs, limits)
    return (state, _reverse_time(outputs) if options.reverse else outputs), convergence


def _reverse_time(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:, ::-1], tree)


def _solve_loops(
    cell: Cell, options: Options, params: Params, state: State, inputs: Inputs, limits: Limits
) -> tuple[tuple[State, Output], Convergence]:
    """Solves a cell loop by loop, because separate loops have smaller Jacobians and separate numbers of iterations."""
    leaves, tree = jax.tree.flatten(state)
    if not (inputs.batch and inputs.time and len(leaves) > 1):
        return _solve_batch(cell, options, params, state, inputs, limits)
    loops, variables, output_tree = split_loops(cell, params, state, inputs.x, inputs.noise)
    if len(loops) <= 2 and not loops[-1].stage.program.jaxpr.eqns:  # one loop, and nothing outside it
        return _solve_batch(cell, options, params, state, inputs, limits)
    known = dict(zip(variables, jax.tree.leaves((inputs.x, inputs.noise)), strict=True))
    results, outputs = [], ()
    for loop in loops:
        stage = loop.stage
        own, reads = tuple(leaves[i] for i in stage.leaves), tuple(known[v] for v in stage.inputs)
        # The noise is among the variables that the loop reads.
        of_loop = inputs._replace(x=reads, noise=None)
        (own, outputs), convergence = _solve_batch(loop, options, params, own, of_loop, limits)
        for i, leaf in zip(stage.leaves, own, strict=True):
            leaves[i] = leaf
        if stage.leaves:
            known.update(zip(stage.outputs, outputs, strict=True))
            results.append(convergence)
    return (tree.unflatten(leaves), output_tree.unflatten(outputs)), combine(results)


def _solve_batch(
    cell: Cell, options: Options, params: Params, state: State, inputs: Inputs, limits: Limits
) -> tuple[tuple[State, Output], Convergence]:
    """Solves one loop for the states, attaches their derivatives, and runs all steps once more for the outputs."""
    flat = newton_cell(cell, state)
    batch, time = jax.tree.leaves(inputs)[0].shape[:2]
    first = jax.vmap(flat.ravel, axis_size=batch)(state)
    arguments = (params, first, inputs)
    if not (batch and time and flat.size):
        states, convergence = empty_search(flat, batch, time)
    else:
        check_differentiable(flat, type(options.method).__name__, params, first, inputs)
        states, convergence = search(flat, options, limits, *_without_gradient(arguments))
        rows = jax.vmap(partial(implicit, flat, options.method.algebra), ((None, 0, 0), 0, None))
        # After a fallback products of Jacobians may overflow, so the derivatives are computed step by step too.
        states = rows(arguments, states, jnp.any(convergence.fell_back))
    before = jax.vmap(previous_states)(first, states)
    run_all = jax.vmap(jax.vmap(flat.run, (None, 0, 0)), (None, 0, 0))
    after, outputs = run_all(params, before, inputs)
    final = jax.tree.map(lambda leaf: leaf[:, -1], after) if time else state
    return (final, outputs), convergence


def _without_gradient(tree: PyTree) -> PyTree:
    """The same values without derivatives, so that JAX does not differentiate the search."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf, tree
    )


def _check_options(method: object, tolerance: float | None, max_iterations: int) -> None:
    if isinstance(method, type) or not isinstance(method, Method):
        got = f"the class {method.__name__}: {method.__name__}()" if isinstance(method, type) else f"{method!r}: DEER()"
        raise TypeError(f"expected method, one of DEER(), QuasiDEER(), ELK(), QuasiELK(), got {got} is one")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(
            f"expected a positive tolerance on the residual, got {tolerance!r}: leave it out for eps^(3/4)"
        )
    whole_number("max_iterations", max_iterations, hint="no method needs more than one per step")


def _check_state(cell: Cell, method: Method, state: State) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"expected a floating-point state for {type(method).__name__}, which is Newton's method and needs "
                f"ds_t/ds_(t-1), got {leaf.dtype} in {type(cell).__name__}'s state{jax.tree_util.keystr(path)}: "
                f"pass it as an input, or use sj.unroll"
            )
