"""The search for the trajectories of a batch by Newton's method, and its `Convergence`."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqjax.cell import Params, State
from seqjax.parallel._flat import At, NewtonCell
from seqjax.parallel._newton import newton
from seqjax.parallel.contraction import largest_exponent
from seqjax.parallel.methods import Method
from seqjax.sequence._masked_step import Inputs, emit_state, masked_step
from seqjax.sequence.unroll import trajectory

Limits = tuple[Array | float, Array | int]  # the tolerance, 0 for the default, and the largest number of iterations


@dataclasses.dataclass(frozen=True)
class Options:
    """How to unroll in parallel; it compiles once for equal options.

    Attributes:
        method: the Jacobians and the change per iteration.
        reverse: from right to left.
        fallback: whether a row that does not converge gets the states of the sequential scan.
    """

    method: Method
    reverse: bool
    fallback: bool


class Convergence(NamedTuple):
    """The result of the search for each sequence of the batch. A stack is searched layer by layer.

    Attributes:
        converged: whether the residual is within the tolerance, in all layers of a stack.
        iterations: the number of iterations of Newton's method, summed over the layers of a stack.
        residual: max_t |s_t - f(s_{t-1}, x_t)| relative to the largest state up to t; infinite if it is NaN.
        exponent: an estimate of the largest Lyapunov exponent, in nats per step; minus infinity if the cell has no
            state, or if a step forgets it.
        fell_back: whether the values are those of the sequential scan.
    """

    converged: Bool[Array, " batch"]
    iterations: Int[Array, " batch"]
    residual: Float[Array, " batch"]
    exponent: Float[Array, " batch"]
    fell_back: Bool[Array, " batch"]

    def __str__(self) -> str:
        return (
            f"{int(self.converged.sum())} of {self.converged.size} rows converged, in {int(self.iterations.min())} to "
            f"{int(self.iterations.max())} iterations; {int(self.fell_back.sum())} rows come from the sequential scan\n"
            f"  largest residual {float(self.residual.max()):.2g}, largest Lyapunov exponent "
            f"{float(self.exponent.max()):.3g} per step"
        )


def combine(layers: list[Convergence]) -> Convergence:
    """Combines the results of all layers: all of them must converge, and the largest exponent counts."""
    converged, iterations, residual, exponent, fell_back = (jnp.stack(field) for field in zip(*layers, strict=True))
    return Convergence(
        converged=jnp.all(converged, axis=0),
        iterations=jnp.sum(iterations, axis=0, dtype=jnp.int32),
        residual=jnp.max(residual, axis=0),
        exponent=jnp.max(exponent, axis=0),
        fell_back=jnp.any(fell_back, axis=0),
    )


def empty_search(flat: NewtonCell, batch: int, time: int) -> tuple[Array, Convergence]:
    """The states and the convergence if there is no sequence, no step or no state."""
    exponent = jnp.full(batch, 0.0 if flat.size else -jnp.inf, jnp.float32)
    converged, residual = jnp.ones(batch, bool), jnp.zeros(batch, jnp.float32)
    convergence = Convergence(converged, jnp.zeros(batch, jnp.int32), residual, exponent, ~converged)
    return jnp.zeros((batch, time, flat.size), flat.dtype), convergence


def search(
    flat: NewtonCell, options: Options, limits: Limits, params: Params, first: Array, inputs: At
) -> tuple[Array, Convergence]:
    """Searches for the states (batch, time, n) of a batch by Newton's method.

    Args:
        flat: the cell.
        options: the method, and whether a row that does not converge falls back to the sequential scan.
        limits: the tolerance, 0 for the default, and the largest number of iterations.
        params: the parameters of the cell.
        first: s_0 (batch, n).
        inputs: the inputs, leaves (batch, time, ...).
    """
    tolerance, max_iterations = limits
    tolerance = jnp.where(tolerance > 0, tolerance, flat.epsilon**0.75).astype(first.dtype)
    max_iterations = jnp.asarray(max_iterations, jnp.int32)

    def search_row(first: Array, inputs: At) -> tuple[Array, Array, Array]:
        return newton(flat, options.method, params, first, inputs, tolerance, max_iterations)

    states, residual, iterations = jax.vmap(search_row)(first, inputs)
    converged = residual <= tolerance
    fell_back = ~converged if options.fallback else jnp.zeros_like(converged)
    if options.fallback:
        # A `cond`, so that the scan runs only if a row needs it. Under an outer `vmap` it always runs.
        scanned = jax.lax.cond(
            jnp.any(fell_back), lambda states: _scanned(flat, params, first, inputs), lambda states: states, states
        )
        states = jax.vmap(jnp.where)(fell_back, scanned, states)
    exponent = jax.vmap(partial(largest_exponent, flat, params))(first, states, inputs)
    return states, Convergence(converged, iterations, residual.astype(jnp.float32), exponent, fell_back)


def _scanned(flat: NewtonCell, params: Params, first: Array, inputs: At) -> Array:
    """The states (batch, time, n) by a sequential scan."""
    # By the program of `unroll` if possible. In a chaotic recurrence the rounding errors of another program grow to the
    # size of the states. With noise another program is needed, because the noise is already drawn.
    xs, mask, reset, noise = inputs
    start = jax.vmap(flat.unravel)(first)
    if noise is None:
        states = trajectory(flat.cell, params, xs, state=start, mask=mask, reset=reset)
        return jax.vmap(jax.vmap(flat.ravel))(states)[:, 1:]

    def one(state: State, inputs: At) -> State:
        return jax.lax.scan(lambda s, at: masked_step(flat.cell, params, s, Inputs(*at), emit_state), state, inputs)[1]

    return jax.vmap(jax.vmap(flat.ravel))(jax.vmap(one)(start, inputs))
