"""Which loops the compiled kernel runs, whoever wrote the cell.

It has loops of its own for some formulas, which are faster for small networks and save gates. It runs every other step
that acts unit by unit as instructions (`unit_kernel`).

`seqjax.sequence._partition.units` reads the formulas from the program of the step. So the names, the order of the
gates, the order of the state and the layout of the weights do not matter, and a kernel cannot run a cell with other
mathematics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.extend.core import Literal

from seqjax import kernels
from seqjax.sequence._execution.instructions import NoKernel
from seqjax.sequence._execution.kernel import DTYPES, Kernel, Roles
from seqjax.sequence._execution.unit_kernel import UnitKernel
from seqjax.sequence._partition.units import RELU, Formula, NotUnitwise, Symbol, Terms, Units, constant

if TYPE_CHECKING:
    from seqjax.sequence._partition.parts import Parts
else:
    Parts = Any


class Step(NamedTuple):
    """The formulas of one step.

    Attributes:
        operand: the state that the product reads.
        new_state: the new state.
        output: h where a step is valid, and zero elsewhere.
    """

    operand: Formula
    new_state: list[Formula]
    output: Formula | None


def _lstm(terms: Terms, state: list[Formula], after: Callable[[int, Formula], Formula]) -> list[Formula]:
    """The new h and c, with the gates in the order i, f, g, o."""
    i, f, g, o = (terms.add(terms.symbol("drive", k), terms.symbol("cut", k)) for k in range(4))
    forget = terms.multiply(_sigmoid(terms, f), state[1])
    c = terms.add(forget, terms.multiply(_sigmoid(terms, i), _tanh(terms, g)))
    return [terms.multiply(_sigmoid(terms, o), _tanh(terms, after(1, c))), c]


def _gru(terms: Terms, state: list[Formula], after: Callable[[int, Formula], Formula]) -> list[Formula]:
    """The new h, with the gates in the order r, z, n, and r applied after the product."""
    d, u = ([terms.symbol(kind, k) for k in range(3)] for kind in ("drive", "cut"))
    r, z = (_sigmoid(terms, terms.add(d[k], u[k])) for k in range(2))
    n = _tanh(terms, terms.add(d[2], terms.multiply(r, u[2])))
    one_minus_z = terms.add(constant(1.0), terms.multiply(constant(-1.0), z))
    return [terms.add(terms.multiply(one_minus_z, n), terms.multiply(z, state[0]))]


def _vanilla(terms: Terms, state: list[Formula], after: Callable[[int, Formula], Formula]) -> list[Formula]:
    """The new h."""
    return [_tanh(terms, *_identity(terms, state, after))]


def _relu(terms: Terms, state: list[Formula], after: Callable[[int, Formula], Formula]) -> list[Formula]:
    """The new h."""
    return [terms.function(RELU, *_identity(terms, state, after))]


def _identity(terms: Terms, state: list[Formula], after: Callable[[int, Formula], Formula]) -> list[Formula]:
    """The new h."""
    return [terms.add(terms.symbol("drive", 0), terms.symbol("cut", 0))]


def _sigmoid(terms: Terms, a: Formula) -> Formula:
    return terms.function(("logistic", ""), a)


def _tanh(terms: Terms, a: Formula) -> Formula:
    return terms.function(("tanh", ""), a)


def _select(terms: Terms, condition: Formula, yes: Formula, no: Formula) -> Formula:
    return terms.function(SELECT, condition, no, yes)


def _step(terms: Terms, cell: Callable[..., list[Formula]], roles: Roles, zero: int | None) -> Step:
    """The formulas of a step of a kernel with its mask and reset, for a hoisted value that is zero."""
    state = [terms.symbol("state", k) for k in range(len(roles.states))]
    if roles.reset is not None:
        anew = terms.symbol("reset")
        state = [
            _select(terms, anew, terms.symbol("parameter", j), s) for j, s in zip(roles.initial, state, strict=True)
        ]
    if roles.valid is None:
        return Step(state[0], cell(terms, state, lambda k, _: terms.symbol("after", k)), None)
    valid = terms.symbol("valid")
    new = cell(terms, state, lambda _, formula: formula)
    held = [_select(terms, valid, a, b) for a, b in zip(new, state, strict=True)]
    return Step(
        state[0], held, None if zero is None else _select(terms, valid, new[0], terms.symbol("parameter", zero))
    )


# The numbers of gates and of leaves of the state, and the formulas of the new state.
FORMULAS = {"lstm": (4, 2, _lstm), "gru": (3, 1, _gru), "vanilla": (1, 1, _vanilla), "relu": (1, 1, _relu),
            "identity": (1, 1, _identity)}  # fmt: skip
SELECT = ("select_n", "[]")  # the primitive and its options


def kernel_for(parts: Parts) -> Kernel | UnitKernel | None:
    """The kernel that runs a loop; None if none supports it, or if the kernel is not available."""
    try:
        return supported_kernel(parts) if kernels.available() else None
    except NoKernel:
        return None


def supported_kernel(parts: Parts) -> Kernel | UnitKernel:
    """The kernel whose formulas are those of a loop, or the one that runs any step that acts unit by unit.

    Raises:
        NoKernel: none supports the loop.
    """
    return _named_kernel(parts) or UnitKernel.of(parts)


def _named_kernel(parts: Parts) -> Kernel | None:
    """The kernel whose formulas are those of a loop, if its arrays are all float32 or all float64."""
    if len(parts.cuts) != 1:
        return None
    (cut,) = parts.cuts
    flags = [k for k, v in enumerate(parts.drives) if v.aval.dtype == bool and v.aval.ndim == 0]
    drives = [v for k, v in enumerate(parts.drives) if k not in flags]
    values = [v for v, read in zip(parts.hoisted, parts.read_in_loop, strict=True) if read]
    biases = [b for _, b in parts.biases.values()]
    arrays = [*parts.state, *drives, *biases, *values, cut.weights, cut.out]
    dtypes = {v.aval.dtype for v in arrays}
    if len(flags) > 2 or len(dtypes) > 1 or not dtypes <= DTYPES or cut.weights.aval.ndim != 2:
        return None
    try:
        units = Units(parts, Terms())
    except NotUnitwise:
        return None
    n, gates = units.size, cut.out.aval.size // units.size
    blocks = _drives_by_block(units)
    if cut.weights.aval.shape != (gates * n, n) or len(units.operands[0]) != 1 or set(blocks) != set(range(gates)):
        return None
    reset, initial = _reset(units, flags)
    valid = next((k for k in flags if k != reset), None)
    # At most 2 * 4! comparisons of short formulas.
    for name, (count, leaves, formulas) in FORMULAS.items():
        if (count, leaves) != (gates, len(parts.state)) or (reset is not None and len(initial) != leaves):
            continue
        for states, order in itertools.product(*(itertools.permutations(range(size)) for size in (leaves, gates))):
            roles = Roles(states, order, valid, reset, tuple(initial[k] for k in states) if initial else ())
            outputs = _matched_outputs(parts, formulas, roles, blocks)
            if outputs is not None:
                biases = [parts.hoisted.index(parts.biases[v][1]) if v in parts.biases else None for v in parts.drives]
                lookup = _lookup(parts, [blocks[block] for block in range(gates)])
                drives_of_gates = tuple(blocks[block] for block in order)
                return Kernel(name, n, dtypes.pop(), roles, drives_of_gates, tuple(biases), lookup, outputs)
    return None


def _lookup(parts: Parts, blocks: list[tuple[int, int]]) -> tuple[Any, int] | None:
    """`Kernel.lookup`, from the drive and its block for each block of the cut."""
    drive = parts.drives[blocks[0][0]]
    is_one = blocks == [(blocks[0][0], k) for k in range(len(blocks))]
    if not is_one or drive not in parts.lookups or drive in parts.biases:
        return None
    return drive, parts.hoisted.index(parts.lookups[drive][0])


def _reset(units: Units, flags: list[int]) -> tuple[int | None, dict[int, int]]:
    """The drive that is a reset, and for each leaf of the state the hoisted value that it sets; None without one.

    A leaf s is reset if the step reads select(flag, value, s).
    """
    found, initial = None, {}
    for eqn, args in filter(None, units.terms.calls):
        if eqn is not None and eqn.primitive.name == "select_n":
            match [_symbol(units.terms, arg) for arg in args]:
                case [("drive", k), ("state", leaf), ("parameter", j, 0)] if k in flags:
                    found, initial[leaf] = k, j
    return found, initial


def _symbol(terms: Terms, formula: Formula) -> Symbol | None:
    """The name of a formula that is one symbol."""
    match formula:
        case (((term,), 1.0),):
            return terms.names[term]
    return None


def _matched_outputs(
    parts: Parts,
    cell: Callable[..., list[Formula]],
    roles: Roles,
    drives: dict[int, tuple[int, int]],
) -> tuple[tuple[int, bool], ...] | None:
    """`Kernel.outputs` if a loop has the formulas of a kernel with these roles; None if it has others."""
    names: dict[Symbol, Symbol] = {
        (kind, leaf): (kind, k) for k, leaf in enumerate(roles.states) for kind in ("state", "after")
    }
    for gate, block in enumerate(roles.blocks):
        names[("cut", 0, block)] = ("cut", gate)
        names[("drive", *drives[block])] = ("drive", gate)
    names |= {("drive", k): (name,) for name, k in (("valid", roles.valid), ("reset", roles.reset)) if k is not None}
    zeros = _zeros(parts)
    zero = next((j for j, v in enumerate(parts.hoisted) if v in zeros and parts.read_in_loop[j]), None)
    names |= {("parameter", j, 0): ("parameter", j) for j in {*roles.initial, *([] if zero is None else [zero])}}
    # The kernel's formulas come first, because the numbers of the terms, and so their order, must be the same in both.
    terms = Terms()
    step = _step(terms, cell, roles, zero)
    units = Units(parts, terms, lambda name: names.get(name, ("other", *name)))
    if [units.new_state[k] for k in roles.states] != step.new_state or units.operands[0] != [step.operand]:
        return None
    outputs = []
    for v, formula in zip(parts.outputs, units.outputs, strict=True):
        if v in parts.new_state:
            outputs.append((parts.new_state.index(v), False))
        elif step.output is not None and formula == [step.output]:
            outputs.append((roles.states[0], True))
        else:
            return None
    return tuple(outputs)


def _zeros(parts: Parts) -> set[Any]:
    """The hoisted vectors that are zero whatever the parameters are."""
    filled = [e for e in parts.once if e.primitive.name == "broadcast_in_dim" and isinstance(e.invars[0], Literal)]
    return {e.outvars[0] for e in filled if e.invars[0].val == 0}


def _drives_by_block(units: Units) -> dict[int, tuple[int, int]]:
    """For each block of the cut, the drive that it is added to: its index and its block."""
    terms = units.terms
    found: dict[int, tuple[int, int]] = {}
    for formula in [*terms.formulas, *units.new_state]:
        names: list[Symbol] = [terms.names[term] or () for monomial, _ in formula for term in monomial]
        cuts = [name for name in names if name[:1] == ("cut",)]
        summands: list[Symbol] = [terms.names[m[0]] or () for m, factor in formula if len(m) == 1 and factor == 1.0]
        drives = [name for name in summands if name[:1] == ("drive",) and len(name) == 3]
        if len(cuts) == len(drives) == 1:
            found[cuts[0][2]] = (drives[0][1], drives[0][2])
    return found
