"""Token embedding as a cell without a state, so that the first layer of a stack can read tokens."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax.cells.fields import check_fields


class EmbeddingParams(NamedTuple):
    """One row per token."""

    E: Float[Array, "vocabulary d"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Embedding:
    """Looks up the vector of a token, o_t = E[x_t]; it has no state.

    As the first layer, it lets a stack read tokens: `stack([Embedding(v, d), LSTM(d, n)])`.

    Args:
        vocabulary: number of tokens v; a token is an integer in 0..v-1.
        features: d, the length of a token's vector.
        dtype: the dtype of the vectors.

    Raises:
        ValueError: a size is not positive.
        TypeError (from `step`): the input is not an integer.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.Embedding(10, 4)
        >>> params = cell.init(jax.random.key(0))
        >>> _, vectors = sj.unroll(cell, params, jnp.array([[7, 7, 1]]))
        >>> vectors.shape, bool((vectors[0, 0] == params.E[7]).all())
        ((1, 3, 4), True)
    """

    vocabulary: int
    features: int
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        check_fields(self, ("vocabulary", "features"))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(): a token is one number."""
        return ()

    def init(self, key: Array) -> EmbeddingParams:
        """E ~ N(0, 1)."""
        # The default of torch.nn.Embedding.
        return EmbeddingParams(jax.random.normal(key, (self.vocabulary, self.features), self.dtype))

    def initial_state(self, params: EmbeddingParams) -> tuple[()]:
        """There is no state."""
        return ()

    def step(
        self, params: EmbeddingParams, state: tuple[()], x: Int[Array, ""]
    ) -> tuple[tuple[()], Float[Array, " d"]]:
        """The row of the token; NaN for a token outside the vocabulary."""
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"expected whole-number tokens in Embedding.step, got {x.dtype}: x.astype(int)")
        # Plain indexing would clip or wrap a wrong token to another row. Training detects and reports NaN.
        return state, params.E.at[x].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
