"""Dropout between layers, as a cell without a state (Srivastava et al. 2014; Zaremba, Sutskever and Vinyals 2014)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqjax.cells.fields import check_sizes


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drops features and scales up the rest, o_t = m_t * x_t / (1 - rate) with m_t ~ Bernoulli(1 - rate).

    It drops features only if `unroll` or `fit` gets a key. Without a key, the output is the input.

    Args:
        features: d, the length of the input.
        rate: the probability that a feature is dropped.

    Raises:
        ValueError: `features` is not positive, or `rate` is not in [0, 1).
        TypeError: `rate` is not a number.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.stack([sj.Dropout(1000, 0.2), sj.Dropout(1000, 0.5)])
        >>> params, xs = cell.init(jax.random.key(0)), jnp.ones((1, 50, 1000))
        >>> _, outputs = sj.unroll(cell, params, xs, key=jax.random.key(1))
        >>> round(float((outputs == 0).mean()), 2), round(float(outputs.mean()), 2)  # 1 - 0.8 * 0.5, and the same mean
        (0.6, 1.0)
        >>> bool((sj.unroll(cell, params, xs)[1] == xs).all())
        True
    """

    features: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        check_sizes(self, "features")
        rate = _as_float(self.rate)
        if not 0 <= rate < 1:
            raise ValueError(f"expected Dropout rate from 0 to below 1, got {self.rate!r}: 0 drops nothing")
        object.__setattr__(self, "rate", rate)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(features,)"""
        return (self.features,)

    def init(self, key: Array) -> tuple[()]:
        """There are no parameters."""
        return ()

    def initial_state(self, params: tuple[()]) -> tuple[()]:
        """There is no state."""
        return ()

    def noise(self, key: Array) -> Bool[Array, " d"]:
        """m_t, True for the features that are not dropped."""
        return jax.random.bernoulli(key, 1 - self.rate, (self.features,))

    def step(
        self, params: tuple[()], state: tuple[()], x: Float[Array, " d"], noise: Bool[Array, " d"] | None = None
    ) -> tuple[tuple[()], Float[Array, " d"]]:
        """Without noise, the output is the input."""
        # `where` and not a product with the mask, because 0 * inf is NaN.
        return state, x if noise is None else jnp.where(noise, x / (1 - self.rate), jnp.zeros_like(x))


def _as_float(rate: object) -> float:
    """A rate as a plain float, so that `Dropout(8, np.float32(0.5))` equals `Dropout(8, 0.5)`."""
    try:
        # `float` would accept a boolean, and the text "0.5".
        if not isinstance(rate, bool | np.bool_ | str | bytes):
            return float(rate)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # a tracer raises TypeError
        pass
    raise TypeError(
        f"expected Dropout rate as a number from 0 to below 1, got {rate!r}: 0.5 drops half of the features"
    )
