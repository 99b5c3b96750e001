"""Backward: the chain of lambda_t = dL/ds_t through a chunk, then the gradients of its products all at once.

    lambda_{t-1} = (ds_t/ds_{t-1})^T lambda_t + (dr_t/ds_{t-1})^T (ds_t/dr_t)^T lambda_t

Here ds_t/ds_{t-1} and ds_t/dr_t are those of `advance`, at states and products that are all known before the loop; so
one product a step remains in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State
from seqjax.guarded import zeros_like
from seqjax.split.chunks import Recurrence, choose_rows, cut, cut_inputs, over_chunk, scan_once
from seqjax.split.forward import initial_states, run_chunk


def pick(tree: PyTree, wanted: PyTree) -> list[Any]:
    """The leaves where `wanted` is True."""
    return [leaf for leaf, is_wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True) if is_wanted]


def put(tree: PyTree, wanted: PyTree, values: Sequence[Any]) -> PyTree:
    """The tree with other leaves where `wanted` is True."""
    those = iter(values)
    return jax.tree.map(lambda leaf, is_wanted: next(those) if is_wanted else leaf, tree, wanted)


def backward(how: Recurrence, inputs: Any, saved: State, cotangents: Any, wanted: PyTree) -> list[Array]:
    """The cotangents of the inputs that are wanted, in their order.

    Args:
        inputs: (params, state, xs, mask, reset), batched.
        saved: what `forward` saved of them.
        cotangents: of the final state and of what was kept, (batch, time, ...).
        wanted: a tree like the inputs, of True and False.
    """
    params, state, xs, mask, reset = inputs
    wanted_params, wanted_state, wanted_xs = wanted[:3]
    last, kept_cotangents = cotangents
    initial = initial_states(how.cell, params, state)

    def chunk(carry: Any, start: Array, length: int) -> tuple[Any, Any]:
        chain, of_params = carry
        x, valid, restart = cut_inputs(xs, mask, reset, start, length)
        drives = over_chunk(how.cell.drive)(params, x)
        first = _state_before(how, state, saved, xs, start, length)
        if how.every:
            states = run_chunk(how, params, initial, first, drives, valid, restart)[1][0]
        else:
            states = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, length), saved)
        before = _shift(how, first, states)
        if restart is not None:
            before = choose_rows(restart, jax.tree.map(lambda leaf: leaf[None], initial), before)
        kept = cut(kept_cotangents, start, length)
        chain, of_products = _chain(how, params, chain, before, drives, (valid, restart, kept))

        def products(some_params: list[Array], some_x: list[Array]) -> tuple[PyTree, PyTree]:
            p = put(params, wanted_params, some_params)
            return over_chunk(how.cell.drive)(p, put(x, wanted_xs, some_x)), over_chunk(how.cell.recur)(p, before)

        pull = jax.vjp(products, pick(params, wanted_params), pick(x, wanted_xs))[1]
        of_p, of_x = pull(of_products)
        of_x = of_x if valid is None else choose_rows(valid, of_x, zeros_like(of_x))
        return (chain, jax.tree.map(jnp.add, of_params, of_p)), of_x

    of_params = zeros_like(pick(params, wanted_params))
    carry = ((last, None if reset is None else zeros_like(state)), of_params)
    ((of_state, of_initial), of_params), of_xs = how.chunks(xs).scan(chunk, carry, back=True)
    if reset is not None:

        def begin(some_params: list[Array]) -> State:
            return initial_states(how.cell, put(params, wanted_params, some_params), state)

        through = jax.vjp(begin, pick(params, wanted_params))[1](of_initial)[0]
        of_params = jax.tree.map(jnp.add, of_params, through)
    return [*of_params, *pick(of_state, wanted_state), *(jnp.swapaxes(leaf, 0, 1) for leaf in of_xs)]


def _state_before(how: Recurrence, state: State, saved: State, xs: PyTree, start: Array, length: int) -> State:
    """The state that the chunk began with, from what was saved."""
    chunks = how.chunks(xs)
    if how.every:
        return jax.tree.map(lambda leaf: leaf[start // chunks.length], saved)
    at, outside = (start + length, start + length >= chunks.time) if how.reverse else (start - 1, start <= 0)
    inside = jax.tree.map(lambda leaf: leaf[jnp.clip(at, 0, chunks.time - 1)], saved)
    return jax.tree.map(lambda a, b: jnp.where(outside, a, b), state, inside)


def _shift(how: Recurrence, first: State, states: State) -> State:
    """s_{t-1} for every s_t of a chunk, (time, batch, ...)."""

    def shift(before: Array, inside: Array) -> Array:
        return jnp.concatenate([inside[1:], before[None]] if how.reverse else [before[None], inside[:-1]])

    return jax.tree.map(shift, first, states)


def _chain(how: Recurrence, params: Params, carry: Any, before: State, drives: PyTree, flags: Any) -> tuple[Any, Any]:
    """lambda through one chunk; and the cotangents of its drives and recurrent products, (time, batch, ...)."""
    recur = jax.vmap(how.cell.recur, (None, 0))
    recurrents = over_chunk(how.cell.recur)(params, before)

    def step(carry: Any, at: Any) -> tuple[Any, Any]:
        after, of_initial = carry
        state, drive, recurrent, (valid, restart, kept) = at
        advance = jax.vmap(how.guarded_advance)
        _, pull = jax.vjp(lambda s, d, r: advance(s, d, r, valid), state, drive, recurrent)
        of_state, of_drive, of_recurrent = pull((after, kept))
        through = jax.vjp(lambda s: recur(params, s), state)[1](of_recurrent)[0]
        of_state = jax.tree.map(jnp.add, of_state, through)
        if restart is not None:
            nothing = zeros_like(of_state)
            of_initial = jax.tree.map(jnp.add, of_initial, choose_rows(restart, of_state, nothing))
            of_state = choose_rows(restart, nothing, of_state)
        return (of_state, of_initial), (of_drive, of_recurrent)

    return scan_once(step, carry, (before, drives, recurrents, flags), not how.reverse)
