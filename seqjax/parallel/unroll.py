"""Unrolling a cell with all steps at once: the trajectory is the root of one large equation, found by Newton's method.

What a mask, a reset and noise mean is what they mean in `seqjax.sequence.unroll`: every step is the same guarded step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from seqjax.cell import Cell, Output, Params, State
from seqjax.parallel._flat import At, FlatCell, check_differentiable, flat_cell
from seqjax.parallel._implicit import implicit
from seqjax.parallel._layers import loops_of
from seqjax.parallel._linear_scan import delayed
from seqjax.parallel.contraction import warn_of_growth
from seqjax.parallel.methods import DEER, Method
from seqjax.parallel.search import Convergence, nothing_to_find, search, together
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._checks import batch_of_states, check_flags, check_inputs
from seqjax.sequence._masked_step import draw_noise


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
    method: Any = DEER(),  # noqa: B008 - a value
    tolerance: float | None = None,
    max_iterations: int = 100,
    fallback: bool = False,
) -> tuple[tuple[State, Output], Convergence]:
    """What `unroll` gives, by iterating on all steps at once instead of going through them one after another.

        s_t = f(s_{t-1}, x_t) for all t    <=    d_t = J_t d_{t-1} + (f(s_{t-1}, x_t) - s_t),    s_t <- s_t + d_t

    Each iteration is a linear scan of depth 16 + log T. It pays on an accelerator, for long sequences and
    small states, and where the recurrence contracts. On a CPU `unroll` is faster. The derivatives, of first and second
    order, are those of the trajectory, by one linear scan, and do not pass through the iterations; where a row has not
    converged they mean as little as its values.

    Args:
        cell, params, xs, state, mask, reset, reverse, key: as for `unroll`.
        method: how to iterate: `DEER()`, `QuasiDEER()`, `ELK()` or `QuasiELK()`.
        tolerance: a row has converged where its residual, relative to its states, is no larger; by default eps^(3/4)
            of the state's dtype, 6e-6 in float32 and 2e-12 in float64.
        max_iterations: at most so many. None needs more than there are steps, on any cell.
        fallback: give a row that does not converge the values and gradients of the sequential scan, which then runs
            for the whole batch, and only then. Otherwise the row holds its last iterate.

    Returns:
        (final state, outputs) as `unroll` returns them, and the `Convergence`.

    Raises:
        ValueError: a shape does not fit, or an option is out of its range.
        TypeError: a dtype does not fit, the state has a part that the method cannot differentiate, or `method` is none.

    Warns:
        NotContractingWarning: perturbations grow over the sequence. Not under `jax.jit`: there, see `exponent`.

    Source: Lim et al. 2024, "Parallelizing non-linear sequential models over the sequence length"; Gonzalez et al.
        2024, "Towards scalable and stable parallelization of nonlinear RNNs".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.GRU(1, 2)
        >>> params, xs = cell.init(jax.random.key(0)), jnp.sin(jnp.arange(1000.0)).reshape(1, 1000, 1)
        >>> (state, outputs), found = sj.unroll_parallel(cell, params, xs)
        >>> bool(found.converged[0]), bool(found.exponent[0] < 0), bool(found.iterations[0] < 10)
        (True, True, True)
        >>> float(abs(outputs - sj.unroll(cell, params, xs)[1]).max()) < 1e-5
        True
    """
    xs, batch, time = check_inputs(cell, xs)
    mask, reset = check_flags("mask", mask, batch, time), check_flags("reset", reset, batch, time)
    _check_options(method, tolerance, max_iterations)
    state = batch_of_states(cell, params, state, batch)
    _check_state(cell, method, state)
    run = cached_jit(_run, cell, method, bool(reverse), bool(fallback))
    limits = float(tolerance or 0), int(max_iterations)  # 0 for the default, so that either compiles once
    result, found = run(params, state, (xs, mask, reset), key, limits)
    warn_of_growth(method, found.exponent, found.converged, time)
    return result, found


def _run(
    cell: Cell,
    method: Method,
    reverse: bool,
    fallback: bool,
    params: Params,
    state: State,
    inputs: Any,
    key: Any,
    limits: Any,
) -> tuple[tuple[State, Output], Convergence]:
    inputs = (*inputs, draw_noise(cell, key, *jax.tree.leaves(inputs)[0].shape[:2]))
    if reverse:
        inputs = _backwards(inputs)
    (state, outputs), found = _layers(cell, method, fallback, params, state, inputs, limits)
    return (state, _backwards(outputs) if reverse else outputs), found


def _backwards(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:, ::-1], tree)


def _layers(
    cell: Cell, method: Method, fallback: bool, params: Params, state: State, inputs: At, limits: Any
) -> tuple[tuple[State, Output], Convergence]:
    """A cell loop by loop: the same function, with smaller Jacobians and searches that end on their own."""
    xs, mask, reset, noise = inputs
    batch, time = jax.tree.leaves(inputs)[0].shape[:2]
    leaves, tree = jax.tree.flatten(state)
    if not (batch and time and len(leaves) > 1):
        return _batch(cell, method, fallback, params, state, inputs, limits)
    loops, names, out = loops_of(cell, params, state, xs, noise)
    if len(loops) <= 2 and not loops[-1].stage.program.jaxpr.eqns:
        return _batch(cell, method, fallback, params, state, inputs, limits)
    known, records, outputs = dict(zip(names, jax.tree.leaves((xs, noise)), strict=True)), [], ()
    for loop in loops:
        stage = loop.stage
        own, reads = tuple(leaves[i] for i in stage.leaves), tuple(known[v] for v in stage.inputs)
        (own, outputs), found = _batch(loop, method, fallback, params, own, (reads, mask, reset, None), limits)
        for i, leaf in zip(stage.leaves, own, strict=True):
            leaves[i] = leaf
        if stage.leaves:
            known.update(zip(stage.outputs, outputs, strict=True))
            records.append(found)
    return (tree.unflatten(leaves), out.unflatten(outputs)), together(records)


def _batch(
    cell: Cell, method: Method, fallback: bool, params: Params, state: State, inputs: At, limits: Any
) -> tuple[tuple[State, Output], Convergence]:
    """One loop: the states, with their derivatives, and then every step once more for its output."""
    flat = flat_cell(cell, state)
    batch, time = jax.tree.leaves(inputs)[0].shape[:2]
    first = jax.vmap(flat.ravel, axis_size=batch)(state)
    arguments = (params, first, inputs)
    if not (batch and time and flat.size):
        states, found = nothing_to_find(flat, batch, time)
    else:
        check_differentiable(flat, type(method).__name__, params, first, inputs)
        states, found = search(flat, method, fallback, limits, *_constant(arguments))
        rows = jax.vmap(partial(_implicit_row, flat, method), ((None, 0, 0), 0, None))
        states = rows(arguments, states, jnp.any(found.fell_back))
    before = jax.vmap(delayed)(first, states)
    each = jax.vmap(jax.vmap(flat.run, (None, 0, 0)), (None, 0, 0))
    after, outputs = each(params, before, inputs)
    final = jax.tree.map(lambda leaf: leaf[:, -1], after) if time else state
    return (final, outputs), found


def _implicit_row(flat: FlatCell, method: Method, arguments: Any, states: Array, in_turn: Array) -> Array:
    return implicit(flat, method.algebra, arguments, states, in_turn)


def _constant(tree: PyTree) -> PyTree:
    """The same without derivatives, so that none is taken of the search."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf, tree
    )


def _check_options(method: Any, tolerance: Any, max_iterations: Any) -> None:
    if isinstance(method, type) or not isinstance(method, Method):
        got = f"the class {method.__name__}: {method.__name__}()" if isinstance(method, type) else f"{method!r}: DEER()"
        raise TypeError(f"expected method, one of DEER(), QuasiDEER(), ELK(), QuasiELK(), got {got} is one")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(
            f"expected a positive tolerance on the residual, got {tolerance!r}: leave it out for eps^(3/4)"
        )
    whole = hasattr(max_iterations, "__index__") and not isinstance(max_iterations, bool)
    if not whole or max_iterations < 1:
        raise ValueError(
            f"expected max_iterations to be a whole number of at least 1, got {max_iterations!r}: "
            f"no method needs more than one for each step"
        )


def _check_state(cell: Cell, method: Any, state: State) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"expected a floating-point state for {type(method).__name__}, which is Newton's method and needs "
                f"ds_t/ds_(t-1), got {leaf.dtype} in {type(cell).__name__}'s state{jax.tree_util.keystr(path)}: "
                f"give it as an input, or use sj.unroll"
            )
