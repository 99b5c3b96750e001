"""Sigmoids, rewritten so that XLA computes them in SIMD vectors on a CPU.

XLA vectorizes sigma of a whole array, but computes sigma of a slice one number after the other. If the program needs
only some slices of sigma(a), XLA replaces it by sigmas of slices, unless these slices are concatenated first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from seqjax.sequence._partition.program import (
    Atom,
    Dependencies,
    Env,
    Eqn,
    Read,
    Rule,
    Var,
    concatenated,
    overlap,
    readers,
    retrace,
    skip,
    split,
    variables,
)


def with_merged_sigmoids(program: ClosedJaxpr, n_params: int, n_state: int) -> ClosedJaxpr:
    """The same function, in which sigmoids that can be computed at the same time are one sigmoid.

    Args:
        program: the normal form of one loop, (params.., state.., x..) -> results.
        n_params, n_state: the numbers of leaves of its parameters and of its state.
    """
    # All sigmoids become sigmoids of slices first, so that the merge alone decides which of them run together.
    program = _sigmoids_of_slices(program, Dependencies(program, n_params, n_state))
    return _merge_sigmoids(program, Dependencies(program, n_params, n_state))


def _sigmoids_of_slices(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    """Rewrites slices of sigma(a) as sigma of slices of a."""
    rules: dict[int, Rule] = {}
    for e in depends.eqns:
        out = e.outvars[0]
        if e.primitive.name != "logistic" or not depends.on_state(out):
            continue
        slices = depends.readers.get(out, [])
        if not slices or any(r is None or r.primitive.name not in ("slice", "split") for r in slices):
            continue
        rules[id(e)] = skip
        rules |= {id(r): _sigmoid_of_slice(r, e.invars[0]) for r in slices}
    return retrace(program, depends.eqns, rules) if rules else program


def _sigmoid_of_slice(e: Eqn, a: Atom) -> Rule:
    def run(env: Env, read: Read) -> None:
        parts = e.primitive.bind(read(a), **e.params)
        parts = parts if e.primitive.multiple_results else [parts]
        env.update(zip(e.outvars, map(lax.logistic, parts), strict=True))

    return run


def _merge_sigmoids(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    """Computes the sigmoids of each depth as one sigmoid of their concatenated operands.

    The depth of an equation is the number of sigmoids on the longest path that leads to it. Sigmoids of equal depth do
    not depend on each other.
    """
    depth: dict[Var, int] = {}
    order: dict[tuple[int, bool], list[Eqn]] = {}
    for e in depends.eqns:
        before = max((depth.get(v, 0) for v in variables(e.invars)), default=0)
        out = e.outvars[0]
        is_sigmoid = e.primitive.name == "logistic" and depends.on_state(out) and out.aval.ndim == 1
        depth.update((v, before + is_sigmoid) for v in e.outvars)
        order.setdefault((before, is_sigmoid), []).append(e)
    slices = depends.slices()
    rules: dict[int, Rule] = {}
    for (_, is_sigmoid), members in order.items():
        if is_sigmoid:
            rules |= _rules_for_equal_depth(members, slices)
    # Sorted by depth, other equations before sigmoids, so that every operand is known when the merged sigmoid runs.
    return retrace(program, [e for key in sorted(order) for e in order[key]], rules) if rules else program


def _rules_for_equal_depth(sigmoids: list[Eqn], slices: dict[Var, tuple[Var, int]]) -> dict[int, Rule]:
    groups: dict[Any, list[Eqn]] = {}  # (the vector of which the operands are slices, or None; the dtype) -> sigmoids
    for e in sigmoids:
        whole, _ = slices.get(e.invars[0], (None, 0))
        groups.setdefault((whole, e.outvars[0].aval.dtype), []).append(e)
    rules: dict[int, Rule] = {}
    for (whole, _), group in groups.items():
        starts = None if whole is None else [slices[e.invars[0]][1] for e in group]
        if len(group) < 2 or (starts is not None and _slices_overlap(starts, group)):
            continue
        rules[id(group[0])] = _one_sigmoid(group) if starts is None else _sigmoid_of_whole(group, whole, starts)
        rules |= {id(e): skip for e in group[1:]}
    return rules


def _slices_overlap(starts: list[int], group: list[Eqn]) -> bool:
    return overlap((start, start + e.outvars[0].aval.shape[0]) for start, e in zip(starts, group, strict=True))


def _one_sigmoid(group: list[Eqn]) -> Rule:
    """Sigmoids of several vectors, as slices of the sigmoid of their concatenation."""
    outs = [e.outvars[0] for e in group]
    sizes = [out.aval.shape[0] for out in outs]

    def run(env: Env, read: Read) -> None:
        sigma = lax.logistic(concatenated([read(e.invars[0]) for e in group]))
        env.update(zip(outs, split(sigma, sizes), strict=True))

    return run


def _sigmoid_of_whole(group: list[Eqn], whole: Var, starts: list[int]) -> Rule:
    """Sigmoids of slices of one vector, as slices of its sigmoid."""
    outs = [e.outvars[0] for e in group]
    ends = [start + out.aval.shape[0] for start, out in zip(starts, outs, strict=True)]

    def run(env: Env, read: Read) -> None:
        sigma = lax.logistic(read(whole))
        # One split at every bound, also at those of parts that no sigmoid reads. XLA turns separate slices back into
        # sigmoids of slices.
        bounds = sorted({0, *starts, *ends, sigma.shape[0]})
        pieces = dict(zip(bounds, split(sigma, [b - a for a, b in itertools.pairwise(bounds)]), strict=False))
        env.update(zip(outs, [pieces[start] for start in starts], strict=True))

    return run


def rules_for_slices(eqns: Sequence[Eqn]) -> dict[int, Rule]:
    """Rules that compute sigma only of those slices of a vector that the equations read.

    The rematerialization of states does not read every slice: an LSTM's next state does not need the output gate. XLA
    would then compute sigma of each slice that is left, one number after the other. Sigma of their concatenation is
    faster.
    """
    read_by, rules = readers(eqns, ()), {}
    for e in eqns:
        by = read_by.get(e.outvars[0], []) if e.primitive.name == "logistic" else []
        if len(by) == 1 and by[0].primitive.name == "split":
            ends = [int(end) for end in itertools.accumulate(by[0].params["sizes"])]
            ranges = [
                pair for pair, v in zip(itertools.pairwise([0, *ends]), by[0].outvars, strict=True) if v in read_by
            ]
            rules[id(e)] = _sigmoid_of_ranges(e, ranges)
    return rules


def _sigmoid_of_ranges(e: Eqn, ranges: list[tuple[int, int]]) -> Rule:
    def run(env: Env, read: Read) -> None:
        a, out = read(e.invars[0]), e.outvars[0].aval
        sigma = lax.logistic(jnp.concatenate([a[start:stop] for start, stop in ranges]))
        # Zeros in the gaps restore the positions that the split after the sigmoid expects. XLA removes them.
        parts, position = [], 0
        for start, stop in ranges:
            parts += [jnp.zeros(start - position, out.dtype), sigma[: stop - start]]
            sigma, position = sigma[stop - start :], stop
        env[e.outvars[0]] = jnp.concatenate([*parts, jnp.zeros(out.shape[0] - position, out.dtype)])

    return run
