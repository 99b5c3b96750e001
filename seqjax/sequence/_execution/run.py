"""The unroll of any cell by the parts of its step, with every kind of derivative.

`forward.py` and `backward.py` contain the two passes. A plain scan over the same program gives `jvp` and second
derivatives (`seqjax.sequence._linear_map`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State
from seqjax.sequence._execution.backward import backward, pick, put
from seqjax.sequence._execution.chunks import Leaves, chunk_length, has_launches
from seqjax.sequence._execution.formulas import kernel_for
from seqjax.sequence._execution.forward import Arguments, Loop, Result, Saved, forward
from seqjax.sequence._execution.kernel import Kernel
from seqjax.sequence._execution.partitioned import NO_BATCH, axes_of, partitioned, partitioned_program
from seqjax.sequence._execution.saved_gates import backward_from_gates, forward_saving_gates
from seqjax.sequence._linear_map import Direction, linear_map
from seqjax.sequence._partition.program import inexact
from seqjax.sequence._sizes import is_known

if TYPE_CHECKING:
    from seqjax.sequence._partition.parts import Parts
    from seqjax.sequence._partition.plan import Plan
else:
    Parts = Plan = Any


MOST_SAVED = 2**28  # bytes of the saved gates of one loop
# Units of a product that a CPU computes again in the time in which it would save it. A GPU always computes it again: an
# H100 took 5 % less time for that at 768 units in float32, and 13 % less in TF32.
SLOW_PRODUCT = 512
# The same where the kernel runs. To save them, a gradient of a GRU with reset before took 1.16 of the time of computing
# them again at 128 units, and 0.95 at 512; that of an LSTM with peepholes took 0.97 at 256.
SLOW_PRODUCT_OF_KERNEL = 256


def run_plan(plan: Plan, reverse: bool, params: Params, state: State, inputs: PyTree) -> tuple[State, PyTree]:
    """Unrolls a partitioned step.

    Args:
        plan: from `seqjax.sequence._partition.plan.plan_of`.
        reverse: whether to run from right to left.
        params: the parameters.
        state: the state before the first step, leaves (batch, ...).
        inputs: the inputs of the step that the plan was made for, leaves (batch, time, ...).

    Returns:
        The final state, (batch, ...), and the outputs of each step, (batch, time, ...).
    """
    leaves = [*map(jnp.asarray, jax.tree.leaves(params))]
    first = jax.tree.leaves(state)
    known = dict(zip(plan.x, jax.tree.leaves(inputs), strict=True))
    final: dict[int, Any] = {}
    outputs: Leaves = []
    for stage, parts in zip(plan.stages, plan.parts, strict=True):
        xs = [known[v] for v in stage.inputs]
        arguments = Arguments([*parts.consts, *leaves], [first[i] for i in stage.leaves], xs)
        new_state, outputs = _run_loop(plan, parts, arguments, reverse)
        final.update(zip(stage.leaves, new_state, strict=True))
        if stage.leaves:  # the outputs of the last stage are not variables that a stage reads
            known.update(zip(stage.outputs, outputs, strict=True))
    new_leaves = [final[i] for i in range(len(first))]
    return jax.tree.unflatten(plan.new_state, new_leaves), jax.tree.unflatten(plan.outputs, outputs)


def _run_loop(plan: Plan, parts: Parts, arguments: Arguments, reverse: bool) -> Result:
    if not arguments.state:
        return Result([], _run_at_once(parts, arguments))
    if not parts.saves_work or not any(map(inexact, arguments.state)):
        return _run_plainly(parts, reverse, arguments)
    batch, time = arguments.xs[0].shape[:2]
    loop = Loop(parts, kernel_for(parts) if plan.use_kernel else None, reverse, chunk_length(batch, time))
    if plan.saves_gates and is_known(batch, time):  # otherwise they may not fit
        loop = _with_saved_gates(loop, batch * time)
    return _run_in_parts(loop, arguments)


def _with_saved_gates(loop: Loop, steps: int) -> Loop:
    """The loop that saves its gates, or the results of its cuts, if they fit and save time."""
    parts, kernel = loop.parts, loop.kernel
    if isinstance(kernel, Kernel):
        fits = steps * kernel.bytes_of_gates <= MOST_SAVED
        return dataclasses.replace(loop, saves_gates=kernel.runs_backward and fits)
    of_step = sum(c.out.aval.size * c.out.aval.dtype.itemsize for c in parts.cuts)
    slow = SLOW_PRODUCT if kernel is None else SLOW_PRODUCT_OF_KERNEL
    is_slow = not has_launches() and all(c.operand.aval.size >= slow for c in parts.cuts)
    return dataclasses.replace(loop, saves_products=is_slow and steps * of_step <= MOST_SAVED)


def _run_at_once(parts: Parts, arguments: Arguments) -> Leaves:
    """The outputs of every step at once, if there is no state."""
    hoisted = parts.hoist(arguments.params)

    def outputs(x: Leaves) -> Leaves:
        return parts.run_rest(hoisted, [], parts.compute_drives(hoisted, x))[1]

    return jax.vmap(jax.vmap(outputs))(arguments.xs)


def _run_plainly(parts: Parts, reverse: bool, arguments: Arguments) -> Result:
    """One scan over the whole step."""
    hoisted = parts.hoist(arguments.params)

    def step(state: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        return parts.run_rest(hoisted, state, parts.compute_drives(hoisted, x))

    def one_sequence(state: Leaves, xs: Leaves) -> tuple[Leaves, Leaves]:
        return lax.scan(step, state, xs, reverse=reverse)

    return Result(*jax.vmap(one_sequence)(arguments.state, arguments.xs))


def _run_in_parts(loop: Loop, arguments: Arguments) -> Result:
    """The loop by its parts, with the backward pass of `backward.py` as its derivative."""
    sizes = len(arguments.params), len(arguments.state)

    def fast(*leaves: Any) -> tuple[Result, Any]:
        def on_one_device(*leaves: Any) -> tuple[Result, Any]:
            arguments = Arguments.divided(leaves, *sizes)
            return forward_saving_gates(loop, arguments) if loop.saves_gates else forward(loop, arguments)

        axes = _batch_axes(*map(len, arguments))
        return partitioned(on_one_device, leaves, axes, (0, _axes_of_saved(loop)))

    # Not `jax.custom_vjp`, which would exclude `jax.jvp` and second derivatives.
    @jax.custom_jvp
    def run(*leaves: Any) -> tuple[Result, Any]:
        if loop.kernel is None and jax.device_count() == 1:
            return fast(*leaves)
        # JAX cannot differentiate the calls in this program. Partial evaluation, as of a scan or of `jax.checkpoint`,
        # drops the rule below and keeps what is here, so it is a map that has the derivative of `run` too.
        program, shapes = jax.make_jaxpr(fast, return_shape=True)(*leaves)
        forwards = Direction(
            lambda leaves, _: jaxpr_as_fun(program)(*leaves), lambda leaves, _: jax.tree.leaves(run(*leaves))
        )
        shapes, tree = jax.tree.flatten(shapes)
        return tree.unflatten(linear_map(leaves, [], forwards, forwards, shapes, calls=program))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        out, saved = run(*primals)
        saved_leaves, saved_tree = jax.tree.flatten(saved)
        outs = jax.tree.leaves(out)
        wanted = [not isinstance(t, SymbolicZero) for t in tangents]
        is_inexact = Result([*map(inexact, out.new_state)], [*map(inexact, out.outputs)])
        derivative = _Derivative(loop, sizes, wanted, is_inexact, saved_tree)
        moved = linear_map(
            [*primals, *saved_leaves],
            pick(list(tangents), wanted),
            Direction(derivative.push, derivative.push),
            Direction(derivative.pull, derivative.pull_plainly),
            like=pick(outs, is_inexact),
            calls=partitioned_program(),
        )
        zeros = jax.tree.map(_zero_tangent, out)
        # The saved values depend on the inputs too, but nothing that reads them needs their tangents.
        return (out, saved), (put(zeros, is_inexact, moved), jax.tree.map(_zero_tangent, saved))

    # Symbolic zeros tell which gradients are wanted, so that the others are not computed.
    run.defjvp(jvp, symbolic_zeros=True)
    return run(*arguments.params, *arguments.state, *arguments.xs)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Derivative:
    """The derivative of a loop, as a linear map of the tangents of the wanted leaves, and its transpose.

    The residuals of both are the leaves of the arguments and those of `Saved`.

    Attributes:
        loop: the loop.
        sizes: the numbers of parameters and of leaves of the state.
        wanted: for each leaf of the arguments, whether its derivative is wanted.
        is_inexact: for each leaf of the result, whether it has a derivative.
        saved_tree: the tree structure of what the forward pass saved.
    """

    loop: Loop
    sizes: tuple[int, int]
    wanted: list[bool]
    is_inexact: Result
    saved_tree: Any

    def push(self, residuals: Leaves, tangents: Leaves) -> Leaves:
        """The tangents of the inexact leaves of the result."""
        function, primals = self._plain_function(residuals)
        return jax.jvp(function, primals, tangents)[1]

    def pull(self, residuals: Leaves, cts: Leaves) -> Leaves:
        """The cotangents of the wanted leaves, by the fast backward pass."""
        n, n_saved = len(self.wanted), len(residuals)
        n_state = sum(self.is_inexact.new_state)
        run = backward_from_gates if self.loop.saves_gates else backward

        def on_one_device(*leaves: Any) -> Leaves:
            arguments = Arguments.divided(leaves[:n], *self.sizes)
            saved = jax.tree.unflatten(self.saved_tree, leaves[n:n_saved])
            cts = list(leaves[n_saved:])
            return run(self.loop, arguments, saved, Result(cts[:n_state], cts[n_state:]), self.wanted)

        axes = _batch_axes(*self.sizes, n - sum(self.sizes))
        of_leaves = [*axes, *axes_of(_axes_of_saved(self.loop), self.saved_tree), *[0] * len(cts)]
        return partitioned(on_one_device, [*residuals, *cts], of_leaves, pick(axes, self.wanted))

    def pull_plainly(self, residuals: Leaves, cts: Leaves) -> Leaves:
        """The cotangents of the wanted leaves, by a program that JAX can differentiate again."""
        function, primals = self._plain_function(residuals)
        return list(jax.vjp(function, *primals)[1](cts))

    def _plain_function(self, residuals: Leaves) -> tuple[Callable[..., Leaves], Leaves]:
        """A plain scan from the wanted leaves to the inexact leaves of the result, and the values of the former."""
        leaves = residuals[: len(self.wanted)]

        def function(*values: Any) -> Leaves:
            arguments = Arguments.divided(put(leaves, self.wanted, values), *self.sizes)
            return pick(_run_plainly(self.loop.parts, self.loop.reverse, arguments), self.is_inexact)

        return function, pick(leaves, self.wanted)


def _batch_axes(params: int, state: int, xs: int) -> list[int]:
    """The axis of the batch in each leaf of the arguments, by the numbers of these leaves."""
    return [*[NO_BATCH] * params, *[0] * (state + xs)]


def _axes_of_saved(loop: Loop) -> PyTree:
    """The axis of the batch in what the forward pass saves."""
    return 0 if loop.saves_gates else Saved._make((0, 1, 0))


def _zero_tangent(leaf: Array) -> Any:
    # The tangent type of integers and booleans is float0, which only numpy has.
    return jnp.zeros_like(leaf) if inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0)
