"""Which loops the compiled kernel runs: those whose rest has the kernel's formulas, whoever wrote the cell.

`seqjax.sequence._partition.units` reads the formulas from the program of the step. So the names, the order of the
gates, the order of the state and the layout of the weights do not matter, and a kernel cannot run a cell with other
mathematics.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array

from seqjax import kernels
from seqjax.sequence._execution.chunks import Leaves
from seqjax.sequence._partition.units import Formula, NotUnitwise, Symbol, Terms, Units, constant

if TYPE_CHECKING:
    from seqjax.sequence._execution.backward import KnownSteps
    from seqjax.sequence._partition.parts import Parts
else:
    KnownSteps = Parts = Any

Weights = list[tuple[Array, Array | None]]  # (W, b) of each cut; a kernel supports loops with one cut


def _lstm(terms: Terms) -> list[Formula]:
    """The new h and c, with the gates in the order i, f, g, o."""
    i, f, g, o = (terms.add(terms.symbol("drive", k), terms.symbol("cut", k)) for k in range(4))
    forget = terms.multiply(_sigmoid(terms, f), terms.symbol("state", 1))
    c = terms.add(forget, terms.multiply(_sigmoid(terms, i), _tanh(terms, g)))
    return [terms.multiply(_sigmoid(terms, o), _tanh(terms, terms.symbol("after", 1))), c]


def _gru(terms: Terms) -> list[Formula]:
    """The new h, with the gates in the order r, z, n, and r applied after the product."""
    d, u = ([terms.symbol(kind, k) for k in range(3)] for kind in ("drive", "cut"))
    r, z = (_sigmoid(terms, terms.add(d[k], u[k])) for k in range(2))
    n = _tanh(terms, terms.add(d[2], terms.multiply(r, u[2])))
    one_minus_z = terms.add(constant(1.0), terms.multiply(constant(-1.0), z))
    return [terms.add(terms.multiply(one_minus_z, n), terms.multiply(z, terms.symbol("state", 0)))]


def _vanilla(terms: Terms) -> list[Formula]:
    """The new h."""
    return [_tanh(terms, terms.add(terms.symbol("drive", 0), terms.symbol("cut", 0)))]


def _sigmoid(terms: Terms, a: Formula) -> Formula:
    return terms.function(("logistic", ""), a)


def _tanh(terms: Terms, a: Formula) -> Formula:
    return terms.function(("tanh", ""), a)


# The numbers of gates and of leaves of the state, and the formulas of the new state.
FORMULAS = {"lstm": (4, 2, _lstm), "gru": (3, 1, _gru), "vanilla": (1, 1, _vanilla)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The compiled loops of one cell, and the order in which they read the cell's arrays.

    Attributes:
        name: the formulas, "lstm", "gru" or "vanilla".
        size: n, the number of units.
        states: the leaf of the state that is h, and the leaf that is c if there is one.
        drives: for each gate of the kernel, the index of the drive and the block in it.
        blocks: for each gate of the kernel, the block of the cut.
        outputs: for each output of a step, the leaf of the new state that it is.
    """

    name: str
    size: int
    states: tuple[int, ...]
    drives: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def gates(self) -> int:
        """The number of gates."""
        return len(self.blocks)

    @property
    def runs_backward(self) -> bool:
        """Whether the backward loop is compiled too. It reads cotangents of the outputs only if these are h."""
        return all(leaf == self.states[0] for leaf in self.outputs)

    def forward(self, weights: Weights, state: Leaves, drives: Leaves, reverse: bool) -> Leaves:
        """The state after each step of a chunk, leaves (time, batch, n)."""
        W, b = self._weights(weights)
        h_c = [state[k] for k in self.states]
        return self._leaves(kernels.run_forward(W, b, h_c, self._drives(drives), reverse))

    def rematerialized(self, first: Leaves, steps: KnownSteps, reverse: bool) -> Leaves:
        """The states before each step of a chunk of an LSTM, leaves (time, batch, n).

        Args:
            first: the state before the chunk.
            steps: the known steps, with h only in `before`. An LSTM saves h and not c, because the cut reads h only.
            reverse: whether the loop runs from right to left.
        """
        h, c = self.states
        drives, cut = self._drives(steps.drives), self._reorder(steps.results[0])
        return self._leaves([steps.before[h], kernels.run_replay(drives, cut, first[c], reverse)])

    def backward(
        self, weights: Weights, steps: KnownSteps, ct_state: Leaves, ct_outputs: Leaves, reverse: bool
    ) -> tuple[Leaves, Leaves, Leaves]:
        """The cotangents of the state before a chunk, of its drives and of its cuts.

        Args:
            weights: (W, b) of the cut.
            steps: the known steps.
            ct_state: the cotangents of the state after the chunk.
            ct_outputs: the cotangents of the outputs of each step, all of which are h.
            reverse: whether the loop runs from right to left.
        """
        W, _ = self._weights(weights)
        drives, cut = self._drives(steps.drives), self._reorder(steps.results[0])
        before, after = [steps.before[k] for k in self.states], [ct_state[k] for k in self.states]
        ct_h: Any = sum(ct_outputs[1:], ct_outputs[0]) if ct_outputs else jnp.zeros_like(before[0])
        ct_before, ct_gates, ct_cut = kernels.run_backward(W, drives, cut, before, after, ct_h, reverse)
        inverse = [self.blocks.index(k) for k in range(self.gates)]
        return self._leaves(ct_before), self._ct_drives(steps.drives, ct_gates), [self._reorder(ct_cut, inverse)]

    def _ct_drives(self, drives: Leaves, ct_gates: Array) -> Leaves:
        """The cotangents of the cell's drives from those of the kernel's gates, (time, batch, gates * n)."""
        gate_of = {position: gate for gate, position in enumerate(self.drives)}
        by_gate = [ct_gates[..., k * self.size : (k + 1) * self.size] for k in range(self.gates)]
        found = []
        for i, drive in enumerate(drives):
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
        return [value for _, value in sorted(zip(self.states, states, strict=True), key=lambda pair: pair[0])]

    def _weights(self, weights: Weights) -> tuple[Array, Array | None]:
        ((W, b),) = weights
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
        order = list(self.blocks if order is None else order)
        if order == list(range(self.gates)):
            return array
        blocks = jnp.split(array, self.gates, axis=axis)
        return jnp.concatenate([blocks[k] for k in order], axis=axis)


