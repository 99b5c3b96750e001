"""Each step's share of the weight gradient, without a copy of the parameters for every step.

The gradient is a sum over steps, g = sum_t g_t. With delta_t = dL/ds_t already traced back, <g_t, g> is the derivative
of step t along g, <delta_t, ds_t> + <dL/do_t, do_t>: pushed forward, so only states are kept for every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from seqjax.analysis._flow import Driven, flat_trajectory, unflatten
from seqjax.analysis._leaves import floating_leaves, with_leaves
from seqjax.analysis._scaled import common_scale, rescaled, rescaled_rows, times_power
from seqjax.cell import Cell
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence._masked_step import guarded_step


def gradient_shares(cell: Cell, given: Driven, d_outputs: PyTree) -> list[Float[np.ndarray, " time"]]:
    """<g_t, g> / |g|^2 for every leaf of the parameters and every step.

    Args:
        cell: any cell.
        given: what drives it.
        d_outputs: dL/do_t, leaves (batch, time, ...).

    Returns:
        One array (time,) for each leaf, in the order of `floating_leaves`; zeros where the gradient is zero.
    """
    d_outputs = _flat(d_outputs, 2, given.first.dtype)
    parts = [[np.asarray(x, np.float64) for x in leaf] for leaf in compiled(_shares, cell)(given, d_outputs)]
    return [
        np.ldexp(along, -exponent.astype(int)) / np.where(square == 0, 1, square) for along, square, exponent in parts
    ]


def _flat(tree: PyTree, axes: int, dtype: DTypeLike) -> Array:
    """The leaves behind their first `axes` axes, side by side."""
    return jnp.concatenate([x.reshape(*x.shape[:axes], -1).astype(dtype) for x in jax.tree.leaves(tree)], axis=-1)


def _shares(cell: Cell, given: Driven, d_outputs: Array) -> list[tuple[Array, Array, Array]]:
    """For every leaf <g_t, g'> (time,), |g'|^2 and e, with g = 2^e g' at the scale of the largest step."""
    params, leaves = given.params, list(floating_leaves(given.params).values())
    before = flat_trajectory(cell, given)[:, :-1]

    def step(leaves: list[Array], v: Array, at: PyTree) -> tuple[Array, Array]:
        here = with_leaves(params, leaves)
        after, output = guarded_step(cell, here, unflatten(cell, params, v), *at)
        return _flat(after, 0, v.dtype), _flat(output, 0, v.dtype)

    def traced(before: Array, inputs: PyTree, d_outputs: Array) -> PyTree:
        def back(carry: tuple[Array, Array], at_step: PyTree) -> tuple[tuple[Array, Array], PyTree]:
            (delta, exponent), (v, at, d_output) = carry, at_step
            delta, d_output, exponent = common_scale(delta, exponent, *rescaled(d_output))
            _, pull = jax.vjp(lambda s: step(leaves, s, at), v)
            return rescaled_rows(pull((delta, d_output))[0], exponent), (delta, d_output, exponent)

        start = jnp.zeros_like(before[0]), jnp.zeros((), jnp.int32)
        return jax.lax.scan(back, start, (before, inputs, d_outputs), reverse=True)[1]

    delta, d_outputs, exponent = jax.vmap(traced)(before, given.inputs, d_outputs)
    there = jnp.any(delta != 0, axis=-1) | jnp.any(d_outputs != 0, axis=-1)
    shift = jnp.where(there, exponent - jnp.max(jnp.where(there, exponent, jnp.iinfo(jnp.int32).min)), 0)
    arriving = times_power(delta, shift), times_power(d_outputs, shift)

    everywhere = jax.vmap(jax.vmap(step, in_axes=(None, 0, 0)), in_axes=(None, 0, 0))
    _, pull = jax.vjp(lambda leaves: everywhere(leaves, before, given.inputs), leaves)
    gradient = [rescaled(g) for g in pull(arriving)[0]]
    _, push = jax.linearize(lambda leaves: everywhere(leaves, before, given.inputs), leaves)
    zeros = [jnp.zeros_like(leaf) for leaf in leaves]

    def along(i: int, g: Array) -> Array:
        d_after, d_output = push([*zeros[:i], g, *zeros[i + 1 :]])
        return jnp.sum(arriving[0] * d_after, axis=(0, 2)) + jnp.sum(arriving[1] * d_output, axis=(0, 2))

    return [(along(i, g), jnp.sum(g**2), e) for i, (g, e) in enumerate(gradient)]
