"""Rewrites of the program of a step: the same function in the form that runs fast and that the partition recognizes.

1. Equal equations are computed once.
2. The product of a concatenation of input and state becomes a sum of products, W [x, h] -> W_x x + W_h h.
3. Parameters and numbers that are added to a slice of a product or of a sum are added to the whole vector.
4. Sums are regrouped, (W h + U x) + b -> W h + (U x + b), so that everything that needs no state leaves the loop.
5. Products of the same vector become one product, with the matrices stacked as (out, in).
6. Sums of slices become slices of one sum.

Regrouping changes the rounding of a sum in its last digit, so only float32 and float64 sums are regrouped.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params
from jax.typing import ArrayLike

from seqjax.sequence._partition.program import (
    Atom,
    Dependencies,
    Env,
    Eqn,
    Read,
    Rule,
    Var,
    bind,
    can_regroup,
    concatenated,
    contracted_axis,
    copy_value,
    inexact,
    is_product,
    is_slice,
    overlap,
    retrace,
    skip,
    split,
    starts_of_slices,
)


def normalized(program: ClosedJaxpr, n_params: int, n_state: int) -> ClosedJaxpr:
    """The normal form of the program of one loop, (params.., state.., x..) -> (new_state.., outputs..).

    Args:
        program: the inlined program.
        n_params: the number of its leaves of parameters.
        n_state: the number of its leaves of the state.
    """
    # The order matters. Products of concatenations must be split before products of the same vector are merged. Biases
    # of slices must be biases of whole vectors before sums are regrouped and products are merged.
    rewrites = [
        share_equal, split_concatenated, _add_before_slicing, _regroup_sums, _merge_products, _add_whole_vectors
    ]  # fmt: skip
    for rewrite in rewrites:
        program = rewrite(program, Dependencies(program, n_params, n_state))
    return program


def share_equal(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    """Computes equal equations once."""
    first: dict[Any, Eqn] = {}
    equal: dict[Var, Var] = {}  # a result -> the equal result of an earlier equation
    rules: dict[int, Rule] = {}
    for e in depends.eqns:
        # An effect must run every time, and the text of a program inside an equation does not identify it.
        if e.effects or list(jaxprs_in_params(e.params)):
            continue
        operands: list[Any] = [
            (np.asarray(v.val).tobytes(), str(v.aval)) if isinstance(v, Literal) else equal.get(v, v) for v in e.invars
        ]
        earlier = first.setdefault((e.primitive.name, str(e.params), *operands), e)
        if earlier is not e:
            equal.update(zip(e.outvars, earlier.outvars, strict=True))
            rules[id(e)] = _copy_results(earlier, e)
    return retrace(program, depends.eqns, rules) if rules else program


def _copy_results(earlier: Eqn, e: Eqn) -> Rule:
    def run(env: Env, read: Read) -> None:
        env.update((b, env[a]) for a, b in zip(earlier.outvars, e.outvars, strict=True) if a in env)

    return run


def split_concatenated(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    """Writes the product of W with a concatenation of state and input as a sum of products with parts of W."""
    concatenations = {e.outvars[0]: e for e in depends.eqns if e.primitive.name == "concatenate"}
    rules: dict[int, Rule] = {}
    for e in depends.eqns:
        if not is_product(e, 1, 2) or not depends.only_on_params(e.invars[1]) or e.invars[0] not in concatenations:
            continue
        parts = list(concatenations[e.invars[0]].invars)
        on_state = list(map(depends.on_state, parts))
        if can_regroup(e.outvars[0]) and any(on_state) and not all(on_state):
            rules[id(e)] = _sum_of_products(e, parts, on_state)
    return retrace(program, depends.eqns, rules) if rules else program


def _sum_of_products(e: Eqn, parts: list[Atom], on_state: list[bool]) -> Rule:
    """One product for each run of neighbouring parts that all depend on the state, or all do not; and their sum."""
    ends = [0, *itertools.accumulate(v.aval.shape[0] for v in parts)]
    groups = [list(group) for _, group in itertools.groupby(range(len(parts)), lambda i: on_state[i])]

    def run(env: Env, read: Read) -> None:
        W, products = read(e.invars[1]), []
        for group in groups:
            rows = lax.slice_in_dim(W, ends[group[0]], ends[group[-1] + 1], axis=contracted_axis(e, 1))
            products.append(e.primitive.bind(concatenated(read(parts[i]) for i in group), rows, **e.params))
        env[e.outvars[0]] = sum(products[1:], products[0])

    return run


def _regroup_sums(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    sums: dict[Var, tuple[Any, Any]] = {}  # a sum -> the terms that depend on the state, and the other terms

    def is_sum(e: Eqn) -> bool:
        out = e.outvars[0]
        if e.primitive.name != "add" or not depends.on_state(out) or not can_regroup(out):
            return False
        return all(v.aval.shape == out.aval.shape for v in e.invars)

    def rule(e: Eqn) -> Rule:
        def terms(v: Atom, read: Read) -> tuple[Any, Any]:
            if not depends.on_state(v):
                return None, read(v)
            # A sum that something else reads too must exist as it is, so regrouping it would add a second sum.
            return sums[v] if v in sums and depends.only_reader(v) is e else (read(v), None)

        def run(env: Env, read: Read) -> None:
            (late, early), (more_late, more_early) = (terms(v, read) for v in e.invars)
            late, early = _add(late, more_late), _add(early, more_early)
            sums[e.outvars[0]] = late, early
            env[e.outvars[0]] = _add(late, early)

        return run

    return retrace(program, depends.eqns, {id(e): rule(e) for e in depends.eqns if is_sum(e)})


def _add(a: ArrayLike | None, b: ArrayLike | None) -> ArrayLike | None:
    return b if a is None else a if b is None else lax.add(a, b)


def _add_before_slicing(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    rules: dict[int, Rule] = {}
    for e in depends.eqns:
        if not _is_vector_of_gates(e, depends):
            continue
        slices = depends.readers.get(e.outvars[0], [])
        if not slices or any(r is None or not is_slice(r) for r in slices):
            continue
        added: list[Any] = [
            (start, v, *found)
            for r in slices
            for start, v in starts_of_slices(r)
            if (found := depends.added_params(v) or depends.added_number(v)) is not None
        ]
        if not added or overlap((start, start + v.aval.shape[0]) for start, v, *_ in added):
            continue
        rules[id(e)] = _add_padded(e, added)
        rules |= {id(adds): copy_value(v, adds) for _, v, adds, _ in added}
    return retrace(program, depends.in_params_first_order(), rules) if rules else program


def _is_vector_of_gates(e: Eqn, depends: Dependencies) -> bool:
    """Whether an equation is a product with parameters, or a sum, that depends on the state."""
    out = e.outvars[0]
    if not depends.on_state(out):
        return False
    if is_product(e, 1, 2):
        return depends.only_on_params(e.invars[1])
    return e.primitive.name == "add" and out.aval.ndim == 1 and can_regroup(out)


def _add_padded(e: Eqn, added: list[tuple[int, Var, Eqn, Atom]]) -> Rule:
    """Adds one vector to the result of an equation: what is added to each of its slices, and zeros elsewhere."""

    def run(env: Env, read: Read) -> None:
        result = bind(e, list(map(read, e.invars)))[0]
        whole = jnp.zeros(result.shape, result.dtype)
        for start, v, _, b in added:
            block = jnp.broadcast_to(jnp.asarray(read(b), result.dtype), v.aval.shape)
            whole = lax.dynamic_update_slice(whole, block, (start,))
        env[e.outvars[0]] = result + whole

    return run


def _merge_products(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    groups: dict[Any, list[Eqn]] = {}  # (vector, options of the product) -> its products
    for e in depends.eqns:
        if not is_product(e, 1, 2) or depends.only_on_params(e.invars[0]) or not depends.only_on_params(e.invars[1]):
            continue
        v, W = e.invars
        if isinstance(v, Literal) or not inexact(v.aval):
            continue
        options = str((e.params["precision"], e.params["preferred_element_type"], W.aval.dtype))
        groups.setdefault((v, options), []).append(e)

    rules: dict[int, Rule] = {}
    for products in groups.values():
        # A bias that is added to a product becomes part of the bias of the merged product. A product that is not merged
        # keeps its own addition, and is rewritten only so that its matrix is (out, in).
        biases = [depends.added_params(e.outvars[0]) if len(products) > 1 else None for e in products]
        rules[id(products[0])] = _one_product(products, biases)
        replaced = [*products[1:], *(bias[0] for bias in biases if bias)]
        rules |= {id(e): skip for e in replaced}
    return retrace(program, depends.in_params_first_order(), rules)


def _one_product(products: list[Eqn], biases: list[tuple[Eqn, Var] | None]) -> Rule:
    """Products of one vector, and their biases, as slices of one product with the stacked matrices."""
    outs = [e.outvars[0] for e in products]
    results = [bias[0].outvars[0] if bias else out for bias, out in zip(biases, outs, strict=True)]
    options = {name: products[0].params[name] for name in ("precision", "preferred_element_type")}

    def run(env: Env, read: Read) -> None:
        matrices = [read(e.invars[1]) if contracted_axis(e, 1) == 1 else read(e.invars[1]).T for e in products]
        v = read(products[0].invars[0])
        product = lax.dot_general(v, concatenated(matrices), (((0,), (1,)), ((), ())), **options)
        if any(biases):
            zeros = [jnp.zeros(out.aval.shape, out.aval.dtype) for out in outs]
            added = [zero if bias is None else read(bias[1]) for zero, bias in zip(zeros, biases, strict=True)]
            product = product + concatenated(added)
        env.update(zip(results, split(product, [out.aval.shape[0] for out in outs]), strict=True))

    return run


def _add_whole_vectors(program: ClosedJaxpr, depends: Dependencies) -> ClosedJaxpr:
    """Sums of slices of two vectors become slices of the sum of the vectors, if the slices cover them."""
    slices = depends.slices()
    groups: dict[tuple[Var, Var], list[tuple[int, Eqn]]] = {}  # two vectors -> the sums of their slices, with the start
    for e in depends.eqns:
        if e.primitive.name != "add" or e.outvars[0].aval.ndim != 1:
            continue
        (u, a), (w, b) = (slices.get(v, (None, -1)) if not isinstance(v, Literal) else (None, -1) for v in e.invars)
        if u is not None and w is not None and u is not w and a == b and u.aval.shape == w.aval.shape:
            groups.setdefault((u, w), []).append((a, e))
    rules: dict[int, Rule] = {}
    for (u, w), members in groups.items():
        # The rule stands at the first sum in the order of the program, where both vectors are known.
        first = members[0][1]
        members.sort(key=lambda member: member[0])
        sizes = [e.outvars[0].aval.shape[0] for _, e in members]
        starts = [start for start, _ in members]
        if len(members) > 1 and starts == [*itertools.accumulate([0, *sizes[:-1]])] and sum(sizes) == u.aval.shape[0]:
            rules |= {id(e): skip for _, e in members} | {id(first): _sum_of_vectors(u, w, [e for _, e in members])}
    return retrace(program, depends.eqns, rules) if rules else program


def _sum_of_vectors(u: Var, w: Var, sums: list[Eqn]) -> Rule:
    outs = [e.outvars[0] for e in sums]

    def run(env: Env, read: Read) -> None:
        total = lax.add(read(u), read(w))
        env.update(zip(outs, split(total, [out.aval.shape[0] for out in outs]), strict=True))

    return run
