"""Readouts: p(y_t | x_{<=t}) = g(h_t), with log-probabilities and samples.

A head is any object with the methods of `Head`. Like the step of a cell, it sees one example at one time.
`head_log_probs` maps it over batch and time. A head that shares parameters with the cell has a fourth method,
`with_cell(params, cell_params)`, which returns the parameters that the others get.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.cells.arguments import as_array, as_arrays, described, real_number
from seqjax.cells.embedding import EmbeddingParams
from seqjax.cells.fields import check_fields
from seqjax.initializers import Glorot
from seqjax.sequence._checks import check_flags


@runtime_checkable
class Head(Protocol):
    """A distribution over the target y_t given the cell's output h_t."""

    def init(self, key: Array) -> PyTree:
        """Draws the parameters; the sizes are fields of the head."""
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
        """Draws y ~ p(. | h); returns the most likely y if the temperature is 0."""
        ...


class ReadoutParams(NamedTuple):
    """Parameters of a linear readout from n hidden units to m numbers; W_hy is None if another part has it."""

    W_hy: Float[Array, "m n"] | None
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
    h = as_array("h", h)
    if not hasattr(params, "W_hy") or not (params.W_hy is None or hasattr(params.W_hy, "shape")):
        raise TypeError(f"expected ReadoutParams(W_hy, b_y), got {described(params)}: they come from head.init")
    if params.W_hy is None:
        raise ValueError(
            "expected W_hy in the parameters of the readout, got None: a tied head reads model.head_params(params)"
        )
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
        dtype: the dtype of the parameters.
        tied: whether W_hy is the matrix of the cell's embedding, (classes, n), in place of a matrix of its own. The
            cell must have one `Embedding`, whose vectors have the length of the cell's output.

    Raises:
        ValueError: a size is not positive.

    Source of tying: Press and Wolf 2017, "Using the output embedding to improve language models".

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> head = sj.Categorical(3, 4)
        >>> uniform = jax.tree.map(jnp.zeros_like, head.init(jax.random.key(0)))
        >>> round(float(head.log_prob(uniform, jnp.ones(3), jnp.array(2))), 4)  # -ln 4
        -1.3863
        >>> tied = sj.Model(sj.stack([sj.Embedding(50, 8), sj.GRU(8, 8)]), sj.Categorical(8, 50, tied=True))
        >>> [leaf.shape for leaf in jax.tree.leaves(tied.init(jax.random.key(0)).head)]
        [(50,)]
    """

    hidden_size: int
    classes: int
    dtype: DTypeLike = "float32"
    tied: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ("hidden_size", "classes"))

    def init(self, key: Array) -> ReadoutParams:
        """Draws W_hy, if the head has its own; b_y is zero."""
        params = _init_readout(self, key, self.classes)
        return params._replace(W_hy=None) if self.tied else params

    def with_cell(self, params: ReadoutParams, cell_params: PyTree) -> ReadoutParams:
        """The parameters of the readout, with W_hy from the parameters of the cell if it is tied.

        Raises:
            ValueError: the cell does not have one embedding, or its shape is not (classes, n).
        """
        if not self.tied:
            return params
        leaves = jax.tree.leaves(cell_params, is_leaf=lambda part: isinstance(part, EmbeddingParams))
        found = [part.E for part in leaves if isinstance(part, EmbeddingParams)]
        expected = (self.classes, self.hidden_size)
        if [E.shape for E in found] != [expected]:
            raise ValueError(
                f"expected one embedding {expected} in the cell of a tied head, (classes, hidden_size), got "
                f"{[E.shape for E in found]}: tied=False, or sj.Embedding{expected}"
            )
        return params._replace(W_hy=found[0])

    def logits(self, params: ReadoutParams, h: Float[Array, " n"]) -> Float[Array, " m"]:
        """The unnormalized log-probabilities, `readout(params, h)`."""
        return readout(params, h)

    def log_prob(self, params: ReadoutParams, h: Float[Array, " n"], y: Int[Array, ""]) -> Float[Array, ""]:
        """log softmax(W_hy h + b_y)_y, in nats; NaN for a class outside 0..classes-1."""
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"expected whole-number classes as targets of Categorical, got {y.dtype}: y.astype(int)")
        log_p = jax.nn.log_softmax(self.logits(params, h))
        # Plain indexing would clip or wrap a wrong class to another one. Training detects and reports NaN.
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
        """Draws a class from softmax(logits / temperature), restricted by `top_k` and `top_p`.

        Args:
            params: W_hy (m, n) and b_y (m,).
            h: h_t (n,).
            key: a random key.
            temperature: 0 selects the likeliest class, 1 samples from the distribution itself.
            top_k: keep only this many likeliest classes.
            top_p: keep only the smallest set of likeliest classes whose probabilities together reach `top_p`
                (Holtzman et al. 2020).

        Returns:
            The class, an integer.
        """
        logits = self.logits(params, h)
        if temperature == 0:  # logits / 0 would be infinite or NaN
            return jnp.argmax(logits)
        logits = nucleus(likeliest(logits / temperature, top_k), top_p)
        return jax.random.categorical(key, logits)


def likeliest(logits: Float[Array, " m"], k: int | None) -> Float[Array, " m"]:
    """Sets all but the `k` largest logits to minus infinity; of equal logits, the first ones stay."""
    if k is None or k >= logits.size:
        return logits
    # By index and not by a threshold, which would keep more than k if logits are equal.
    _, largest = jax.lax.top_k(logits, k)
    return jnp.full_like(logits, -jnp.inf).at[largest].set(logits[largest])


def nucleus(logits: Float[Array, " m"], p: float | None) -> Float[Array, " m"]:
    """Sets all logits to minus infinity except the largest ones whose probabilities together reach `p`."""
    if p is None or p >= 1:
        return logits
    order = jnp.argsort(-logits)
    probability = jax.nn.softmax(logits[order])
    before = jnp.cumsum(probability) - probability
    in_nucleus = jnp.zeros(logits.shape, bool).at[order].set(before < p)
    # The first one always, even if `p` rounds to 0 in the dtype of the logits.
    return jnp.where(in_nucleus.at[order[0]].set(True), logits, -jnp.inf)


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
        std: a fixed standard deviation in the units of y; with std=1, -log p is half the squared error plus a constant.
            By default the standard deviation is exp(log_std), and log_std is a linear readout of h like the mean.
        dtype: the dtype of the parameters.

    Raises:
        ValueError: a size or `std` is not positive.

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
        if self.std is not None and not real_number("Gaussian std", self.std) > 0:
            raise ValueError(f"expected Gaussian std to be positive, got {self.std!r}: leave it out to learn it")

    def init(self, key: Array) -> ReadoutParams:
        """Draws W_hy; b_y is zero, so a learned standard deviation starts near 1."""
        return _init_readout(self, key, self.features if self.std is not None else 2 * self.features)

    def moments(self, params: ReadoutParams, h: Float[Array, " n"]) -> GaussianMoments:
        """The mean and the standard deviation of y."""
        o = readout(params, h)
        if self.std is not None:
            return GaussianMoments(o, jnp.full_like(o, self.std))
        # The logarithm, so that the standard deviation is positive for any h.
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
        # The parameters decide the dtype, as in a cell; targets of float64 must not promote the loss.
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
            ValueError: `top_k` or `top_p` is not None; only a categorical readout has them.
        """
        if top_k is not None or top_p is not None:
            raise ValueError("expected neither top_k nor top_p for Gaussian, which has no classes: use temperature")
        mean, std = self.moments(params, h)
        return mean + temperature * std * jax.random.normal(key, mean.shape, mean.dtype)


