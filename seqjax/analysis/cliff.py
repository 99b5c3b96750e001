"""The wall in the loss of a recurrent network, and what clipping does there, on the smallest network that has one.

One unit and two parameters show it whole. Where the fixed point that holds the state vanishes, a small change of a
parameter decides which of two values the state ends at, so the loss has a wall, and on its edge the gradient is that
of T steps multiplied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqjax.sequence._cached_jit import compiled
from seqjax.sequence.unroll import unroll


class OneUnitParams(NamedTuple):
    """The two numbers of `OneUnit`."""

    w: Any
    b: Any


class OneUnit:
    """h_t = sigma(w h_{t-1} + b) without an input, from h_0 = sigma(1/2)."""

    def init(self, key: Any) -> OneUnitParams:
        """Draws both from a normal distribution."""
        return OneUnitParams(*jax.random.normal(key, (2,)))

    def initial_state(self, params: OneUnitParams) -> Any:
        """sigma(1/2), which is no parameter."""
        return jax.nn.sigmoid(jnp.full_like(params.w, 0.5))

    def step(self, params: OneUnitParams, state: Any, x: Any) -> tuple[Any, Any]:
        """One step; x has no feature."""
        h = jax.nn.sigmoid(params.w * state + params.b)
        return h, h


class LossCliff(NamedTuple):
    """The loss of `OneUnit` over its two parameters, and two descents on it.

    Attributes:
        w: places of the surface, (columns,).
        b: places of the surface, (rows,).
        loss: L(w, b) at each of them, (rows, columns).
        plain: (w, b) at the start and after each step of gradient descent, (steps + 1, 2).
        clipped: the same with clipping.
        norms: the norm of the gradient at each of these places, before clipping, (2, steps + 1): plain, clipped.
        clip_norm: the threshold of the clipping.
        time: T, steps of the network.
    """

    w: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    plain: np.ndarray
    clipped: np.ndarray
    norms: np.ndarray
    clip_norm: float
    time: int


def loss_cliff(
    *,
    time: int = 50,
    target: float = 0.7,
    start: tuple[float, float] = (5.2, -2.3),
    steps: int = 60,
    learning_rate: float = 0.1,
    clip_norm: float = 0.2,
    w: tuple[float, float] = (4.5, 5.5),
    b: tuple[float, float] = (-3.0, -2.0),
    resolution: int = 120,
) -> LossCliff:
    """Gradient descent at a wall of the loss L(w, b) = (h_T - target)^2, with clipping and without.

    Args:
        time: T, steps of the network.
        target: what its last state is to be.
        start: (w, b) before the first step of the descent.
        steps: of the descent.
        learning_rate: of the descent.
        clip_norm: the threshold c of the clipping g <- g min(1, c / |g|).
        w, b: the first and the last place of the surface.
        resolution: places along each side of it.

    Returns:
        A `LossCliff`.

    Raises:
        ValueError: a count is below one, or the threshold is not positive.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", figure 6.

    Example:
        >>> import seqjax as sj
        >>> cliff = sj.analysis.loss_cliff(resolution=3)
        >>> float(cliff.norms[0].max()) > 100 * float(cliff.norms[0, 0])  # the wall
        True
    """
    for name, value in (("time", time), ("steps", steps), ("resolution", resolution)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if not clip_norm > 0:
        raise ValueError(f"expected clip_norm to be positive, got {clip_norm}: inf does not clip")
    places = np.linspace(*w, resolution), np.linspace(*b, resolution)
    grid = OneUnitParams(*map(jnp.asarray, np.meshgrid(*(side.astype(np.float32) for side in places))))
    surface = compiled(_surface, time)(grid, jnp.float32(target))
    first = OneUnitParams(*map(jnp.float32, start))
    descend = compiled(_descend, time, steps)
    paths = [descend(first, *map(jnp.float32, (target, learning_rate, limit))) for limit in (np.inf, clip_norm)]
    (plain, norms), (clipped, clipped_norms) = ([np.asarray(part) for part in path] for path in paths)
    return LossCliff(*places, np.asarray(surface), plain, clipped, np.stack([norms, clipped_norms]), clip_norm, time)


def _loss(time: int, params: OneUnitParams, target: Any) -> Any:
    final, _ = unroll(OneUnit(), params, jnp.zeros((1, time, 0)))
    return (final[0] - target) ** 2


def _surface(time: int, grid: OneUnitParams, target: Any) -> Any:
    return jax.vmap(jax.vmap(lambda params: _loss(time, params, target)))(grid)


def _descend(time: int, steps: int, first: OneUnitParams, target: Any, rate: Any, limit: Any) -> tuple[Any, Any]:
    def step(params: OneUnitParams, _: None) -> tuple[OneUnitParams, tuple[Any, Any]]:
        gradient = jax.grad(lambda p: _loss(time, p, target))(params)
        norm = optax.tree.norm(gradient)
        scale = rate * jnp.minimum(1, limit / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda p, g: p - scale * g, params, gradient), (jnp.stack(params), norm)

    return jax.lax.scan(step, first, None, length=steps + 1)[1]
