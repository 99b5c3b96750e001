"""Rewrites of the program of a step: the same function in the form that runs fast and that the partition recognises.

1. Equal equations are computed once.
2. The product of a concatenation of input and state becomes a sum of products, W [x, h] -> W_x x + W_h h.
3. Parameters and numbers that are added to a slice of a product or of a sum are added to the whole vector.
4. Sums are regrouped, (W h + U x) + b -> W h + (U x + b), so that everything that needs no state leaves the loop.
5. Products of the same vector become one product, with the matrices stacked as (out, in).
6. Sums of slices become slices of one sum.
7. Sigmoids that can be computed at the same time become one, over their operands side by side.

Regrouping changes the rounding of a sum in its last digit, so it is done in float32 and float64 only.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params

from seqjax.sequence._partition.program import (
    Eqn,
    Read,
    Rule,
    bind,
    contracted,
    inexact,
    is_product,
    retrace,
)
from seqjax.sequence._partition.rewriting import Kinds, concatenated, slices_rows, split, starts_of_slices
from seqjax.sequence._partition.sigmoids import merge_sigmoids, slices_of_sigmoids


def normalized(closed: ClosedJaxpr, params: int, state: int, with_sigmoids: bool = True) -> ClosedJaxpr:
    """The program of one loop, (params.., state.., x..) -> (state.., kept..), in its normal form.

    Args:
        closed: the inlined program.
        params: the number of its leaves of parameters.
        state: the number of its leaves of the state.
        with_sigmoids: whether to do the last rewrite, which pays if the program runs over a batch.
    """
    rewrites = [
        _share_equal, _split_concatenated, _add_before_slicing, _regroup_sums, _merge_products, _sums_of_slices
    ]  # fmt: skip
    for rewrite in [*rewrites, slices_of_sigmoids, merge_sigmoids] if with_sigmoids else rewrites:
        closed = rewrite(closed, Kinds(closed, params, state))
    return closed


def _share_equal(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    first: dict[Any, Eqn] = {}
    same: dict[Any, Any] = {}  # a result -> the equal result of an earlier equation
    rules: dict[int, Rule] = {}
    for e in kinds.eqns:
        if e.effects or jaxprs_in_params(e.params):
            continue
        operands: list[Any] = [
            (np.asarray(v.val).tobytes(), str(v.aval)) if isinstance(v, Literal) else same.get(v, v) for v in e.invars
        ]
        earlier = first.setdefault((e.primitive.name, str(e.params), *operands), e)
        if earlier is not e:
            same.update(zip(e.outvars, earlier.outvars, strict=True))
            rules[id(e)] = _same_values(earlier, e)
    return retrace(closed, kinds.eqns, rules) if rules else closed


def _same_values(earlier: Eqn, e: Eqn) -> Rule:
    def run(env: dict[Any, Any], read: Read) -> None:
        env.update((b, env[a]) for a, b in zip(earlier.outvars, e.outvars, strict=True) if a in env)

    return run


def _split_concatenated(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    made_by = {e.outvars[0]: e for e in kinds.eqns if e.primitive.name == "concatenate"}
    rules: dict[int, Rule] = {}
    for e in kinds.eqns:
        if not is_product(e, 1, 2) or not kinds.is_fixed(e.invars[1]) or e.invars[0] not in made_by:
            continue
        out, parts = e.outvars[0].aval, made_by[e.invars[0]].invars
        late = [kinds.is_late(v) for v in parts]
        if inexact(out) and out.dtype.itemsize >= 4 and any(late) and not all(late):
            rules[id(e)] = _sum_of_products(e, list(parts), late)
    return retrace(closed, kinds.eqns, rules) if rules else closed


def _sum_of_products(e: Eqn, parts: list[Any], late: list[bool]) -> Rule:
    """The product of neighbouring parts of one kind at a time, and the sum of these products."""
    ends = [0, *itertools.accumulate(v.aval.shape[0] for v in parts)]
    groups = [list(group) for _, group in itertools.groupby(range(len(parts)), lambda i: late[i])]

    def run(env: dict[Any, Any], read: Read) -> None:
        W, products = read(e.invars[1]), []
        for group in groups:
            rows = lax.slice_in_dim(W, ends[group[0]], ends[group[-1] + 1], axis=contracted(e, 1))
            products.append(e.primitive.bind(concatenated(read(parts[i]) for i in group), rows, **e.params))
        env[e.outvars[0]] = sum(products[1:], products[0])

    return run


def _regroup_sums(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    sums: dict[Any, tuple[Any, Any]] = {}  # a sum -> its part that depends on the state, and the rest of it

    def is_sum(e: Eqn) -> bool:
        out = e.outvars[0].aval
        if e.primitive.name != "add" or not kinds.is_late(e.outvars[0]) or not inexact(out):
            return False
        return out.dtype.itemsize >= 4 and all(v.aval.shape == out.shape for v in e.invars)

    def rule(e: Eqn) -> Rule:
        def terms(v: Any, read: Read) -> tuple[Any, Any]:
            if not kinds.is_late(v):
                return None, read(v)
            return sums[v] if v in sums and kinds.only_reader(v) is e else (read(v), None)

        def add(a: Any, b: Any) -> Any:
            return b if a is None else a if b is None else lax.add(a, b)

        def run(env: dict[Any, Any], read: Read) -> None:
            (late, early), (more_late, more_early) = (terms(v, read) for v in e.invars)
            late, early = add(late, more_late), add(early, more_early)
            sums[e.outvars[0]] = late, early
            env[e.outvars[0]] = add(late, early)

        return run

    return retrace(closed, kinds.eqns, {id(e): rule(e) for e in kinds.eqns if is_sum(e)})


def _add_before_slicing(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    rules: dict[int, Rule] = {}
    for e in kinds.eqns:
        if not _is_vector_of_gates(e, kinds):
            continue
        slices = kinds.readers.get(e.outvars[0], [])
        if not slices or any(r is None or not slices_rows(r) for r in slices):
            continue
        starts = [(start, v) for r in slices for start, v in starts_of_slices(r)]
        added = [
            (start, v, *found)
            for start, v in starts
            if (found := kinds.added_to(v) or kinds.number_added_to(v)) is not None
        ]
        ends = sorted((start, start + v.aval.shape[0]) for start, v, *_ in added)
        if not added or any(start < stop for (_, stop), (start, _) in itertools.pairwise(ends)):
            continue
        rules[id(e)] = _plus_padded(e, added)
        rules |= {id(adds): _same_value(v, adds) for _, v, adds, _ in added}
    order = sorted(kinds.eqns, key=lambda e: not all(map(kinds.is_fixed, e.outvars)))
    return retrace(closed, order, rules) if rules else closed


def _is_vector_of_gates(e: Eqn, kinds: Kinds) -> bool:
    """Whether an equation computes a vector that depends on the state: a product with fixed weights, or a sum."""
    out = e.outvars[0]
    if not kinds.is_late(out):
        return False
    if is_product(e, 1, 2):
        return kinds.is_fixed(e.invars[1])
    return e.primitive.name == "add" and out.aval.ndim == 1 and inexact(out.aval) and out.aval.dtype.itemsize >= 4


def _plus_padded(e: Eqn, added: list[tuple[int, Any, Eqn, Any]]) -> Rule:
    """The result of an equation plus one vector that holds what is added to each of its slices."""

    def run(env: dict[Any, Any], read: Read) -> None:
        result = bind(e, list(map(read, e.invars)))[0]
        whole = jnp.zeros(result.shape, result.dtype)
        for start, v, _, b in added:
            block = jnp.broadcast_to(jnp.asarray(read(b), result.dtype), v.aval.shape)
            whole = lax.dynamic_update_slice(whole, block, (start,))
        env[e.outvars[0]] = result + whole

    return run


def _same_value(v: Any, e: Eqn) -> Rule:
    def run(env: dict[Any, Any], read: Read) -> None:
        env[e.outvars[0]] = read(v)

    return run


def _merge_products(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    groups: dict[Any, list[tuple[Eqn, Any]]] = {}  # (vector, precision) -> its products and their matrices
    for e in kinds.eqns:
        if not is_product(e, 1, 2) or kinds.is_fixed(e.invars[0]) or not kinds.is_fixed(e.invars[1]):
            continue
        v, W = e.invars
        if isinstance(v, Literal) or not inexact(v.aval):
            continue
        key = v, str((e.params["precision"], e.params["preferred_element_type"], W.aval.dtype))
        groups.setdefault(key, []).append((e, W))

    rules: dict[int, Rule] = {}
    for (v, _), members in groups.items():
        first = members[0][0]
        biases = [kinds.added_to(e.outvars[0]) for e, _ in members] if len(members) > 1 else []
        outs = [e.outvars[0] for e, _ in members]
        results = [b[0].outvars[0] if b else out for b, out in zip(biases, outs, strict=True)] if biases else outs

        def run(
            env: dict[Any, Any],
            read: Read,
            v: Any = v,
            members: Any = members,
            biases: Any = biases,
            outs: Any = outs,
            results: Any = results,
        ) -> None:
            matrices = [read(W) if contracted(e, 1) == 1 else read(W).T for e, W in members]
            options = {k: members[0][0].params[k] for k in ("precision", "preferred_element_type")}
            product = lax.dot_general(read(v), concatenated(matrices), (((0,), (1,)), ((), ())), **options)
            if any(biases):
                zeros = [jnp.zeros(out.aval.shape, out.aval.dtype) for out in outs]
                added = [zero if b is None else read(b[1]) for zero, b in zip(zeros, biases, strict=True)]
                product = product + concatenated(added)
            env.update(zip(results, split(product, [out.aval.shape[0] for out in outs]), strict=True))

        rules[id(first)] = run
        covered = [*(e for e, _ in members[1:]), *(b[0] for b in biases if b)]
        rules |= {id(e): lambda env, read: None for e in covered}
    # Every matrix must be known when the first product of its group runs.
    order = sorted(kinds.eqns, key=lambda e: not all(map(kinds.is_fixed, e.outvars)))
    return retrace(closed, order, rules)


def _sums_of_slices(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    """Sums of slices of two vectors as slices of their sum, if they cover the vectors."""
    sliced = {v: (r.invars[0], start) for r in kinds.eqns if slices_rows(r) for start, v in starts_of_slices(r)}
    groups: dict[Any, list[tuple[int, Eqn]]] = {}
    for e in kinds.eqns:
        if e.primitive.name != "add" or e.outvars[0].aval.ndim != 1:
            continue
        (u, a), (w, b) = (sliced.get(v, (None, -1)) if not isinstance(v, Literal) else (None, -1) for v in e.invars)
        if u is not None and w is not None and u is not w and a == b and u.aval.shape == w.aval.shape:
            groups.setdefault((u, w), []).append((a, e))
    rules: dict[int, Rule] = {}
    for (u, w), members in groups.items():
        members.sort(key=lambda member: member[0])
        outs = [e.outvars[0] for _, e in members]
        sizes = [out.aval.shape[0] for out in outs]
        starts = [start for start, _ in members]
        if len(members) < 2 or starts != [*itertools.accumulate([0, *sizes[:-1]])] or sum(sizes) != u.aval.shape[0]:
            continue

        def run(env: dict[Any, Any], read: Read, u: Any = u, w: Any = w, outs: Any = outs, sizes: Any = sizes) -> None:
            env.update(zip(outs, split(lax.add(read(u), read(w)), sizes), strict=True))

        first = next(e for e in kinds.eqns if any(e is member for _, member in members))
        rules |= {id(e): lambda env, read: None for _, e in members} | {id(first): run}
    return retrace(closed, kinds.eqns, rules) if rules else closed
