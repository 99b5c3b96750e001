"""The loops of a step: leaves of the state that depend on each other form one loop, and the others loops of their own.

A group of leaves that no later one feeds back into runs over all of time before the next group begins. So a stack
runs layer by layer, whoever built it, and a product that only outputs read leaves the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal

from seqjax.sequence._partition.parts import CUTS
from seqjax.sequence._partition.program import Eqn, needed, reach, variables


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One loop of a step.

    Attributes:
        program: (params.., state.., inputs..) -> (state.., outputs..).
        leaves: which leaves of the state it carries; none for what needs no loop, which is the last stage.
        inputs, outputs: variables of the whole step; an output of a stage is an input of later ones.
    """

    program: ClosedJaxpr
    leaves: tuple[int, ...]
    inputs: list[Any]
    outputs: list[Any]


def stages(closed: ClosedJaxpr, params: int, state: int) -> list[Stage]:
    """The loops of an inlined step, (params.., state.., x..) -> (after.., kept..), in an order in which they can run.

    Args:
        closed: the program.
        params: the number of its leaves of parameters.
        state: the number of its leaves of the state.

    Returns:
        The stages. The outputs of the last one are what is kept of the step.
    """
    jaxpr = closed.jaxpr
    ins = jaxpr.invars
    leaves, x = ins[params : params + state], ins[params + state :]
    after, kept = jaxpr.outvars[:state], jaxpr.outvars[state:]
    eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
    from_steps = reach(eqns, [*leaves, *x])
    fixed = {v for e in eqns for v in e.outvars if v not in from_steps}  # may be computed by every stage that reads it
    groups = [*_groups(eqns, leaves, after), ()]
    contents: list[list[Eqn]] = []
    done: set[int] = set()
    for place, group in enumerate(groups):
        left = [e for e in eqns if id(e) not in done]
        core, _ = needed(left, [after[i] for i in group] if group else kept)
        if group:
            later = [leaves[i] for other in groups[place + 1 :] for i in other]
            core = _with_outputs(eqns, left, core, [leaves[i] for i in group], later)
        contents.append(core)
        done |= {id(e) for e in core if not fixed.issuperset(e.outvars)}
    return _as_programs(closed, params, groups, contents, fixed, leaves, x, after, kept)


def _groups(eqns: Sequence[Eqn], leaves: Sequence[Any], after: Sequence[Any]) -> list[tuple[int, ...]]:
    """The strongly connected groups of leaves, in an order in which each reads earlier ones only."""
    n = len(leaves)
    feeds = [[not isinstance(a, Literal) and a in found for a in after] for found in (reach(eqns, [s]) for s in leaves)]
    for k in range(n):  # the transitive closure
        feeds = [[feeds[i][j] or (feeds[i][k] and feeds[k][j]) for j in range(n)] for i in range(n)]
    groups = {tuple(j for j in range(n) if j == i or (feeds[i][j] and feeds[j][i])) for i in range(n)}
    return sorted(groups, key=lambda g: (sum(any(feeds[i][j] for j in g) and i not in g for i in range(n)), g))


def _with_outputs(eqns: Sequence[Eqn], left: list[Eqn], core: list[Eqn], own: list[Any], later: list[Any]) -> list[Eqn]:
    """The equations of a loop and those that only outputs read of its leaves, if they are behind no product."""
    from_own, has = reach(eqns, own), set(map(id, core))
    candidates = [e for e in left if id(e) not in has and not from_own.isdisjoint(e.outvars)]
    products = [v for e in candidates if e.primitive.name in CUTS for v in e.outvars]
    outside = reach(eqns, [*products, *later])
    has |= {id(e) for e in candidates if outside.isdisjoint(e.outvars)}
    return needed(left, [v for e in eqns if id(e) in has for v in e.outvars])[0]


def _as_programs(
    closed: ClosedJaxpr,
    params: int,
    groups: list[tuple[int, ...]],
    contents: list[list[Eqn]],
    fixed: set[Any],
    leaves: Sequence[Any],
    x: Sequence[Any],
    after: Sequence[Any],
    kept: Sequence[Any],
) -> list[Stage]:
    made_in = {v: k for k, core in reversed([*enumerate(contents)]) for e in core for v in e.outvars if v not in fixed}
    made_in |= {leaves[i]: k for k, group in enumerate(groups) for i in group}
    reads = [
        set(variables([*(v for e in core for v in e.invars), *(after[i] for i in group)]))
        for group, core in zip(groups, contents, strict=True)
    ]
    reads[-1] |= set(variables(kept))
    found = []
    for k, (group, core) in enumerate(zip(groups, contents, strict=True)):
        inputs = [*x, *(v for v in made_in if v in reads[k] and made_in[v] < k)]
        outputs = [v for v in made_in if made_in[v] == k and any(v in r for r in reads[k + 1 :])] if group else [*kept]
        program = closed.jaxpr.replace(
            invars=[*closed.jaxpr.invars[:params], *(leaves[i] for i in group), *inputs],
            outvars=[*(after[i] for i in group), *outputs],
            eqns=core,
        )
        found.append(Stage(ClosedJaxpr(program, closed.consts), group, inputs, outputs))
    return found
