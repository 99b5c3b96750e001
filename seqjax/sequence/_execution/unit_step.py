"""The program of a step, and of its derivative, for one vector of units, if the step acts unit by unit.

The products of the step are inputs of these programs, one vector of units for each block of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from seqjax.sequence._execution.instructions import BFLOAT16, BOOL, FLOAT32, FLOAT64, NoKernel, check_primitive
from seqjax.sequence._partition.program import Eqn, inline, needed, source_line
from seqjax.sequence._partition.units import NotUnitwise, Symbol, Units, bind_to_units

if TYPE_CHECKING:
    from seqjax.sequence._partition.parts import Parts
else:
    Parts = Any


MOST_BLOCKS = 16  # of a product, in the source of the compiled loops


class UnitStep:
    """A step that acts unit by unit.

    Attributes:
        parts: the parts of the loop.
        size: n, the number of units.
        dtype: float32 or float64, in which the compiled loops compute. bfloat16 numbers are float32 numbers there.
        inputs: by the name of each vector of units that the step reads, its dtype. The names are those of `Units`, and
            ("drive_bias", drive, block) and ("cut_bias", cut, block) for what is added to a drive or to a product.
        results: by the name of each vector that it computes, its position: ("operand", cut), ("new", leaf),
            ("output", output, block), and ("product", cut, block) with its bias.
        program: from the inputs to the results, and then the inputs again, because a later phase may read them.
    """

    def __init__(self, parts: Parts) -> None:
        """Finds the programs.

        Raises:
            NoKernel: the step does not act unit by unit, or it has arrays of another kind.
        """
        self.parts = parts
        self.size, self.dtype = self._check()
        self.inputs = self._inputs()
        names = [("operand", i) for i in range(len(parts.cuts))] + [("new", k) for k in range(len(parts.state))]
        names += [("output", k, block) for k, v in enumerate(parts.outputs) for block in range(self.blocks(v))]
        names += [("product", *name[1:]) for name in self.inputs if name[0] == "cut"]
        self.results: dict[Symbol, int] = {name: k for k, name in enumerate(names)}
        try:
            self.program = self._traced(lambda *values: [*self._run(values), *values])
        except NotUnitwise as error:
            raise NoKernel(f"the step mixes units{_where(error)}") from None

    def blocks(self, v: Any) -> int:
        """The number of vectors of units of a value. A number stands for one."""
        return 1 if v.aval.ndim == 0 else v.aval.size // self.size

    def reads(self, results: Sequence[Symbol]) -> list[Symbol]:
        """The inputs on which some results depend."""
        jaxpr = self.program.jaxpr
        _, read = needed(jaxpr.eqns, [jaxpr.outvars[self.results[name]] for name in results])
        return [name for name, v in zip(self.inputs, jaxpr.invars, strict=True) if v in read]

    def leaf_of_operand(self, cut: int) -> int | None:
        """The leaf of the state that is the operand of a cut; None if it is another value."""
        v = self.program.jaxpr.outvars[self.results["operand", cut]]
        of = dict(zip(self.program.jaxpr.invars, self.inputs, strict=True))
        name: Symbol = () if isinstance(v, Literal) else of.get(v, ())
        return name[1] if name[:1] == ("state",) else None

    def pullback(self, results: Sequence[Symbol], inputs: Sequence[Symbol], zeros: int) -> ClosedJaxpr:
        """The program of a derivative.

        Args:
            results: the results whose cotangents are known.
            inputs: the inputs whose cotangents are wanted.
            zeros: a number of zeros that it returns too.

        Returns:
            From all inputs of the step, with the biases added to the products already, and the cotangents of the
            results, to the cotangents of the inputs and the zeros.
        """

        def pulled(*values: Any) -> list[Any]:
            known, cts = list(values[: len(self.inputs)]), values[len(self.inputs) :]
            positions = [list(self.inputs).index(name) for name in inputs]

            def f(*some: Any) -> list[Any]:
                every = list(known)
                for position, value in zip(positions, some, strict=True):
                    every[position] = value
                found = self._run(every, adds_to_cuts=False)
                return [found[self.results[name]] for name in results]

            pulled = jax.vjp(f, *(known[position] for position in positions))[1](list(cts))
            return [*pulled, *[jnp.zeros(self.size, self.dtype)] * zeros]

        outvars = self.program.jaxpr.outvars
        return self._traced(pulled, *(outvars[self.results[name]].aval.dtype for name in results))

    def _check(self) -> tuple[int, np.dtype]:
        """n and the dtype of the loop."""
        parts = self.parts
        sizes = {v.aval.size for v in parts.state}
        if len(sizes) != 1 or 0 in sizes or any(v.aval.ndim != 1 for v in parts.state):
            raise NoKernel("the leaves of its state are not vectors of one size")
        if not parts.cuts:
            raise NoKernel("no product of a step reads the state")
        if not parts.drives:
            raise NoKernel("a step reads no input")
        n = sizes.pop()
        if any(c.out.aval.size > MOST_BLOCKS * n for c in parts.cuts):
            raise NoKernel(f"a product has more than {MOST_BLOCKS} results per unit")
        for c in parts.cuts:
            if not c.is_matrix or c.operand.aval.shape != (n,) or c.weights.aval.shape != (c.out.aval.size, n):
                where = f" at {line}" if (line := source_line(c.eqn)) else ""
                raise NoKernel(f"a product{where} is not that of one vector of the {n} units and one matrix")
        vectors = [*parts.new_state, *parts.outputs, *(c.out for c in parts.cuts)]
        if any(v.aval.ndim != 1 or v.aval.size % n or not v.aval.size for v in vectors):
            raise NoKernel(f"a result of a step is no vector of the {n} units")
        dtypes = {v.aval.dtype for v in (*parts.state, *vectors, *(c.weights for c in parts.cuts))}
        for known in (FLOAT64, FLOAT32):
            if dtypes <= {known, *([BFLOAT16] if known == FLOAT32 else [])}:
                return n, known
        names = " and ".join(sorted(dtype.name for dtype in dtypes))
        raise NoKernel(f"it computes in {names}, and the kernel in float64, or in float32 and bfloat16")

    def _inputs(self) -> dict[Symbol, np.dtype]:
        parts, named = self.parts, []
        named += [("state", k, v) for k, v in enumerate(parts.state)]
        named += [("drive", k, v) for k, v in enumerate(parts.drives)]
        named += [("drive_bias", k, parts.biases[v][1]) for k, v in enumerate(parts.drives) if v in parts.biases]
        named += [("parameter", k, v) for k, v in enumerate(parts.hoisted) if parts.read_in_loop[k]]
        named += [("cut", k, c.out) for k, c in enumerate(parts.cuts)]
        named += [("cut_bias", k, c.bias[1]) for k, c in enumerate(parts.cuts) if c.bias is not None]
        return {name: v.aval.dtype for kind, k, v in named for name in self._names(kind, k, v)}

    def _names(self, kind: str, k: int, v: Any) -> list[Symbol]:
        """The names of the vectors of a value, as `Units` has them; none if it has another shape or dtype."""
        is_known = v.aval.dtype in (self.dtype, BOOL) or (v.aval.dtype == BFLOAT16 and self.dtype == FLOAT32)
        if not is_known or v.aval.ndim > 1 or (v.aval.ndim == 1 and v.aval.size % self.size):
            return []
        if v.aval.ndim == 0 or kind == "state":
            return [(kind, k)]
        return [(kind, k, block) for block in range(self.blocks(v))]

    def _traced(self, f: Callable[..., Any], *more: np.dtype) -> ClosedJaxpr:
        """A program of the inputs and of further vectors."""
        return inline(
            jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct((self.size,), dtype) for dtype in (*self.inputs.values(), *more)))
        )

    def _run(self, inputs: Sequence[Any], adds_to_cuts: bool = True) -> list[Any]:
        """The results."""
        values = dict(zip(self.inputs, inputs, strict=True))
        for kind in ("drive", "cut") if adds_to_cuts else ("drive",):
            for name in [name for name in values if name[0] == f"{kind}_bias"]:
                values[kind, *name[1:]] += values[name]
        units = Units(self.parts, _Values(values))
        blocks = [*units.operands, *([value] for value in units.new_state), *units.outputs]
        expected = [1] * (len(units.operands) + len(units.new_state)) + [self.blocks(v) for v in self.parts.outputs]
        if any(some is None or len(some) != count for some, count in zip(blocks, expected, strict=True)):
            raise NotUnitwise(None)
        products = [value for name, value in values.items() if name[0] == "cut"]
        return [*(jnp.broadcast_to(value, (self.size,)) for some in blocks for value in some), *products]


class _Values:
    """What `Units` reads in place of terms: a formula is the value of a vector of units."""

    def __init__(self, values: Mapping[Symbol, Any]) -> None:
        self.values = values

    def symbol(self, *name: Any) -> Any:
        return self.values[name]

    def named(self, name: Symbol, value: Any) -> Any:
        del name
        return value

    def constant(self, value: Any, like: Any) -> Any:
        return np.asarray(value, like.dtype)

    def function(self, name: Any, *args: Any, eqn: Eqn) -> Any:
        del name
        check_primitive(eqn)  # here, where it has the line of the step
        shape = jnp.broadcast_shapes(*map(jnp.shape, args))
        return bind_to_units(eqn, [jnp.broadcast_to(arg, shape) for arg in args])

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def multiply(self, a: Any, b: Any) -> Any:
        return a * b


def _where(error: NotUnitwise) -> str:
    """The equation that mixes units, and its line, if they are known."""
    eqn = error.args[0]
    if eqn is None:
        return ""
    line = source_line(eqn)
    return f" ({eqn.primitive.name}{f' at {line}' if line else ''})"
