"""Both passes of a loop that the kernel runs in one call, with the gates of every step saved.

There are no chunks, in which the backward pass would compute the gates again, but one array (batch, time, gates n). It
holds first the drives, then the gates, and at the end the cotangents of the drives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jaxtyping import Array

from seqjax.kernels.calls import SavedSteps
from seqjax.sequence._execution.backward import ct_of_params, pick, pullback
from seqjax.sequence._execution.chunks import Leaves
from seqjax.sequence._execution.forward import Arguments, Loop, Result
from seqjax.sequence._execution.kernel import Kernel
from seqjax.sequence._partition.program import inexact

if TYPE_CHECKING:
    from seqjax.sequence._partition.parts import Hoisted
else:
    Hoisted = Any


class SavedGates(NamedTuple):
    """What the forward pass saves for the backward pass.

    Attributes:
        states: every leaf of the state after each step, (batch, time, n).
        steps: the gates.
    """

    states: Leaves
    steps: SavedSteps


def forward_saving_gates(loop: Loop, arguments: Arguments) -> tuple[Result, SavedGates]:
    """`forward` in one call of the kernel."""
    kernel = _kernel(loop)
    params, state, xs = arguments
    hoisted = loop.parts.hoist(params)
    inputs = _of_all_steps(loop.parts.drives_without_biases, hoisted, xs)
    tokens = _tokens(loop, hoisted, xs)
    states, outputs, steps = kernel.forward_saving_gates(hoisted, state, inputs, tokens, loop.reverse)
    new_state = [leaf[:, 0 if loop.reverse else -1] for leaf in states]
    return Result(new_state, outputs), SavedGates(states, steps)


def backward_from_gates(
    loop: Loop, arguments: Arguments, saved: SavedGates, cts: Result, wanted: list[bool]
) -> list[Array]:
    """`backward` in one call of the kernel, which also computes the gradient of the recurrent weights."""
    kernel = _kernel(loop)
    params, state, xs = arguments
    wanted_params, wanted_state, wanted_xs = Arguments.divided(wanted, len(params), len(state))
    parts = loop.parts
    hoisted, active = parts.hoist(params), parts.active(wanted)
    # The cotangents of a table come from the kernel.
    pulled_back = [
        a and not (kernel.lookup and v is kernel.lookup[0]) for v, a in zip(parts.drives, active.drives, strict=True)
    ]

    def compute(values: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        before_loop = hoisted._replace(values=values)
        inputs = _of_all_steps(parts.drives_without_biases, before_loop, x)
        return pick(parts.add_biases(before_loop, inputs), pulled_back), inputs

    _, inputs, pull = pullback(compute, (hoisted.values, xs), (active.hoisted.values, wanted_xs))
    steps, tokens = (saved.steps, state, saved.states), _tokens(loop, hoisted, xs)
    ct_state, ct_values, ct_drives, ct_cut = kernel.backward_from_gates(
        hoisted, (inputs, tokens), steps, cts.new_state, cts.outputs, loop.reverse, any(active.cuts)
    )
    pulled, count = pull(pick(ct_drives, pulled_back)), sum(active.hoisted.values)
    ct_hoisted = [a + b for a, b in zip(pulled, pick(ct_values, active.hoisted.values), strict=False)]
    ct_hoisted += pick(list(ct_cut[: len(jax.tree.leaves(hoisted.weights))]), active.hoisted.weights)
    ct_params = ct_of_params(parts, params, wanted_params, active, ct_hoisted)
    return [*ct_params, *pick(ct_state, pick(wanted_state, [*map(inexact, state)])), *pulled[count:]]


def _kernel(loop: Loop) -> Kernel:
    if not isinstance(loop.kernel, Kernel):
        raise ValueError("expected a loop whose kernel saves gates, got another one")
    return loop.kernel


def _tokens(loop: Loop, hoisted: Hoisted, xs: Leaves) -> Array | None:
    """The number of the row that the drives are at each step, (batch, time), if they are rows of a table."""
    lookup = _kernel(loop).lookup
    if lookup is None:
        return None
    return _of_all_steps(lambda hoisted, x: [loop.parts.row_number(hoisted, x, lookup[0])], hoisted, xs)[0]


def _of_all_steps(f: Callable[[Hoisted, Leaves], Leaves], hoisted: Hoisted, xs: Leaves) -> Leaves:
    """A function of one example at one time for leaves (batch, time, ...)."""
    # As one axis, because XLA copies the result of a gather and the operand of a scatter that have two.
    shape = xs[0].shape[:2]
    rows = [x.reshape(-1, *x.shape[2:]) for x in xs]
    return [leaf.reshape(*shape, *leaf.shape[1:]) for leaf in jax.vmap(f, (None, 0))(hoisted, rows)]
