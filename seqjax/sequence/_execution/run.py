"""The unroll of any cell by the parts of its step, with every kind of derivative.

`forward.py` and `backward.py` beside this module hold the two passes. A plain scan over the same program gives `jvp`
and second derivatives (`seqjax.sequence._linear_map`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from seqjax.sequence._execution.backward import backward, pick, put
from seqjax.sequence._execution.forward import Leaves, forward
from seqjax.sequence._execution.kernel import kernel_for
from seqjax.sequence._linear_map import Direction, linear_map
from seqjax.sequence._partition.loops import Stage
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.plan import Plan
from seqjax.sequence._partition.program import inexact


def run_plan(plan: Plan, reverse: bool, params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
    """Unrolls a partitioned step.

    Args:
        plan: from `seqjax.sequence._partition.plan.plan_of`.
        reverse: right to left.
        params, state, inputs: trees as the plan was made for, the state (batch, ...) and the inputs (batch, time, ...).

    Returns:
        The final state, (batch, ...), and what is kept of each step, (batch, time, ...).
    """
    leaves = [*map(jnp.asarray, jax.tree.leaves(params))]
    first = jax.tree.leaves(state)
    known = dict(zip(plan.x, jax.tree.leaves(inputs), strict=True))
    final: dict[int, Any] = {}
    kept: Leaves = []
    for stage, parts in zip(plan.stages, plan.parts, strict=True):
        args = [*parts.consts, *leaves], [first[i] for i in stage.leaves], [known[v] for v in stage.inputs]
        after, kept = _run_stage(stage, parts, plan.kernel, reverse, *args)
        final.update(zip(stage.leaves, after, strict=True))
        if stage.leaves:
            known.update(zip(stage.outputs, kept, strict=True))
    after = [final[i] for i in range(len(first))]
    return jax.tree.unflatten(plan.state, after), jax.tree.unflatten(plan.kept, kept)


def _run_stage(
    stage: Stage, parts: Parts, kernel: bool, reverse: bool, params: Leaves, state: Leaves, xs: Leaves
) -> tuple[Leaves, Leaves]:
    if not stage.leaves:
        return [], _at_once(parts, params, xs)
    if not parts.pays or not any(map(inexact, state)):
        return _run_plainly(parts, reverse, params, state, xs)
    return _run_in_parts(parts, kernel, reverse, params, state, xs)


def _at_once(parts: Parts, params: Leaves, xs: Leaves) -> Leaves:
    """Every step at once, if nothing recurs."""
    hoisted = parts.hoist(params)
    return jax.vmap(jax.vmap(lambda x: parts.finish(hoisted, [], parts.drives(hoisted, x))[1]))(xs)


def _run_plainly(parts: Parts, reverse: bool, params: Leaves, state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
    """One scan over the whole step."""
    hoisted = parts.hoist(params)

    def step(state: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        return parts.finish(hoisted, state, parts.drives(hoisted, x))

    return jax.vmap(lambda state, xs: lax.scan(step, state, xs, reverse=reverse))(state, xs)


def _run_in_parts(
    parts: Parts, kernel: bool, reverse: bool, params: Leaves, state: Leaves, xs: Leaves
) -> tuple[Leaves, Leaves]:
    sizes = len(params), len(state)
    chosen = kernel_for(parts) if kernel else None

    def split(leaves: Any) -> tuple[Leaves, Leaves, Leaves]:
        leaves = list(leaves)
        return leaves[: sizes[0]], leaves[sizes[0] : sum(sizes)], leaves[sum(sizes) :]

    @jax.custom_jvp
    def run(*leaves: Any) -> Any:
        return forward(parts, chosen, reverse, *split(leaves))

    def tangent(primals: Any, tangents: Any) -> Any:
        out, saved = run(*primals)
        wanted = [not isinstance(t, SymbolicZero) for t in tangents]
        saved_leaves, saved_tree = jax.tree.flatten(saved)
        outs, n = jax.tree.leaves(out), len(primals)
        floats = [inexact(leaf) for leaf in outs]
        n_after = sum(map(inexact, out[0]))

        def along(leaves: Leaves) -> Any:
            plain = partial(_run_plainly, parts, reverse)
            return lambda *values: pick(plain(*split(put(leaves, wanted, values))), floats)

        def push(residuals: Leaves, tangents: Leaves) -> Leaves:
            return jax.jvp(along(residuals[:n]), pick(residuals[:n], wanted), tangents)[1]

        def pull_plainly(residuals: Leaves, cts: Leaves) -> Leaves:
            return list(jax.vjp(along(residuals[:n]), *pick(residuals[:n], wanted))[1](cts))

        def pull(residuals: Leaves, cts: Leaves) -> Leaves:
            saved = jax.tree.unflatten(saved_tree, residuals[n:])
            inputs = split(residuals[:n])
            return backward(parts, chosen, reverse, *inputs, saved, cts[:n_after], cts[n_after:], wanted)

        directions = Direction(push, push), Direction(pull, pull_plainly)
        moved = linear_map(
            [*primals, *saved_leaves], pick(list(tangents), wanted), *directions, like=pick(outs, floats)
        )
        zeros = [_zero_tangent(leaf) for leaf in outs]
        # What is saved is a function of the same inputs, and nothing that reads it needs its tangent.
        still = jax.tree.map(_zero_tangent, saved)
        return (out, saved), (jax.tree.unflatten(jax.tree.structure(out), put(zeros, floats, moved)), still)

    run.defjvp(tangent, symbolic_zeros=True)
    return run(*params, *state, *xs)[0]


def _zero_tangent(leaf: Any) -> Any:
    return jnp.zeros_like(leaf) if inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0)
