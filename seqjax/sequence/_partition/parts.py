"""The parts of a step, found in the program of the step itself.

    once     equations that read parameters only                              evaluated once
    drive    equations that read the input and not the state                  evaluated for a whole chunk of time
    rest     equations that read the state                                    evaluated in the loop
    cuts     products, among the rest, of something that depends on the state with something that depends on
             parameters only

If every state is known, every cut is known too. Then the cuts of a chunk come from one product each, the backward loop
holds one product per cut, and the gradient of each weight matrix is one product per chunk.

The program is that of the masked step (`seqjax.sequence._masked_step`). A mask, a reset, noise and the values that are
saved are equations or inputs of the program, so they need no special cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from seqjax.sequence._partition.normalize import normalized
from seqjax.sequence._partition.program import (
    Eqn,
    Rule,
    bind,
    contracted,
    evaluate,
    inexact,
    is_product,
    multiplications,
    needed,
    reach,
    readers,
    variables,
)
from seqjax.sequence._partition.sigmoids import rules_for_slices

CUTS = ("dot_general", "conv_general_dilated")
LARGE = 2**14  # numbers of a matrix, from which on turning it costs more than one row gains


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """r = W v + b: a product of a vector that depends on the state with weights that depend on parameters only.

    Attributes:
        eqn: the product.
        operand: v, its variable.
        weights: W, its variable.
        added: the equation that adds b, and b, if there is one.
        is_matrix: whether v is one vector and W one matrix (out, in).
    """

    eqn: Eqn
    operand: Any
    weights: Any
    added: tuple[Eqn, Any] | None
    is_matrix: bool

    @property
    def out(self) -> Any:
        """The variable of r."""
        return self.eqn.outvars[0] if self.added is None else self.added[0].outvars[0]

    @property
    def eqns(self) -> list[Eqn]:
        """The equations that a known r replaces."""
        return [self.eqn] if self.added is None else [self.eqn, self.added[0]]

    def product(self, W: Any, v: Any) -> Any:
        """W v, without b."""
        return bind(self.eqn, [v if a is self.operand else W for a in self.eqn.invars])[0]

    def is_stored_turned(self, batch: int) -> bool:
        """Whether the loop reads W^T: XLA's product on a CPU is faster on it, except for one row and a large matrix."""
        e = self.eqn
        if e.primitive.name != "dot_general" or self.weights.aval.ndim != 2:
            return False
        place = self._place_of_weights
        return contracted(e, place) == place and (batch > 1 or self.weights.aval.size <= LARGE)

    def product_of_turned(self, turned: Any, v: Any) -> Any:
        """`product` from W^T."""
        place = self._place_of_weights
        axes, batch = self.eqn.params["dimension_numbers"]
        turned_axes = tuple((1 - axes[place][0],) if k == place else axes[k] for k in (0, 1))
        operands = [v if a is self.operand else turned for a in self.eqn.invars]
        return self.eqn.primitive.bind(*operands, **{**self.eqn.params, "dimension_numbers": (turned_axes, batch)})

    @property
    def _place_of_weights(self) -> int:
        return 0 if self.eqn.invars[0] is self.weights else 1

    def value(self, weight: tuple[Any, Any], v: Any) -> Any:
        """W v + b."""
        W, b = weight
        r = self.product(W, v)
        return r if b is None else r + b


@dataclasses.dataclass(frozen=True)
class Moving:
    """What of a loop depends on the leaves whose derivatives are wanted.

    Attributes:
        fixed: for each hoisted value, and for (W, b) of each cut; in the tree that `Parts.hoist` returns.
        extra: the hoisted values that the loop reads beside the cuts.
        passed: the passed values.
        cuts: the cuts of which W or b does.
    """

    fixed: tuple[list[bool], list[tuple[bool, bool | None]]]
    extra: list[bool]
    passed: list[bool]
    cuts: list[bool]


