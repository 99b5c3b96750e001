"""What the rest of a step does to each unit, as formulas.

A rest acts unit by unit if unit k of each result depends only on unit k of the state, of the drive and of the cuts, as
in an LSTM or a GRU. Then a vector of 4n numbers is four blocks of n units, and one formula describes all units of a
block.

Formulas are polynomials, so that (1 - z) a + z h and a + z (h - a) are the same formula. Their variables are numbered
terms: the symbols of the state, the drive, the parameters and the cuts, and functions such as tanh of other formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.typing import ArrayLike
from jaxtyping import Array

from seqjax.sequence._partition.program import Atom, Eqn, Var, bind, inline

if TYPE_CHECKING:
    from seqjax.sequence._partition.parts import Parts
else:
    Parts = Any

Monomial = tuple[int, ...]  # the sorted numbers of its terms; the number of a squared term occurs twice
Formula = tuple[tuple[Monomial, float], ...]  # sorted monomials and their factors
# One value per block of a vector: a formula, or what other terms compute with. A scalar has one, which stands for any
# number of blocks.
Blocks = list[Any]
Symbol = tuple[Any, ...]  # a kind and numbers: ("cut", 0, 3)
Call = tuple[Eqn | None, tuple[Formula, ...]]  # the equation that computes a function, and its arguments

# The monomials of a formula. A longer formula becomes one term, because products of sums grow exponentially.
LARGEST = 12
# Primitives of which each number of the result depends only on the numbers at the same index of the operands.
ELEMENTWISE = {
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "ne", "nextafter", "not", "or", "pow", "real", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh",
    "sqrt", "square", "tan", "tanh", "xor", "complex",
}  # fmt: skip
# Primitives that do not change the numbers or their order.
UNCHANGED = {"copy", "copy_p", "reshape", "squeeze", "expand_dims", "stop_gradient"}
# Calls with a derivative of their own, and the parameter that contains their program.
CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


RELU = ("relu", "")  # the name of the function


class NotUnitwise(Exception):
    """An equation mixes units, or its primitive is not known to act unit by unit. The equation is its argument."""


class Terms:
    """The terms of a family of formulas, numbered in the order in which they appear.

    Formulas of the same terms are equal as tuples if they are equal as polynomials.
    """

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.depends: list[frozenset[Symbol]] = []  # the symbols that a term depends on
        self.names: list[Symbol | None] = []  # the name of a term that is a symbol
        self.calls: list[Call | None] = []  # the call of a term that is a function

    def symbol(self, *name: Hashable) -> Formula:
        """A symbol as a formula."""
        return self._term(("symbol", *name), frozenset([name]), name, None)

    def named(self, name: Symbol, formula: Formula) -> Formula:
        """A symbol in place of a formula, so that what reads it does not repeat the formula."""
        del formula
        return self.symbol(*name)

    def constant(self, value: ArrayLike, like: Any) -> Formula:
        """A number as a formula, whatever its dtype `like.dtype` is."""
        del like
        return constant(float(np.asarray(value)))

    def function(self, name: Hashable, *args: Formula, eqn: Eqn | None = None) -> Formula:
        """A function of formulas, as a formula. `eqn` computes it; without one, its value is its only argument."""
        depends = frozenset().union(*map(self.symbols, args))
        return self._term((name, *args), depends, None, (eqn, args))

    @property
    def formulas(self) -> set[Formula]:
        """Every argument of a function."""
        return {arg for call in self.calls if call is not None for arg in call[1]}

    def symbols(self, formula: Formula) -> frozenset[Symbol]:
        """The symbols that a formula depends on."""
        return frozenset().union(*(self.depends[term] for monomial, _ in formula for term in monomial))

    def add(self, *formulas: Formula) -> Formula:
        """The sum."""
        return self._collect(summand for formula in formulas for summand in formula)

    def multiply(self, a: Formula, b: Formula) -> Formula:
        """The product."""
        return self._collect(((*sorted((*m, *k)),), c * d) for m, c in a for k, d in b)

    def _collect(self, summands: Iterable[tuple[Monomial, float]]) -> Formula:
        found: dict[Monomial, float] = {}
        for monomial, factor in summands:
            found[monomial] = found.get(monomial, 0.0) + factor
        formula = tuple(sorted((m, c) for m, c in found.items() if c != 0))
        return formula if len(formula) <= LARGEST else self.function("sum", formula)

    def _term(
        self,
        key: Hashable,
        depends: frozenset[Symbol],
        name: Symbol | None,
        call: Call | None,
    ) -> Formula:
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self.depends.append(depends)
            self.names.append(name)
            self.calls.append(call)
        return (((self.numbers[key],), 1.0),)

    def value(self, formula: Formula, values: Mapping[Symbol, Any], found: dict[int, Any], like: ArrayLike) -> Array:
        """The value of a formula for all units.

        Args:
            formula: the formula.
            values: the value of each symbol that the formula depends on.
            found: the values of terms that are known already. New ones are added to it.
            like: an array with the shape and dtype of the result.
        """
        dtype, total = jnp.result_type(like), None
        for monomial, factor in formula:
            product = None
            for term in monomial:
                if term not in found:
                    found[term] = self._value_of_term(term, values, found, like)
                product = found[term] if product is None else product * found[term]
            if product is None:
                product = jnp.full_like(like, factor)
            elif factor != 1.0:
                product = -product if factor == -1.0 else jnp.asarray(factor, dtype) * product
            total = product if total is None else total + product
        return jnp.zeros_like(like) if total is None else total

    def _value_of_term(self, term: int, values: Mapping[Symbol, Any], found: dict[int, Any], like: ArrayLike) -> Any:
        name, call = self.names[term], self.calls[term]
        if name is not None or call is None:
            return values[name or ()]
        eqn, args = call
        dtype, shape = jnp.result_type(like), jnp.shape(like)
        dtypes = [dtype] * len(args) if eqn is None else [v.aval.dtype for v in eqn.invars]
        rows = [
            self.value(arg, values, found, jnp.zeros(shape, dtype)) for arg, dtype in zip(args, dtypes, strict=True)
        ]
        if eqn is None:
            return rows[0]
        shape = jnp.broadcast_shapes(*map(jnp.shape, rows))
        return bind_to_units(eqn, [jnp.broadcast_to(row, shape) for row in rows])


def constant(value: float) -> Formula:
    """A number as a formula."""
    return (((), value),) if value else ()


def _is_relu(e: Eqn) -> bool:
    """Whether a call is `jax.nn.relu`, with its derivative: a surrogate may have the same values."""
    if e.primitive.name != "custom_jvp_call" or len(e.invars) != 1:
        return False

    def program(f: Callable[[Array], Any]) -> str:
        v = e.invars[0].aval
        x = jax.ShapeDtypeStruct(v.shape, v.dtype)
        return str(jax.make_jaxpr(lambda x, t: jax.jvp(f, (x,), (t,)))(x, x))

    return program(lambda x: bind(e, [x])[0]) == program(jax.nn.relu)


def bind_to_units(eqn: Eqn, values: Sequence[Array]) -> Array:
    """The result of an elementwise equation for operands of another shape than its own."""
    if eqn.primitive.name in CALLS:
        return bind(eqn, values)[0]
    return eqn.primitive.bind(*values, **eqn.params)


class Units:
    """The formulas of the rest of a step.

    Attributes:
        size: n, the number of units.
        new_state: the formula of each leaf of the new state. It may depend on other leaves of the new state.
        order: the leaves in an order in which each depends on earlier ones only.
        operands: the blocks of the operand of each cut.
        outputs: the blocks of each output; None for an output that is no vector of these units.
    """

    def __init__(self, parts: Parts, terms: Any, rename: Callable[[Symbol], Symbol] = lambda name: name) -> None:
        """Finds the formulas.

        Args:
            parts: a loop of a step.
            terms: the terms, shared between formulas that are compared; or an object with the same methods `symbol`,
                `named`, `constant`, `function`, `add` and `multiply` that computes with other values.
            rename: from the name of a symbol to another name. The names are ("state", leaf), ("after", leaf),
                ("drive", drive, block), ("parameter", hoisted value, block) and ("cut", cut, block), without a block
                for a scalar.

        Raises:
            NotUnitwise: the rest does not act unit by unit.
        """
        sizes = {v.aval.size for v in parts.state}
        if len(sizes) != 1 or any(v.aval.ndim != 1 for v in parts.state):
            raise NotUnitwise(None)
        self.size, self.terms, self.rename = sizes.pop(), terms, rename
        self.new_state: list[Any] = [()] * len(parts.new_state)
        self.order: list[int] = []
        env = self._inputs(parts)
        self._follow(parts, env)
        for k, v in enumerate(parts.new_state):
            if k not in self.order:  # a leaf that the step returns unchanged
                self._add_new_leaf(k, v, env)
        self.operands = [self._lookup(c.operand, env) for c in parts.cuts]
        self.outputs = [None if isinstance(v, Literal) else env.get(v) for v in parts.outputs]

    def _inputs(self, parts: Parts) -> dict[Var, Blocks]:
        env = {v: self._symbols("state", k, v) for k, v in enumerate(parts.state)}
        named = [("drive", k, v) for k, v in enumerate(parts.drives)]
        named += [("parameter", k, v) for k, v in enumerate(parts.hoisted) if parts.read_in_loop[k]]
        return env | {v: self._symbols(kind, k, v) for kind, k, v in named if self._in_blocks(v)}

    def _follow(self, parts: Parts, env: dict[Var, Blocks]) -> None:
        """Adds the formulas of the results of all equations to `env`."""
        replaced = {id(e) for c in parts.cuts for e in c.eqns}
        by_eqn = {id(c.eqns[-1]): (i, c) for i, c in enumerate(parts.cuts)}
        leaves = {v: k for k, v in enumerate(parts.new_state) if not isinstance(v, Literal)}
        for e in parts.rest:
            if id(e) in by_eqn:
                i, c = by_eqn[id(e)]
                if not c.is_matrix or not self._in_blocks(c.out):
                    raise NotUnitwise(e)
                env[c.out] = self._symbols("cut", i, c.out)
            elif id(e) not in replaced:
                env.update(zip(e.outvars, self._results(e, env), strict=True))
            for v in e.outvars:
                if v in leaves:
                    self._add_new_leaf(leaves[v], v, env)
                    # So h = o tanh(c) does not repeat the formula of c.
                    env[v] = [self.terms.named(self.rename(("after", leaves[v])), self.new_state[leaves[v]])]

    def _add_new_leaf(self, k: int, v: Atom, env: dict[Var, Blocks]) -> None:
        self.order.append(k)
        self.new_state[k] = self._lookup(v, env)[0]

    def _in_blocks(self, v: Var) -> bool:
        return v.aval.ndim == 0 or (v.aval.ndim == 1 and v.aval.size > 0 and v.aval.size % self.size == 0)

    def _symbols(self, kind: str, index: int, v: Var) -> Blocks:
        name = (kind, index)
        if kind == "state" or v.aval.ndim == 0:
            return [self.terms.symbol(*self.rename(name))]
        return [self.terms.symbol(*self.rename((*name, block))) for block in range(v.aval.size // self.size)]

    def _lookup(self, v: Atom, env: dict[Var, Blocks]) -> Blocks:
        if isinstance(v, Literal):
            value = np.asarray(v.val)
            if value.ndim or np.iscomplexobj(value):
                raise NotUnitwise(None)
            return [self.terms.constant(value, v.aval)]
        if v not in env:
            raise NotUnitwise(None)
        return env[v]

    def _results(self, e: Eqn, env: dict[Var, Blocks]) -> list[Blocks]:
        name, out, size = e.primitive.name, e.outvars[0], self.size
        try:
            args = [self._lookup(v, env) for v in e.invars]
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
        if name in UNCHANGED and e.invars[0].aval.size == out.aval.size:
            return [args[0]]
        return [self._elementwise(e, args)]

    def _call(self, e: Eqn, args: list[Blocks]) -> Blocks:
        """A function with a derivative of its own, such as relu, as one term, if its program acts unit by unit."""
        inner = inline(e.params[CALLS[e.primitive.name]]).jaxpr
        inside: dict[Var, Blocks] = dict(zip(inner.invars, args, strict=True))
        for inner_eqn in inner.eqns:
            inside.update(zip(inner_eqn.outvars, self._results(inner_eqn, inside), strict=True))
        if len(e.outvars) != 1 or any(len(arg) != 1 for arg in args) or e.outvars[0].aval.size != self.size:
            raise NotUnitwise(e)
        # Named by its identity, because two calls of the same name may be different functions.
        is_max = [inner_eqn.primitive.name for inner_eqn in inner.eqns] == ["max"]
        name = RELU if is_max and _is_relu(e) else ("call", id(e))
        return [self.terms.function(name, *(arg[0] for arg in args), eqn=e)]

    def _elementwise(self, e: Eqn, args: Sequence[Blocks]) -> Blocks:
        name, count, terms = e.primitive.name, max(map(len, args)), self.terms
        scalar = [v.aval.ndim == 0 for v in e.invars]
        rows = [arg * count if is_scalar else arg for arg, is_scalar in zip(args, scalar, strict=True)]
        if any(len(row) != count for row in rows):
            raise NotUnitwise(e)
        minus = terms.constant(-1.0, e.invars[0].aval)
        if name in ("add", "add_any"):
            return [terms.add(a, b) for a, b in zip(*rows, strict=True)]
        if name == "sub":
            return [terms.add(a, terms.multiply(minus, b)) for a, b in zip(*rows, strict=True)]
        if name == "neg":
            return [terms.multiply(minus, a) for a in rows[0]]
        if name == "mul":
            return [terms.multiply(a, b) for a, b in zip(*rows, strict=True)]
        if name in ("square", "integer_pow") and e.params.get("y", 2) == 2:
            return [terms.multiply(a, a) for a in rows[0]]
        if name == "convert_element_type" and e.invars[0].aval.dtype == e.outvars[0].aval.dtype:
            return rows[0]
        if name not in ELEMENTWISE:
            raise NotUnitwise(e)
        options = "" if name in ("tanh", "logistic") else str(sorted(e.params.items()))
        return [terms.function((name, options), *column, eqn=e) for column in zip(*rows, strict=True)]
