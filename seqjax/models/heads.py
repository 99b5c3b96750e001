"""Readouts: p(y_t | x_{<=t}) = g(h_t), with log-probabilities and samples, not only logits.

A head is any object with the methods of `Head`. Like a cell's step it sees one example at one time; the functions of
`seqjax.models.losses` map it over batch and time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from seqjax.cells.fields import check_fields
from seqjax.initializers import Glorot


@runtime_checkable
class Head(Protocol):
    """A distribution over the target y_t given the cell's output h_t."""

    def init(self, key: Array) -> PyTree:
        """Draws parameters; the sizes come from the head's own fields."""
        ...

    def log_prob(self, params: PyTree, h: PyTree, y: PyTree) -> Float[Array, ""]:
        """log p(y | h), in nats."""
        ...

    def sample(
        self,
        params: PyTree,
        h: PyTree,
        key: Array,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> PyTree:
        """y ~ p(. | h); the most likely y where the temperature is 0."""
        ...


class ReadoutParams(NamedTuple):
    """Parameters of a linear readout from n hidden units to m numbers."""

    W_hy: Float[Array, "m n"]
    b_y: Float[Array, " m"]


def readout(params: ReadoutParams, h: Float[Array, " n"]) -> Float[Array, " m"]:
    """The output head o_t = W_hy h_t + b_y, for one example at one time.

    Args:
        params: W_hy (m, n) and b_y (m,).
        h: h_t (n,).

    Returns:
        o_t (m,): logits, or predictions for regression.

    Raises:
        ValueError: `h` is not one vector of n numbers.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> sj.readout(sj.ReadoutParams(jnp.array([[1.0, 2.0]]), jnp.array([0.5])), jnp.array([3.0, 4.0])).tolist()
        [11.5]
    """
    if h.shape != params.W_hy.shape[1:]:
        raise ValueError(
            f"expected the output of a cell for one example at one time, h {params.W_hy.shape[1:]}, got {h.shape}: "
            f"the head's hidden_size must be the cell's, and jax.vmap adds batch and time"
        )
    return params.W_hy @ h + params.b_y


def _init_readout(head: Categorical | Gaussian, key: Array, outputs: int) -> ReadoutParams:
    return ReadoutParams(Glorot()(key, (outputs, head.hidden_size), head.dtype), jnp.zeros(outputs, head.dtype))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Categorical:
    """A categorical readout, p(y | h) = softmax(W_hy h + b_y)_y.

    Args:
        hidden_size: n, the length of the cell's output.
        classes: the number of values that y can take, 0..classes-1.
        dtype: of the parameters.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> head = sj.Categorical(3, 4)
        >>> uniform = jax.tree.map(jnp.zeros_like, head.init(jax.random.key(0)))
        >>> round(float(head.log_prob(uniform, jnp.ones(3), jnp.array(2))), 4)  # -ln 4
        -1.3863
    """

    hidden_size: int
    classes: int
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        check_fields(self, ("hidden_size", "classes"))

    def init(self, key: Array) -> ReadoutParams:
        """Draws W_hy; b_y is zero."""
        return _init_readout(self, key, self.classes)

    def logits(self, params: ReadoutParams, h: Float[Array, " n"]) -> Float[Array, " m"]:
        """`readout`: unnormalised log-probabilities."""
        return readout(params, h)

    def log_prob(self, params: ReadoutParams, h: Float[Array, " n"], y: Int[Array, ""]) -> Float[Array, ""]:
        """log softmax(W_hy h + b_y)_y, in nats; NaN for a class that does not exist."""
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"expected whole-number classes as targets of Categorical, got {y.dtype}: y.astype(int)")
        log_p = jax.nn.log_softmax(self.logits(params, h))
        return log_p.at[y].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def sample(
        self,
        params: ReadoutParams,
        h: Float[Array, " n"],
        key: Array,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Int[Array, ""]:
        """Draws a class from softmax(logits / temperature), cut to the `top_k` likeliest and the `top_p` nucleus.

        Args:
            params: W_hy (m, n) and b_y (m,).
            h: h_t (n,).
            key: a random key.
            temperature: 0 takes the likeliest class, 1 samples from the distribution itself.
            top_k: keep this many of the likeliest classes.
            top_p: keep the likeliest classes up to the first whose probabilities together reach `top_p`
                (Holtzman et al. 2020).

        Returns:
            The class, a whole number.
        """
        logits = self.logits(params, h)
        if temperature == 0:
            return jnp.argmax(logits)
        logits = nucleus(likeliest(logits / temperature, top_k), top_p)
        return jax.random.categorical(key, logits)


def likeliest(logits: Float[Array, " m"], k: int | None) -> Float[Array, " m"]:
    """Sets all but the `k` largest logits to minus infinity; the earlier of two equal ones stays."""
    if k is None or k >= logits.size:
        return logits
    _, kept = jax.lax.top_k(logits, k)
    return jnp.full_like(logits, -jnp.inf).at[kept].set(logits[kept])


def nucleus(logits: Float[Array, " m"], p: float | None) -> Float[Array, " m"]:
    """Sets all to minus infinity but the largest logits whose probabilities first reach `p` together."""
    if p is None or p >= 1:
        return logits
    order = jnp.argsort(-logits)
    probability = jax.nn.softmax(logits[order])
    before = jnp.cumsum(probability) - probability
    kept = jnp.zeros(logits.shape, bool).at[order].set(before < p)
    return jnp.where(kept.at[order[0]].set(True), logits, -jnp.inf)


class GaussianMoments(NamedTuple):
    """Mean and standard deviation of y, (features,) each, in the units of y."""

    mean: Float[Array, " m"]
    std: Float[Array, " m"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A Gaussian readout, p(y | h) = N(y; mean(h), std(h)^2), independent over features.

    Args:
        hidden_size: n, the length of the cell's output.
        features: m, the length of y.
        std: a fixed standard deviation in the units of y, so that -log p is half the squared error plus a constant; by
            default exp(log_std) is read from h as the mean is.
        dtype: of the parameters.

    Raises:
        ValueError: a size is not positive, or `std` is not.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> head = sj.Gaussian(3, 1, std=1.0)
        >>> zero = jax.tree.map(jnp.zeros_like, head.init(jax.random.key(0)))
        >>> round(float(head.log_prob(zero, jnp.ones(3), jnp.array([2.0]))), 4)  # -(2^2 + ln 2 pi) / 2
        -2.9189
    """

    hidden_size: int
    features: int
    std: float | None = None
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        check_fields(self, ("hidden_size", "features"))
        if self.std is not None and not self.std > 0:
            raise ValueError(f"expected Gaussian std to be positive, got {self.std!r}: leave it out to learn it")

    def init(self, key: Array) -> ReadoutParams:
        """Draws W_hy; b_y is zero, so a learned standard deviation starts near 1."""
        return _init_readout(self, key, self.features if self.std is not None else 2 * self.features)

    def moments(self, params: ReadoutParams, h: Float[Array, " n"]) -> GaussianMoments:
        """The mean and the standard deviation of y."""
        o = readout(params, h)
        if self.std is not None:
            return GaussianMoments(o, jnp.full_like(o, self.std))
        mean, log_std = jnp.split(o, 2)
        return GaussianMoments(mean, jnp.exp(log_std))

    def log_prob(self, params: ReadoutParams, h: Float[Array, " n"], y: Float[Array, " m"]) -> Float[Array, ""]:
        """log N(y; mean, std^2), summed over features, in nats per unit of y."""
        y = jnp.asarray(y)
        if y.shape != (self.features,):
            raise ValueError(
                f"expected targets of Gaussian with {self.features} features, (batch, time, {self.features}), "
                f"got {y.shape} at one step: add the feature axis, y[..., None]"
            )
        mean, std = self.moments(params, h)
        deviation = (y.astype(mean.dtype) - mean) / std
        return -jnp.sum(deviation**2 / 2 + jnp.log(std) + math.log(2 * math.pi) / 2)

    def sample(
        self,
        params: ReadoutParams,
        h: Float[Array, " n"],
        key: Array,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Float[Array, " m"]:
        """mean + temperature * std * noise.

        Raises:
            ValueError: `top_k` or `top_p` is given, which only a categorical readout has.
        """
        if top_k is not None or top_p is not None:
            raise ValueError("expected neither top_k nor top_p for Gaussian, which has no classes: use temperature")
        mean, std = self.moments(params, h)
        return mean + temperature * std * jax.random.normal(key, mean.shape, mean.dtype)
