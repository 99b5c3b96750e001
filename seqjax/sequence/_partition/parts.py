"""The parts of a step, found in the program of the step itself.

    once     equations that read parameters only                              evaluated before the loop, once per pass
    drive    equations that read the input and not the state                  evaluated for a whole chunk of time
    rest     equations that read the state                                    evaluated in the loop
    cuts     products, among the rest, of something that depends on the state with something that depends on
             parameters only

If every state is known, every cut is known too. Then the cuts of a chunk come from one product each, the backward loop
contains one product per cut, and the gradient of each weight matrix is one product per chunk.

The program is that of the masked step (`seqjax.sequence._masked_step`). A mask, a reset, noise and the values that are
emitted are equations or inputs of the program, so they need no special cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jax.typing import ArrayLike
from jaxtyping import Array

from seqjax.sequence._partition.cuts import Cut, with_known_value
from seqjax.sequence._partition.normalize import normalized
from seqjax.sequence._partition.program import (
    PRODUCTS,
    Atom,
    Env,
    Eqn,
    Read,
    Rule,
    Var,
    count_multiplications,
    dependents,
    evaluate,
    inexact,
    is_product,
    needed,
    readers,
    skip,
    variables,
)
from seqjax.sequence._partition.sigmoids import rules_for_slices, with_merged_sigmoids
from seqjax.sequence._partition.tables import is_lookup, with_tables


class Hoisted(NamedTuple):
    """What a loop computes once, from the parameters only.

    Attributes:
        values: for each of `Parts.hoisted`.
        weights: (W, b) of each cut; b is None if the cut adds none.
    """

    values: list[Any]
    weights: list[Any]


CutValue = Callable[[int, Any], Any]  # from the index of a cut and its operand to its value


@dataclasses.dataclass(frozen=True, eq=False)
class Active:
    """Which values of a loop depend on the leaves whose gradients are wanted.

    Such values are called active in the literature on automatic differentiation.

    Attributes:
        hoisted: for each leaf of `Hoisted`, in the same tree.
        read_in_loop: for each hoisted value, whether it is active and the loop reads it beside the cuts.
        drives: for each drive.
        cuts: for each cut, whether W or b is active.
    """

    hoisted: Hoisted
    read_in_loop: list[bool]
    drives: list[bool]
    cuts: list[bool]


class Parts:
    """The program of one loop, (params.., state.., x..) -> (new_state.., outputs..), in its parts.

    Attributes:
        params: the variables of the parameters. The constants that the cell closes over come first, and `consts` are
            their values.
        state, x: the other inputs.
        new_state, outputs: the results: the state after the step, and the values that the step emits.
        once, drive, rest: the equations.
        cuts: the products of the rest that one product per chunk computes when the states are known.
        hoisted: the variables that depend on parameters only and that the drive or the rest reads.
        read_in_loop: for each of `hoisted`, whether the loop reads it beside the cuts.
        drives: the variables that depend on the input but not on the state, and that the rest reads.
        biases: u and b of the drives that are u + b, with u from the input and b from the parameters.
        lookups: the drives that are rows of a table, with the variables of the table and of the number of the row. A
            number outside the table stands for a row of NaN.
        read_by_cuts: for each leaf of the state, whether the operand of a cut depends on it.
    """

    def __init__(
        self, program: ClosedJaxpr, n_params: int, n_state: int, merge_sigmoids: bool = True, steps: int = 0
    ) -> None:
        """Finds the parts.

        Args:
            program: the inlined program of the loop.
            n_params, n_state: the numbers of leaves of its parameters and of its state.
            merge_sigmoids: whether sigmoids are merged, which is faster if the program runs over a batch.
            steps: batch times time; 0 if it is unknown.
        """
        program = normalized(program, n_params, n_state)
        if merge_sigmoids:
            program = with_merged_sigmoids(program, n_params, n_state)
        program = with_tables(program, n_params, n_state, steps)
        jaxpr, self.consts = program.jaxpr, program.consts
        self.params: list[Any] = [*jaxpr.constvars, *jaxpr.invars[:n_params]]
        self.state: list[Any] = list(jaxpr.invars[n_params : n_params + n_state])
        self.x: list[Any] = list(jaxpr.invars[n_params + n_state :])
        self.new_state: list[Any] = list(jaxpr.outvars[:n_state])
        self.outputs: list[Any] = list(jaxpr.outvars[n_state:])
        eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
        from_x, from_state = dependents(eqns, self.x), dependents(eqns, self.state)
        self._divide(eqns, from_x, from_state)
        self.cuts = self._find_cuts(from_state, from_x)
        self._find_values(jaxpr.outvars)
        self.biases = self._find_biases(from_x)
        self.lookups = {e.outvars[0]: e.invars for e in self.drive if e.outvars[0] in self.drives and is_lookup(e)}
        self._sigmoid_rules = rules_for_slices(self.rest)
        self._eqns_before_cuts, _ = needed(self.rest, [c.out for c in self.cuts])
        # The walk from the operands of the cuts back to the state stops at other cuts, because the backward pass knows
        # the results of all cuts.
        _, read = needed(self._rest_without_cuts, [c.operand for c in self.cuts])
        self.read_by_cuts = [v in read for v in self.state]

    def _divide(self, eqns: list[Eqn], from_x: set[Var], from_state: set[Var]) -> None:
        late = {id(e) for e in eqns if not from_state.isdisjoint(e.outvars)}
        late |= self._slices_for_the_rest(eqns, late, from_x)
        self.rest = [e for e in eqns if id(e) in late]
        # An equation that reads nothing, such as one that fills an array with zeros, belongs to `once`.
        early = [e for e in eqns if id(e) not in late]
        self.drive = [e for e in early if not from_x.isdisjoint(e.outvars)]
        self.once = [e for e in early if from_x.isdisjoint(e.outvars)]

    def _slices_for_the_rest(self, eqns: list[Eqn], late: set[int], from_x: set[Var]) -> set[int]:
        """The slices of drives that only the rest reads. The loop takes these slices itself and so reads one array."""
        read_by, found = readers(eqns, [*self.new_state, *self.outputs]), set()
        for e in reversed(eqns):
            if e.primitive.name not in ("slice", "split") or id(e) in late or e.invars[0] not in from_x:
                continue
            by = [r for v in e.outvars for r in read_by.get(v, [])]
            if by and all(r is not None and id(r) in late | found for r in by):
                found.add(id(e))
        return found

    def _find_cuts(self, from_state: set[Var], from_x: set[Var]) -> list[Cut]:
        read_by = readers(self.rest, [*self.new_state, *self.outputs])

        def on_state(v: Atom) -> bool:
            return not isinstance(v, Literal) and v in from_state

        def only_on_params(v: Atom) -> bool:
            return not isinstance(v, Literal) and v not in from_state and v not in from_x

        def bias(out: Var) -> tuple[Eqn, Var] | None:
            by = read_by.get(out, [])
            if len(by) != 1 or by[0] is None or by[0].primitive.name != "add":
                return None
            b = next((b for b in by[0].invars if b is not out), None)
            return (by[0], b) if b is not None and only_on_params(b) and b.aval.shape == out.aval.shape else None

        found = []
        for e in self.rest:
            late, fixed = [v for v in e.invars if on_state(v)], [v for v in e.invars if only_on_params(v)]
            # Without a derivative, as for integers, a cut has nothing to gain.
            if e.primitive.name in PRODUCTS and (len(late), len(fixed)) == (1, 1) and inexact(late[0].aval):
                is_matrix = is_product(e, 1, 2)
                found.append(Cut(e, late[0], fixed[0], bias(e.outvars[0]) if is_matrix else None, is_matrix))
        return found

    @property
    def _rest_without_cuts(self) -> list[Eqn]:
        replaced = {id(e) for c in self.cuts for e in c.eqns}
        return [e for e in self.rest if id(e) not in replaced]

    def _find_values(self, outvars: Sequence[Atom]) -> None:
        """Finds which values the loop reads from outside."""
        in_loop = set(variables(v for e in self._rest_without_cuts for v in e.invars))
        in_loop |= {c.operand for c in self.cuts} | set(variables(outvars))
        read = in_loop | set(variables(v for e in self.drive for v in e.invars))
        fixed = [*self.params, *(v for e in self.once for v in e.outvars)]
        early = [*self.x, *(v for e in self.drive for v in e.outvars)]
        # dict.fromkeys and not set, because the order of the values must be the same in every process.
        self.hoisted = [v for v in dict.fromkeys(fixed) if v in read]
        self.drives = [v for v in dict.fromkeys(early) if v in in_loop]
        self.read_in_loop = [v in in_loop and inexact(v.aval) for v in self.hoisted]

    def _find_biases(self, from_x: set[Var]) -> dict[Var, tuple[Var, Var]]:
        found = {}
        for e in self.drive:
            is_sum = e.primitive.name == "add" and len(variables(e.invars)) == 2  # and no number of the step
            if is_sum and e.outvars[0] in self.drives and inexact(e.outvars[0].aval):
                u, b = e.invars if e.invars[0] in from_x else e.invars[::-1]
                if b in self.hoisted and u.aval.shape == b.aval.shape:
                    found[e.outvars[0]] = u, b
        return found

    @property
    def saves_work(self) -> bool:
        """Whether the products that leave the loops outweigh those that stay, which the backward pass runs twice."""
        cuts = {id(c.eqn) for c in self.cuts}
        gained = [e for e in self.rest if id(e) in cuts] + self.drive
        lost = [e for e in self.rest if id(e) not in cuts]
        return sum(map(count_multiplications, gained)) > sum(map(count_multiplications, lost))

    def active(self, wanted: Sequence[bool]) -> Active:
        """What depends on the wanted leaves of [*params, *state, *x]."""
        inputs = [*self.params, *self.state, *self.x]
        sources = [v for v, w in zip(inputs, wanted, strict=True) if w and inexact(v.aval)]
        found = dependents([*self.once, *self.drive], sources)

        def is_active(v: Var) -> bool:
            return v in found and inexact(v.aval)

        values = [*map(is_active, self.hoisted)]
        weights = [(is_active(c.weights), None if c.bias is None else is_active(c.bias[1])) for c in self.cuts]
        read_in_loop = [r and active for r, active in zip(self.read_in_loop, values, strict=True)]
        cuts = [any(pair) for pair in weights]
        return Active(Hoisted(values, weights), read_in_loop, [*map(is_active, self.drives)], cuts)

    def hoist(self, params: Sequence[Any]) -> Hoisted:
        """Computes what depends on parameters only."""
        read = evaluate(self.once, dict(zip(self.params, params, strict=True)))
        weights = [(read(c.weights), None if c.bias is None else read(c.bias[1])) for c in self.cuts]
        return Hoisted([read(v) for v in self.hoisted], weights)

    def compute_drives(self, hoisted: Hoisted, x: Sequence[Any]) -> list[Any]:
        """The drives of one example at one time."""
        return self.add_biases(hoisted, self.drives_without_biases(hoisted, x))

    def drives_without_biases(self, hoisted: Hoisted, x: Sequence[Any]) -> list[Any]:
        """The drives before biases are added. The loop adds them, which is cheaper than a pass over a chunk."""
        env = dict(zip([*self.hoisted, *self.x], [*hoisted.values, *x], strict=True))
        read = evaluate(self.drive, env)
        return [read(self.biases[v][0] if v in self.biases else v) for v in self.drives]

    def row_number(self, hoisted: Hoisted, x: Sequence[Any], drive: Var) -> Array:
        """The number of the row, an integer, that one of `lookups` reads at one step."""
        env = dict(zip([*self.hoisted, *self.x], [*hoisted.values, *x], strict=True))
        index = self.lookups[drive][1]
        return evaluate(needed(self.drive, [index])[0], env)(index)[0]

    def add_biases(self, hoisted: Hoisted, drives: Sequence[Any]) -> list[Any]:
        """The drives from `drives_without_biases`, with any number of leading axes."""
        values = dict(zip(self.hoisted, hoisted.values, strict=True))
        return [
            u + jnp.broadcast_to(values[self.biases[v][1]], u.shape) if v in self.biases else u
            for v, u in zip(self.drives, drives, strict=True)
        ]

    def products_in_loop(self, hoisted: Hoisted, batch: int) -> CutValue:
        """A function from the index of a cut and its operand to its value, with weights stored as a loop reads them."""
        transposed = [c.is_stored_transposed(batch) for c in self.cuts]
        stored = [W.T if transpose else W for (W, _), transpose in zip(hoisted.weights, transposed, strict=True)]

        def value(i: int, v: ArrayLike) -> Array:
            b = hoisted.weights[i][1]
            r = (self.cuts[i].product_with_transposed if transposed[i] else self.cuts[i].product)(stored[i], v)
            return r if b is None else r + b

        return value

    def run_rest(
        self, hoisted: Hoisted, state: Sequence[Any], drives: Sequence[Any], cut_value: CutValue | None = None
    ) -> tuple[list[Any], list[Any]]:
        """The rest of the step of one example.

        Args:
            hoisted: from `hoist`.
            state: the state before the step.
            drives: the drives of the step.
            cut_value: from the index of a cut and its operand to its value; by default its product.

        Returns:
            The new state and the outputs.
        """
        run = cut_value or (lambda i, v: self.cuts[i].value(hoisted.weights[i], v))
        read = self._evaluate(self.rest, run, hoisted.values, state, drives)
        return [read(v) for v in self.new_state], [read(v) for v in self.outputs]

    def run_rest_with_known_cuts(
        self, hoisted: Hoisted, state: Sequence[Any], drives: Sequence[Any], results: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """`run_rest` with the results of the cuts: values need no product, and derivatives need one product per cut."""

        def cut_value(i: int, v: ArrayLike) -> Array:
            return with_known_value(self.cuts[i], results[i], v, hoisted.weights[i][0])

        return self.run_rest(hoisted, state, drives, cut_value)

    def next_state(
        self, hoisted: Hoisted, state: Sequence[Any], drives: Sequence[Any], results: Sequence[Any]
    ) -> list[Any]:
        """The state after the step of one example, from the known results of the cuts."""
        wanted, _ = needed(self.rest, self.new_state)
        read = self._evaluate(wanted, lambda i, v: results[i], hoisted.values, state, drives, self._sigmoid_rules)
        return [read(v) for v in self.new_state]

    def cut_results(self, hoisted: Hoisted, state: Sequence[Any], drives: Sequence[Any]) -> list[Any]:
        """The result of each cut from the state that it reads. Only the derivatives by the weights are defined."""
        found: list[Any] = [None] * len(self.cuts)

        def cut_value(i: int, v: ArrayLike) -> Array:
            # The backward loop computes the cotangents of v. Here they would be a second product per cut.
            found[i] = self.cuts[i].value(hoisted.weights[i], lax.stop_gradient(v))
            return found[i]

        self._evaluate(self._eqns_before_cuts, cut_value, hoisted.values, state, drives)
        return found

    def _evaluate(
        self,
        eqns: Sequence[Eqn],
        cut_value: CutValue,
        hoisted: Sequence[Any],
        state: Sequence[Any],
        drives: Sequence[Any],
        more_rules: Mapping[int, Rule] | None = None,
    ) -> Read:
        env: Env = {}
        for names, values in ((self.hoisted, hoisted), (self.state, state), (self.drives, drives)):
            # A leaf of the state that is not saved is None. No equation that runs then reads it.
            env.update((v, value) for v, value in zip(names, values, strict=True) if value is not None)

        def rule(i: int, c: Cut) -> Rule:
            def run(env: Env, read: Read) -> None:
                env[c.out] = cut_value(i, read(c.operand))

            return run

        rules = {id(c.eqn): rule(i, c) for i, c in enumerate(self.cuts)}
        rules |= {id(e): skip for c in self.cuts for e in c.eqns[1:]}
        return evaluate(eqns, env, rules | dict(more_rules or {}))
