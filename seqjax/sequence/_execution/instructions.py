"""Programs of one unit as instructions for the compiled loops, which run them for vectors of units.

An instruction is five numbers: the operation, the register of its result, and up to three registers that it reads. To
load a value or to store one takes an array and an offset instead. `seqjax/kernels/units.h` runs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from seqjax.sequence._partition.program import Atom, Eqn, Var, inline, needed, source_line, variables

# In the order of the source.
OPERATIONS = ("load", "store", "add", "sub", "mul", "div", "neg", "abs", "sqrt", "exp", "tanh", "logistic", "max",
              "min", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select", "round")  # fmt: skip
REGISTERS = 48  # of the source
SAME = {"copy", "copy_p", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient",
        "convert_element_type"}  # fmt: skip
OTHER_NAMES = {"add_any": "add", "select_n": "select"}
LARGEST_POWER = 8
# Calls with a derivative of their own, which is not needed any more, and the parameter that contains their program.
CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}

COMPOSED = {"square", "integer_pow", "one_minus_square", "rsqrt", "sign", "clamp"}  # of several instructions
BFLOAT16, FLOAT32, FLOAT64, BOOL = (jnp.dtype(name) for name in ("bfloat16", "float32", "float64", "bool"))

Instruction = tuple[int, ...]


class NoKernel(Exception):
    """Why the compiled loops do not run a loop, in words."""


def check_primitive(e: Eqn) -> None:
    """Raises NoKernel if there is no instruction for an equation."""
    name = OTHER_NAMES.get(e.primitive.name, e.primitive.name)
    if name not in {*OPERATIONS, *SAME, *COMPOSED, *CALLS}:
        line = source_line(e)
        raise NoKernel(f"it has no instruction for {e.primitive.name}{f' at {line}' if line else ''}")


class Place(NamedTuple):
    """Where a number of a unit is: an array, and the position in it of the number of unit 0."""

    array: int
    offset: int


class Constants:
    """The numbers in programs, which lie in one array."""

    def __init__(self, array: int) -> None:
        self.array = array
        self.numbers: dict[str, int] = {}  # by their digits, because NaN does not equal itself

    def place(self, value: float) -> Place:
        """Where a number is. It is added if it is new."""
        return Place(self.array, self.numbers.setdefault(repr(value), len(self.numbers)))

    @property
    def values(self) -> list[float]:
        """The numbers in the array."""
        return [float(number) for number in self.numbers]


def instructions(
    program: ClosedJaxpr,
    inputs: Sequence[int | Place],
    outputs: Sequence[tuple[Place, bool] | None],
    constants: Constants,
) -> list[Instruction]:
    """The instructions of a program.

    Args:
        program: an inlined program of elementwise equations on vectors of one dtype and of booleans.
        inputs: for each argument the register that it is in, or where it is in memory.
        outputs: for each result where it goes, and whether it is added to what is there; None if it is not wanted.
        constants: the numbers of the program are added to it.

    Raises:
        NoKernel: the program has an equation that the compiled loops do not know, or too many values at a time.
    """
    jaxpr, consts = program.jaxpr, dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    wanted = [v for v, out in zip(jaxpr.outvars, outputs, strict=True) if out is not None]
    writer = _Writer(dict(zip(jaxpr.invars, inputs, strict=True)), consts, constants)
    writer.run(needed(jaxpr.eqns, wanted)[0])
    # Numbers of bfloat16 are rounded when they are stored, and not after each equation, as in a fusion of XLA.
    values = [(writer.rounded(v), *out) for v, out in zip(jaxpr.outvars, outputs, strict=True) if out is not None]
    for value, place, is_added in values:
        writer.store(value, place, is_added)
    first_free = 1 + max((r for r in inputs if isinstance(r, int)), default=-1)
    return _allocated(writer.lines, first_free)


class _Line(NamedTuple):
    """An instruction, with a register of its own for each value."""

    operation: str
    result: int | None
    reads: tuple[int, ...] = ()
    place: Place | None = None


class _Writer:
    """Instructions with a new register for each value. Those of the arguments come first."""

    def __init__(self, places: dict[Var, int | Place], consts: dict[Var, Any], constants: Constants) -> None:
        self.places = {v: place for v, place in places.items() if isinstance(place, Place)}
        self.consts, self.constants = consts, constants
        self.lines: list[_Line] = []
        self.registers: dict[Any, int] = {v: r for v, r in places.items() if isinstance(r, int)}
        self.fresh = itertools.count(1 + max(self.registers.values(), default=-1))

    def run(self, eqns: Sequence[Eqn]) -> None:
        """Adds the instructions of equations."""
        for e in eqns:
            name = e.primitive.name
            if name in CALLS:
                self._call(e)
            elif len(e.outvars) != 1 or not _is_known_dtype(e):
                raise NoKernel(f"it has no instruction for {name} of this dtype")
            else:
                check_primitive(e)
                self.registers[e.outvars[0]] = self._result(e, name)

    def _call(self, e: Eqn) -> None:
        inner = inline(e.params[CALLS[e.primitive.name]])
        self.consts |= dict(zip(inner.jaxpr.constvars, inner.consts, strict=True))
        self.registers |= {v: self.read(a) for v, a in zip(inner.jaxpr.invars, e.invars, strict=True)}
        self.run(inner.jaxpr.eqns)
        self.registers |= {v: self.read(a) for v, a in zip(e.outvars, inner.jaxpr.outvars, strict=True)}

    def _result(self, e: Eqn, name: str) -> int:
        args = [self.read(v) for v in e.invars]
        name = OTHER_NAMES.get(name, name)
        if name in SAME and (e.invars[0].aval.dtype == BOOL or e.outvars[0].aval.dtype != BOOL):
            is_rounded = e.invars[0].aval.dtype == FLOAT32 and e.outvars[0].aval.dtype == BFLOAT16
            return self.write("round", args[0]) if is_rounded else args[0]
        if name in COMPOSED:
            return self._composed(name, args, e.params.get("y", 2))
        if (name == "select" and len(args) != 3) or name not in OPERATIONS:
            raise NoKernel(f"it has no instruction for this {name}")
        return self.write(name, *args)

    def _composed(self, name: str, args: list[int], exponent: int) -> int:
        x = args[0]
        if name == "rsqrt":
            return self.write("div", self._number(1.0), self.write("sqrt", x))
        if name == "one_minus_square":  # in the derivative of tanh, since jax 0.12
            return self.write("sub", self._number(1.0), self.write("mul", x, x))
        if name == "clamp":  # its arguments are the lower bound, the number and the upper bound
            return self.write("min", self.write("max", args[1], x), args[2])
        if name == "sign":
            zero = self._number(0.0)
            sign = self.write("sub", self.write("gt", x, zero), self.write("lt", x, zero))
            return self.write("select", self.write("ne", x, x), sign, x)
        if not 0 < abs(exponent) <= LARGEST_POWER:
            raise NoKernel(f"it has no instruction for a power of {exponent}")
        power = x
        for _ in range(abs(exponent) - 1):
            power = self.write("mul", power, x)
        return power if exponent > 0 else self.write("div", self._number(1.0), power)

    def read(self, v: Atom) -> int:
        """The register of a value, which is loaded when it is first read."""
        if isinstance(v, Literal):
            return self._number(v.val)
        if v in self.consts:
            return self._number(self.consts[v])
        if v not in self.registers:
            self.registers[v] = self._load(self.places[v])
        return self.registers[v]

    def rounded(self, v: Atom) -> int:
        """The register of a value that is rounded to its dtype."""
        return self.write("round", self.read(v)) if v.aval.dtype == BFLOAT16 else self.read(v)

    def _number(self, value: Any) -> int:
        if np.ndim(value):
            raise NoKernel("a step reads a constant array")
        place = self.constants.place(float(value))
        if place not in self.registers:
            self.registers[place] = self._load(place)
        return self.registers[place]

    def write(self, name: str, *reads: int) -> int:
        """Adds an instruction. Returns the register of its result."""
        self.lines.append(_Line(name, result := next(self.fresh), reads))
        return result

    def _load(self, place: Place) -> int:
        self.lines.append(_Line("load", result := next(self.fresh), place=place))
        return result

    def store(self, value: int, place: Place, is_added: bool) -> None:
        """Stores a value, or adds it to what is there."""
        value = self.write("add", self._load(place), value) if is_added else value
        self.lines.append(_Line("store", None, (value,), place))


def _is_known_dtype(e: Eqn) -> bool:
    dtypes = {v.aval.dtype for v in [*variables(e.invars), *e.outvars]} - {BOOL}
    return dtypes <= {FLOAT64} or dtypes <= {FLOAT32, BFLOAT16}


def _allocated(lines: list[_Line], first_free: int) -> list[Instruction]:
    """The instructions with as few registers as values live at a time."""
    last = {r: i for i, line in enumerate(lines) for r in line.reads}
    where = {r: r for r in range(first_free)}
    free = [*reversed(range(first_free, REGISTERS))]
    written: list[Instruction] = []
    for i, line in enumerate(lines):
        registers = [where[r] for r in line.reads]
        # Before the result gets its register, which may be that of an operand: each row is read before it is written.
        free += [where.pop(r) for r in dict.fromkeys(line.reads) if last[r] == i]
        if line.result is not None:
            if line.result not in last:
                continue
            if not free:
                raise NoKernel("the step has too many values per unit at a time")
            where[line.result] = free.pop()
            registers.insert(0, where[line.result])
        numbers = [*registers, *(line.place or ())]
        written.append((OPERATIONS.index(line.operation), *numbers, *[0] * (4 - len(numbers))))
    return written
