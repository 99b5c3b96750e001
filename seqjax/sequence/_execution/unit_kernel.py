"""The compiled loops of any cell whose step acts unit by unit between its products.

The step of one unit is a program of elementwise equations, and so is its derivative, which JAX computes. Both become
instructions, which the compiled loops run for vectors of units. The products of a step may form a chain, as in a GRU
whose reset gate acts before the product: the operand of a product may depend on the results of earlier ones.

    phase 0    the operand of product 1, unless it is a leaf of the state
    phase k    with the results of product k: the operand of the next product, or the new state and the outputs

The backward loop has the phases of a derivative: first that of the new state, then, with the cotangent of the operand
of each product, from the last product to the first, that of the operand.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array

from seqjax.kernels.calls import Layout, UnitArray, UnitLoop, UnitProduct, run_units
from seqjax.sequence._execution.chunks import Leaves
from seqjax.sequence._execution.instructions import BOOL, Constants, Instruction, Place, instructions
from seqjax.sequence._execution.unit_step import UnitStep
from seqjax.sequence._partition.units import Symbol

if TYPE_CHECKING:
    from seqjax.sequence._execution.backward import KnownSteps
    from seqjax.sequence._partition.parts import Hoisted, Parts
else:
    Hoisted = KnownSteps = Parts = Any


@dataclasses.dataclass(frozen=True, eq=False)
class UnitKernel:
    """The compiled loops of a cell that acts unit by unit, with the methods of `Kernel`.

    Attributes:
        parts: the parts of the loop.
        forward_loop, saving_loop: the instructions of the forward loop, and those of one that returns all products too.
        backward_loop: the instructions of the backward loop.
    """

    parts: Parts
    forward_loop: UnitLoop
    saving_loop: UnitLoop
    backward_loop: UnitLoop

    name = "unitwise"
    runs_backward = True
    saves_all = True

    @classmethod
    def of(cls, parts: Parts) -> UnitKernel:
        """The kernel of a loop.

        Raises:
            NoKernel: the compiled loops cannot run it.
        """
        step = UnitStep(parts)
        return cls(parts, forward_loop(step, False), forward_loop(step, True), backward_loop(step))

    def forward(
        self, hoisted: Hoisted, state: Leaves, drives: Leaves, reverse: bool, saves_products: bool
    ) -> tuple[Leaves, Leaves, Leaves]:
        """The state after each step of a chunk, the outputs, and the results of the cuts, leaves (time, batch, ...).

        The last are empty unless `saves_products`.
        """
        arrays = self._shared(hoisted, drives) | _named("before", state)
        loop = self.saving_loop if saves_products else self.forward_loop
        found = run_units(loop, arrays, [W for W, _ in hoisted.weights], False, reverse)
        states = [found["new", k].astype(leaf.dtype) for k, leaf in enumerate(state)]
        of_leaves = dict(zip(self.parts.new_state, states, strict=True))
        outputs = [
            of_leaves[v] if v in of_leaves else found["output", k].astype(v.aval.dtype)
            for k, v in enumerate(self.parts.outputs)
        ]
        cuts = self.parts.cuts if saves_products else []
        return states, outputs, [found["product", i].astype(c.out.aval.dtype) for i, c in enumerate(cuts)]

    def backward(
        self, hoisted: Hoisted, steps: KnownSteps, ct_state: Leaves, ct_outputs: Leaves, reverse: bool
    ) -> tuple[Leaves, Leaves, Leaves, Leaves]:
        """The cotangents of the state before a chunk, of the hoisted values, of its drives and of its cuts."""
        arrays = self._shared(hoisted, steps.drives) | _named("before", steps.before) | _named("cut", steps.results)
        arrays |= _named("of_new", ct_state) | _named("of_output", ct_outputs)
        found = run_units(self.backward_loop, arrays, [W for W, _ in hoisted.weights[::-1]], True, not reverse)

        def of_value(j: int, value: Array) -> Array:
            if ("of_parameter", j) not in found:
                return jnp.zeros_like(value)
            rows = found["of_parameter", j].sum(0)
            return rows if value.ndim else rows.sum()

        def of_drive(k: int, drive: Array) -> Array:
            if ("of_drive", k) not in found:
                return drive  # a mask, which has no cotangent
            ct = found["of_drive", k]
            return (ct if ct.shape == drive.shape else ct.sum(-1)).astype(drive.dtype)

        return (
            [found["of_state", k].astype(ct.dtype) for k, ct in enumerate(ct_state)],
            [of_value(j, value) for j, value in enumerate(hoisted.values)],
            [of_drive(k, drive) for k, drive in enumerate(steps.drives)],
            [found["of_cut", i].astype(result.dtype) for i, result in enumerate(steps.results)],
        )

    def _shared(self, hoisted: Hoisted, drives: Leaves) -> dict[Symbol, Array]:
        """The arrays that both loops read."""
        values = dict(zip(self.parts.hoisted, hoisted.values, strict=True))
        found = _named("drive", drives) | _named("parameter", hoisted.values)
        biases = {k: self.parts.biases[v][1] for k, v in enumerate(self.parts.drives) if v in self.parts.biases}
        found |= {("drive_bias", k): values[v] for k, v in biases.items()}
        return found | {("cut_bias", i): b for i, (_, b) in enumerate(hoisted.weights) if b is not None}


def _named(name: str, leaves: Leaves) -> dict[Symbol, Array]:
    return {(name, k): leaf for k, leaf in enumerate(leaves)}


class _Arrays:
    """The arrays of a loop, and where the numbers of a unit are in them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.found: dict[Symbol, UnitArray] = {}

    def add(self, name: Symbol, layout: Layout, blocks: int = 1, of: Symbol = ()) -> None:
        """Adds an array with so many numbers per unit."""
        self.found[name] = UnitArray(name, layout, blocks, of)

    def place(self, name: Symbol) -> Place:
        """Where a vector of units is."""
        kind, k, *block = name
        return Place(list(self.found).index((kind, k)), self.size * sum(block))

    def find(self, name: Symbol) -> Place:
        """Where an input of the step is in memory; anywhere for one that is never read from there."""
        kind, k, *block = name
        key = ("before", k) if kind == "state" else (kind, k)
        return self.place((*key, *block)) if key in self.found else Place(0, 0)


