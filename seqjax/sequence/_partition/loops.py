"""The loops of a step: leaves of the state that depend on each other form one loop, and the others loops of their own.

If no later leaf feeds back into a group of leaves, the group runs over all of time before the next group begins. So a
stack runs layer by layer, whoever built it, and a product that only outputs read leaves the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Literal

from seqjax.sequence._partition.program import PRODUCTS, Atom, Eqn, Var, dependents, needed, variables


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A part of the step that runs over all of time before the next one: a loop over some leaves of the state.

    The last stage is what needs no loop.

    Attributes:
        program: (params.., state.., inputs..) -> (new_state.., outputs..).
        leaves: the indices of the leaves of the state that the loop carries; none for the last stage.
        inputs, outputs: variables of the whole step. An output of a stage is an input of later ones.
    """

    program: ClosedJaxpr
    leaves: tuple[int, ...]
    inputs: list[Any]
    outputs: list[Any]


class _Step(NamedTuple):
    """The inlined program of a whole step and its variables.

    Attributes:
        program: (params.., state.., x..) -> (new_state.., outputs..).
        n_params: the number of leaves of the parameters.
        state, x, new_state, outputs: the variables.
        fixed: the variables that no state and no input reaches. Every stage that reads one computes it itself.
    """

    program: ClosedJaxpr
    n_params: int
    state: Sequence[Var]
    x: Sequence[Var]
    new_state: Sequence[Atom]
    outputs: Sequence[Atom]
    fixed: set[Var]


def stages(program: ClosedJaxpr, n_params: int, n_state: int) -> list[Stage]:
    """Divides an inlined step into loops.

    Args:
        program: (params.., state.., x..) -> (new_state.., outputs..).
        n_params: the number of its leaves of parameters.
        n_state: the number of its leaves of the state.

    Returns:
        The stages in an order in which they can run. The outputs of the last one are those of the step.
    """
    jaxpr = program.jaxpr
    leaves, x = jaxpr.invars[n_params : n_params + n_state], jaxpr.invars[n_params + n_state :]
    new_state, outputs = jaxpr.outvars[:n_state], jaxpr.outvars[n_state:]
    eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
    from_state_or_x = dependents(eqns, [*leaves, *x])
    fixed = {v for e in eqns for v in e.outvars if v not in from_state_or_x}
    step = _Step(program, n_params, leaves, x, new_state, outputs, fixed)
    groups = [*_groups(eqns, leaves, new_state), ()]
    return _programs(step, groups, _divide(step, eqns, groups))


def _divide(step: _Step, eqns: Sequence[Eqn], groups: list[tuple[int, ...]]) -> list[list[Eqn]]:
    """The equations of each stage."""
    found: list[list[Eqn]] = []
    done: set[int] = set()
    for position, group in enumerate(groups):
        left = [e for e in eqns if id(e) not in done]
        own, _ = needed(left, [step.new_state[i] for i in group] if group else step.outputs)
        if group:
            later = [step.state[i] for other in groups[position + 1 :] for i in other]
            own = _with_outputs(eqns, left, own, [step.state[i] for i in group], later)
        found.append(own)
        # Fixed values do not pass from stage to stage, because the inputs of a stage have a time axis.
        done |= {id(e) for e in own if not step.fixed.issuperset(e.outvars)}
    return found


def _groups(eqns: Sequence[Eqn], leaves: Sequence[Var], new_state: Sequence[Atom]) -> list[tuple[int, ...]]:
    """The strongly connected groups of leaves, in an order in which each reads earlier ones only."""
    n = len(leaves)
    reached = [dependents(eqns, [leaf]) for leaf in leaves]
    feeds = [[not isinstance(v, Literal) and v in found for v in new_state] for found in reached]
    for k in range(n):  # the transitive closure, by Warshall's algorithm
        feeds = [[feeds[i][j] or (feeds[i][k] and feeds[k][j]) for j in range(n)] for i in range(n)]
    groups = {tuple(j for j in range(n) if j == i or (feeds[i][j] and feeds[j][i])) for i in range(n)}
    # In a transitive closure a group has more predecessors than each group that feeds it.
    return sorted(groups, key=lambda g: (sum(any(feeds[i][j] for j in g) and i not in g for i in range(n)), g))


def _with_outputs(
    eqns: Sequence[Eqn], left: list[Eqn], own: list[Eqn], leaves: list[Var], later: list[Var]
) -> list[Eqn]:
    """The equations of a loop, and those that only outputs read of its leaves, if no product lies before them.

    An elementwise output such as h = o tanh(c) is cheap in the loop. After the loop it would have to read o and c of
    every step from memory. A product is faster after the loop, for all steps at once.
    """
    from_leaves, selected = dependents(eqns, leaves), set(map(id, own))
    candidates = [e for e in left if id(e) not in selected and not from_leaves.isdisjoint(e.outvars)]
    products = [v for e in candidates if e.primitive.name in PRODUCTS for v in e.outvars]
    outside = dependents(eqns, [*products, *later])
    selected |= {id(e) for e in candidates if outside.isdisjoint(e.outvars)}
    return needed(left, [v for e in eqns if id(e) in selected for v in e.outvars])[0]


def _programs(step: _Step, groups: list[tuple[int, ...]], eqns: list[list[Eqn]]) -> list[Stage]:
    """The stages from the leaves and the equations of each."""
    stage_of = {v: k for k, own in reversed([*enumerate(eqns)]) for e in own for v in e.outvars if v not in step.fixed}
    stage_of |= {step.state[i]: k for k, group in enumerate(groups) for i in group}
    reads = [
        set(variables([*(v for e in own for v in e.invars), *(step.new_state[i] for i in group)]))
        for group, own in zip(groups, eqns, strict=True)
    ]
    reads[-1] |= set(variables(step.outputs))
    found = []
    for k, (group, own) in enumerate(zip(groups, eqns, strict=True)):
        inputs = [*step.x, *(v for v in stage_of if v in reads[k] and stage_of[v] < k)]
        later = [v for v in stage_of if stage_of[v] == k and any(v in r for r in reads[k + 1 :])]
        outputs = later if group else [*step.outputs]
        program = step.program.jaxpr.replace(
            invars=[*step.program.jaxpr.invars[: step.n_params], *(step.state[i] for i in group), *inputs],
            outvars=[*(step.new_state[i] for i in group), *outputs],
            eqns=own,
        )
        found.append(Stage(ClosedJaxpr(program, step.program.consts), group, inputs, outputs))
    return found
