"""The share of each step in the weight gradient, without a copy of the parameters for every step.

The gradient is a sum over steps, g = sum_t g_t. With delta_t = dL/ds_t from a backward pass, <g_t, g> is the derivative
of step t in the direction g, <delta_t, ds_t> + <dL/do_t, do_t>. A forward-mode derivative computes it, so memory grows
with the states and not with time * parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from seqjax.analysis._flow import Sequences, flat_trajectory, unflatten
from seqjax.analysis._leaves import floating_leaves, with_leaves
from seqjax.analysis._scaled import rescale, rescale_rows, scale_by_power, to_common_scale
from seqjax.cell import Cell
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._masked_step import Inputs, masked_step


def gradient_shares(cell: Cell, sequences: Sequences, d_outputs: PyTree) -> list[Float[np.ndarray, " time"]]:
    """<g_t, g> / |g|^2 for every leaf of the parameters and every step.

    Args:
        cell: any cell.
        sequences: parameters and inputs.
        d_outputs: dL/do_t, leaves (batch, time, ...).

    Returns:
        One array (time,) for each leaf, in the order of `floating_leaves`; zeros if the gradient is zero.
    """
    d_outputs = _flat(d_outputs, 2, sequences.first.dtype)
    parts = [[np.asarray(x, np.float64) for x in leaf] for leaf in precise_jit(_shares, cell)(sequences, d_outputs)]
    return [
        np.ldexp(along, -exponent.astype(int)) / np.where(square == 0, 1, square) for along, square, exponent in parts
    ]


def _flat(tree: PyTree, axes: int, dtype: DTypeLike) -> Array:
    """Flattens the leaves after their first `axes` axes and concatenates them."""
    return jnp.concatenate([x.reshape(*x.shape[:axes], -1).astype(dtype) for x in jax.tree.leaves(tree)], axis=-1)


def _shares(cell: Cell, sequences: Sequences, d_outputs: Array) -> list[tuple[Array, Array, Array]]:
    """For every leaf <g_t, g'> (time,), |g'|^2 and e, with g = 2^e g' and g_t on the scale of the largest step."""
    params, leaves = sequences.params, list(floating_leaves(sequences.params).values())
    before = flat_trajectory(cell, sequences)[:, :-1]

    # The gradient of the outputs is needed too, which `FlatCell.step` does not return.
    def step(leaves: list[Array], v: Array, at: Inputs) -> tuple[Array, Array]:
        after, output = masked_step(cell, with_leaves(params, leaves), unflatten(cell, params, v), at)
        return _flat(after, 0, v.dtype), _flat(output, 0, v.dtype)

    def backward(before: Array, inputs: Inputs, d_outputs: Array) -> PyTree:
        def back(carry: tuple[Array, Array], at_step: PyTree) -> tuple[tuple[Array, Array], PyTree]:
            (delta, exponent), (v, at, d_output) = carry, at_step
            delta, d_output, exponent = to_common_scale(delta, exponent, *rescale(d_output))
            _, pull = jax.vjp(lambda s: step(leaves, s, at), v)
            return rescale_rows(pull((delta, d_output))[0], exponent), (delta, d_output, exponent)

        start = jnp.zeros_like(before[0]), jnp.zeros((), jnp.int32)
        return jax.lax.scan(back, start, (before, inputs, d_outputs), reverse=True)[1]

    delta, d_outputs, exponent = jax.vmap(backward)(before, sequences.inputs, d_outputs)
    # All steps get the scale of the largest one, so that their sum is meaningful. Rows of zeros have no scale.
    nonzero = jnp.any(delta != 0, axis=-1) | jnp.any(d_outputs != 0, axis=-1)
    shift = jnp.where(nonzero, exponent - jnp.max(jnp.where(nonzero, exponent, jnp.iinfo(jnp.int32).min)), 0)
    arriving = scale_by_power(delta, shift), scale_by_power(d_outputs, shift)

    all_steps = jax.vmap(jax.vmap(step, in_axes=(None, 0, 0)), in_axes=(None, 0, 0))
    _, pull = jax.vjp(lambda leaves: all_steps(leaves, before, sequences.inputs), leaves)
    gradient = [rescale(g) for g in pull(arriving)[0]]
    _, push = jax.linearize(lambda leaves: all_steps(leaves, before, sequences.inputs), leaves)
    zeros = [jnp.zeros_like(leaf) for leaf in leaves]  # one leaf at a time, because shares are per leaf

    def along(i: int, g: Array) -> Array:
        d_after, d_output = push([*zeros[:i], g, *zeros[i + 1 :]])
        return jnp.sum(arriving[0] * d_after, axis=(0, 2)) + jnp.sum(arriving[1] * d_output, axis=(0, 2))

    return [(along(i, g), jnp.sum(g**2), e) for i, (g, e) in enumerate(gradient)]
