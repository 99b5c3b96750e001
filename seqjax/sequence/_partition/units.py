"""What the rest of a step does to each unit, as formulas.

A rest acts unit by unit if unit k of each result depends only on unit k of the state, of the drive and of the cuts, as
in an LSTM or a GRU. Then a vector of 4n numbers is four blocks of n units, and one formula describes all units of a
block.

Formulas are polynomials, so that (1 - z) a + z h and a + z (h - a) are the same formula. Their variables are numbered
atoms: the symbols of the state, the drive, the parameters and the cuts, and functions such as tanh of other formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.program import Eqn, bind, inline

Monomial = tuple[int, ...]  # the numbers of atoms, sorted; an atom squared stands twice
Formula = tuple[tuple[Monomial, float], ...]  # sorted
Blocks = list[Formula]  # of a vector; a scalar has one, and stands for any number of them
Symbol = tuple[Any, ...]  # a kind and numbers: ("cut", 0, 3)

LARGEST = 12  # monomials of a formula; a longer one becomes an atom
UNITWISE = {
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "ne", "nextafter", "not", "or", "pow", "real", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh",
    "sqrt", "square", "tan", "tanh", "xor", "complex",
}  # fmt: skip
SAME = {"copy", "copy_p", "reshape", "squeeze", "expand_dims", "stop_gradient"}
CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


class NotUnitwise(Exception):
    """An equation mixes units, or its primitive is not known to act unit by unit. The equation is its argument."""


class Atoms:
    """The atoms of a family of formulas, numbered in the order in which they appear."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.depends: list[frozenset[Symbol]] = []  # the symbols that an atom depends on
        self.names: list[Symbol | None] = []  # of the atoms that are symbols
        self.calls: list[tuple[Eqn | None, tuple[Formula, ...]] | None] = []  # of those that are functions

    def symbol(self, *name: Hashable) -> Formula:
        """A symbol as a formula."""
        return self._atom(("symbol", *name), frozenset([name]), name, None)

    def function(self, name: Hashable, *args: Formula, eqn: Eqn | None = None) -> Formula:
        """A function of formulas, as a formula. `eqn` computes it; without one, its value is its only argument."""
        depends = frozenset().union(*map(self.symbols, args))
        return self._atom((name, *args), depends, None, (eqn, args))

    @property
    def formulas(self) -> set[Formula]:
        """Every argument of a function."""
        return {arg for call in self.calls if call is not None for arg in call[1]}

    def symbols(self, formula: Formula) -> frozenset[Symbol]:
        """The symbols that a formula depends on."""
        return frozenset().union(*(self.depends[atom] for monomial, _ in formula for atom in monomial))

    def add(self, *formulas: Formula) -> Formula:
        """The sum."""
        return self._collected(term for formula in formulas for term in formula)

    def multiply(self, a: Formula, b: Formula) -> Formula:
        """The product."""
        return self._collected(((*sorted((*m, *k)),), c * d) for m, c in a for k, d in b)

    def _collected(self, terms: Iterable[tuple[Monomial, float]]) -> Formula:
        found: dict[Monomial, float] = {}
        for monomial, factor in terms:
            found[monomial] = found.get(monomial, 0.0) + factor
        formula = tuple(sorted((m, c) for m, c in found.items() if c != 0))
        return formula if len(formula) <= LARGEST else self.function("sum", formula)

    def _atom(self, key: Hashable, depends: frozenset[Symbol], name: Symbol | None, call: Any) -> Formula:
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self.depends.append(depends)
            self.names.append(name)
            self.calls.append(call)
        return (((self.numbers[key],), 1.0),)

    def value(self, formula: Formula, values: Mapping[Symbol, Any], found: dict[int, Any], like: Any) -> Any:
        """The value of a formula for all units.

        Args:
            formula: the formula.
            values: of each symbol that it depends on.
            found: the values of atoms, which are added to it.
            like: an array with the shape and dtype of the result.
        """
        total = None
        for monomial, factor in formula:
            term = None
            for atom in monomial:
                if atom not in found:
                    found[atom] = self._value_of_atom(atom, values, found, like)
                term = found[atom] if term is None else term * found[atom]
            if term is None:
                term = jnp.full_like(like, factor)
            elif factor != 1.0:
                term = -term if factor == -1.0 else jnp.asarray(factor, like.dtype) * term
            total = term if total is None else total + term
        return jnp.zeros_like(like) if total is None else total

    def _value_of_atom(self, atom: int, values: Mapping[Symbol, Any], found: dict[int, Any], like: Any) -> Any:
        name, call = self.names[atom], self.calls[atom]
        if name is not None or call is None:
            return values[name or ()]
        eqn, args = call
        dtypes = [like.dtype] * len(args) if eqn is None else [v.aval.dtype for v in eqn.invars]
        rows = [
            self.value(arg, values, found, jnp.zeros(like.shape, dtype))
            for arg, dtype in zip(args, dtypes, strict=True)
        ]
        if eqn is None:
            return rows[0]
        shape = jnp.broadcast_shapes(*map(jnp.shape, rows))
        return bind_alike(eqn, [jnp.broadcast_to(row, shape) for row in rows])


