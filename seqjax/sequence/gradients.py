"""Backpropagation through time in its parts.

Backpropagation through time is `jax.grad` of a loss of `unroll`. These functions return what it computes on the way.
With delta_t = dL/ds_t, the chain rule through time is a linear recurrence that runs backward,

    delta_{t-1} = (ds_t/ds_{t-1})^T delta_t + (do_t/ds_{t-1})^T dL/do_t,

and every step contributes a term to the gradient of the shared parameters,

    dL/dtheta = sum_t (ds_t/dtheta)^T delta_t + (do_t/dtheta)^T dL/do_t.

Truncation to a window of k steps keeps only the gradient that returns within the window. It is computed for all t at
once by k - 1 rounds of the recurrence, starting from delta = 0.

All functions differentiate the masked step that `unroll` runs, so masks and resets have the same meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from seqjax.cell import Cell, Params, State
from seqjax.cells.arguments import check_function
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._checks import batch_of_states, check_floating_state, check_sequences
from seqjax.sequence._devices import with_automatic_axes
from seqjax.sequence._masked_step import Inputs, masked_step
from seqjax.sequence._sizes import is_known
from seqjax.sequence.unroll import trajectory, unroll

Loss = Callable[[PyTree], Array]


def detach(state: State) -> State:
    """Stops the gradient, s <- stopgrad(s), so that a state carried into the next window brings no history.

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
    check_function("loss", loss, "it gets the states, leaves (batch, time, ...)")
    arguments = _checked(cell, params, xs, state, mask, reset)
    return cached_jit(_state_gradients, cell, loss)(*arguments)


def _state_gradients(cell: Cell, loss: Loss, params: Params, state: State | None, inputs: Inputs) -> State:
    run = partial(_state_gradients_on_mesh, cell, loss)
    return with_automatic_axes(run, inputs.x, params, state, inputs)


def _state_gradients_on_mesh(cell: Cell, loss: Loss, params: Params, state: State | None, inputs: Inputs) -> State:
    run = _ForwardPass(cell, params, state, inputs)
    after = jax.tree.map(lambda leaf: leaf[:, 1:], run.states)
    return run.state_gradients(jax.grad(loss)(after), run.zero_outputs())


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
    check_function("loss", loss, "it gets the outputs, leaves (batch, time, ...)")
    arguments = _checked(cell, params, xs, state, mask, reset)
    return cached_jit(_weight_gradients, cell, loss)(*arguments)


def _weight_gradients(cell: Cell, loss: Loss, params: Params, state: State | None, inputs: Inputs) -> Params:
    run = partial(_weight_gradients_on_mesh, cell, loss)
    return with_automatic_axes(run, (), params, state, inputs)


def _weight_gradients_on_mesh(cell: Cell, loss: Loss, params: Params, state: State | None, inputs: Inputs) -> Params:
    run = _ForwardPass(cell, params, state, inputs)
    d_outputs = run.output_gradients(loss)
    inputs = run.starting_with_a_reset()
    delta = run.state_gradients(run.zero_states(), d_outputs, inputs)

    def at_step(before: PyTree, at: Inputs, d_after: PyTree, d_output: PyTree) -> Params:
        step = jax.vmap(run.step, in_axes=(None, 0, 0))
        _, pull = jax.vjp(lambda p: step(p, before, at), params)
        return pull((d_after, d_output))[0]

    before, after = _before(run.states), jax.tree.map(lambda leaf: leaf[:, 1:], delta)
    return jax.vmap(at_step, in_axes=1)(before, inputs, after, d_outputs)


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
    hint = "window=1 is no recurrence at all"
    window = whole_number("window", window, hint=hint, expected="a window of at least 1 step")
    check_function("loss", loss, "it gets the outputs, leaves (batch, time, ...)")
    arguments = _checked(cell, params, xs, state, mask, reset)
    return cached_jit(_truncated, cell, loss, window)(*arguments)


def _truncated(cell: Cell, loss: Loss, window: int, params: Params, state: State | None, inputs: Inputs) -> Params:
    run = partial(_truncated_on_mesh, cell, loss, window)
    return with_automatic_axes(run, (), params, state, inputs)


