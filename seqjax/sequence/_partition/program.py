"""Tools for the program (jaxpr) of a step: evaluate its equations, inline nested calls, follow its dependencies."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, jaxpr_as_fun, jaxprs_in_params
from jax.typing import ArrayLike
from jaxtyping import Array

if TYPE_CHECKING:
    # JAX does not declare that the abstract value of a variable has a shape and a dtype, so the real types would make
    # every use of them an error. At run time the annotations have the real types.
    Eqn = Var = Atom = Any
else:
    from jax.extend.core import JaxprEqn as Eqn
    from jax.extend.core import Var

    Atom = Var | Literal  # an operand of an equation

Env = dict[Var, Any]  # the values of variables
Read = Callable[[Atom], Any]  # from a variable or a literal to its value
Rule = Callable[[Env, Read], None]  # replaces an equation: computes its results in another way and adds them to the env

# Calls that have no derivative of their own, and the parameter that contains their program.
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
PRODUCTS = ("dot_general", "conv_general_dilated")

# Parts of the names of files that call a step but do not define one.
CALLERS = ("/jax/", "/jax/_src/", "seqjax/sequence/", "seqjax/cells/product.py", "contextlib.py", "functools.py")


def inexact(leaf: Any) -> bool:
    """Whether an array or an abstract value has a derivative, because it is real or complex."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """The atoms without literals."""
    return [v for v in atoms if not isinstance(v, Literal)]


def bind(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """The results of one equation; None for a result that nothing reads."""
    # A program of one equation works for every primitive. `primitive.bind` does not: calls and loops have programs
    # among their parameters, which JAX converts in a different way for each primitive.
    env = {v: value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    out = [v for v in eqn.outvars if not isinstance(v, DropVar)]
    program = _empty_program().replace(invars=list(env), outvars=out, eqns=[eqn], effects=eqn.effects)
    results = iter(jaxpr_as_fun(ClosedJaxpr(program, []))(*env.values()))
    return [None if isinstance(v, DropVar) else next(results) for v in eqn.outvars]


@functools.cache
def _empty_program() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def evaluate(eqns: Sequence[Eqn], env: Env, rules: Mapping[int, Rule] | None = None) -> Read:
    """Evaluates equations.

    Args:
        eqns: equations in an order in which they can run.
        env: the value of each variable. The results are added to it.
        rules: by the `id` of an equation, the rule that replaces it.

    Returns:
        A function that reads a variable or a literal.
    """
    rules = rules or {}

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for e in eqns:
        if id(e) in rules:
            rules[id(e)](env, read)
        else:
            env.update(zip(e.outvars, bind(e, [read(v) for v in e.invars]), strict=True))
    return read


def skip(env: Env, read: Read) -> None:
    """The rule of an equation whose results come from another rule."""


def copy_value(v: Var, e: Eqn) -> Rule:
    """The rule that gives the result of an equation the value of `v`."""

    def run(env: Env, read: Read) -> None:
        env[e.outvars[0]] = read(v)

    return run


def retrace(program: ClosedJaxpr, eqns: Sequence[Eqn], rules: Mapping[int, Rule]) -> ClosedJaxpr:
    """The same function with its equations in another order, some of them replaced by rules."""
    jaxpr = program.jaxpr

    def run(*args: Any) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args], strict=True))
        return list(map(evaluate(eqns, env, rules), jaxpr.outvars))

    return jax.make_jaxpr(run)(*program.in_avals)


def inline(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same function without nested calls, and with each product W v of a matrix and a vector written as v W^T."""

    def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        rules = {id(e): call(e) for e in jaxpr.eqns if e.primitive.name in INLINED}
        rules |= {id(e): _vector_first(e) for e in jaxpr.eqns if is_product(e, 2, 1)}
        return list(map(evaluate(jaxpr.eqns, env, rules), jaxpr.outvars))

    def call(e: Eqn) -> Rule:
        inner = e.params[INLINED[e.primitive.name]]
        body, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, [])

        def rule(env: Env, read: Read) -> None:
            env.update(zip(e.outvars, run(body, consts, [read(v) for v in e.invars]), strict=True))

        return rule

    return jax.make_jaxpr(lambda *args: run(program.jaxpr, program.consts, args))(*program.in_avals)