def _arrays_of_both(step: UnitStep) -> _Arrays:
    """The arrays that both loops read."""
    parts, arrays = step.parts, _Arrays(step.size)

    def add(name: Symbol, v: Any, of_number: Layout, of_vector: Layout) -> None:
        if any(each[:2] == name for each in step.inputs):
            arrays.add(name, of_vector if v.aval.ndim else of_number, step.blocks(v))

    for k, v in enumerate(parts.drives):
        add(("drive", k), v, Layout.STEP_NUMBERS, Layout.STEPS)
        if v in parts.biases:
            add(("drive_bias", k), v, Layout.NUMBERS, Layout.SHARED)
    for j, v in enumerate(parts.hoisted):
        add(("parameter", j), v, Layout.NUMBERS, Layout.SHARED)
    for i, c in enumerate(parts.cuts):
        add(("cut_bias", i), c.out, Layout.NUMBERS, Layout.SHARED)
    arrays.add(("constants", 0), Layout.NUMBERS)
    return arrays


def forward_loop(step: UnitStep, saves_products: bool) -> UnitLoop:
    """The instructions of the forward loop, which may return the results of all products."""
    parts, arrays, cuts = step.parts, _arrays_of_both(step), range(len(step.parts.cuts))
    for k in range(len(parts.state)):
        arrays.add(("before", k), Layout.BEFORE, of=("new", k))
    arguments = len(arrays.found)
    for k in range(len(parts.state)):
        arrays.add(("new", k), Layout.STEPS)
    for k, v in enumerate(parts.outputs):
        if v not in parts.new_state:
            arrays.add(("output", k), Layout.STEPS, step.blocks(v))
    final = [name for name in step.results if name[:2] in arrays.found]
    for i in cuts if saves_products else ():
        arrays.add(("product", i), Layout.STEPS, step.blocks(parts.cuts[i].out))
    results = len(arrays.found)
    # Which results each phase computes, and which products a later phase reads again.
    leaves = [step.leaf_of_operand(i) for i in cuts]
    phases = [[] if leaf is not None else [("operand", i)] for i, leaf in enumerate(leaves)]
    phases.append(final)
    for i in cuts if saves_products else ():
        phases[i + 1] = [*phases[i + 1], *(name for name in step.results if name[:2] == ("product", i))]
    again = {name for k, some in enumerate(phases) for name in step.reads(some) if name[0] == "cut" and name[1] + 1 < k}
    for i, leaf in enumerate(leaves):
        if leaf is None:
            arrays.add(("operand", i), Layout.ROWS)
        if any(name[1] == i for name in again):
            arrays.add(("cut", i), Layout.ROWS, step.blocks(parts.cuts[i].out))
    constants = Constants(arrays.place(("constants", 0)).array)
    code = []
    for k, wanted in enumerate(phases):
        is_here = {name: name[:2] == ("cut", k - 1) for name in step.inputs}
        inputs = [name[2] if here else arrays.find(name) for name, here in is_here.items()]
        outputs = [(arrays.place(name), False) if name in wanted else None for name in step.results]
        outputs += [(arrays.place(name), False) if here and name in again else None for name, here in is_here.items()]
        code.append(instructions(step.program, inputs, outputs, constants))
    operands = [("operand", i) if leaf is None else ("before", leaf) for i, leaf in enumerate(leaves)]
    products = [
        UnitProduct(*arrays.place(operand), 1, step.blocks(c.out))
        for operand, c in zip(operands, parts.cuts, strict=True)
    ]
    return _loop(step, arrays, (arguments, results), code, products, constants)


