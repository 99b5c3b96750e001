"""Reads the loops of an optimized XLA program: their kernel launches, matrix products and carried values per step.

for loop in loops(jax.jit(f).lower(*arguments).compile().as_text()):
    print(loop.steps, loop.kernels, loop.products)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Not launches: they name values, are loops that are counted separately, or end an operation whose start is counted.
NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "after-all", "call"}
MATRIX_LIBRARY = re.compile(r'custom_call_target="[^"]*(gemm|matmul)', re.IGNORECASE)
INNER = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

Shape = tuple[int, ...]


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    shapes: list[Shape]  # one shape, or the shapes of a tuple
    opcode: str
    operands: list[str]
    rest: str
    root: bool


class Loop(NamedTuple):
    """A compiled while loop, without the work of the loops inside it."""

    name: str
    steps: int | None  # None if the compiler does not know it
    kernels: Counter[str]  # launches per step, by opcode
    products: list[Shape]  # shapes of the results of the matrix products of one step
    changed: list[Shape]  # shapes of the carried values that the body changes
    innermost: bool

    def makes(self, shapes: Iterable[Shape]) -> bool:
        """Whether a product or a changed carried value has one of these shapes, ignoring axes of length one."""
        wanted = {_squeezed(shape) for shape in shapes}
        return any(_squeezed(shape) in wanted for shape in self.products + self.changed)


def loops(text: str) -> list[Loop]:
    """Returns every while loop in the text of a compiled program."""
    program = _computations(text)
    found = []
    for instruction in (line for lines in program.values() for line in lines if line.opcode == "while"):
        body = re.search(r"body=%([\w.\-]+)", instruction.rest)[1]
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
        found.append(
            Loop(
                instruction.name,
                int(count[1]) if count else None,
                Counter(line.opcode for line in _launches(program, body)),
                [shape for line in _all_lines(program, body) for shape in _product(line)],
                _changed(program[body]),
                not any(line.opcode == "while" for line in _all_lines(program, body)),
            )
        )
    return found


def weight_shapes(weights: Iterable) -> set[Shape]:
    """The shapes in which a loop could accumulate a gradient of these matrices: plain, transposed, or per gate."""
    shapes = set()
    for rows, columns in (w.shape for w in weights if w.ndim == 2 and min(w.shape) > 1):
        shapes |= {(rows, columns), (columns, rows)}
        if rows % columns == 0:
            gates = rows // columns
            shapes |= {(gates, columns, columns), (columns, gates, columns), (columns, columns)}
    return shapes


def _computations(text: str) -> dict[str, list[Instruction]]:
    program: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line)
        if head:
            lines = program[head[1]] = []
        elif re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line):
            lines.append(_instruction(line.strip()))
    return program


def _instruction(line: str) -> Instruction:
    name, line_after = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(line_after) if line_after.startswith("(") else line_after.index(" ")
    opcode, rest = line_after[end:].strip().split("(", 1)
    inside = _closing("(" + rest) - 1
    operands = re.findall(r"%([\w.\-]+)", rest[:inside])
    shapes = [tuple(int(n) for n in of.split(",") if n) for of in re.findall(r"\w+\[([\d,]*)\]", line_after[:end])]
    return Instruction(name.lstrip("%"), shapes, opcode, operands, rest[inside:], line.startswith("ROOT "))


def _closing(text: str) -> int:
    """The index after the bracket that closes the first one."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"expected a closing bracket in {text[:80]!r}")


def _inner(line: Instruction) -> list[str]:
    branches = [name for of in BRANCHES.findall(line.rest) for name in re.findall(r"%([\w.\-]+)", of)]
    return INNER.findall(line.rest) + branches


def _all_lines(program: dict[str, list[Instruction]], computation: str) -> Iterator[Instruction]:
    """The instructions of a computation and of the computations that it calls, except the bodies of loops."""
    for line in program[computation]:
        yield line
        for inner in _inner(line):
            yield from _all_lines(program, inner)


def _launches(program: dict[str, list[Instruction]], computation: str) -> Iterator[Instruction]:
    for line in program[computation]:
        if line.opcode == "call":
            yield from _launches(program, _inner(line)[0])
        elif line.opcode not in NO_KERNEL and not line.opcode.endswith("-done"):
            yield line


def _product(line: Instruction) -> list[Shape]:
    return line.shapes[:1] if line.opcode == "dot" or MATRIX_LIBRARY.search(line.rest) else []


def _changed(body: list[Instruction]) -> list[Shape]:
    names = {line.name: line for line in body}
    root = next(line for line in body if line.root)

    def passed_along(at: int, operand: str) -> bool:
        line = names[operand]
        return line.opcode == "get-tuple-element" and re.search(rf"index={at}\b", line.rest) is not None

    if root.opcode != "tuple":
        return root.shapes
    return [shape for at, (operand, shape) in enumerate(zip(root.operands, root.shapes, strict=True))
            if not passed_along(at, operand)]  # fmt: skip


def _squeezed(shape: Shape) -> Shape:
    return tuple(length for length in shape if length != 1)
