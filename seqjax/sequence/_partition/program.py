"""Tools for the program (jaxpr) of a step: evaluate its equations, inline nested calls, follow its dependencies."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, jaxpr_as_fun, jaxprs_in_params

# Calls that have no derivative of their own, and the parameter that holds their program.
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}

TRACING = ("seqjax/sequence/", "seqjax/cells/product.py", "contextlib.py", "functools.py")

Eqn = Any  # a JaxprEqn, whose variables have no static type
Read = Callable[[Any], Any]  # from a variable or a literal to its value
Rule = Callable[[dict[Any, Any], Read], None]  # evaluates one equation in its own way: writes results into the env


def inexact(leaf: Any) -> bool:
    """Whether a value has a derivative: a float or a complex number."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """The atoms without literals."""
    return [v for v in atoms if not isinstance(v, Literal)]


def bind(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """The results of one equation; None for a result that nothing reads."""
    given = {v: value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    out = [v for v in eqn.outvars if not isinstance(v, DropVar)]
    program = _empty().replace(invars=list(given), outvars=out, eqns=[eqn], effects=eqn.effects)
    results = iter(jaxpr_as_fun(ClosedJaxpr(program, []))(*given.values()))
    return [None if isinstance(v, DropVar) else next(results) for v in eqn.outvars]


@functools.cache
def _empty() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def evaluate(eqns: Sequence[Eqn], env: dict[Any, Any], rules: Mapping[int, Rule] | None = None) -> Read:
    """Runs equations over `env`.

    Args:
        eqns: equations in an order in which they can be run.
        env: the value of each variable; results are added to it.
        rules: by `id` of an equation, what to run in its place.

    Returns:
        A function that reads a variable or a literal.
    """
    rules = rules or {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for e in eqns:
        if id(e) in rules:
            rules[id(e)](env, read)
        else:
            env.update(zip(e.outvars, bind(e, [read(v) for v in e.invars]), strict=True))
    return read


def retrace(closed: ClosedJaxpr, eqns: Sequence[Eqn], rules: Mapping[int, Rule]) -> ClosedJaxpr:
    """The same function with its equations in another order, some of them replaced by rules."""
    jaxpr = closed.jaxpr

    def run(*args: Any) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
        return list(map(evaluate(eqns, env, rules), jaxpr.outvars))

    return jax.make_jaxpr(run)(*closed.in_avals)


def inline(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same function without nested calls, and with each product W v of a matrix and a vector as v W^T.

    The vector comes first because then the rows of the product over a batch are examples, as everywhere else.
    """

    def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def call(e: Eqn) -> Rule:
            inner = e.params[INLINED[e.primitive.name]]
            body, own = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, [])

            def rule(env: dict[Any, Any], read: Read) -> None:
                env.update(zip(e.outvars, run(body, own, [read(v) for v in e.invars]), strict=True))

            return rule

        def vector_first(e: Eqn) -> Rule:
            (in_left, in_right), no_batch = e.params["dimension_numbers"]
            params = {**e.params, "dimension_numbers": ((in_right, in_left), no_batch)}
            swapped = e.replace(invars=list(e.invars[::-1]), params=params)

            def rule(env: dict[Any, Any], read: Read) -> None:
                env[e.outvars[0]] = bind(swapped, [read(v) for v in swapped.invars])[0]

            return rule

        rules = {id(e): call(e) for e in jaxpr.eqns if e.primitive.name in INLINED}
        rules |= {id(e): vector_first(e) for e in jaxpr.eqns if is_product(e, 2, 1)}
        return list(map(evaluate(jaxpr.eqns, env, rules), jaxpr.outvars))

    return jax.make_jaxpr(lambda *args: run(closed.jaxpr, closed.consts, args))(*closed.in_avals)


def is_product(e: Eqn, *ranks: int) -> bool:
    """Whether an equation is `dot_general` of operands of these ranks, without batch axes."""
    if e.primitive.name != "dot_general" or tuple(v.aval.ndim for v in e.invars) != ranks:
        return False
    return e.params["dimension_numbers"][1] == ((), ()) and e.params.get("out_sharding") is None


def contracted(e: Eqn, operand: int) -> int:
    """The first axis of an operand of a product that is summed over."""
    return e.params["dimension_numbers"][0][operand][0]


def multiplications(e: Eqn) -> int:
    """The multiplications of the products of an equation, those of programs inside it included."""
    name = e.primitive.name
    if name == "dot_general":
        axes, _ = e.params["dimension_numbers"]
        return e.outvars[0].aval.size * math.prod(e.invars[0].aval.shape[axis] for axis in axes[0])
    if name == "conv_general_dilated":
        spec = e.params["dimension_numbers"].rhs_spec
        return e.outvars[0].aval.size * (e.invars[1].aval.size // e.invars[1].aval.shape[spec[0]])
    inner = [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in jaxprs_in_params(e.params)]
    return sum(multiplications(i) for jaxpr in inner for i in jaxpr.eqns)


def reach(eqns: Sequence[Eqn], sources: Iterable[Any]) -> set[Any]:
    """The variables that depend on the sources, these included."""
    found = set(sources)
    for e in eqns:
        if not found.isdisjoint(variables(e.invars)):
            found |= set(e.outvars)
    return found


def needed(eqns: Sequence[Eqn], wanted: Iterable[Any]) -> tuple[list[Eqn], set[Any]]:
    """The equations on which the wanted variables depend, and every variable that these read."""
    read, kept = set(variables(wanted)), []
    for e in reversed(eqns):
        if not read.isdisjoint(e.outvars):
            kept.append(e)
            read |= set(variables(e.invars))
    return kept[::-1], read


def readers(eqns: Sequence[Eqn], outvars: Iterable[Any]) -> dict[Any, list[Any]]:
    """For each variable the equations that read it, and None for each time that it is a result."""
    found: dict[Any, list[Any]] = {}
    for e in eqns:
        for v in variables(e.invars):
            found.setdefault(v, []).append(e)
    for v in variables(outvars):
        found.setdefault(v, []).append(None)
    return found


def source_line(e: Eqn) -> str:
    """Where in the source an equation was written: the innermost place outside of JAX and of the tracing, or ""."""
    frames = getattr(e.source_info.traceback, "frames", ())
    for frame in frames:
        name = frame.file_name.replace(os.sep, "/")
        if not any(part in name for part in ("/jax/", "/jax/_src/", *TRACING)):
            here = os.getcwd().replace(os.sep, "/") + "/"
            short = name.rpartition("site-packages/")[2].removeprefix(here)
            return f"{short}:{frame.line_num}"
    return ""
