"""Trajectories, Jacobians and growth of a cell in float64, by plain scans over `cell.step`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

BURN_IN = 5_000  # steps of a long run before its growth counts
CHUNK = 2_000  # steps of one compiled loop of a long run


def widen(tree):
    """Converts floating-point leaves to float64; needs `jax.enable_x64`."""

    def convert(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, tree)


def flat(cell, params):
    """The step as a map of vectors, v, x -> v, with the initial vector and the inverse of the flattening."""
    first, unravel = ravel_pytree(cell.initial_state(params))

    def step(params, v, x):
        return ravel_pytree(cell.step(params, unravel(v), x)[0])[0]

    return step, first, unravel


@functools.partial(jax.jit, static_argnums=(0, 5))
def _grow(cell, params, v, tangent, keys, steps, scale):
    """ln of the growth of one perturbation of each row at each step, under fresh normal inputs."""
    step, _, _ = flat(cell, params)

    def one_row(v, tangent, key):
        def advance(carry, key):
            v, tangent = carry
            x = scale * jax.random.normal(key, cell.input_shape, v.dtype)
            v, tangent = jax.jvp(lambda v: step(params, v, x), (v,), (tangent,))
            size = jnp.linalg.norm(tangent)
            return (v, tangent / size), jnp.log(size)

        return jax.lax.scan(advance, (v, tangent), jax.random.split(key, steps))

    (v, tangent), logs = jax.vmap(one_row)(v, tangent, keys)
    return v, tangent, logs


def long_run_exponents(cell, params, rows, steps, scale=1.0, seed=0, first=None):
    """The largest exponent of each row in a long run in float64 with fresh inputs, and its standard error.

    Args:
        cell, params: with `input_shape`; the inputs are normal with standard deviation `scale`.
        rows, steps: the number of runs, and of steps of each after `BURN_IN`.
        first: flat initial states (rows, n); by default the cell's own.

    Returns:
        Exponents and standard errors, (rows,) each; the errors come from the means of 20 blocks.
    """
    with jax.enable_x64(True):
        params = widen(params)
        _, start, _ = flat(cell, params)
        v = jnp.broadcast_to(start, (rows, start.size)) if first is None else jnp.asarray(first, jnp.float64)
        key, key_t = jax.random.split(jax.random.key(seed))
        tangent = jax.random.normal(key_t, v.shape, v.dtype)
        logs = []
        for key_chunk in jax.random.split(key, 1 + -(-(steps + BURN_IN) // CHUNK)):
            v, tangent, growth = _grow(cell, params, v, tangent, jax.random.split(key_chunk, rows), CHUNK, scale)
            logs.append(np.asarray(growth))
    logs = np.concatenate(logs, axis=1)[:, BURN_IN : BURN_IN + steps]
    blocks = logs[:, : steps // 20 * 20].reshape(rows, 20, -1).mean(axis=2)
    return logs.mean(axis=1), blocks.std(axis=1, ddof=1) / np.sqrt(20)


@functools.partial(jax.jit, static_argnums=0)
def states_before(cell, params, first, xs, mask, reset):
    """The flat state that each step reads, and that after it, (rows, time, n) each, in the cell's own dtype."""
    step, start, _ = flat(cell, params)

    def one_row(v, row):
        def advance(v, at):
            x, valid, again = at
            before = jnp.where(again, start, v)
            after = jnp.where(valid, step(params, before, x), before)
            return after, (before, after)

        return jax.lax.scan(advance, v, row)[1]

    return jax.vmap(one_row)(first, (xs, mask, reset))


@functools.partial(jax.jit, static_argnums=0)
def jacobians(cell, params, before, xs):
    """Explicit Jacobians of the steps, (rows, time, n, n)."""
    step, _, _ = flat(cell, params)
    return jax.vmap(jax.vmap(jax.jacfwd(lambda v, x: step(params, v, x))))(before, xs)


@functools.partial(jax.jit, static_argnums=0)
def follow(cell, params, v, tangent, xs, mask):
    """Several trajectories of each row under the same inputs, each with one perturbation.

    Args:
        v, tangent: (rows, starts, n).
        xs, mask: (rows, time, ...).

    Returns:
        The final states and perturbations, (rows, starts, n), and ln of the growth of each perturbation at each step,
        (rows, starts, time).
    """
    step, _, _ = flat(cell, params)

    def one_start(v, tangent, xs, mask):
        def advance(carry, at):
            v, tangent = carry
            x, valid = at
            after, pushed = jax.jvp(lambda v: step(params, v, x), (v,), (tangent,))
            size = jnp.linalg.norm(pushed)
            # A singular step has minus infinity as its logarithm; the perturbation itself must stay a direction.
            pushed = jnp.where(size > 0, pushed / jnp.where(size > 0, size, 1.0), tangent)
            return (jnp.where(valid, after, v), jnp.where(valid, pushed, tangent)), jnp.where(valid, jnp.log(size), 0.0)

        (v, tangent), logs = jax.lax.scan(advance, (v, tangent), (xs, mask))
        return v, tangent, logs

    return jax.vmap(jax.vmap(one_start, in_axes=(0, 0, None, None)))(v, tangent, xs, mask)