def _vector_first(e: Eqn) -> Rule:
    # Under `jax.vmap` the operand that comes first gives the rows of the product. They must be the examples, because
    # all other arrays of a loop have the batch in front, and XLA would transpose the product at every step.
    (in_left, in_right), no_batch = e.params["dimension_numbers"]
    params = {**e.params, "dimension_numbers": ((in_right, in_left), no_batch)}
    swapped = e.replace(invars=list(e.invars[::-1]), params=params)

    def rule(env: Env, read: Read) -> None:
        env[e.outvars[0]] = bind(swapped, [read(v) for v in swapped.invars])[0]

    return rule


def is_product(e: Eqn, *ranks: int) -> bool:
    """Whether an equation is a `dot_general` of operands of these ranks, without batch axes."""
    if e.primitive.name != "dot_general" or tuple(v.aval.ndim for v in e.invars) != ranks:
        return False
    return e.params["dimension_numbers"][1] == ((), ()) and e.params.get("out_sharding") is None


def contracted_axis(e: Eqn, operand: int) -> int:
    """The first axis of an operand that a product sums over."""
    return e.params["dimension_numbers"][0][operand][0]


def count_multiplications(e: Eqn) -> int:
    """The number of multiplications in the products of an equation, including those of programs inside it."""
    name = e.primitive.name
    if name == "dot_general":
        axes, _ = e.params["dimension_numbers"]
        return e.outvars[0].aval.size * math.prod(e.invars[0].aval.shape[axis] for axis in axes[0])
    if name == "conv_general_dilated":
        spec = e.params["dimension_numbers"].rhs_spec
        return e.outvars[0].aval.size * (e.invars[1].aval.size // e.invars[1].aval.shape[spec[0]])
    inner = [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in jaxprs_in_params(e.params)]
    return sum(count_multiplications(i) for jaxpr in inner for i in jaxpr.eqns)


def dependents(eqns: Sequence[Eqn], sources: Iterable[Var]) -> set[Var]:
    """The sources and all variables that depend on them."""
    found = set(sources)
    for e in eqns:
        if not found.isdisjoint(variables(e.invars)):
            found |= set(e.outvars)
    return found


def needed(eqns: Sequence[Eqn], wanted: Iterable[Atom]) -> tuple[list[Eqn], set[Var]]:
    """The equations on which the wanted variables depend, and every variable that these equations read."""
    read, selected = set(variables(wanted)), []
    for e in reversed(eqns):
        if not read.isdisjoint(e.outvars):
            selected.append(e)
            read |= set(variables(e.invars))
    return selected[::-1], read


def readers(eqns: Sequence[Eqn], outvars: Iterable[Atom]) -> dict[Var, list[Any]]:
    """For each variable the equations that read it, and None for each time that it is a result of the program."""
    found: dict[Var, list[Any]] = {}
    for e in eqns:
        for v in variables(e.invars):
            found.setdefault(v, []).append(e)
    for v in variables(outvars):
        found.setdefault(v, []).append(None)
    return found


def source_line(e: Eqn) -> str:
    """The line "file:line" of the step that an equation comes from; "" if it is unknown."""
    frames = getattr(e.source_info.traceback, "frames", ())
    for frame in frames:
        name = frame.file_name.replace(os.sep, "/")
        if not any(part in name for part in CALLERS):
            folder = os.getcwd().replace(os.sep, "/") + "/"
            short = name.rpartition("site-packages/")[2].removeprefix(folder)
            return f"{short}:{frame.line_num}"
    return ""


class Dependencies:
    """Which variables of a program depend on what.

    Attributes:
        eqns: the equations that the results need.
        from_state, from_x: the variables that depend on the state, and those that depend on the input.
        readers: for each variable the equations that read it, and None for each time that it is a result.
    """

    def __init__(self, program: ClosedJaxpr, n_params: int, n_state: int) -> None:
        """Follows the dependencies of (params.., state.., x..) -> results, with these numbers of leaves."""
        jaxpr = program.jaxpr
        # Without the equations that no result needs, because these would count as readers.
        self.eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
        self.from_state = dependents(self.eqns, jaxpr.invars[n_params : n_params + n_state])
        self.from_x = dependents(self.eqns, jaxpr.invars[n_params + n_state :])
        self.readers = readers(self.eqns, jaxpr.outvars)

    def on_state(self, v: Atom) -> bool:
        """Whether a variable depends on the state."""
        return not isinstance(v, Literal) and v in self.from_state

    def only_on_params(self, v: Atom) -> bool:
        """Whether a variable depends on parameters only."""
        return not isinstance(v, Literal) and v not in self.from_state and v not in self.from_x

    def only_reader(self, v: Var) -> Eqn | None:
        """The equation that reads a variable, if there is exactly one and the variable is not a result."""
        found = self.readers.get(v, [])  # [None] for a variable that is only a result
        return found[0] if len(found) == 1 else None

    def added_params(self, v: Var) -> tuple[Eqn, Var] | None:
        """The equation that adds parameters to a variable, and these parameters, if nothing else reads the variable."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if b is not None and self.only_on_params(b) and b.aval.shape == v.aval.shape else None

    def added_number(self, v: Var) -> tuple[Eqn, Literal] | None:
        """Like `added_params`, for a number that is written in the step, such as a forget bias of 1."""
        reader = self.only_reader(v)
        if reader is None or reader.primitive.name != "add":
            return None
        b: Any = next((b for b in reader.invars if b is not v), None)
        return (reader, b) if isinstance(b, Literal) and np.shape(b.val) == () else None

    def in_params_first_order(self) -> list[Eqn]:
        """The equations with those first that read parameters only, so that a merged product finds all its matrices."""
        return sorted(self.eqns, key=lambda e: not all(map(self.only_on_params, e.outvars)))

    def slices(self) -> dict[Var, tuple[Var, int]]:
        """For each slice of a vector, that vector and the first index."""
        return {v: (e.invars[0], start) for e in self.eqns if is_slice(e) for start, v in starts_of_slices(e)}


def can_regroup(v: Atom) -> bool:
    """Whether sums of this dtype may be regrouped, which changes the last digit of the result.

    In half precision the last digit matters, so there the order in which the step adds is preserved.
    """
    return inexact(v.aval) and v.aval.dtype.itemsize >= 4


def is_slice(e: Eqn) -> bool:
    """Whether an equation is a slice or a split, without strides."""
    if e.primitive.name == "slice":
        return e.params["strides"] is None
    return e.primitive.name == "split"


def starts_of_slices(e: Eqn) -> list[tuple[int, Var]]:
    """The first index of each result of a slice or a split of a vector."""
    if e.primitive.name == "slice":
        return [(e.params["start_indices"][0], e.outvars[0])]
    sizes = [int(size) for size in e.params["sizes"]]
    return list(zip(itertools.accumulate([0, *sizes[:-1]]), e.outvars, strict=True))


def overlap(ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether two of some ranges (start, stop) have an index in common."""
    return any(start < stop for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)))


def concatenated(parts: Iterable[ArrayLike]) -> ArrayLike:
    """The concatenation of vectors or matrices; a single one is returned without a copy."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def split(whole: Array, sizes: list[int]) -> list[Array]:
    """A vector in parts of these sizes; with a single size it is returned without a copy."""
    return [whole] if len(sizes) == 1 else list(lax.split(whole, sizes))
