"""The cliff in the loss of a recurrent network, and the effect of clipping, for the smallest network with a cliff.

One unit with two parameters is enough. At the parameters for which the fixed point near the initial state disappears, a
small change decides which of two values the state reaches. So the loss has a cliff there, and the gradient on its edge
is a product of T large factors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence.unroll import unroll


class OneUnitParams(NamedTuple):
    """The parameters of `OneUnit`, scalars or grids of the same shape."""

    w: Float[Array, "..."]
    b: Float[Array, "..."]


class OneUnit:
    """h_t = sigma(w h_{t-1} + b), without an input, with h_0 = sigma(1/2)."""

    def init(self, key: Array) -> OneUnitParams:
        """Draws both from a normal distribution."""
        return OneUnitParams(*jax.random.normal(key, (2,)))

    def initial_state(self, params: OneUnitParams) -> Array:
        """sigma(1/2), a constant."""
        return jax.nn.sigmoid(jnp.full_like(params.w, 0.5))

    def step(self, params: OneUnitParams, state: Array, x: Array) -> tuple[Array, Array]:
        """One step; x has no features."""
        h = jax.nn.sigmoid(params.w * state + params.b)
        return h, h


class LossCliff(NamedTuple):
    """The loss of `OneUnit` over its two parameters, and two descents on it.

    Attributes:
        w: the columns of the grid, (columns,).
        b: the rows of the grid, (rows,).
        loss: L(w, b) on the grid, (rows, columns).
        plain: (w, b) at the start and after each step of gradient descent, (steps + 1, 2).
        clipped: the same with clipping.
        norms: the gradient norms along `plain` and `clipped`, before clipping, (2, steps + 1).
        clip_norm: the threshold of the clipping.
        time: T, the number of steps of the network.
    """

    w: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    plain: np.ndarray
    clipped: np.ndarray
    norms: np.ndarray
    clip_norm: float
    time: int

    def __str__(self) -> str:
        lines = [f"loss of one unit over {self.time} steps: {self.loss.min():.3g} to {self.loss.max():.3g}"]
        names = ("plain", f"clipped at {self.clip_norm:g}")
        for name, path, norms in zip(names, (self.plain, self.clipped), self.norms, strict=True):
            step = np.hypot(*np.diff(path, axis=0).T).max()
            lines.append(
                f"  {name}: {len(path) - 1} updates end at w = {path[-1, 0]:.4g}, b = {path[-1, 1]:.4g}; largest "
                f"gradient norm {norms.max():.3g}, longest step {step:.3g}"
            )
        return "\n".join(lines)


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
    """Gradient descent at a cliff of the loss L(w, b) = (h_T - target)^2, with and without clipping.

    Args:
        time: T, the number of steps of the network.
        target: the wanted value of its last state.
        start: (w, b) before the first step of the descent.
        steps: the number of descent steps.
        learning_rate: of the descent.
        clip_norm: the threshold c of the clipping g <- g min(1, c / |g|).
        w, b: the limits of the grid.
        resolution: the number of points along each side of the grid.

    Returns:
        A `LossCliff`.

    Raises:
        ValueError: a count is not a whole number of at least one, or the threshold is not positive.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", figure 6.

    Example:
        >>> import seqjax as sj
        >>> cliff = sj.analysis.loss_cliff(resolution=3)
        >>> float(cliff.norms[0].max()) > 100 * float(cliff.norms[0, 0])  # at the cliff
        True
    """
    for name, value in (("time", time), ("steps", steps), ("resolution", resolution)):
        whole_number(name, value, expected=f"{name} of at least 1")
    if not clip_norm > 0:
        raise ValueError(f"expected clip_norm to be positive, got {clip_norm}: inf does not clip")
    axes = np.linspace(*w, resolution), np.linspace(*b, resolution)
    # float32 on every platform and setting of x64, so that the figure is always the same.
    grid = OneUnitParams(*map(jnp.asarray, np.meshgrid(*(side.astype(np.float32) for side in axes))))
    surface = precise_jit(_surface, time)(grid, jnp.float32(target))
    first = OneUnitParams(*map(jnp.float32, start))
    descend = precise_jit(_descend, time, steps)
    paths = [descend(first, *map(jnp.float32, (target, learning_rate, limit))) for limit in (np.inf, clip_norm)]
    (plain, norms), (clipped, clipped_norms) = ([np.asarray(part) for part in path] for path in paths)
    return LossCliff(*axes, np.asarray(surface), plain, clipped, np.stack([norms, clipped_norms]), clip_norm, time)


def _loss(time: int, params: OneUnitParams, target: Array) -> Array:
    final, _ = unroll(OneUnit(), params, jnp.zeros((1, time, 0)))
    return (final[0] - target) ** 2


def _surface(time: int, grid: OneUnitParams, target: Array) -> Array:
    return jax.vmap(jax.vmap(lambda params: _loss(time, params, target)))(grid)


def _descend(
    time: int, steps: int, first: OneUnitParams, target: Array, rate: Array, limit: Array
) -> tuple[Array, Array]:
    def step(params: OneUnitParams, _: None) -> tuple[OneUnitParams, tuple[Array, Array]]:
        gradient = jax.grad(lambda p: _loss(time, p, target))(params)
        norm = optax.tree.norm(gradient)
        # On flat parts of the surface the gradient underflows to zero in float32.
        scale = rate * jnp.minimum(1, limit / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda p, g: p - scale * g, params, gradient), (jnp.stack(params), norm)

    # The last of steps + 1 updates is not used; it only returns the gradient at the end.
    return jax.lax.scan(step, first, None, length=steps + 1)[1]
