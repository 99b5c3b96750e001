"""States that are run forward under a constant input until they come to rest.

Whatever attracts the states of a network is found this way, however small its part of the state space is. Newton's
steps from a random state of a large network rather find the unstable points near the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LARGE = 1e6  # a state that grows by this factor has diverged


class ForwardRun(NamedTuple):
    """The end of one run.

    Attributes:
        v: the last state, (n,), or the slowest one if the run diverged.
        steps: the number of steps.
        at_rest: whether the last step changed the state by less than the tolerance.
    """

    v: Float[Array, " n"]
    steps: Int[Array, ""]
    at_rest: Bool[Array, ""]


class _Run(NamedTuple):
    v: Float[Array, " n"]
    slowest: Float[Array, " n"]
    speed: Float[Array, ""]  # of the slowest state
    steps: Int[Array, ""]
    at_rest: Bool[Array, ""]
    diverged: Bool[Array, ""]


def run_forward(step: Callable[[Array], Array], v: Array, limit: Array, tolerance: Array) -> ForwardRun:
    """Repeats s <- F(s) until |F(s) - s| <= tolerance max(1, |s|), for at most `limit` steps.

    Args:
        step: F.
        v: the first state, (n,).
        limit: the largest number of steps; 0 returns the state itself.
        tolerance: the relative speed of a state at rest.

    Returns:
        `ForwardRun`.
    """
    largest = LARGE * size(v)

    def goes_on(now: _Run) -> Array:
        return (now.steps < limit) & ~now.at_rest & ~now.diverged

    def advance(now: _Run) -> _Run:
        after = step(now.v)
        speed = jnp.linalg.norm(after - now.v)
        slower = speed < now.speed  # False for NaN
        return _Run(
            after,
            jnp.where(slower, now.v, now.slowest),
            jnp.where(slower, speed, now.speed),
            now.steps + 1,
            speed <= tolerance * size(now.v),
            ~(size(after) <= largest),
        )

    no = jnp.zeros((), bool)
    start = _Run(v, v, jnp.full((), jnp.inf, v.dtype), jnp.zeros((), jnp.int32), no, no)
    end = jax.lax.while_loop(goes_on, advance, start)
    return ForwardRun(jnp.where(end.diverged, end.slowest, end.v), end.steps, end.at_rest)


def size(v: Array) -> Array:
    """max(1, |s|), the scale of relative tolerances."""
    return jnp.maximum(1, jnp.linalg.norm(v))
