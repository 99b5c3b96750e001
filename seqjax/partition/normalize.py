"""Rewrites of the program of a step: the same function in the form that runs fast and that the partition recognises.

1. Equal equations are computed once.
2. Sums are regrouped, (W h + U x) + b -> W h + (U x + b), so that everything that needs no state leaves the loop.
3. Parameters that are added to a slice of a product are added to the whole product.
4. Products of the same vector become one product, with the matrices stacked as (out, in).
5. Sums of slices become slices of one sum.
6. Sigmoids that can be computed at the same time become one, over their operands side by side.

Regrouping changes the rounding of a sum in its last digit, so it is done in float32 and float64 only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params

from seqjax.partition.program import (
    Eqn,
    Read,
    Rule,
    bind,
    contracted,
    inexact,
    is_product,
    needed,
    reach,
    readers,
    retrace,
    variables,
)


def normalized(closed: ClosedJaxpr, params: int, state: int, merge_sigmoids: bool = True) -> ClosedJaxpr:
    """The program of one loop, (params.., state.., x..) -> (state.., kept..), in its normal form.

    Args:
        closed: the inlined program.
        params: the number of its leaves of parameters.
        state: the number of its leaves of the state.
        merge_sigmoids: whether to do the last rewrite, which pays if the program runs over a batch.
    """
    rewrites = [_share_equal, _regroup_sums, _add_before_slicing, _merge_products, _sums_of_slices]
    for rewrite in [*rewrites, _slices_of_sigmoids, _merge_sigmoids] if merge_sigmoids else rewrites:
        closed = rewrite(closed, _Kinds(closed, params, state))
    return closed


class _Kinds:
    """Which variables of a program depend on what."""

    def __init__(self, closed: ClosedJaxpr, params: int, state: int) -> None:
        jaxpr = closed.jaxpr
        self.eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
        self.from_state = reach(self.eqns, jaxpr.invars[params : params + state])
        self.from_x = reach(self.eqns, jaxpr.invars[params + state :])
        self.readers = readers(self.eqns, jaxpr.outvars)

    def is_late(self, v: Any) -> bool:
        """Whether it depends on the state."""
        return not isinstance(v, Literal) and v in self.from_state

    def is_fixed(self, v: Any) -> bool:
        """Whether it depends on parameters only."""
        return not isinstance(v, Literal) and v not in self.from_state and v not in self.from_x

    def only_reader(self, v: Any) -> Eqn | None:
        """The equation that reads a variable, if there is exactly one and it is no result."""
        found = self.readers.get(v, [])
        return found[0] if len(found) == 1 else None

    def added_to(self, v: Any) -> tuple[Eqn, Any] | None:
        """The equation that adds parameters to a variable, and these, if nothing else reads the variable."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if b is not None and self.is_fixed(b) and b.aval.shape == v.aval.shape else None