def _truncated_on_mesh(
    cell: Cell, loss: Loss, window: int, params: Params, state: State | None, inputs: Inputs
) -> Params:
    run = _ForwardPass(cell, params, state, inputs)
    d_outputs = run.output_gradients(loss)
    inputs = run.starting_with_a_reset()
    # For an unknown time the windows run too: with k >= time they give the full gradient.
    is_full = is_known(inputs.time) and window >= inputs.time
    if is_full:
        delta = run.state_gradients(run.zero_states(), d_outputs, inputs)
        delta = jax.tree.map(lambda leaf: leaf[:, 1:], delta)
    else:
        delta = run.zero_states()
    step = jax.vmap(jax.vmap(run.step, in_axes=(None, 0, 0)), in_axes=(None, 0, 0))
    _, pull = jax.vjp(lambda p, s: step(p, s, inputs), params, _before(run.states))

    def one_step_further(_: Array, delta: State) -> State:
        d_before = pull((delta, d_outputs))[1]
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf[:, 1:], jnp.zeros_like(leaf[:, :1])], axis=1), d_before)

    if not is_full:
        delta = jax.lax.fori_loop(0, window - 1, one_step_further, delta)
    return pull((delta, d_outputs))[0]


def _checked(
    cell: Cell, params: Params, xs: PyTree, state: State | None, mask: Any, reset: Any
) -> tuple[Params, State | None, Inputs]:
    """The arguments as arrays.

    Raises:
        ValueError, TypeError: an argument does not fit, or a leaf of the state is not floating-point.
    """
    inputs = check_sequences(cell, Inputs(xs, mask, reset))
    states = batch_of_states(cell, params, state, inputs.batch)
    check_floating_state(cell, states)
    return params, None if state is None else states, inputs


def _before(states: State) -> State:
    """s_0..s_{T-1} from s_0..s_T."""
    return jax.tree.map(lambda leaf: leaf[:, :-1], states)


class _ForwardPass:
    """One forward pass, and what the backward passes need from it."""

    def __init__(self, cell: Cell, params: Params, state: State | None, inputs: Inputs) -> None:
        self.cell, self.params, self.state, self.inputs = cell, params, state, inputs
        self.states = trajectory(cell, params, inputs.x, state=state, mask=inputs.mask, reset=inputs.reset)

    def starting_with_a_reset(self) -> Inputs:
        """The inputs, with a reset before the first step if no state is given.

        The first step then computes the initial state itself, so the gradient of a learned initial state comes out of
        that step like the gradient of any other parameter.
        """
        if self.state is not None:
            return self.inputs
        batch, time, reset = self.inputs.batch, self.inputs.time, self.inputs.reset
        first = jnp.broadcast_to(jnp.arange(time)[None] == 0, (batch, time))
        return self.inputs._replace(reset=first if reset is None else reset | first)

    def step(self, params: Params, state: State, inputs: Inputs) -> tuple[State, PyTree]:
        return masked_step(self.cell, params, state, inputs)

    def outputs(self) -> PyTree:
        x, mask, reset, _ = self.inputs
        return unroll(self.cell, self.params, x, state=self.state, mask=mask, reset=reset)[1]

    def output_gradients(self, loss: Loss) -> PyTree:
        """dL/do_t for every t."""
        return jax.grad(loss)(self.outputs())

    def zero_outputs(self) -> PyTree:
        return jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), jax.eval_shape(self.outputs))

    def zero_states(self) -> State:
        return jax.tree.map(jnp.zeros_like, _before(self.states))

    def state_gradients(self, d_states: State, d_outputs: PyTree, inputs: Inputs | None = None) -> State:
        """delta_t for t = 0..T, from the gradients of the loss with respect to s_1..s_T and to o_1..o_T alone."""

        def of_sequence(before: State, inputs: Inputs, d_states: State, d_outputs: PyTree) -> State:
            def back(delta: State, at: PyTree) -> tuple[State, State]:
                s, inputs, d_state, d_output = at
                delta = jax.tree.map(jnp.add, delta, d_state)
                _, pull = jax.vjp(lambda s: self.step(self.params, s, inputs), s)
                return pull((delta, d_output))[0], delta

            zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), before)
            delta_0, delta = jax.lax.scan(back, zero, (before, inputs, d_states, d_outputs), reverse=True)
            return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), delta_0, delta)

        inputs = self.inputs if inputs is None else inputs
        return jax.vmap(of_sequence)(_before(self.states), inputs, d_states, d_outputs)
