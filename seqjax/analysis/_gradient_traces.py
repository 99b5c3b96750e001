"""Gradients traced back through a trajectory, as compiled code: from a loss once, and from chosen times lag by lag.

A gradient is kept as 2^exponent times numbers near one, and what is reported of it is a logarithm.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.analysis._flow import Driven, flat_step, orthonormal, pull, push, random_frame, state_parts
from seqjax.analysis._scaled import common_scale, rescaled, rescaled_rows
from seqjax.cell import Cell

RITZ, RITZ_ROUNDS, RITZ_POWER = 8, 3, 4  # columns, QRs, and products before each, for the largest singular value


def loss_gradient(cell: Cell, given: Driven, states: Array, arriving: Array) -> tuple[Array, list[Array]]:
    """ln |dL/ds_t| for t = 0..T, in all and by field, from one backward pass."""
    step, params = flat_step(cell, given.params), given.params
    parts = state_parts(cell, params).values()

    def logs(g: Array, exponent: Array) -> Array:
        sizes = [_norm(g), *(_norm(g[where]) for where in parts)]
        return jnp.log(jnp.stack(sizes)) + exponent.astype(g.dtype) * math.log(2)

    def one(states: Array, inputs: PyTree, arriving: Array) -> Array:
        def back(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], Array]:
            (g, exponent), (v, x, more) = carry, at
            g, more, exponent = common_scale(g, exponent, *rescaled_rows(more, jnp.zeros((), jnp.int32)))
            g = g + more
            log_norm = logs(g, exponent)
            return rescaled_rows(pull(step, params, v, g[None], x)[0], exponent), log_norm

        start = (jnp.zeros_like(states[0]), jnp.zeros((), jnp.int32))
        first, rest = jax.lax.scan(back, start, (states[:-1], inputs, arriving), reverse=True)
        return jnp.concatenate([logs(*first)[None], rest])

    logs_of_all = jax.vmap(one)(states, given.inputs, arriving)
    return logs_of_all[..., 0], [logs_of_all[..., i + 1] for i in range(len(parts))]


def norms_by_lag(
    cell: Cell, K: int, given: Driven, states: Array, ends: Array, frame: Array
) -> tuple[Array, Array, Array]:
    """ln of the expected and of the worst norm of ds_t/ds_{t-k}, (batch, times, K + 1), and the expected one by field.

    Rows of the frame are gradients at s_t; they are pulled back K times. Before the beginning there is NaN.
    """
    step, params = flat_step(cell, given.params), given.params
    parts = state_parts(cell, params).values()

    def norms(rows: Array, exponent: Array, best: Array) -> tuple[PyTree, Array]:
        scale, root = exponent.astype(rows.dtype) * math.log(2), math.sqrt(rows.shape[0])

        def towards_the_largest(_: Any, best: Array) -> Array:
            for _ in range(RITZ_POWER):
                best = best @ rows @ rows.T
            return orthonormal(best)[0]

        best = jax.lax.fori_loop(0, RITZ_ROUNDS, towards_the_largest, best)
        largest = jnp.linalg.norm(best @ rows, 2)
        by_part = jnp.stack([jnp.log(_norm(rows[:, where]) / root) for where in parts])
        return (jnp.log(_norm(rows) / root) + scale, jnp.log(largest) + scale, by_part + scale), best

    def one(states: Array, inputs: PyTree, end: Array) -> tuple[Array, Array, Array]:
        def back(carry: tuple[Array, Array, Array], lag: Array) -> tuple[tuple[Array, Array, Array], PyTree]:
            rows, exponent, best = carry
            t = end - lag  # rows are gradients at s_t
            found, best = norms(rows, exponent, best)
            before = jnp.maximum(t - 1, 0)
            x = jax.tree.map(lambda leaf: leaf[before], inputs)
            rows, more = rescaled(pull(step, params, states[before], rows, x))
            return (rows, exponent + more, best), jax.tree.map(lambda leaf: jnp.where(t >= 0, leaf, jnp.nan), found)

        columns = min(RITZ, len(frame))
        start = (frame, jnp.zeros((), jnp.int32), random_frame(jax.random.key(0), columns, len(frame), frame.dtype))
        return jax.lax.scan(back, start, jnp.arange(K + 1))[1]

    over_times = jax.vmap(one, in_axes=(None, None, 0))
    expected, worst, by_part = jax.vmap(over_times, in_axes=(0, 0, None))(states, given.inputs, ends)
    return expected, worst, jnp.moveaxis(by_part, -1, 2)


def _norm(values: Array) -> Array:
    """The root of the sum of squares, of which none vanishes because it is small."""
    largest = jnp.max(jnp.abs(values))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum((values / scale) ** 2))


def turns(cell: Cell, given: Driven, states: Array) -> Array:
    """Whether the step's derivative differs from state to state: in a linear map an error grows, and harms nothing."""
    step, params = flat_step(cell, given.params), given.params
    first = jax.tree.map(lambda leaf: leaf[0, 0], given.inputs)
    frame = jnp.ones((1, given.size), given.first.dtype) / math.sqrt(given.size)
    early, late = (push(step, params, v, frame, first)[1] for v in (states[0, 0], states[0, -1]))
    return jnp.any(jnp.abs(early - late) > 1e-3 * jnp.max(jnp.abs(early)))