def check_targets(outputs: PyTree, targets: PyTree) -> PyTree:
    """The targets as arrays.

    Raises:
        ValueError: (batch, time) differs between targets and outputs.
    """
    outputs, targets = as_arrays("outputs", outputs), as_arrays("targets", targets)
    if not all(leaf.ndim > 1 for leaf in jax.tree.leaves(outputs)) or not jax.tree.leaves(outputs):
        raise ValueError("expected outputs (batch, time, ...), got others: pass the outputs of unroll")
    if not jax.tree.leaves(targets):
        raise ValueError("expected targets (batch, time, ...), got none: pass one target per step")
    expected = jax.tree.leaves(outputs)[0].shape[:2]
    for leaf in jax.tree.leaves(targets):
        if leaf.shape[:2] != expected:
            raise ValueError(
                f"expected targets (batch, time, ...) = ({expected[0]}, {expected[1]}, ...) as in the outputs, "
                f"got {leaf.shape}: pass one target per step, or pool to one output per sequence with sj.last_valid"
            )
    return targets


def head_log_probs(
    head: Head, params: PyTree, outputs: PyTree, targets: PyTree, mask: Bool[Any, "batch time"] | None = None
) -> Float[Array, "batch time"]:
    """log p(y_t | h_t) of every step, from the outputs of a cell.

    Args:
        head: the readout.
        params: its parameters.
        outputs: the outputs of `unroll`, leaves (batch, time, ...).
        targets: y, leaves (batch, time, ...).
        mask: True at valid steps (batch, time). At other steps the result is zero, and outputs and targets affect
            neither values nor gradients.

    Returns:
        Log-probabilities (batch, time), in nats.

    Raises:
        ValueError: (batch, time) differs between targets and outputs.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> log_p = sj.head_log_probs(head, zero, jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int))
        >>> round(float(log_p.sum()), 4)  # -10 ln 4
        -13.8629
    """
    if not isinstance(head, Head) or isinstance(head, type):
        raise TypeError(f"expected a head, such as sj.Categorical(hidden_size, classes), got {described(head)}")
    targets = check_targets(outputs, targets)
    mask = check_flags("mask", mask, *jax.tree.leaves(outputs)[0].shape[:2])

    def one(h: PyTree, y: PyTree, valid: Array | None) -> Array:
        if valid is None:
            return head.log_prob(params, h, y)
        # Both inside and outside: NaN in the unused branch of `where` would reach the gradient.
        h, y = jax.tree.map(lambda leaf: jnp.where(valid, leaf, jnp.zeros_like(leaf)), (h, y))
        return jnp.where(valid, head.log_prob(params, h, y), 0)

    return jax.vmap(jax.vmap(one))(outputs, targets, mask)
