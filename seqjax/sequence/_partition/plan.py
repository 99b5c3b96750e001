"""The partition of a cell's masked step: its program is divided into loops, and each loop into parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from seqjax.sequence._partition.loops import Stage, stages
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.program import inline, source_line

if TYPE_CHECKING:  # only annotations need it
    from seqjax.sequence._partition.tracing import Traced
else:
    Traced = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a step is unrolled.

    Attributes:
        x: the variables of the inputs of the whole step.
        stages: the loops of the step.
        parts: the parts of each loop.
        new_state, outputs: the tree structures of the new state and of what a step emits.
        use_kernel: whether the compiled kernel may run a loop that it supports.
        saves_gates: whether loops may save the gates of every step, or their products, for the backward pass.
    """

    x: list[Any]
    stages: list[Stage]
    parts: list[Parts]
    new_state: Any
    outputs: Any
    use_kernel: bool
    saves_gates: bool


@dataclasses.dataclass(frozen=True)
class NoPlan:
    """Why a step runs as a plain scan."""

    reason: str


def plan_of(traced: Traced, use_kernel: bool, saves_gates: bool = False, steps: int = 0) -> Plan | NoPlan:
    """Divides the program of a step into loops and parts. A step that cannot be divided runs as a plain scan.

    Args:
        traced: the masked step.
        use_kernel: whether the compiled kernel may run a loop that it supports.
        saves_gates: whether loops may save the gates of every step, or their products, for the backward pass.
        steps: batch times time; 0 if it is unknown.
    """
    # Parts run for a whole chunk, or not at all if nothing reads them. A side effect must run once per step.
    effects = traced.program.effects
    if effects:
        line = next((source_line(e) for e in traced.program.jaxpr.eqns if e.effects), "")
        names = ", ".join(sorted({type(effect).__name__ for effect in effects}))
        return NoPlan(f"the step has side effects ({names}){line and ' at ' + line}, which run once per step")
    try:
        program = inline(traced.program)
        loops = stages(program, traced.n_params, traced.n_state)
        parts = [Parts(loop.program, traced.n_params, len(loop.leaves), steps=steps) for loop in loops]
    except Exception as error:  # noqa: BLE001 - jaxprs differ between releases of JAX, and a plain scan always works
        return NoPlan(f"the partition failed: {type(error).__name__}: {error}")
    x = list(program.jaxpr.invars[traced.n_params + traced.n_state :])
    return Plan(x, loops, parts, *traced.trees, use_kernel, saves_gates)