def kernel_for(parts: Parts) -> Kernel | None:
    """The kernel that runs a loop; None if none supports it, or if the kernel is not available."""
    return kernel_supports(parts) if kernels.available() else None


def kernel_supports(parts: Parts) -> Kernel | None:
    """The kernel whose formulas are those of a loop, if its arrays are float32."""
    if len(parts.cuts) != 1 or any(parts.read_in_loop) or not all(v in parts.new_state for v in parts.outputs):
        return None
    (cut,) = parts.cuts
    arrays = [*parts.state, *parts.drives, cut.weights, cut.out]
    if any(v.aval.dtype != jnp.float32 for v in arrays) or cut.weights.aval.ndim != 2:
        return None
    try:
        units = Units(parts, Terms())
    except NotUnitwise:
        return None
    n, gates = units.size, cut.out.aval.size // units.size
    drives = _drives_by_block(units)
    if cut.weights.aval.shape != (gates * n, n) or len(units.operands[0]) != 1 or set(drives) != set(range(gates)):
        return None
    # At most 2 * 4! comparisons of short formulas.
    for name, (count, leaves, formulas) in FORMULAS.items():
        if (count, leaves) != (gates, len(parts.state)):
            continue
        for states, order in itertools.product(*(itertools.permutations(range(size)) for size in (leaves, gates))):
            if _matches(parts, formulas, states, order, drives):
                outputs = tuple(parts.new_state.index(v) for v in parts.outputs)
                return Kernel(name, n, states, tuple(drives[block] for block in order), order, outputs)
    return None


def _matches(
    parts: Parts,
    formulas: Callable[[Terms], list[Formula]],
    states: tuple[int, ...],
    order: tuple[int, ...],
    drives: dict[int, tuple[int, int]],
) -> bool:
    """Whether a loop has the formulas of a kernel if its leaves and blocks have these roles."""
    names: dict[Symbol, Symbol] = {
        (kind, leaf): (kind, k) for k, leaf in enumerate(states) for kind in ("state", "after")
    }
    for gate, block in enumerate(order):
        names[("cut", 0, block)] = ("cut", gate)
        names[("drive", *drives[block])] = ("drive", gate)
    # The kernel's formulas come first, because the numbers of the terms, and so their order, must be the same in both.
    terms = Terms()
    expected = formulas(terms)
    units = Units(parts, terms, lambda name: names.get(name, ("other", *name)))
    return [units.new_state[k] for k in states] == expected and units.operands[0] == [terms.symbol("state", 0)]


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
