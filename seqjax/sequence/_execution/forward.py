"""The forward pass: the drives of a whole chunk at once, then a loop with one product per cut and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.sequence._execution.chunks import Chunks, Leaves, has_launches, scan_distinct, steps_of_chunk
from seqjax.sequence._execution.unit_kernel import UnitKernel
from seqjax.sequence._partition.program import inexact

if TYPE_CHECKING:
    from seqjax.sequence._execution.kernel import Kernel
    from seqjax.sequence._partition.parts import Hoisted, Parts
else:
    Hoisted = Kernel = Parts = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """One loop of a step, and how it runs.

    Attributes:
        parts: the parts of the loop.
        kernel: the compiled kernel that runs it; None if XLA does.
        reverse: whether it runs from right to left.
        chunk: the number of steps of a chunk, the same on every device.
        saves_products: whether XLA's loops, or the kernel of any step, save the results of the cuts for the backward
            pass.
        saves_gates: whether the kernel runs the loop in one call and saves the gates of every step for the backward
            pass, which otherwise computes them again (`seqjax.sequence._execution.saved_gates`).
    """

    parts: Parts
    kernel: Kernel | UnitKernel | None
    reverse: bool
    chunk: int
    saves_products: bool = False
    saves_gates: bool = False

    @property
    def is_saved(self) -> list[bool]:
        """For each leaf of the state, whether the forward pass saves it for the backward pass.

        The leaves that the cuts read are saved. The backward pass rematerializes the others without products, in a loop
        that with launches would take as long as a third of the forward pass, so that there they are saved too, as by
        the kernel of any step.
        """
        parts = self.parts
        saves_all = has_launches() or (self.kernel is not None and self.kernel.saves_all)
        return [
            read or (saves_all and inexact(v.aval)) for read, v in zip(parts.read_by_cuts, parts.state, strict=True)
        ]


class Arguments(NamedTuple):
    """The arrays that a loop reads.

    Attributes:
        params: the parameters. The constants that the cell closes over come first.
        state: the state before the first step, leaves (batch, ...).
        xs: the inputs, leaves (batch, time, ...).
    """

    params: Leaves
    state: Leaves
    xs: Leaves

    @classmethod
    def divided(cls, leaves: Sequence[Any], params: int, state: int) -> Arguments:
        """The arguments from [*params, *state, *xs] with these numbers of parameters and of leaves of the state."""
        leaves = list(leaves)
        return cls(leaves[:params], leaves[params : params + state], leaves[params + state :])


class Result(NamedTuple):
    """What a loop returns.

    Attributes:
        new_state: the state after the last step, leaves (batch, ...).
        outputs: what each step emits, leaves (batch, time, ...).
    """

    new_state: Leaves
    outputs: Leaves


class Saved(NamedTuple):
    """What the forward pass saves for the backward pass.

    Attributes:
        states: the leaves of the state after each step for which `Loop.is_saved` is True, (batch, time, ...).
        first: the state before each chunk, leaves (chunks, batch, ...).
        results: the results of the cuts, (batch, time, ...), if `Loop.saves_products`; otherwise none.
    """

    states: Leaves
    first: Leaves
    results: Leaves


def over_chunk(f: Callable[..., Any], shape: tuple[int, int], *axes: int | None) -> Callable[..., Any]:
    """From a function of one example at one time to a function of a chunk of shape (time, batch)."""
    return jax.vmap(jax.vmap(f, axes, axis_size=shape[1]), axes, axis_size=shape[0])


def forward(loop: Loop, arguments: Arguments) -> tuple[Result, Saved]:
    """Runs one loop of a step over a batch of sequences.

    Args:
        loop: the loop.
        arguments: the parameters, the state and the inputs.

    Returns:
        The result, and what the backward pass needs.
    """
    params, state, xs = arguments
    batch, time = xs[0].shape[:2]
    parts = loop.parts
    hoisted = parts.hoist(params)
    # Before the loop over the chunks, so that the weights are transposed once and not once per chunk.
    products = parts.products_in_loop(hoisted, batch)

    def chunk(state: Leaves, start: Array, length: int) -> tuple[Leaves, Any, Leaves]:
        x = steps_of_chunk(xs, start, length)
        inputs = over_chunk(parts.drives_without_biases, (length, batch), None, 0)(hoisted, x)
        return *run_chunk(loop, hoisted, products, state, inputs, length), state

    chunks = Chunks(time, loop.chunk, loop.reverse)
    new_state, (states, outputs, results), first = chunks.scan(chunk, state)
    return Result(new_state, outputs), Saved(states, first, results)


def run_chunk(
    loop: Loop,
    hoisted: Hoisted,
    products: Callable[[int, Array], Array],
    state: Leaves,
    inputs: Leaves,
    length: int,
) -> tuple[Leaves, tuple[Leaves, Leaves, Leaves]]:
    """Runs one chunk.

    Args:
        loop: the loop.
        hoisted: from `Parts.hoist`.
        products: from `Parts.products_in_loop`.
        state: the state before the chunk, (batch, ...).
        inputs: the drives without their biases, (time, batch, ...).
        length: the number of steps.

    Returns:
        The state after the chunk; the saved leaves of the state after each step, the outputs of each step, and the
        results of the cuts that are saved, (time, batch, ...).
    """
    parts, kernel, is_saved = loop.parts, loop.kernel, loop.is_saved

    def saved(states: Leaves) -> Leaves:
        return [leaf for leaf, saves in zip(states, is_saved, strict=True) if saves]

    if kernel is not None:
        # The kernel returns all states in one call.
        if isinstance(kernel, UnitKernel):
            states, outputs, results = kernel.forward(hoisted, state, inputs, loop.reverse, loop.saves_products)
        else:
            states, outputs, results = *kernel.forward(hoisted, state, inputs, loop.reverse), []
        return [leaf[0 if loop.reverse else -1] for leaf in states], (saved(states), outputs, results)

    def rest(state: Leaves, drives: Leaves) -> tuple[Leaves, Leaves, Leaves]:
        results: dict[int, Array] = {}

        def product(i: int, v: Array) -> Array:
            results[i] = products(i, v)
            return results[i]

        new_state, outputs = parts.run_rest(hoisted, state, drives, product)
        return new_state, outputs, [results[i] for i in range(len(parts.cuts))] if loop.saves_products else []

    def step(state: Leaves, at: tuple[Leaves, Array]) -> tuple[Leaves, Any]:
        inputs, _ = at
        drives = parts.add_biases(hoisted, inputs)
        new_state, outputs, results = jax.vmap(rest)(state, drives)
        return new_state, (saved(new_state), outputs, results)

    # `inputs` may be empty, and a scan needs an array to count its steps.
    return scan_distinct(step, state, (inputs, jnp.arange(length)), loop.reverse)
