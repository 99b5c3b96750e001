"""The search for a trajectory, for every sequence of a batch, and the record of it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.cell import Params, State
from seqjax.parallel._flat import At, FlatCell
from seqjax.parallel._newton import newton
from seqjax.parallel.contraction import largest_exponent
from seqjax.parallel.methods import Method
from seqjax.sequence._masked_step import Inputs, masked_step, new_state
from seqjax.sequence.unroll import trajectory


class Convergence(NamedTuple):
    """What the search found, for each sequence of the batch. A stack is searched layer by layer.

    Attributes:
        converged: whether the residual is within the tolerance; of a stack, in all layers.
        iterations: of Newton's method; of a stack, of all layers together.
        residual: max_t |s_t - f(s_{t-1}, x_t)| over the largest state up to t; infinite where it is not a number.
        exponent: the largest Lyapunov exponent in nats a step, estimated; minus infinity where nothing recurs.
        fell_back: whether the values are those of the sequential scan.
    """

    converged: Bool[Array, " batch"]
    iterations: Int[Array, " batch"]
    residual: Float[Array, " batch"]
    exponent: Float[Array, " batch"]
    fell_back: Bool[Array, " batch"]


def together(records: list[Convergence]) -> Convergence:
    """One record of all layers: every one must converge, and the slowest to contract is what counts."""
    converged, iterations, residual, exponent, fell_back = (jnp.stack(each) for each in zip(*records, strict=True))
    return Convergence(
        converged=jnp.all(converged, axis=0),
        iterations=jnp.sum(iterations, axis=0, dtype=jnp.int32),
        residual=jnp.max(residual, axis=0),
        exponent=jnp.max(exponent, axis=0),
        fell_back=jnp.any(fell_back, axis=0),
    )


def nothing_to_find(flat: FlatCell, batch: int, time: int) -> tuple[Array, Convergence]:
    """Where there is no sequence, no step or no state: no states to search for, and a record that says so."""
    exponent = jnp.full(batch, 0.0 if flat.size else -jnp.inf, jnp.float32)
    done, none = jnp.ones(batch, bool), jnp.zeros(batch, jnp.float32)
    found = Convergence(done, jnp.zeros(batch, jnp.int32), none, exponent, ~done)
    return jnp.zeros((batch, time, flat.size), flat.dtype), found


def search(
    flat: FlatCell, method: Method, fallback: bool, limits: Any, params: Params, first: Array, inputs: At
) -> tuple[Array, Convergence]:
    """The states (batch, time, n), by Newton's method and, where asked for and needed, by the scan."""
    tolerance, most = limits
    tolerance = jnp.where(tolerance > 0, tolerance, flat.epsilon**0.75).astype(first.dtype)
    find = partial(newton, flat, method, params, tolerance=tolerance, most=jnp.asarray(most, jnp.int32))
    states, residual, iterations = jax.vmap(lambda *row: find(*row))(first, inputs)
    converged = residual <= tolerance
    fell_back = ~converged if fallback else jnp.zeros_like(converged)
    if fallback:
        scanned = jax.lax.cond(
            jnp.any(fell_back), lambda states: _scanned(flat, params, first, inputs), lambda states: states, states
        )
        states = jax.vmap(jnp.where)(fell_back, scanned, states)
    measure = jax.vmap(partial(largest_exponent, flat, params))
    exponent = measure(first, states, inputs)
    return states, Convergence(converged, iterations, residual.astype(jnp.float32), exponent, fell_back)


def _scanned(flat: FlatCell, params: Params, first: Array, inputs: At) -> Array:
    """The states (batch, time, n), one step after another: by what `unroll` itself runs, where it need not draw noise.

    A chaotic recurrence tells two programs of the same steps apart.
    """
    xs, mask, reset, noise = inputs
    start = jax.vmap(flat.unravel)(first)
    if noise is None:
        states = trajectory(flat.cell, params, xs, state=start, mask=mask, reset=reset)
        return jax.vmap(jax.vmap(flat.ravel))(states)[:, 1:]

    def one(state: State, inputs: At) -> State:
        return jax.lax.scan(lambda s, at: masked_step(flat.cell, params, s, Inputs(*at), new_state), state, inputs)[1]

    return jax.vmap(jax.vmap(flat.ravel))(jax.vmap(one)(start, inputs))