def constant(value: float) -> Formula:
    """A number as a formula."""
    return (((), value),) if value else ()


def bind_alike(eqn: Eqn, values: Sequence[Any]) -> Any:
    """The result of an elementwise equation for operands of another shape than its own."""
    if eqn.primitive.name in CALLS:
        return bind(eqn, values)[0]
    return eqn.primitive.bind(*values, **eqn.params)


class Units:
    """The formulas of the rest of a step.

    Attributes:
        size: n, the number of units.
        after: the formula of each leaf of the new state. It may depend on other new leaves.
        order: the leaves in an order in which each depends on earlier ones only.
        operands: the blocks of the operand of each cut.
    """

    def __init__(self, parts: Parts, atoms: Atoms, rename: Callable[[Symbol], Symbol] = lambda name: name) -> None:
        """Finds the formulas.

        Args:
            parts: a loop of a step.
            atoms: the atoms, shared between formulas that are compared.
            rename: the name of a symbol, from ("state", leaf), ("after", leaf), ("drive", passed value, block),
                ("parameter", hoisted value, block) or ("cut", cut, block); without a block for a scalar.

        Raises:
            NotUnitwise: the rest does not act unit by unit.
        """
        sizes = {v.aval.size for v in parts.state}
        if len(sizes) != 1 or any(v.aval.ndim != 1 for v in parts.state):
            raise NotUnitwise(None)
        self.size, self.atoms, self.rename = sizes.pop(), atoms, rename
        env: dict[Any, Blocks] = {v: self._symbols("state", k, v) for k, v in enumerate(parts.state)}
        known = {id(e) for c in parts.cuts for e in c.eqns}
        by_eqn = {id(c.eqns[-1]): (i, c) for i, c in enumerate(parts.cuts)}
        named = [("drive", k, v) for k, v in enumerate(parts.passed)]
        named += [("parameter", k, v) for k, v in enumerate(parts.hoisted) if parts.extra[k]]
        env |= {v: self._symbols(kind, k, v) for kind, k, v in named if self._in_blocks(v)}
        places = {v: k for k, v in enumerate(parts.after)}
        self.after: list[Formula] = [()] * len(parts.after)
        self.order: list[int] = []
        for e in parts.rest:
            if id(e) in by_eqn:
                i, c = by_eqn[id(e)]
                if not c.is_matrix or not self._in_blocks(c.out):
                    raise NotUnitwise(e)
                env[c.out] = self._symbols("cut", i, c.out)
            elif id(e) not in known:
                env.update(zip(e.outvars, self._results(e, env), strict=True))
            for v in e.outvars:  # what reads a new leaf of the state reads it as a symbol
                if v in places:
                    self.order.append(places[v])
                    self.after[places[v]] = self._of(v, env)[0]
                    env[v] = self._symbols("after", places[v], v)
        for k, v in enumerate(parts.after):
            if k not in self.order:
                self.order.append(k)
                self.after[k] = self._of(v, env)[0]
        self.operands = [self._of(c.operand, env) for c in parts.cuts]

    def _in_blocks(self, v: Any) -> bool:
        return v.aval.ndim == 0 or (v.aval.ndim == 1 and v.aval.size > 0 and v.aval.size % self.size == 0)

    def _symbols(self, kind: str, index: int, v: Any) -> Blocks:
        name = (kind, index)
        if kind in ("state", "after") or v.aval.ndim == 0:
            return [self.atoms.symbol(*self.rename(name))]
        return [self.atoms.symbol(*self.rename((*name, block))) for block in range(v.aval.size // self.size)]

    def _of(self, v: Any, env: dict[Any, Blocks]) -> Blocks:
        if isinstance(v, Literal):
            value = np.asarray(v.val)
            if value.ndim or np.iscomplexobj(value):
                raise NotUnitwise(None)
            return [constant(float(value))]
        if v not in env:
            raise NotUnitwise(None)
        return env[v]

    def _results(self, e: Eqn, env: dict[Any, Blocks]) -> list[Blocks]:
        name, out, size = e.primitive.name, e.outvars[0], self.size
        try:
            args = [self._of(v, env) for v in e.invars]
        except NotUnitwise:
            raise NotUnitwise(e) from None
        if name in CALLS:
            return [self._call(e, args)]
        if not all(map(self._in_blocks, e.outvars)):
            raise NotUnitwise(e)
        if name == "slice" and e.params["strides"] is None:
            (start,), (stop,) = e.params["start_indices"], e.params["limit_indices"]
            if start % size or stop % size:
                raise NotUnitwise(e)
            return [args[0][start // size : stop // size]]
        if name == "split":
            ends = np.cumsum([int(s) for s in e.params["sizes"]])
            if (ends % size).any():
                raise NotUnitwise(e)
            return [
                args[0][(end - int(s)) // size : end // size] for end, s in zip(ends, e.params["sizes"], strict=True)
            ]
        if name == "concatenate":
            return [[block for arg in args for block in arg]]
        if name == "broadcast_in_dim" and (e.invars[0].aval.ndim == 0 or e.invars[0].aval.shape == out.aval.shape):
            return [args[0] * (out.aval.size // size if out.aval.ndim and e.invars[0].aval.ndim == 0 else 1)]
        if name in SAME and e.invars[0].aval.size == out.aval.size:
            return [args[0]]
        return [self._elementwise(e, args)]

    def _call(self, e: Eqn, args: list[Blocks]) -> Blocks:
        """A function with a derivative of its own, such as relu: one atom, if its program acts unit by unit."""
        inner = inline(e.params[CALLS[e.primitive.name]]).jaxpr
        inside: dict[Any, Blocks] = dict(zip(inner.invars, args, strict=True))
        for inner_eqn in inner.eqns:
            inside.update(zip(inner_eqn.outvars, self._results(inner_eqn, inside), strict=True))
        if len(e.outvars) != 1 or any(len(arg) != 1 for arg in args) or e.outvars[0].aval.size != self.size:
            raise NotUnitwise(e)
        return [self.atoms.function(("call", id(e)), *(arg[0] for arg in args), eqn=e)]

    def _elementwise(self, e: Eqn, args: Sequence[Blocks]) -> Blocks:
        name, count, atoms = e.primitive.name, max(map(len, args)), self.atoms
        scalar = [v.aval.ndim == 0 for v in e.invars]
        rows = [arg * count if is_scalar else arg for arg, is_scalar in zip(args, scalar, strict=True)]
        if any(len(row) != count for row in rows):
            raise NotUnitwise(e)
        minus = constant(-1.0)
        if name in ("add", "add_any"):
            return [atoms.add(a, b) for a, b in zip(*rows, strict=True)]
        if name == "sub":
            return [atoms.add(a, atoms.multiply(minus, b)) for a, b in zip(*rows, strict=True)]
        if name == "neg":
            return [atoms.multiply(minus, a) for a in rows[0]]
        if name == "mul":
            return [atoms.multiply(a, b) for a, b in zip(*rows, strict=True)]
        if name in ("square", "integer_pow") and e.params.get("y", 2) == 2:
            return [atoms.multiply(a, a) for a in rows[0]]
        if name == "convert_element_type" and e.invars[0].aval.dtype == e.outvars[0].aval.dtype:
            return rows[0]
        if name not in UNITWISE:
            raise NotUnitwise(e)
        options = "" if name in ("tanh", "logistic") else str(sorted(e.params.items()))
        return [atoms.function((name, options), *column, eqn=e) for column in zip(*rows, strict=True)]
