"""Gradients through time, taken apart.

Backpropagation through time is `jax.grad` of a loss of `unroll`. These functions show what is inside. With
delta_t = dL/ds_t, the temporal chain rule is one linear recurrence that runs backward,

    delta_{t-1} = (ds_t/ds_{t-1})^T delta_t + (do_t/ds_{t-1})^T dL/do_t,

and every step adds its own part to the gradient of the shared parameters,

    dL/dtheta = sum_t (ds_t/dtheta)^T delta_t + (do_t/dtheta)^T dL/do_t.

Truncated to a window of k steps, delta holds only what returns within the window: k - 1 rounds of the recurrence, each
over all t at once, from delta = 0.

They differentiate the same guarded step that `unroll` runs, so masks and resets mean what they mean there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from seqjax.cell import Cell, Params, State
from seqjax.sequence._checks import check_flags, check_inputs
from seqjax.sequence._masked_step import guarded_step
from seqjax.sequence.unroll import trajectory, unroll

Loss = Callable[[PyTree], Array]


def detach(state: State) -> State:
    """Cuts the gradient, s <- stopgrad(s): the state goes on into the next chunk of a stream, its history does not.

    Args:
        state: any state.

    Returns:
        The same numbers, through which no gradient flows.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> float(jax.grad(lambda s: (sj.detach(s) * s).sum())(jnp.array([3.0]))[0])  # s * 1, not 2 s
        3.0
    """
    return jax.lax.stop_gradient(state)


def state_gradients(
    cell: Cell,
    params: Params,
    xs: PyTree,
    loss: Loss,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> State:
    """dL/ds_t for every t in one backward pass: dL/ds_t = dl_t/ds_t + (ds_{t+1}/ds_t)^T dL/ds_{t+1}.

    The loss reads states and not outputs, because an output is computed inside its step: as a function of s_{t-1} and
    x_t it would hide the term dl_t/ds_t. The parts of a state, such as an LSTM's h and c, are independent coordinates.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        loss: from the states s_1..s_T, leaves (batch, time, ...), to one number.

    Returns:
        The gradients, shaped like `trajectory`: leaves (batch, time + 1, ...), index t for dL/ds_t.

    Raises:
        ValueError, TypeError: as for `unroll`, or a leaf of the state is not floating-point.

    Source: Werbos 1990, "Backpropagation through time: what it does and how to do it".

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.5 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> last = lambda states: states.h[:, -1].sum()
        >>> sj.state_gradients(cell, params, jnp.ones((1, 3, 1)), last).h[0, :, 0].tolist()  # 0.5^(3 - t)
        [0.125, 0.25, 0.5, 1.0]
    """
    run = _Run(cell, params, xs, state, mask, reset)
    after = jax.tree.map(lambda leaf: leaf[:, 1:], run.states)
    d_states = jax.grad(loss)(after)
    return run.state_gradients(d_states, run.zero_outputs())


def weight_gradients_by_step(
    cell: Cell,
    params: Params,
    xs: PyTree,
    loss: Loss,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Params:
    """Each time step's own contribution to the weight gradient, dL/dtheta = sum_t dL_t/dtheta.

    Step t contributes (ds_t/dtheta)^T dL/ds_t + (do_t/dtheta)^T dL/do_t: all that L owes to the parameters as they were
    used at step t. A learned initial state belongs to the step that reads it.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        loss: from the outputs, leaves (batch, time, ...), to one number.

    Returns:
        Shaped like `params` with a leading time axis, (time, ...), summed over the batch. Memory grows with time times
        the number of parameters.

    Raises:
        ValueError, TypeError: as for `unroll`, or a leaf of the state is not floating-point.

    Source: Werbos 1990.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.GRU(2, 3)
        >>> params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 6, 2))
        >>> loss = lambda outputs: jnp.sum(outputs**2)
        >>> by_step = sj.weight_gradients_by_step(cell, params, xs, loss)
        >>> whole = jax.grad(lambda params: loss(sj.unroll(cell, params, xs)[1]))(params)
        >>> by_step.W_hh.shape, bool(jnp.allclose(by_step.W_hh.sum(0), whole.W_hh, atol=1e-5))
        ((6, 9, 3), True)
    """
    run = _Run.of_parameters(cell, params, xs, state, mask, reset)
    d_outputs = run.output_gradients(loss)
    delta = run.state_gradients(run.zero_states(), d_outputs)

    def at_step(before: PyTree, x: PyTree, flags: PyTree, d_after: PyTree, d_output: PyTree) -> Params:
        step = jax.vmap(run.step, in_axes=(None, 0, 0, 0))
        _, pull = jax.vjp(lambda p: step(p, before, x, flags), params)
        return pull((d_after, d_output))[0]

    before, after = _before(run.states), jax.tree.map(lambda leaf: leaf[:, 1:], delta)
    return jax.vmap(at_step, in_axes=1)(before, run.xs, run.flags, after, d_outputs)


def truncated_grad(
    cell: Cell,
    params: Params,
    xs: PyTree,
    loss: Loss,
    window: int,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Params:
    """The gradient of truncated backpropagation through time: each l_t reaches the last `window` steps, t-k+1..t.

    Every step is its own end of a window, so no step sees less history than another, as it would at the start of a
    chunk. (Training on chunks with the state carried and detached is `fit` on a stream.) All windows run side by side:
    delta <- (ds_t/ds_{t-1})^T delta + (do_t/ds_{t-1})^T dL/do_t for all t at once, k - 1 times from zero.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        loss: from the outputs, leaves (batch, time, ...), to one number.
        window: k, in steps, at least 1; with k >= time this is the full gradient.

    Returns:
        Shaped like `params`, as from `jax.grad`. A learned initial state is reached by the first k steps after it.

    Raises:
        ValueError: the window is below 1, or a shape does not fit.
        TypeError: as for `unroll`, or a leaf of the state is not floating-point.

    Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network
        trajectories", their BPTT(h) with h = k.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.5 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> last = lambda outputs: outputs[:, -1].sum()
        >>> [float(sj.truncated_grad(cell, params, jnp.ones((1, 3, 1)), last, k).b_h[0]) for k in (1, 2, 3)]
        [1.0, 1.5, 1.75]
    """
    if isinstance(window, bool) or not hasattr(window, "__index__") or window < 1:
        raise ValueError(f"expected a window of at least 1 step, got {window!r}: window=1 is no recurrence at all")
    run = _Run.of_parameters(cell, params, xs, state, mask, reset)
    d_outputs = run.output_gradients(loss)
    if window >= run.time:
        delta = jax.tree.map(lambda leaf: leaf[:, 1:], run.state_gradients(run.zero_states(), d_outputs))
    else:
        delta = run.zero_states()
    before = _before(run.states)
    step = jax.vmap(jax.vmap(run.step, in_axes=(None, 0, 0, 0)), in_axes=(None, 0, 0, 0))
    _, pull = jax.vjp(lambda p, s: step(p, s, run.xs, run.flags), params, before)

    def one_step_further(_: Array, delta: State) -> State:
        d_before = pull((delta, d_outputs))[1]
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf[:, 1:], jnp.zeros_like(leaf[:, :1])], axis=1), d_before)

    if window < run.time:
        delta = jax.lax.fori_loop(0, window - 1, one_step_further, delta)
    return pull((delta, d_outputs))[0]


def _before(states: State) -> State:
    return jax.tree.map(lambda leaf: leaf[:, :-1], states)


class _Run:
    """One forward pass and what its backward passes need."""

    def __init__(self, cell: Cell, params: Params, xs: PyTree, state: State | None, mask: Any, reset: Any) -> None:
        self.cell, self.params = cell, params
        self.xs, batch, self.time = check_inputs(cell, xs)
        mask, reset = check_flags("mask", mask, batch, self.time), check_flags("reset", reset, batch, self.time)
        self.arguments = dict(state=state, mask=mask, reset=reset)
        self.states = trajectory(cell, params, self.xs, **self.arguments)
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.states):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"expected a floating-point state to differentiate, got {leaf.dtype} in "
                    f"{type(cell).__name__}'s state{jax.tree_util.keystr(path)}: carry it as an input instead"
                )
        self.flags = (mask, reset)

    @classmethod
    def of_parameters(cls, *arguments: Any) -> _Run:
        """One whose first step makes the initial state itself, where none is given.

        It begins with a reset, so the gradient of a learned initial state comes out of the first step like that of any
        other parameter.
        """
        run = cls(*arguments)
        mask, reset = run.flags
        if run.arguments["state"] is None:
            batch = jax.tree.leaves(run.xs)[0].shape[0]
            first = jnp.broadcast_to(jnp.arange(run.time)[None] == 0, (batch, run.time))
            run.flags = (mask, first if reset is None else reset | first)
        return run

    def step(self, params: Params, state: State, x: PyTree, flags: tuple[Any, Any]) -> tuple[State, PyTree]:
        return guarded_step(self.cell, params, state, x, *flags)

    def outputs(self) -> PyTree:
        return unroll(self.cell, self.params, self.xs, **self.arguments)[1]

    def output_gradients(self, loss: Loss) -> PyTree:
        """dL/do_t for every t."""
        return jax.grad(loss)(self.outputs())

    def zero_outputs(self) -> PyTree:
        return jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), jax.eval_shape(self.outputs))

    def zero_states(self) -> State:
        return jax.tree.map(jnp.zeros_like, _before(self.states))

    def state_gradients(self, d_states: State, d_outputs: PyTree) -> State:
        """delta_t for t = 0..T, from what the loss owes to s_1..s_T and to o_1..o_T directly."""

        def one(before: State, xs: PyTree, flags: PyTree, d_states: State, d_outputs: PyTree) -> State:
            def back(delta: State, inputs: PyTree) -> tuple[State, State]:
                s, x, flag, d_state, d_output = inputs
                delta = jax.tree.map(jnp.add, delta, d_state)
                _, pull = jax.vjp(lambda s: self.step(self.params, s, x, flag), s)
                return pull((delta, d_output))[0], delta

            zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), before)
            delta_0, delta = jax.lax.scan(back, zero, (before, xs, flags, d_states, d_outputs), reverse=True)
            return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), delta_0, delta)

        return jax.vmap(one)(_before(self.states), self.xs, self.flags, d_states, d_outputs)
