"""Which loops the compiled kernel runs: those whose rest has the kernel's formulas, whoever wrote the cell.

`seqjax.sequence._partition.units` reads the formulas from the program of the step. So the names, the order of the
gates, the order of the state and the layout of the weights do not matter, and a kernel cannot run a cell with other
mathematics.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array

from seqjax import kernels
from seqjax.sequence._execution.chunks import Leaves
from seqjax.sequence._partition.units import Formula, NotUnitwise, Symbol, Terms, Units, constant

if TYPE_CHECKING:
    from seqjax.sequence._execution.backward import KnownSteps
    from seqjax.sequence._partition.parts import Hoisted, Parts
else:
    Hoisted = KnownSteps = Parts = Any


class Roles(NamedTuple):
    """Which part of a loop is what a kernel's formulas mean by it.

    Attributes:
        states: the leaf of the state that is h, and the leaf that is c if there is one.
        blocks: for each gate of the kernel, the block of the cut.
        valid, reset: the drive that is the mask, and the one that is the reset; None if there is none.
        initial: for each of `states`, the hoisted value that a reset sets; empty if there is no reset.
    """

    states: tuple[int, ...]
    blocks: tuple[int, ...]
    valid: int | None
    reset: int | None
    initial: tuple[int, ...]


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
    return [_tanh(terms, terms.add(terms.symbol("drive", 0), terms.symbol("cut", 0)))]


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
FORMULAS = {"lstm": (4, 2, _lstm), "gru": (3, 1, _gru), "vanilla": (1, 1, _vanilla)}
SELECT = ("select_n", "[]")  # the primitive and its options


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The compiled loops of one cell, and the order in which they read the cell's arrays.

    Attributes:
        name: the formulas, "lstm", "gru" or "vanilla".
        size: n, the number of units.
        roles: which leaf, block or value is what the kernel means by it.
        drives: for each gate of the kernel, the index of the drive and the block in it.
        outputs: for each output of a step, the leaf of the new state that it is, and whether it is zero where the step
            is masked.
    """

    name: str
    size: int
    roles: Roles
    drives: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, bool], ...]

    @property
    def gates(self) -> int:
        """The number of gates."""
        return len(self.roles.blocks)

    @property
    def runs_backward(self) -> bool:
        """Whether the backward loop is compiled too. It reads cotangents of the outputs only if these are h."""
        return all(leaf == self.roles.states[0] for leaf, _ in self.outputs)

    def forward(self, hoisted: Hoisted, state: Leaves, drives: Leaves, reverse: bool) -> tuple[Leaves, Leaves]:
        """The state after each step of a chunk, and the outputs of each step, leaves (time, batch, n)."""
        W, b = self._weights(hoisted)
        h_c = [state[k] for k in self.roles.states]
        flags = self._flags(hoisted, drives)
        states = self._leaves(kernels.run_forward(self.name, W, b, h_c, self._drives(drives), flags, reverse))
        return states, [self._where_valid(flags, states[leaf], masked) for leaf, masked in self.outputs]

    def rematerialized(self, hoisted: Hoisted, first: Leaves, steps: KnownSteps, reverse: bool) -> Leaves:
        """The states before each step of a chunk of an LSTM, leaves (time, batch, n).

        Args:
            hoisted: from `Parts.hoist`.
            first: the state before the chunk.
            steps: the known steps, with h only in `before`. An LSTM saves h and not c, because the cut reads h only.
            reverse: whether the loop runs from right to left.
        """
        h, c = self.roles.states
        drives, cut = self._drives(steps.drives), self._reorder(steps.results[0])
        flags = self._flags(hoisted, steps.drives)
        return self._leaves([steps.before[h], kernels.run_replay(drives, cut, first[c], flags, reverse)])

    def backward(
        self, hoisted: Hoisted, steps: KnownSteps, ct_state: Leaves, ct_outputs: Leaves, reverse: bool
    ) -> tuple[Leaves, Leaves, Leaves, Leaves]:
        """The cotangents of the state before a chunk, of the hoisted values, of its drives and of its cuts.

        Args:
            hoisted: from `Parts.hoist`.
            steps: the known steps.
            ct_state: the cotangents of the state after the chunk.
            ct_outputs: the cotangents of the outputs of each step, all of which are h.
            reverse: whether the loop runs from right to left.
        """
        W, _ = self._weights(hoisted)
        flags = self._flags(hoisted, steps.drives)
        states = self.roles.states
        drives, cut, before = self._drives(steps.drives), self._reorder(steps.results[0]), steps.before
        known = (drives, cut, [before[k] for k in states])
        cts = [self._where_valid(flags, ct, masked) for ct, (_, masked) in zip(ct_outputs, self.outputs, strict=True)]
        ct_h: Any = sum(cts[1:], cts[0]) if cts else jnp.zeros_like(before[states[0]])
        ct_after = [ct_state[k] for k in states]
        ct_before, ct_initial, ct_gates, ct_cut = kernels.run_backward(
            self.name, W, known, ct_after, ct_h, flags, reverse
        )
        ct_hoisted = [jnp.zeros_like(value) for value in hoisted.values]
        for j, ct in zip(self.roles.initial, ct_initial, strict=True) if self.roles.initial else ():
            ct_hoisted[j] += ct.sum(axis=0)
        inverse = [self.roles.blocks.index(k) for k in range(self.gates)]
        ct_drives = self._ct_drives(steps.drives, ct_gates)
        return self._leaves(ct_before), ct_hoisted, ct_drives, [self._reorder(ct_cut, inverse)]

    def _flags(self, hoisted: Hoisted, drives: Leaves) -> kernels.Flags:
        roles = self.roles
        valid, reset = (None if k is None else drives[k] for k in (roles.valid, roles.reset))
        return kernels.Flags(valid, reset, [hoisted.values[j] for j in roles.initial])

    def _where_valid(self, flags: kernels.Flags, array: Array, masked: bool) -> Array:
        return jnp.where(flags.valid[..., None], array, 0) if masked and flags.valid is not None else array

    def _ct_drives(self, drives: Leaves, ct_gates: Array) -> Leaves:
        """The cotangents of the cell's drives from those of the kernel's gates, (time, batch, gates * n)."""
        gate_of = {position: gate for gate, position in enumerate(self.drives)}
        by_gate = [ct_gates[..., k * self.size : (k + 1) * self.size] for k in range(self.gates)]
        found = []
        for i, drive in enumerate(drives):
            if i in (self.roles.valid, self.roles.reset):
                found.append(drive)  # it has no cotangent
                continue
            blocks = range(drive.shape[-1] // self.size)
            if [gate_of.get((i, k)) for k in blocks] == list(range(self.gates)):
                found.append(ct_gates)  # without slices, which XLA would copy
            else:
                zero = jnp.zeros_like(drive[..., : self.size])
                parts = [by_gate[gate_of[i, k]] if (i, k) in gate_of else zero for k in blocks]
                found.append(jnp.concatenate(parts, axis=-1))
        return found

    def _leaves(self, states: Iterable[Array]) -> Leaves:
        """From (h, c) to the leaves of the cell's state in their order."""
        return [value for _, value in sorted(zip(self.roles.states, states, strict=True), key=lambda pair: pair[0])]

    def _weights(self, hoisted: Hoisted) -> tuple[Array, Array | None]:
        ((W, b),) = hoisted.weights
        return self._reorder(W, axis=0), None if b is None else self._reorder(b)

    def _drives(self, drives: Leaves) -> Array:
        """The drives of all gates, (time, batch, gates * n)."""
        # A drive that has the order of the kernel already is not copied.
        if self.drives == tuple((self.drives[0][0], k) for k in range(self.gates)):
            whole = drives[self.drives[0][0]]
            if whole.shape[-1] == self.gates * self.size:
                return whole
        parts = [drives[i][..., k * self.size : (k + 1) * self.size] for i, k in self.drives]
        return jnp.concatenate(parts, axis=-1)

    def _reorder(self, array: Array, order: Iterable[int] | None = None, axis: int = -1) -> Array:
        """The blocks of an array in another order; by default from the order of the cut to that of the gates."""
        order = list(self.roles.blocks if order is None else order)
        if order == list(range(self.gates)):
            return array
        blocks = jnp.split(array, self.gates, axis=axis)
        return jnp.concatenate([blocks[k] for k in order], axis=axis)


def kernel_for(parts: Parts) -> Kernel | None:
    """The kernel that runs a loop; None if none supports it, or if the kernel is not available."""
    return kernel_supports(parts) if kernels.available() else None


def kernel_supports(parts: Parts) -> Kernel | None:
    """The kernel whose formulas are those of a loop, if its arrays are float32."""
    if len(parts.cuts) != 1:
        return None
    (cut,) = parts.cuts
    flags = [k for k, v in enumerate(parts.drives) if v.aval.dtype == bool and v.aval.ndim == 0]
    drives = [v for k, v in enumerate(parts.drives) if k not in flags]
    values = [v for v, read in zip(parts.hoisted, parts.read_in_loop, strict=True) if read]
    arrays = [*parts.state, *drives, *values, cut.weights, cut.out]
    if len(flags) > 2 or any(v.aval.dtype != jnp.float32 for v in arrays) or cut.weights.aval.ndim != 2:
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
                return Kernel(name, n, roles, tuple(blocks[block] for block in order), outputs)
    return None


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
