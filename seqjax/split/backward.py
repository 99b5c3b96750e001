"""Backward: the chain of lambda_t = dL/ds_t through a chunk, then the gradients of its products all at once.

    lambda_{t-1} = (ds_t/ds_{t-1})^T lambda_t + (dr_t/ds_{t-1})^T (ds_t/dr_t)^T lambda_t

Here ds_t/ds_{t-1} and ds_t/dr_t are those of `advance`, at states and products that are all known before the loop; so
one product a step remains in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State, recalled_step, same_state_type
from seqjax.guarded import last_output, zeros_like
from seqjax.native import run_backward, run_replay, takes
from seqjax.split.chunks import Recurrence, choose_rows, cut, cut_inputs, over_chunk, scan_once
from seqjax.split.forward import initial_states


def pick(tree: PyTree, wanted: PyTree) -> list[Any]:
    """The leaves where `wanted` is True."""
    return [leaf for leaf, is_wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True) if is_wanted]


def put(tree: PyTree, wanted: PyTree, values: Sequence[Any]) -> PyTree:
    """The tree with other leaves where `wanted` is True."""
    those = iter(values)
    return jax.tree.map(lambda leaf, is_wanted: next(those) if is_wanted else leaf, tree, wanted)


def backward(how: Recurrence, inputs: Any, saved: Any, cotangents: Any, wanted: PyTree) -> list[Array]:
    """The cotangents of the inputs that are wanted, in their order.

    Args:
        inputs: (params, state, xs, mask, reset), batched.
        saved: what `forward` saved of them.
        cotangents: of the final state and of what was kept, (batch, time, ...).
        wanted: a tree like the inputs, of True and False.
    """
    params, state, xs, mask, reset = inputs
    wanted_params, wanted_state, wanted_xs = wanted[:3]
    of_last, of_kept = cotangents
    initial = initial_states(how.cell, params, state)

    def chunk(carry: Any, start: Array, length: int) -> tuple[Any, Any, None]:
        chain, of_params = carry
        x, valid, restart = cut_inputs(xs, mask, reset, start, length)
        before = _states_before(how, state, saved, xs, start, length)
        if restart is not None:
            before = choose_rows(restart, jax.tree.map(lambda leaf: leaf[None], initial), before)

        def products(some_params: list[Array], some_x: list[Array]) -> tuple[PyTree, PyTree]:
            p = put(params, wanted_params, some_params)
            drives = over_chunk(how.cell.drive)(p, put(x, wanted_xs, some_x))
            recurrents = over_chunk(how.cell.recur)(p, before)
            if not how.is_nested:
                return drives, recurrents
            v = lax.stop_gradient(jax.vmap(jax.vmap(how.cell.inner))(before, drives, recurrents))
            return drives, (recurrents, over_chunk(how.cell.recur_inner)(p, v))

        made, pull = jax.vjp(products, pick(params, wanted_params), pick(x, wanted_xs))
        if how.recalls(mask):
            before = _replay(how, params, initial, before, made, restart)
        chain, of_made = _chain(how, params, chain, before, made, (valid, restart, cut(of_kept, start, length)))
        of_p, of_x = pull(of_made)
        of_x = of_x if valid is None else choose_rows(valid, of_x, zeros_like(of_x))
        return (chain, jax.tree.map(jnp.add, of_params, of_p)), of_x, None

    of_params = zeros_like(pick(params, wanted_params))
    carry = ((of_last, None if reset is None else zeros_like(state)), of_params)
    ((of_state, of_initial), of_params), of_xs, _ = how.chunks(xs).scan(chunk, carry, back=True)
    if reset is not None:

        def begin(some_params: list[Array]) -> State:
            return initial_states(how.cell, put(params, wanted_params, some_params), state)

        through = jax.vjp(begin, pick(params, wanted_params))[1](of_initial)[0]
        of_params = jax.tree.map(jnp.add, of_params, through)
    return [*of_params, *pick(of_state, wanted_state), *of_xs]


def _states_before(how: Recurrence, state: State, saved: Any, xs: PyTree, start: Array, length: int) -> State:
    """s_{t-1} for every t of a chunk, (time, batch, ...), as far as `recur` reads it; the first is right in full."""
    (states, outputs), time = saved, how.chunks(xs).time
    if outputs is not None:
        first = jax.tree.map(lambda leaf: leaf[start // how.chunks(xs).length], states)
        part = jax.vmap(jax.vmap(how.cell.recalled))(cut(outputs, start, length))
        return jax.tree.map(partial(_shift, how), first, part)

    at, outside = (start + length, start + length >= time) if how.reverse else (start - 1, start <= 0)

    def before(first: Array, every: Array) -> Array:
        neighbour = lax.dynamic_index_in_dim(every, jnp.clip(at, 0, time - 1), 1, keepdims=False)
        return _shift(how, jnp.where(outside, first, neighbour), cut(every, start, length))

    return jax.tree.map(before, state, states)


def _shift(how: Recurrence, first: Array, inside: Array) -> Array:
    return jnp.concatenate([inside[1:], first[None]] if how.reverse else [first[None], inside[:-1]])


def _replay(how: Recurrence, params: Params, initial: State, seen: State, made: Any, restart: Any) -> State:
    """s_{t-1} for every t of a chunk in full, by the steps without their products, which are known."""
    first = jax.tree.map(lambda leaf: leaf[-1 if how.reverse else 0], seen)
    if takes(how.cell, params, seen, made, (None, restart)):
        return run_replay(first, seen, made, how.reverse)

    def step(state: State, at: Any) -> tuple[State, State]:
        (drive, recurrent), restart = at
        if restart is not None:
            state = choose_rows(restart, initial, state)
        after = jax.vmap(recalled_step(how.cell))(state, drive, recurrent)
        return same_state_type(how.cell, after, state), state

    return scan_once(step, first, (made, restart), how.reverse)[1]


def _chain(how: Recurrence, params: Params, carry: Any, before: State, made: Any, flags: Any) -> tuple[Any, Any]:
    """lambda through one chunk; and the cotangents of its drives and recurrent products, (time, batch, ...).

    Args:
        carry: lambda of the states after the chunk, and the cotangent that the initial state has gathered.
        before: s_{t-1} for every t.
        made: the drives and the recurrent products.
        flags: the mask and the reset of the chunk, and the cotangents of what was kept.
    """
    if how.emit is last_output and takes(how.cell, params, (carry[0], before, flags[2]), made, flags[:2]):
        of_state, of_made = run_backward(how.cell, params, carry[0], before, made, flags[2], how.reverse)
        return (of_state, carry[1]), of_made

    def step(carry: Any, at: Any) -> tuple[Any, Any]:
        of_after, of_initial = carry
        state, made, (valid, restart, of_kept) = at
        _, pull = jax.vjp(lambda s, m: jax.vmap(how.guarded_advance)(s, m[0], m[1], valid), state, made)
        of_state, of_made = _through_products(how, params, state, made, *pull((of_after, of_kept)))
        if restart is not None:
            nothing = zeros_like(of_state)
            of_initial = jax.tree.map(jnp.add, of_initial, choose_rows(restart, of_state, nothing))
            of_state = choose_rows(restart, nothing, of_state)
        return (of_state, of_initial), of_made

    return scan_once(step, carry, (before, made, flags), not how.reverse)


def _through_products(
    how: Recurrence, params: Params, state: State, made: Any, of_state: State, of_made: Any
) -> tuple[State, Any]:
    """Adds to the cotangent of the state what comes through its product, and before that through an inner one."""
    of_drive, of_recurrent = of_made
    of_product = of_recurrent
    if how.is_nested:
        drive, (product, _) = made
        of_product, of_second = of_recurrent
        v, pull = jax.vjp(jax.vmap(how.cell.inner), state, drive, product)
        of_v = jax.vjp(lambda v: jax.vmap(how.cell.recur_inner, (None, 0))(params, v), v)[1](of_second)[0]
        of_state, of_drive, of_product = jax.tree.map(jnp.add, (of_state, of_drive, of_product), pull(of_v))
        of_recurrent = (of_product, of_second)
    through = jax.vjp(lambda s: jax.vmap(how.cell.recur, (None, 0))(params, s), state)[1](of_product)[0]
    return jax.tree.map(jnp.add, of_state, through), (of_drive, of_recurrent)
