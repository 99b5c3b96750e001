"""Unrolling a cell over time: s_t, o_t = step(theta, s_{t-1}, x_t) for t = 1..T, by `lax.scan`.

One sequence is one scan, and `jax.vmap` makes it a batch. `seqjax.sequence._masked_step` defines what a mask and a
reset mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from seqjax.cell import Cell, Output, Params, State, is_value
from seqjax.sequence._checkpointed import run_checkpointed
from seqjax.sequence._checks import batch_of_states, check_flags, check_inputs, check_methods, check_steps
from seqjax.sequence._execution.run import run_plan
from seqjax.sequence._masked_step import Emit, drawn_noise, guarded_step, last_output, new_state
from seqjax.sequence._partition.plan import NoPlan, Plan, plan_of, traced_step
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
    kernel: bool = True,
) -> tuple[State, Output]:
    """Runs a cell over a batch of sequences: s_t, o_t = step(theta, s_{t-1}, x_t).

    Args:
        cell: any object with `init`, `initial_state` and `step`.
        params: the cell's parameters, the same at every step.
        xs: inputs, every leaf (batch, time, ...).
        state: the state before the first step, every leaf (batch, ...), such as the final state of an earlier call; by
            default the cell's initial state.
        mask: where False, the state is held, the output is zero, and the input reaches no value and no gradient.
        reset: where True, the state is replaced by the initial one before the step, also where the mask is False.
        reverse: right to left; outputs stay at their own time index.
        key: a random key for cells that draw noise, such as `Dropout`; without one every cell is deterministic.
        checkpoint_every: for gradients in little memory: keep the state only before every so many steps, and run
            these steps once more in the backward pass. About sqrt(time) of them keep memory at sqrt(time) states, for
            a third more time. None keeps what is quickest. Values and gradients are the same.
        kernel: whether the compiled kernel may run the loops that it supports (`seqjax.kernels`); False always runs
            XLA's loops.

    Returns:
        The final state, leaves (batch, ...), and the outputs, leaves (batch, time, ...).

    Raises:
        ValueError: a shape does not fit, or `checkpoint_every` is not a positive number of steps.
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
    return _run(last_output, cell, params, xs, state, mask, reset, reverse, key, checkpoint_every, kernel)


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
    """Every state s_0, s_1, ..., s_T, the initial one included.

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
    xs, batch, _ = check_inputs(cell, xs)
    first = batch_of_states(cell, params, state, batch)
    _, states = _run(new_state, cell, params, xs, first, mask, reset, reverse)

    def join(s_0: Array, s: Array) -> Array:
        s_0 = s_0[:, None]
        return jnp.concatenate([s, s_0] if reverse else [s_0, s], axis=1)

    return jax.tree.map(join, first, states)


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
        For each name an array (batch, time, hidden); zero where the mask is False.

    Raises:
        TypeError: the cell does not name its gates.
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
    if not hasattr(cell, "gates"):
        raise TypeError(
            f"expected a cell that names its gates, got {type(cell).__name__}: "
            f"give it a method gates(params, state, x) that returns a dict of arrays"
        )
    return _run(_Gates(cell), cell, params, xs, state, mask, reset, reverse)[1]


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
    lengths = jnp.asarray(lengths)
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
class _Gates:
    """What `gates` keeps of a step; equal for equal cells, so that it compiles once."""

    cell: Any

    def __call__(self, params: Params, before: State, x: PyTree, after: State, output: Output) -> PyTree:
        return self.cell.gates(params, before, x)


def _run(
    emit: Emit,
    cell: Cell,
    params: Params,
    xs: PyTree,
    state: State | None,
    mask: Any,
    reset: Any,
    reverse: bool,
    key: Array | None = None,
    every: int | None = None,
    kernel: bool = True,
) -> tuple[State, PyTree]:
    xs, batch, time = check_inputs(cell, xs)
    mask, reset = check_flags("mask", mask, batch, time), check_flags("reset", reset, batch, time)
    state = batch_of_states(cell, params, state, batch)
    run = _run_compiled if is_value(cell) else _run_batch
    every = None if every is None else int(every)
    with errors_of_step(cell, params, only=jax.errors.UnexpectedTracerError):
        return run(emit, cell, bool(reverse), every, bool(kernel), params, state, xs, mask, reset, key)


def _run_batch(
    emit: Emit,
    cell: Cell,
    reverse: bool,
    every: int | None,
    kernel: bool,
    params: Params,
    state: State,
    xs: PyTree,
    mask: Any,
    reset: Any,
    key: Any,
) -> tuple[State, PyTree]:
    batch, time = jax.tree.leaves(xs)[0].shape[:2]
    inputs = (xs, mask, reset, drawn_noise(cell, key, batch, time))
    traced = traced_step(cell, emit, params, state, inputs)
    plan = plan_of(traced, kernel) if batch and time else NoPlan("there is no step")
    if isinstance(plan, Plan):
        run = partial(run_plan, plan, reverse, params)
    else:
        run = partial(_run_plainly, emit, cell, reverse, params)
    return run(state, inputs) if every is None else run_checkpointed(run, every, reverse, state, inputs)


_run_compiled = jax.jit(_run_batch, static_argnums=(0, 1, 2, 3, 4))


def _run_plainly(
    emit: Emit, cell: Cell, reverse: bool, params: Params, state: State, inputs: PyTree
) -> tuple[State, PyTree]:
    """One scan over `step` for every sequence of the batch."""

    def one(state: State, inputs: PyTree) -> tuple[State, PyTree]:
        def body(state: State, at: PyTree) -> tuple[State, PyTree]:
            return guarded_step(cell, params, state, *at, emit=emit)

        return jax.lax.scan(body, state, inputs, reverse=reverse)

    return jax.vmap(one)(state, inputs)