class Parts:
    """The program of one loop, (params.., state.., x..) -> (after.., kept..), in its parts.

    Attributes:
        params: its parameters; what the cell closes over is among them, and `consts` are the values of these.
        state, x: its other inputs.
        after, kept: its results: the state after the step, and what is saved of the step.
        once, drive, rest: its equations.
        cuts: the products of the rest that come from one product per chunk if the states are known.
        hoisted: the variables of parameters only that the drive or the rest reads.
        passed: the variables of the input only that the rest reads.
        extra: for each of `hoisted`, whether the loop reads it beside the cuts.
        biases: of the passed values that are u + b, u from the input and b parameters: u and b.
        seen: for each leaf of the state, whether a cut's operand is computed from it. Only these are saved for the
            backward pass. The others are rematerialized without products.
    """

    def __init__(self, closed: ClosedJaxpr, params: int, state: int, with_sigmoids: bool = True) -> None:
        closed = normalized(closed, params, state, with_sigmoids)
        jaxpr, self.consts = closed.jaxpr, closed.consts
        self.params = [*jaxpr.constvars, *jaxpr.invars[:params]]
        self.state = list(jaxpr.invars[params : params + state])
        self.x = list(jaxpr.invars[params + state :])
        self.after, self.kept = list(jaxpr.outvars[:state]), list(jaxpr.outvars[state:])
        eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
        from_x, from_state = reach(eqns, self.x), reach(eqns, self.state)
        late = {id(e) for e in eqns if not from_state.isdisjoint(e.outvars)}
        late |= _slices_for_the_rest(eqns, late, from_x, jaxpr.outvars)
        self.rest = [e for e in eqns if id(e) in late]
        early = [e for e in eqns if id(e) not in late]
        self.drive = [e for e in early if not from_x.isdisjoint(e.outvars)]
        self.once = [e for e in early if from_x.isdisjoint(e.outvars)]
        self.cuts = self._find_cuts(from_state, from_x)
        known = {id(e) for c in self.cuts for e in c.eqns}
        in_loop = set(variables(v for e in self.rest if id(e) not in known for v in e.invars))
        in_loop |= {c.operand for c in self.cuts} | set(variables(jaxpr.outvars))
        read = in_loop | set(variables(v for e in self.drive for v in e.invars))
        fixed = [*self.params, *(v for e in self.once for v in e.outvars)]
        self.hoisted = [v for v in dict.fromkeys(fixed) if v in read]
        given = [*self.x, *(v for e in self.drive for v in e.outvars)]
        self.passed = [v for v in dict.fromkeys(given) if v in in_loop]
        self.extra = [v in in_loop and inexact(v.aval) for v in self.hoisted]
        self.biases = self._find_biases(from_x)
        self.sigmoids = rules_for_slices(self.rest)
        self.to_cuts, _ = needed(self.rest, [c.out for c in self.cuts])
        # A backward slice that stops at cuts: what a cut gave is known to the equations after it.
        _, by_cuts = needed([e for e in self.rest if id(e) not in known], [c.operand for c in self.cuts])
        self.seen = [v in by_cuts for v in self.state]

    def _find_cuts(self, from_state: set[Any], from_x: set[Any]) -> list[Cut]:
        def is_late(v: Any) -> bool:
            return not isinstance(v, Literal) and v in from_state

        def is_fixed(v: Any) -> bool:
            return not isinstance(v, Literal) and v not in from_state and v not in from_x

        read_by = readers(self.rest, [*self.after, *self.kept])

        def added_to(out: Any) -> tuple[Eqn, Any] | None:
            if len(read_by.get(out, [])) != 1 or read_by[out][0] is None or read_by[out][0].primitive.name != "add":
                return None
            reader = read_by[out][0]
            b = next((b for b in reader.invars if b is not out), None)
            return (reader, b) if b is not None and is_fixed(b) and b.aval.shape == out.aval.shape else None

        found = []
        for e in self.rest:
            late, fixed = [v for v in e.invars if is_late(v)], [v for v in e.invars if is_fixed(v)]
            if e.primitive.name in CUTS and (len(late), len(fixed)) == (1, 1) and inexact(late[0].aval):
                is_matrix = is_product(e, 1, 2)
                added = added_to(e.outvars[0]) if is_matrix else None
                found.append(Cut(e, late[0], fixed[0], added, is_matrix))
        return found

    def _find_biases(self, from_x: set[Any]) -> dict[Any, tuple[Any, Any]]:
        found = {}
        for e in self.drive:
            if e.primitive.name == "add" and e.outvars[0] in self.passed and inexact(e.outvars[0].aval):
                u, b = e.invars if e.invars[0] in from_x else e.invars[::-1]
                if b in self.hoisted and u.aval.shape == b.aval.shape:
                    found[e.outvars[0]] = u, b
        return found

    @property
    def pays(self) -> bool:
        """Whether the products that leave the loops outweigh those that cannot, which the backward pass runs again."""
        cuts = {id(c.eqn) for c in self.cuts}
        gained = [e for e in self.rest if id(e) in cuts] + self.drive
        lost = [e for e in self.rest if id(e) not in cuts]
        return sum(map(multiplications, gained)) > sum(map(multiplications, lost))

    def moving(self, wanted: Sequence[bool]) -> Moving:
        """What depends on the wanted leaves of [*params, *state, *x]."""
        inputs = [*self.params, *self.state, *self.x]
        sources = [v for v, w in zip(inputs, wanted, strict=True) if w and inexact(v.aval)]
        found = reach([*self.once, *self.drive], sources)

        def is_in(v: Any) -> bool:
            return v in found and inexact(v.aval)

        hoisted = [*map(is_in, self.hoisted)]
        weights = [(is_in(c.weights), None if c.added is None else is_in(c.added[1])) for c in self.cuts]
        extra = [e and h for e, h in zip(self.extra, hoisted, strict=True)]
        return Moving((hoisted, weights), extra, [*map(is_in, self.passed)], [any(pair) for pair in weights])

    def hoist(self, params: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The hoisted values, and (W, b) of each cut: computed once."""
        read = evaluate(self.once, dict(zip(self.params, params, strict=True)))
        weights = [(read(c.weights), None if c.added is None else read(c.added[1])) for c in self.cuts]
        return [read(v) for v in self.hoisted], weights

    def drives(self, hoisted: tuple[list[Any], list[Any]], x: Sequence[Any]) -> list[Any]:
        """The passed values of one example at one time."""
        return self.with_biases(hoisted, self.without_biases(hoisted, x))

    def without_biases(self, hoisted: tuple[list[Any], list[Any]], x: Sequence[Any]) -> list[Any]:
        """`drives` before biases are added, which costs less in the loop than in a pass over a chunk."""
        env = dict(zip([*self.hoisted, *self.x], [*hoisted[0], *x], strict=True))
        read = evaluate(self.drive, env)
        return [read(self.biases[v][0] if v in self.biases else v) for v in self.passed]

    def with_biases(self, hoisted: tuple[list[Any], list[Any]], drives: Sequence[Any]) -> list[Any]:
        """`drives` from `without_biases`, for any number of axes in front."""
        values = dict(zip(self.hoisted, hoisted[0], strict=True))
        return [
            u + jnp.broadcast_to(values[self.biases[v][1]], u.shape) if v in self.biases else u
            for v, u in zip(self.passed, drives, strict=True)
        ]

    def products_in_loop(self, hoisted: tuple[list[Any], list[Any]], batch: int) -> Callable[[int, Any], Any]:
        """The value of a cut, of its index and its operand, from weights that lie in memory as a loop wants them."""
        turned = [c.is_stored_turned(batch) for c in self.cuts]
        stored = [W.T if turns else W for (W, _), turns in zip(hoisted[1], turned, strict=True)]

        def value(i: int, v: Any) -> Any:
            b = hoisted[1][i][1]
            r = (self.cuts[i].product_of_turned if turned[i] else self.cuts[i].product)(stored[i], v)
            return r if b is None else r + b

        return value

    def finish(
        self,
        hoisted: tuple[list[Any], list[Any]],
        state: Sequence[Any],
        drives: Sequence[Any],
        cut: Callable[[int, Any], Any] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """The rest of the step of one example: (after, kept).

        Args:
            hoisted: from `hoist`.
            state: the state before the step.
            drives: the passed values of the step.
            cut: the value of a cut, of its index and its operand; by default its product.
        """
        run = cut or (lambda i, v: self.cuts[i].value(hoisted[1][i], v))
        read = self._run(self.rest, run, hoisted[0], state, drives)
        return [read(v) for v in self.after], [read(v) for v in self.kept]

    def next_state(
        self, hoisted: tuple[list[Any], list[Any]], state: Sequence[Any], drives: Sequence[Any], results: Sequence[Any]
    ) -> list[Any]:
        """The state after the step of one example, from the known results of the cuts."""
        wanted, _ = needed(self.rest, self.after)
        read = self._run(wanted, lambda i, v: results[i], hoisted[0], state, drives, self.sigmoids)
        return [read(v) for v in self.after]

    def finish_known(
        self, hoisted: tuple[list[Any], list[Any]], state: Sequence[Any], drives: Sequence[Any], results: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """`finish` with the result of each cut known: no product to run, one product to differentiate."""
        return self.finish(hoisted, state, drives, lambda i, v: known(self.cuts[i], results[i], v, hoisted[1][i][0]))

    def results(self, hoisted: tuple[list[Any], list[Any]], state: Sequence[Any], drives: Sequence[Any]) -> list[Any]:
        """The result of each cut, from the states that they read; differentiable with respect to the weights only."""
        found: list[Any] = [None] * len(self.cuts)

        def cut(i: int, v: Any) -> Any:
            found[i] = self.cuts[i].value(hoisted[1][i], lax.stop_gradient(v))
            return found[i]

        self._run(self.to_cuts, cut, hoisted[0], state, drives)
        return found

    def _run(
        self,
        eqns: Sequence[Eqn],
        cut: Callable[[int, Any], Any],
        hoisted: Sequence[Any],
        state: Sequence[Any],
        drives: Sequence[Any],
        more_rules: Mapping[int, Rule] | None = None,
    ) -> Callable[[Any], Any]:
        env: dict[Any, Any] = {}
        for names, values in ((self.hoisted, hoisted), (self.state, state), (self.passed, drives)):
            env.update((v, value) for v, value in zip(names, values, strict=True) if value is not None)

        def rule(i: int, c: Cut) -> Rule:
            def run(env: dict[Any, Any], read: Callable[[Any], Any]) -> None:
                env[c.out] = cut(i, read(c.operand))

            return run

        rules = {id(c.eqn): rule(i, c) for i, c in enumerate(self.cuts)}
        rules |= {id(e): lambda env, read: None for c in self.cuts for e in c.eqns[1:]}
        return evaluate(eqns, env, rules | dict(more_rules or {}))


def _slices_for_the_rest(eqns: Sequence[Eqn], late: set[int], from_x: set[Any], outvars: Sequence[Any]) -> set[int]:
    """The slices of drives that only the rest reads: the loop then reads one array, and takes the slices itself."""
    read_by, found = readers(eqns, outvars), set()
    for e in reversed(eqns):
        if e.primitive.name not in ("slice", "split") or id(e) in late or e.invars[0] not in from_x:
            continue
        by = [r for v in e.outvars for r in read_by.get(v, [])]
        if by and all(r is not None and id(r) in late | found for r in by):
            found.add(id(e))
    return found


def known(cut: Cut, r: Any, v: Any, W: Any) -> Any:
    """r, which is W v + b, with the derivative W dv + dr: as a function of v, and of r as if it were free."""

    @jax.custom_jvp
    def value(r: Any, v: Any) -> Any:
        return r

    value.defjvp(lambda primals, tangents: (primals[0], tangents[0] + cut.product(W, tangents[1])))
    return value(r, v)
