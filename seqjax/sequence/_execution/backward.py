"""The backward pass: the cotangents of the states through a chunk, then the gradients of the weights at once.

    ct s_{t-1} = D_s^T ct s_t + sum_i W_i^T D_i^T ct s_t

D_s and D_i are the derivatives of the rest of the step by its state and by its cuts. The terms of the outputs
have the same form. The saved states give all results of cuts, these give the other states again without products, and
then the loop contains one product per cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.sequence._execution.chunks import Chunks, Leaves, scan_distinct, steps_of_chunk
from seqjax.sequence._execution.forward import Arguments, Loop, Result, Saved, over_chunk
from seqjax.sequence._execution.kernel import Kernel
from seqjax.sequence._partition.program import inexact

if TYPE_CHECKING:
    from seqjax.sequence._partition.parts import Active, Hoisted, Parts
else:
    Active = Hoisted = Parts = Any


def pick(tree: PyTree, wanted: PyTree) -> list[Any]:
    """The leaves for which `wanted` is True."""
    return [leaf for leaf, w in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True) if w]


def put(tree: PyTree, wanted: PyTree, values: Sequence[Any]) -> PyTree:
    """The tree, with the values in place of the leaves for which `wanted` is True."""
    remaining = iter(values)
    return jax.tree.map(lambda leaf, w: next(remaining) if w else leaf, tree, wanted)


class KnownSteps(NamedTuple):
    """What the backward pass knows of the steps of a chunk before its loop, leaves (time, batch, ...).

    Attributes:
        before: the states s_{t-1}; None for a leaf that is not rematerialized yet.
        drives: the drives without their biases, which the loops add.
        results: the results of the cuts.
    """

    before: Leaves
    drives: Leaves
    results: Leaves


def backward(loop: Loop, arguments: Arguments, saved: Saved, cts: Result, wanted: list[bool]) -> list[Array]:
    """The cotangents of the wanted leaves of [*params, *state, *xs].

    Args:
        loop, arguments: as for `forward`.
        saved: what `forward` saved.
        cts: the cotangents of the inexact leaves of the result of `forward`.
        wanted: for each leaf of the arguments; True for inexact ones only.
    """
    params, state, xs = arguments
    batch, time = xs[0].shape[:2]
    wanted_params, wanted_state, wanted_xs = Arguments.divided(wanted, len(params), len(state))
    parts = loop.parts
    hoisted, active = parts.hoist(params), parts.active(wanted)
    is_inexact = [inexact(leaf) for leaf in state]
    chunk_loop = BackwardLoop(loop, hoisted, is_inexact, active)
    length = loop.chunk

    def chunk(carry: tuple[Leaves, Leaves], start: Array, steps: int) -> tuple[Any, Leaves, None]:
        ct_state, ct_hoisted = carry
        x = steps_of_chunk(xs, start, steps)
        first = [leaf[start // length] for leaf in saved.first]
        before = _states_before(loop, first, steps_of_chunk(saved.states, start, steps))
        known, pull = before_loop(parts, active, (hoisted, x, before), wanted_xs, (steps, batch))
        if saved.results:  # then the compiler drops the products that nothing reads
            known = known._replace(results=steps_of_chunk(saved.results, start, steps))
        # After the cuts are known, because rematerialization reads their results instead of computing products.
        if not all(loop.is_saved):
            known = known._replace(before=chunk_loop.rematerialized(steps, first, known))
        ct_outputs = steps_of_chunk(cts.outputs, start, steps)
        ct_state, ct_read_in_loop, ct_known = chunk_loop.run(steps, ct_state, known, ct_outputs)
        pulled = pull(ct_known)
        ct_hoisted = [a + b.astype(a.dtype) for a, b in zip(ct_hoisted, pulled, strict=False)]
        ct_hoisted = added(ct_hoisted, ct_read_in_loop, active)
        return (ct_state, ct_hoisted), pulled[len(ct_hoisted) :], None

    active_values = pick(hoisted, active.hoisted)
    zeros = [jnp.zeros(leaf.shape, _at_least_32_bits(leaf.dtype)) for leaf in active_values]
    chunks = Chunks(time, length, loop.reverse)
    (ct_state, ct_hoisted), ct_xs, _ = chunks.scan(chunk, (cts.new_state, zeros), backward=True)

    ct_params = ct_of_params(parts, params, wanted_params, active, ct_hoisted)
    return [*ct_params, *pick(ct_state, pick(wanted_state, is_inexact)), *ct_xs]


def ct_of_params(
    parts: Parts, params: Leaves, wanted_params: list[bool], active: Active, ct_hoisted: Leaves
) -> list[Array]:
    """The cotangents of the wanted parameters from those of the active hoisted values, which were summed over time."""
    # Once after all chunks, because what depends on parameters only was computed once before them.

    def hoist(some: list[Any]) -> list[Any]:
        return pick(parts.hoist(put(params, wanted_params, some)), active.hoisted)

    values, pull = jax.vjp(hoist, pick(params, wanted_params))
    return pull([ct.astype(value.dtype) for ct, value in zip(ct_hoisted, values, strict=True)])[0]


def before_loop(
    parts: Parts,
    active: Active,
    arguments: tuple[Hoisted, Leaves, Leaves],
    wanted_xs: list[bool],
    shape: tuple[int, int],
) -> tuple[KnownSteps, Callable[[Any], Leaves]]:
    """Computes the drives and the cuts of a chunk from known states.

    Args:
        parts: the parts of the loop.
        active: what depends on the wanted leaves.
        arguments: the hoisted values, and the inputs x_t and the saved states s_{t-1} of the chunk.
        wanted_xs: the inputs whose cotangents are wanted.
        shape: (time, batch) of the chunk.

    Returns:
        The known steps, and a function from the cotangents of the active drives and cuts to those of the active hoisted
        values and the wanted inputs. It computes the gradient of each weight matrix with one product for the chunk.
    """
    hoisted, x, before = arguments

    def compute(hoisted: Hoisted, x: Leaves) -> Any:
        inputs = over_chunk(parts.drives_without_biases, shape, None, 0)(hoisted, x)
        drives = parts.add_biases(hoisted, inputs)
        # The backward loop computes the cotangents that reach the drives through the operands of the cuts.
        constant = lax.stop_gradient(drives)
        results = over_chunk(parts.cut_results, shape, None, 0, 0)(hoisted, before, constant)
        return (pick(drives, active.drives), pick(results, active.cuts)), (inputs, results)

    _, (inputs, results), pull = pullback(compute, (hoisted, x), (active.hoisted, wanted_xs))
    return KnownSteps(before, inputs, results), pull


def added(cts: Leaves, ct_read_in_loop: Leaves, active: Active) -> Leaves:
    """The cotangents of the active hoisted values, with those of the values that the loop reads."""
    cts = list(cts)
    # The weights come after all hoisted values, so the positions among the values are those among all leaves.
    positions = [i for i, w in enumerate(pick(active.read_in_loop, active.hoisted.values)) if w]
    for i, ct in zip(positions, ct_read_in_loop, strict=True):
        cts[i] += ct
    return cts


@dataclasses.dataclass(frozen=True, eq=False)
class BackwardLoop:
    """The loops of the backward pass through one chunk.

    Attributes:
        loop: the loop of the forward pass.
        hoisted: from `Parts.hoist`.
        is_inexact: for each leaf of the state, whether it has a derivative.
        active: from `Parts.active`.
    """

    loop: Loop
    hoisted: Hoisted
    is_inexact: list[bool]
    active: Active

    def run(
        self, length: int, ct_state: Leaves, known: KnownSteps, ct_outputs: Leaves
    ) -> tuple[Leaves, Leaves, tuple[Leaves, Leaves]]:
        """The cotangents of the state before the chunk, of the hoisted values read in the loop, and of (drives, cuts).

        Args:
            length: the number of steps.
            ct_state: the cotangents of the state after the chunk.
            known: all that is known of the steps.
            ct_outputs: the cotangents of the outputs of each step.
        """
        parts, kernel, hoisted, active = self.loop.parts, self.loop.kernel, self.hoisted, self.active
        if kernel is not None and kernel.runs_backward:
            ct_before, ct_values, ct_drives, ct_cuts = kernel.backward(
                hoisted, known, ct_state, ct_outputs, self.loop.reverse
            )
            return (
                ct_before,
                pick(ct_values, active.read_in_loop),
                (pick(ct_drives, active.drives), pick(ct_cuts, active.cuts)),
            )

        wanted = (self.is_inexact, active.drives, active.cuts, active.read_in_loop)

        def step(carry: tuple[Leaves, Leaves], at: tuple[KnownSteps, Leaves, Array]) -> Any:
            ct_state, ct_values = carry
            (before, inputs, results), ct_outputs, _ = at
            drives = parts.add_biases(hoisted, inputs)

            def rest(state: Leaves, drives: Leaves, results: Leaves, values: Leaves) -> Any:
                run = jax.vmap(parts.run_rest_with_known_cuts, (None, 0, 0, 0))
                out = run(hoisted._replace(values=values), state, drives, results)
                return [leaf for leaf in jax.tree.leaves(out) if inexact(leaf)], None

            *_, pull = pullback(rest, (before, drives, results, hoisted.values), wanted)
            cts = iter(pull([*ct_state, *ct_outputs]))
            ct_before, ct_drives, ct_cuts, ct_more = ([next(cts) for w in each if w] for each in wanted)
            ct_values = [a + b.astype(a.dtype) for a, b in zip(ct_values, ct_more, strict=True)]
            return (ct_before, ct_values), (ct_drives, ct_cuts)

        # All leaves of a chunk may be empty, and a scan needs an array to count its steps.
        at = (known, ct_outputs, jnp.arange(length))
        values = pick(hoisted.values, active.read_in_loop)
        zeros = [jnp.zeros(leaf.shape, _at_least_32_bits(leaf.dtype)) for leaf in values]
        (ct_before, ct_values), cts = scan_distinct(step, (ct_state, zeros), at, not self.loop.reverse)
        return ct_before, ct_values, cts

    def rematerialized(self, length: int, first: Leaves, known: KnownSteps) -> Leaves:
        """All leaves of s_{t-1} for every t. Those that are not saved are computed again, without products.

        Args:
            length: the number of steps.
            first: the state before the chunk.
            known: the known steps, with None for each leaf of `before` that is not saved.
        """
        parts, kernel, reverse = self.loop.parts, self.loop.kernel, self.loop.reverse
        is_saved = self.loop.is_saved
        if isinstance(kernel, Kernel):
            return kernel.rematerialized(self.hoisted, first, known, reverse)

        def fill(some: Leaves, others: Leaves) -> Leaves:
            return [other if leaf is None else leaf for leaf, other in zip(some, others, strict=True)]

        def missing(leaves: Leaves) -> Leaves:
            return [None if saves else leaf for leaf, saves in zip(leaves, is_saved, strict=True)]

        def step(hidden: Leaves, at: tuple[KnownSteps, Array]) -> tuple[Leaves, Leaves]:
            (before, inputs, results), _ = at
            drives = parts.add_biases(self.hoisted, inputs)
            next_state = jax.vmap(parts.next_state, (None, 0, 0, 0))
            return missing(next_state(self.hoisted, fill(before, hidden), drives, results)), hidden

        hidden = lax.scan(step, missing(first), (known, jnp.arange(length)), reverse=reverse)[1]
        return fill(known.before, hidden)


def _states_before(loop: Loop, first: Leaves, states: Leaves) -> Leaves:
    """The saved leaves of s_{t-1} for every t of a chunk, (time, batch, ...), and None for the others.

    Args:
        loop: the loop.
        first: the state before the chunk.
        states: the saved leaves of s_t.
    """
    rows = iter(states)

    def shift(first: Array, rows: Array) -> Array:
        return jnp.concatenate([rows[1:], first[None]] if loop.reverse else [first[None], rows[:-1]])

    return [shift(leaf, next(rows)) if is_saved else None for leaf, is_saved in zip(first, loop.is_saved, strict=True)]


def pullback(f: Callable[..., Any], args: PyTree, wanted: PyTree) -> tuple[Any, Any, Callable[[Any], list[Any]]]:
    """Both results of f(*args) = (out, other), and the map from cotangents of `out` to those of the wanted leaves."""

    def f_wanted(values: list[Any]) -> Any:
        return f(*put(args, wanted, values))

    out, pull, other = jax.vjp(f_wanted, pick(args, wanted), has_aux=True)
    return out, other, lambda cts: pull(cts)[0]


def _at_least_32_bits(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which cotangents are summed over time. A sum of many steps is too coarse in half precision."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32
