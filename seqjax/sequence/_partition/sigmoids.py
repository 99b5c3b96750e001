"""Sigmoids, arranged so that XLA on a CPU computes them in vectors and not one number after the other.

It does for sigma of a whole array, and not for sigma of a slice. If only some slices of sigma(a) are needed, it falls
apart into sigmas of slices, unless these are concatenated first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from seqjax.sequence._partition.program import Eqn, Read, Rule, readers, retrace, variables
from seqjax.sequence._partition.rewriting import Kinds, concatenated, slices_rows, split, starts_of_slices


def slices_of_sigmoids(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    """Slices of sigma(a) as sigma of slices of a, so that `merge_sigmoids` decides what is computed together."""
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


def merge_sigmoids(closed: ClosedJaxpr, kinds: Kinds) -> ClosedJaxpr:
    """XLA on a CPU computes sigma of a slice one number after the other, and sigma of a whole array in vectors."""
    level: dict[Any, int] = {}  # of a variable: how many sigmoids in a row lead to it
    order: dict[tuple[int, bool], list[Eqn]] = {}
    for e in kinds.eqns:
        at = max((level.get(v, 0) for v in variables(e.invars)), default=0)
        out = e.outvars[0]
        is_sigmoid = e.primitive.name == "logistic" and kinds.is_late(out) and out.aval.ndim == 1
        level.update((v, at + is_sigmoid) for v in e.outvars)
        order.setdefault((at, is_sigmoid), []).append(e)
    sliced = {v: (r.invars[0], start) for r in kinds.eqns if slices_rows(r) for start, v in starts_of_slices(r)}
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
            parts = split(lax.logistic(concatenated([read(e.invars[0]) for e in same])), sizes)
        else:
            sigma = lax.logistic(read(whole))
            ends = [start + size for start, size in zip(starts, sizes, strict=True)]
            bounds = sorted({0, *starts, *ends, sigma.shape[0]})
            pieces = dict(zip(bounds, split(sigma, [b - a for a, b in itertools.pairwise(bounds)]), strict=False))
            parts = [pieces[start] for start in starts]
        env.update(zip(outs, parts, strict=True))

    return run


def rules_for_slices(eqns: Sequence[Eqn]) -> dict[int, Rule]:
    """Rules that compute sigma of a whole vector from the slices of it that are read.

    XLA on a CPU computes sigma of the whole in vectors, unless one of its slices is not needed, as the output gate is
    not where only states are rematerialized. Then sigma of the slices side by side is faster.
    """
    read_by, rules = readers(eqns, ()), {}
    for e in eqns:
        by = read_by.get(e.outvars[0], []) if e.primitive.name == "logistic" else []
        if len(by) == 1 and by[0].primitive.name == "split":
            ends = [int(end) for end in itertools.accumulate(by[0].params["sizes"])]
            ranges = [
                pair for pair, v in zip(itertools.pairwise([0, *ends]), by[0].outvars, strict=True) if v in read_by
            ]
            rules[id(e)] = _sigma_of_ranges(e, ranges)
    return rules


def _sigma_of_ranges(e: Eqn, ranges: list[tuple[int, int]]) -> Rule:
    def run(env: dict[Any, Any], read: Callable[[Any], Any]) -> None:
        a, out = read(e.invars[0]), e.outvars[0].aval
        sigma = lax.logistic(jnp.concatenate([a[start:stop] for start, stop in ranges]))
        parts, place = [], 0
        for start, stop in ranges:
            parts += [jnp.zeros(start - place, out.dtype), sigma[: stop - start]]
            sigma, place = sigma[stop - start :], stop
        env[e.outvars[0]] = jnp.concatenate([*parts, jnp.zeros(out.shape[0] - place, out.dtype)])

    return run