def _share_equal(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
    first: dict[Any, Eqn] = {}
    same: dict[Any, Any] = {}  # a result -> the equal result of an earlier equation
    rules: dict[int, Rule] = {}
    for e in kinds.eqns:
        if e.effects or jaxprs_in_params(e.params):
            continue
        operands = [(str(v.val), str(v.aval)) if isinstance(v, Literal) else same.get(v, v) for v in e.invars]
        earlier = first.setdefault((e.primitive.name, str(e.params), *operands), e)
        if earlier is not e:
            same.update(zip(e.outvars, earlier.outvars, strict=True))
            rules[id(e)] = _same_values(earlier, e)
    return retrace(closed, kinds.eqns, rules) if rules else closed


def _same_values(earlier: Eqn, e: Eqn) -> Rule:
    def run(env: dict[Any, Any], read: Read) -> None:
        env.update((b, env[a]) for a, b in zip(earlier.outvars, e.outvars, strict=True) if a in env)

    return run


def _regroup_sums(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
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


def _add_before_slicing(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
    rules: dict[int, Rule] = {}
    for e in kinds.eqns:
        if not is_product(e, 1, 2) or not kinds.is_late(e.outvars[0]) or not kinds.is_fixed(e.invars[1]):
            continue
        slices = kinds.readers.get(e.outvars[0], [])
        if not slices or any(r is None or not _slices_rows(r) for r in slices):
            continue
        added = [(start, *found) for r in slices for start, v in _starts(r) if (found := kinds.added_to(v))]
        ends = sorted((start, start + b.aval.shape[0]) for start, _, b in added)
        if not added or any(start < stop for (_, stop), (start, _) in itertools.pairwise(ends)):
            continue

        def run(env: dict[Any, Any], read: Read, e: Any = e, added: Any = added) -> None:
            product = bind(e, list(map(read, e.invars)))[0]
            whole = jnp.zeros(product.shape, product.dtype)
            for start, _, b in added:
                whole = lax.dynamic_update_slice(whole, read(b), (start,))
            env[e.outvars[0]] = product + whole

        rules[id(e)] = run
        rules |= {id(adds): _same_value(v, adds) for _, adds, b in added for v in adds.invars if v is not b}
    order = sorted(kinds.eqns, key=lambda e: not all(map(kinds.is_fixed, e.outvars)))
    return retrace(closed, order, rules) if rules else closed


def _slices_rows(e: Eqn) -> bool:
    if e.primitive.name == "slice":
        return e.params["strides"] is None
    return e.primitive.name == "split"


def _starts(e: Eqn) -> list[tuple[int, Any]]:
    """Where each result of a slice or a split of a vector begins."""
    if e.primitive.name == "slice":
        return [(e.params["start_indices"][0], e.outvars[0])]
    sizes = [int(size) for size in e.params["sizes"]]
    return list(zip(itertools.accumulate([0, *sizes[:-1]]), e.outvars, strict=True))


def _same_value(v: Any, e: Eqn) -> Rule:
    def run(env: dict[Any, Any], read: Read) -> None:
        env[e.outvars[0]] = read(v)

    return run


def _merge_products(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
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
            product = lax.dot_general(read(v), _concatenated(matrices), (((0,), (1,)), ((), ())), **options)
            if any(biases):
                zeros = [jnp.zeros(out.aval.shape, out.aval.dtype) for out in outs]
                added = [zero if b is None else read(b[1]) for zero, b in zip(zeros, biases, strict=True)]
                product = product + _concatenated(added)
            env.update(zip(results, _split(product, [out.aval.shape[0] for out in outs]), strict=True))

        rules[id(first)] = run
        covered = [*(e for e, _ in members[1:]), *(b[0] for b in biases if b)]
        rules |= {id(e): lambda env, read: None for e in covered}
    # Every matrix must be known when the first product of its group runs.
    order = sorted(kinds.eqns, key=lambda e: not all(map(kinds.is_fixed, e.outvars)))
    return retrace(closed, order, rules)


def _sums_of_slices(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
    """Sums of slices of two vectors as slices of their sum, if they cover the vectors."""
    sliced = {v: (r.invars[0], start) for r in kinds.eqns if _slices_rows(r) for start, v in _starts(r)}
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
            env.update(zip(outs, _split(lax.add(read(u), read(w)), sizes), strict=True))

        first = next(e for e in kinds.eqns if any(e is member for _, member in members))
        rules |= {id(e): lambda env, read: None for _, e in members} | {id(first): run}
    return retrace(closed, kinds.eqns, rules) if rules else closed


def _slices_of_sigmoids(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
    """Slices of sigma(a) as sigma of slices of a, so that `_merge_sigmoids` decides what is computed together."""
    rules: dict[int, Rule] = {}
    for e in kinds.eqns:
        out = e.outvars[0]
        if e.primitive.name != "logistic" or not kinds.is_late(out):
            continue
        slices = kinds.readers.get(out, [])
        if not slices or any(r is None or r.primitive.name not in ("slice", "split") for r in slices):
            continue
        rules[id(e)] = lambda env, read: None
        rules |= {id(r): _sigmoid_of_slice(r, e.invars[0]) for r in slices}
    return retrace(closed, kinds.eqns, rules) if rules else closed


def _sigmoid_of_slice(e: Eqn, a: Any) -> Rule:
    def run(env: dict[Any, Any], read: Read) -> None:
        parts = e.primitive.bind(read(a), **e.params)
        parts = parts if e.primitive.multiple_results else [parts]
        env.update(zip(e.outvars, map(lax.logistic, parts), strict=True))

    return run


def _merge_sigmoids(closed: ClosedJaxpr, kinds: _Kinds) -> ClosedJaxpr:
    """XLA on a CPU computes sigma of a slice one number after the other, and sigma of a whole array in vectors."""
    level: dict[Any, int] = {}  # of a variable: how many sigmoids in a row lead to it
    order: dict[tuple[int, bool], list[Eqn]] = {}
    for e in kinds.eqns:
        at = max((level.get(v, 0) for v in variables(e.invars)), default=0)
        out = e.outvars[0]
        is_sigmoid = e.primitive.name == "logistic" and kinds.is_late(out) and out.aval.ndim == 1
        level.update((v, at + is_sigmoid) for v in e.outvars)
        order.setdefault((at, is_sigmoid), []).append(e)
    sliced = {v: (r.invars[0], start) for r in kinds.eqns if _slices_rows(r) for start, v in _starts(r)}
    rules: dict[int, Rule] = {}
    for (_, is_sigmoid), members in order.items():
        together: dict[Any, list[Eqn]] = {}
        for e in members if is_sigmoid else ():
            whole, _ = sliced.get(e.invars[0], (None, 0))
            together.setdefault((whole, e.outvars[0].aval.dtype), []).append(e)
        for (whole, _), same in together.items():
            if len(same) > 1:
                starts = None if whole is None else [sliced[e.invars[0]][1] for e in same]
                if starts is not None and _overlap(starts, same):
                    continue
                rules[id(same[0])] = _one_sigmoid(same, whole, starts)
                rules |= {id(e): lambda env, read: None for e in same[1:]}
    return retrace(closed, [e for key in sorted(order) for e in order[key]], rules) if rules else closed


def _overlap(starts: list[int], same: list[Eqn]) -> bool:
    ends = sorted((start, start + e.outvars[0].aval.shape[0]) for start, e in zip(starts, same, strict=True))
    return any(start < stop for (_, stop), (start, _) in itertools.pairwise(ends))


def _one_sigmoid(same: list[Eqn], whole: Any, starts: list[int] | None) -> Rule:
    """Sigmoids of slices of one vector as slices of its sigmoid; of other vectors, over these side by side."""
    outs = [e.outvars[0] for e in same]
    sizes = [out.aval.shape[0] for out in outs]

    def run(env: dict[Any, Any], read: Read) -> None:
        if starts is None:
            parts = _split(lax.logistic(_concatenated([read(e.invars[0]) for e in same])), sizes)
        else:
            sigma = lax.logistic(read(whole))
            ends = [start + size for start, size in zip(starts, sizes, strict=True)]
            bounds = sorted({0, *starts, *ends, sigma.shape[0]})
            pieces = dict(zip(bounds, _split(sigma, [b - a for a, b in itertools.pairwise(bounds)]), strict=False))
            parts = [pieces[start] for start in starts]
        env.update(zip(outs, parts, strict=True))

    return run


def _concatenated(parts: Iterable[Any]) -> Any:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _split(whole: Any, sizes: list[int]) -> list[Any]:
    return [whole] if len(sizes) == 1 else list(lax.split(whole, sizes))
