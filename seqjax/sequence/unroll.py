"""Unrolling a cell over time: s_t, o_t = step(theta, s_{t-1}, x_t) for t = 1..T.

The step is traced once and divided into parts (`_partition`), which run chunk by chunk (`_execution`). A step that
cannot be divided runs as one plain scan per sequence. `_masked_step` defines what a mask and a reset mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from seqjax.cell import Cell, Output, Params, State, optional
from seqjax.cells.arguments import as_array, check_key
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._checkpointed import run_checkpointed
from seqjax.sequence._checks import batch_of_states, check_methods, check_sequences, check_steps
from seqjax.sequence._declared import undeclared_step
from seqjax.sequence._devices import with_automatic_axes, with_equal_axes, without_manual_axes
from seqjax.sequence._execution.run import run_plan
from seqjax.sequence._masked_step import Emit, Inputs, draw_noise, emit_output, emit_state, masked_step
from seqjax.sequence._partition.plan import NoPlan, Plan, plan_of
from seqjax.sequence._partition.tracing import traced_step
from seqjax.sequence._sizes import is_known
from seqjax.sequence._step_errors import errors_of_step


def unroll(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
    reverse: bool = False,
    key: Array | None = None,
    checkpoint_every: int | None = None,
    save: Literal["states", "gates"] = "states",
    kernel: bool = True,
) -> tuple[State, Output]:
    """Runs a cell over a batch of sequences: s_t, o_t = step(theta, s_{t-1}, x_t).

    If `xs` is sharded over the batch, so are the results, whether the axes of the mesh are automatic, explicit, or
    manual inside `jax.shard_map`. Every device runs its own rows with all parameters, and their gradient is added over
    the devices once, after the loops; with `checkpoint_every` once per chunk outside `jax.shard_map`, except in
    `sj.fit(..., devices=...)`.

    Args:
        cell: any object with `init`, `initial_state` and `step`.
        params: the cell's parameters, the same at every step.
        xs: inputs, every leaf (batch, time, ...).
        state: the state before the first step, every leaf (batch, ...), such as the final state of an earlier call. The
            default is the cell's initial state.
        mask: when False, the state stays the same, the output is zero, and the input reaches no value and no gradient.
        reset: when True, the initial state replaces the state before the step, also if the mask is False.
        reverse: whether to run from right to left. Outputs stay at their own time index.
        key: a random key for cells that draw noise, such as `Dropout`. Without a key every cell is deterministic.
        checkpoint_every: saves the state only before every so many steps, and runs these steps again in the backward
            pass. With about sqrt(time) steps, a gradient needs the memory of 2 sqrt(time) states and a third more time.
            Values and gradients do not change. By default every state is saved.
        save: what is saved of every step for a gradient: "states", from which the gates are computed again, or also
            "gates", which takes up to a third less time and the memory of the gates. It saves states only where the
            gates of one layer need more than 256 MB, or where XLA runs the loop of less than 512 units.
        kernel: whether the compiled kernel may run the loops that it supports (`seqjax.kernels`); False always runs
            XLA's loops.

    Returns:
        The final state, leaves (batch, ...), and the outputs, leaves (batch, time, ...).

    Raises:
        ValueError: a shape does not fit, `checkpoint_every` is not a positive number of steps, or `save` is unknown.
        TypeError: a dtype does not fit, or the cell's step changes the type of its state.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.8 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> impulse = jnp.zeros((1, 21, 1)).at[0, 0].set(1.0)
        >>> state, outputs = sj.unroll(cell, params, impulse)
        >>> round(float(state.h[0, 0]), 6)  # 0.8^20
        0.011529
    """
    if checkpoint_every is not None:
        checkpoint_every = check_steps("checkpoint_every", checkpoint_every)
    if save not in ("states", "gates"):
        raise ValueError(f'expected save to be "states" or "gates", got {save!r}')
    options = Options(bool(reverse), checkpoint_every, bool(kernel), save == "gates")
    return _run(cell, params, state, Inputs(xs, mask, reset), key, options=options)


def trajectory(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
    reverse: bool = False,
) -> State:
    """Every state s_0, s_1, ..., s_T, including the initial one.

    Args:
        cell, params, xs, state, mask, reset, reverse: as for `unroll`.

    Returns:
        The states, leaves (batch, time + 1, ...): index t holds s_t. With `reverse`, index T holds the initial
        state and index t the state after the steps T-1, ..., t.

    Raises:
        ValueError, TypeError: as for `unroll`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.5 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> sj.trajectory(cell, params, jnp.ones((1, 3, 1))).h[0, :, 0].tolist()
        [0.0, 1.0, 1.5, 1.75]
    """
    inputs = check_sequences(cell, Inputs(xs, mask, reset))
    first = batch_of_states(cell, params, state, inputs.batch)
    _, states = _run(cell, params, first, inputs, emit=emit_state, options=Options(bool(reverse)))

    def join(s_0: Array, s: Array) -> Array:
        s_0 = s_0[:, None]
        return jnp.concatenate([s, s_0] if reverse else [s_0, s], axis=1)

    return with_automatic_axes(partial(jax.tree.map, join), states, first, states)


def gates(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
    reverse: bool = False,
) -> dict[str, Array]:
    """Each gate's activations over a sequence, by name.

    Args:
        cell: one that names its gates with a method `gates(params, state, x)`, such as `LSTM` and `GRU`, or a stack
            that holds one.
        params, xs, state, mask, reset, reverse: as for `unroll`.

    Returns:
        For each name an array (batch, time, hidden), which is zero when the mask is False.

    Raises:
        TypeError: the cell does not name its gates, or it inherits them from a class whose step computes another state.
        ValueError: a shape does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(2, 3, forget_bias=1.0)
        >>> activations = sj.gates(cell, cell.init(jax.random.key(0)), jnp.zeros((1, 4, 2)))
        >>> sorted(activations)
        ['candidate', 'forget', 'input', 'output']
        >>> round(float(activations["forget"][0, 0, 0]), 4)  # sigma(1) at a zero state and input
        0.7311
    """
    check_methods(cell)
    if optional(cell, "gates") is None:
        raise TypeError(
            f"expected a cell that names its gates, got {type(cell).__name__}: "
            f"give it a method gates(params, state, x) that returns a dict of arrays"
        )
    other = undeclared_step(cell, "gates")
    if other is not None:
        name = type(other).__name__
        raise TypeError(
            f"expected {name} to define gates beside its own step, got those of a base class with another step: define "
            f"a method gates(params, state, x) in {name} that returns the gates of its step"
        )
    inputs, options = Inputs(xs, mask, reset), Options(bool(reverse))
    return _run(cell, params, state, inputs, emit=GatesOfStep(cell), options=options)[1]


def length_mask(lengths: Int[Any, " batch"] | Sequence[int], time: int) -> Bool[Array, "batch time"]:
    """True at the first `lengths[b]` steps of row b: M_{bt} = (t < lengths_b).

    Args:
        lengths: number of valid steps of each sequence, 0 to `time`.
        time: the length of the padded sequences, in steps.

    Returns:
        The mask (batch, time).

    Raises:
        ValueError: lengths are not one row, or one lies outside 0..time.
        TypeError: they are not whole numbers.

    Example:
        >>> import seqjax as sj
        >>> sj.length_mask([2, 0], 3).tolist()
        [[True, True, False], [False, False, False]]
    """
    lengths, time = as_array("lengths", lengths), whole_number("time", time, 0)
    if lengths.ndim != 1:
        raise ValueError(f"expected lengths (batch,), got {lengths.shape}: one length for each sequence")
    if lengths.size and not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"expected whole-number lengths, got {lengths.dtype}: lengths.astype(int)")
    if not isinstance(lengths, Tracer) and lengths.size:
        shortest, longest = int(np.min(lengths)), int(np.max(lengths))
        if shortest < 0 or longest > time:
            raise ValueError(f"expected lengths from 0 to time = {time}, got {shortest} to {longest}")
    return jax.vmap(lambda length: jnp.arange(time) < length)(lengths)


@dataclasses.dataclass(frozen=True)
class GatesOfStep:
    """Selects the gates of a step, for `gates`. Equal cells give equal objects, so the call compiles once."""

    cell: Any

    def __call__(self, params: Params, before: State, x: PyTree, after: State, output: Output) -> PyTree:
        return self.cell.gates(params, before, x)


@dataclasses.dataclass(frozen=True)
class Options:
    """How an unroll runs; it compiles once for equal options.

    Attributes:
        reverse: right to left.
        checkpoint_every: the steps between two states that a gradient keeps; None keeps what is fastest.
        kernel: whether the compiled kernel may run the loops that it supports.
        saves_gates: whether loops may save the gates of every step, or their products, for a gradient.
    """

    reverse: bool = False
    checkpoint_every: int | None = None
    kernel: bool = True
    saves_gates: bool = False


def _run(
    cell: Cell,
    params: Params,
    state: State | None,
    inputs: Inputs,
    key: Array | None = None,
    *,
    emit: Emit = emit_output,
    options: Options = Options(),
) -> tuple[State, PyTree]:
    """Checks the arguments, compiles or finds the compiled code, and runs it."""
    inputs = check_sequences(cell, inputs)
    state = batch_of_states(cell, params, state, inputs.batch)
    key = None if key is None else check_key(key)
    run = cached_jit(_run_batch, cell, emit, options)
    with errors_of_step(cell, params, only=jax.errors.UnexpectedTracerError):
        return run(params, state, inputs, key)


def _run_batch(
    cell: Cell, emit: Emit, options: Options, params: Params, state: State, inputs: Inputs, key: Array | None
) -> tuple[State, PyTree]:
    run = partial(_run_partition, cell, emit, options)
    return with_automatic_axes(run, inputs.x, params, state, inputs, key)


def _run_partition(
    cell: Cell, emit: Emit, options: Options, params: Params, state: State, inputs: Inputs, key: Array | None
) -> tuple[State, PyTree]:
    batch, time = inputs.batch, inputs.time
    inputs = inputs._replace(noise=draw_noise(cell, key, batch, time))
    traced = traced_step(cell, emit, params, state, inputs)
    if batch and time:
        steps = batch * time if is_known(batch, time) else 0
        plan = plan_of(traced, options.kernel, options.saves_gates, steps)
    else:
        plan = NoPlan("there is no step")
    if isinstance(plan, Plan):
        return without_manual_axes(partial(_run_in_chunks, partial(run_plan, plan), options), params, state, inputs)
    return _run_in_chunks(partial(_run_plainly, cell, emit), options, *with_equal_axes((params, state, inputs)))


def _run_in_chunks(
    run: Callable[..., tuple[State, PyTree]], options: Options, params: Params, state: State, inputs: Inputs
) -> tuple[State, PyTree]:
    run = partial(run, options.reverse, params)
    if options.checkpoint_every is None:
        return run(state, inputs)
    return run_checkpointed(run, options.checkpoint_every, options.reverse, state, inputs)


def _run_plainly(
    cell: Cell, emit: Emit, reverse: bool, params: Params, state: State, inputs: Inputs
) -> tuple[State, PyTree]:
    """One scan over `step` for every sequence of the batch."""

    def of_sequence(state: State, inputs: Inputs) -> tuple[State, PyTree]:
        def body(state: State, at: Inputs) -> tuple[State, PyTree]:
            return masked_step(cell, params, state, at, emit)

        return jax.lax.scan(body, state, inputs, reverse=reverse)

    return jax.vmap(of_sequence)(state, inputs)