def backward_loop(step: UnitStep) -> UnitLoop:
    """The instructions of the backward loop."""
    parts, arrays, cuts = step.parts, _arrays_of_both(step), range(len(step.parts.cuts))
    for k in range(len(parts.state)):
        arrays.add(("before", k), Layout.STEPS)
        arrays.add(("of_new", k), Layout.ROWS)
    for i, c in enumerate(parts.cuts):
        arrays.add(("cut", i), Layout.STEPS, step.blocks(c.out))
    for k, v in enumerate(parts.outputs):
        arrays.add(("of_output", k), Layout.STEPS, step.blocks(v))
    arguments = len(arrays.found)
    for i, c in enumerate(parts.cuts):
        arrays.add(("of_cut", i), Layout.STEPS, step.blocks(c.out))
    for k in range(len(parts.state)):
        arrays.add(("of_state", k), Layout.ROWS, of=("of_new", k))
    read = {name[:2] for name in step.reads(list(step.results))}
    varied = [name for name, dtype in step.inputs.items() if dtype != BOOL and not name[0].endswith("_bias")]
    varied = [name for name in varied if name[0] != "parameter" or name[:2] in read]
    for kind, values, layout in (("drive", parts.drives, Layout.STEPS), ("parameter", parts.hoisted, Layout.ROWS)):
        for k, v in enumerate(values):
            if any(name[:2] == (kind, k) for name in varied):
                arrays.add((f"of_{kind}", k), layout, step.blocks(v))
    results = len(arrays.found)

    def target(name: Symbol) -> Place:
        return arrays.place((f"of_{name[0]}", *name[1:]))

    constants = Constants(arrays.place(("constants", 0)).array)
    places = [arrays.find(name) for name in step.inputs]
    of_cts = {"new": "of_state", "output": "of_output"}
    final = [name for name in step.results if name[0] in of_cts]
    names = [name for name in step.reads(final) if name in varied]
    zeros = [name for name in varied if name not in names and name[0] != "parameter"]
    outputs = [(target(name), name[0] == "parameter") for name in names] + [(target(name), False) for name in zeros]
    inputs = [*places, *(arrays.place((of_cts[name[0]], *name[1:])) for name in final)]
    code = [instructions(step.pullback(final, names, len(zeros)), inputs, outputs, constants)]
    for i in reversed(cuts):
        names = [name for name in step.reads([("operand", i)]) if name in varied]
        outputs = [(target(name), True) for name in names]
        code.append(instructions(step.pullback([("operand", i)], names, 0), [*places, 0], outputs, constants))
    products = [UnitProduct(*arrays.place(("of_cut", i)), step.blocks(parts.cuts[i].out), 1) for i in reversed(cuts)]
    return _loop(step, arrays, (arguments, results), code, products, constants)


def _loop(
    step: UnitStep,
    arrays: _Arrays,
    ends: tuple[int, int],
    phases: list[list[Instruction]],
    products: list[UnitProduct],
    constants: Constants,
) -> UnitLoop:
    """A loop whose arguments and results end at these positions among its arrays."""
    found = tuple(arrays.found.values())
    arguments, results, scratch = found[: ends[0]], found[ends[0] : ends[1]], found[ends[1] :]
    return UnitLoop(step.size, step.dtype, arguments, results, scratch, phases, products, constants.values)
