"""Which loops the compiled kernel runs: those whose rest has the kernel's formulas, whoever wrote the cell.

`seqjax.sequence._partition.units` reads the formulas from the program of the step. So the names, the order of the
gates, the order of the state and the layout of the weights do not matter, and a kernel cannot run a cell with other
mathematics.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from seqjax import kernels
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.units import Atoms, Formula, NotUnitwise, Symbol, Units, constant

Leaves = list[Any]


def _lstm(atoms: Atoms) -> list[Formula]:
    """The new h and c; gates in the order i, f, g, o."""
    i, f, g, o = (atoms.add(atoms.symbol("drive", k), atoms.symbol("cut", k)) for k in range(4))
    c = atoms.add(
        atoms.multiply(_sigma(atoms, f), atoms.symbol("state", 1)), atoms.multiply(_sigma(atoms, i), _tanh(atoms, g))
    )
    return [atoms.multiply(_sigma(atoms, o), _tanh(atoms, atoms.symbol("after", 1))), c]


def _gru(atoms: Atoms) -> list[Formula]:
    """The new h; gates in the order r, z, n, the reset gate after the product, and z keeps the old state."""
    d, u = ([atoms.symbol(kind, k) for k in range(3)] for kind in ("drive", "cut"))
    r, z = (_sigma(atoms, atoms.add(d[k], u[k])) for k in range(2))
    n = _tanh(atoms, atoms.add(d[2], atoms.multiply(r, u[2])))
    write = atoms.add(constant(1.0), atoms.multiply(constant(-1.0), z))
    return [atoms.add(atoms.multiply(write, n), atoms.multiply(z, atoms.symbol("state", 0)))]


def _vanilla(atoms: Atoms) -> list[Formula]:
    """The new h."""
    return [_tanh(atoms, atoms.add(atoms.symbol("drive", 0), atoms.symbol("cut", 0)))]


def _sigma(atoms: Atoms, a: Formula) -> Formula:
    return atoms.function(("logistic", ""), a)


def _tanh(atoms: Atoms, a: Formula) -> Formula:
    return atoms.function(("tanh", ""), a)


FORMULAS = {"lstm": (4, 2, _lstm), "gru": (3, 1, _gru), "vanilla": (1, 1, _vanilla)}  # gates, leaves of the state


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The compiled loops of one cell, and how the cell's arrays are handed to them.

    Attributes:
        name: of the cell: "lstm", "gru" or "vanilla".
        size: n.
        states: for h, and for c if there is one, which leaf of the state it is.
        drives: for each gate of the kernel, the passed value and its block.
        blocks: for each gate of the kernel, the block of the cut.
        kept: the leaf of the state that each kept value is.
    """

    name: str
    size: int
    states: tuple[int, ...]
    drives: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def gates(self) -> int:
        """The number of gates."""
        return len(self.blocks)

    @property
    def runs_backward(self) -> bool:
        """Whether the backward loop is compiled too: it takes cotangents of h for each step, and not of c."""
        return all(leaf == self.states[0] for leaf in self.kept)

    def forward(self, weights: Any, state: Leaves, drives: Leaves, reverse: bool) -> Leaves:
        """The state after each step of a chunk, leaves (time, batch, n)."""
        W, b = self._weights(weights)
        found = kernels.run_forward(self.gates, W, b, [state[k] for k in self.states], self._drives(drives), reverse)
        return self._leaves(found)

    def rematerialized(self, first: Leaves, before: Leaves, drives: Leaves, results: Leaves, reverse: bool) -> Leaves:
        """The states before each step of an LSTM's chunk; `before` has h only, and `first` the first in full."""
        h, c = self.states
        made = self._drives(drives), self._ordered(results[0])
        return self._leaves([before[h], kernels.run_replay(*made, first[c], reverse)])

    def backward(
        self,
        weights: Any,
        ct_after: Leaves,
        before: Leaves,
        drives: Leaves,
        results: Leaves,
        ct_kept: Leaves,
        reverse: bool,
    ) -> tuple[Leaves, Leaves, Leaves]:
        """The cotangents of the state before a chunk, of its drives and of its cuts."""
        W, _ = self._weights(weights)
        made = self._drives(drives), self._ordered(results[0])
        kept: Any = sum(ct_kept[1:], ct_kept[0]) if ct_kept else jnp.zeros_like(before[self.states[0]])
        states = [before[k] for k in self.states], [ct_after[k] for k in self.states]
        ct_state, ct_drives, ct_cut = kernels.run_backward(self.gates, W, *made, *states, kept, reverse)
        places = {place: gate for gate, place in enumerate(self.drives)}
        by_gate = [ct_drives[..., k * self.size : (k + 1) * self.size] for k in range(self.gates)]
        found = []
        for i, drive in enumerate(drives):
            blocks = range(drive.shape[-1] // self.size)
            if [places.get((i, k)) for k in blocks] == list(range(self.gates)):
                found.append(ct_drives)
            else:
                zero = jnp.zeros_like(drive[..., : self.size])
                parts = [by_gate[places[i, k]] if (i, k) in places else zero for k in blocks]
                found.append(jnp.concatenate(parts, axis=-1))
        order = [self.blocks.index(k) for k in range(self.gates)]
        return self._leaves(ct_state), found, [self._ordered(ct_cut, order)]

    def _leaves(self, states: Iterable[Array]) -> Leaves:
        """Values for (h, c) in the order of the cell's state."""
        return [value for _, value in sorted(zip(self.states, states, strict=True), key=lambda pair: pair[0])]

    def _weights(self, weights: Any) -> tuple[Array, Array | None]:
        ((W, b),) = weights
        return self._ordered(W, axis=0), None if b is None else self._ordered(b)

    def _drives(self, drives: Leaves) -> Array:
        """The drive of every gate, (time, batch, gates * n)."""
        if self.drives == tuple((self.drives[0][0], k) for k in range(self.gates)):
            whole = drives[self.drives[0][0]]
            if whole.shape[-1] == self.gates * self.size:
                return whole
        parts = [drives[i][..., k * self.size : (k + 1) * self.size] for i, k in self.drives]
        return jnp.concatenate(parts, axis=-1)

    def _ordered(self, array: Array, order: Iterable[int] | None = None, axis: int = -1) -> Array:
        """The blocks of the cut in the order of the kernel's gates, or in another order."""
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
    if len(parts.cuts) != 1 or any(parts.extra) or not all(v in parts.after for v in parts.kept):
        return None
    (cut,) = parts.cuts
    arrays = [*parts.state, *parts.passed, cut.weights, cut.out]
    if any(v.aval.dtype != jnp.float32 for v in arrays) or cut.weights.aval.ndim != 2:
        return None
    try:
        atoms = Atoms()
        units = Units(parts, atoms)
    except NotUnitwise:
        return None
    n, gates = units.size, cut.out.aval.size // units.size
    if cut.weights.aval.shape != (gates * n, n) or len(units.operands[0]) != 1:
        return None
    paired = _paired_drives(atoms, units)
    for name, (count, leaves, formulas) in FORMULAS.items():
        if (count, leaves) != (gates, len(parts.state)) or set(paired) != set(range(gates)):
            continue
        for states in itertools.permutations(range(leaves)):
            for order in itertools.permutations(range(gates)):
                if _matches(parts, formulas, states, order, paired):
                    drives = tuple(paired[block] for block in order)
                    kept = tuple(parts.after.index(v) for v in parts.kept)
                    return Kernel(name, n, states, drives, order, kept)
    return None


def _matches(
    parts: Parts, formulas: Any, states: tuple[int, ...], order: tuple[int, ...], paired: dict[int, tuple[int, int]]
) -> bool:
    """Whether a loop has the formulas of a kernel when its leaves and blocks are given these roles."""
    names: dict[Symbol, Symbol] = {
        (kind, leaf): (kind, k) for k, leaf in enumerate(states) for kind in ("state", "after")
    }
    for gate, block in enumerate(order):
        names[("cut", 0, block)] = ("cut", gate)
        names[("drive", *paired[block])] = ("drive", gate)
    atoms = Atoms()
    expected = formulas(atoms)
    units = Units(parts, atoms, lambda name: names.get(name, ("other", *name)))
    return [units.after[k] for k in states] == expected and units.operands[0] == [atoms.symbol("state", 0)]


def _paired_drives(atoms: Atoms, units: Units) -> dict[int, tuple[int, int]]:
    """For each block of the cut, the block of the drive that it is added to."""
    found: dict[int, tuple[int, int]] = {}
    for formula in [*atoms.formulas, *units.after]:
        names: list[Any] = [atoms.names[atom] or () for monomial, _ in formula for atom in monomial]
        cuts = [name for name in names if name[:1] == ("cut",)]
        alone: list[Any] = [atoms.names[m[0]] or () for m, factor in formula if len(m) == 1 and factor == 1.0]
        drives = [name for name in alone if name[:1] == ("drive",) and len(name) == 3]
        if len(cuts) == len(drives) == 1:
            found[cuts[0][2]] = (drives[0][1], drives[0][2])
    return found
