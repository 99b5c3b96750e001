"""The matrix products of the cells, in the dtype of the parameters or in a lower precision."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def product(W: Float[Any, "m n"], v: Float[Any, " n"], compute_dtype: DTypeLike | None = None) -> Float[Array, " m"]:
    """W v.

    Args:
        W: the weights (m, n).
        v: the vector (n,).
        compute_dtype: W and v are rounded to this dtype before the product. "bfloat16" is many times faster on tensor
            cores. The sums and the result have the dtype of v. None for no rounding.

    Returns:
        The product (m,). Its gradient is the gradient of the rounded product, rounded once more.

    Example:
        >>> import jax.numpy as jnp
        >>> from seqjax.cells.product import product
        >>> W, v = jnp.ones((1, 3)), jnp.array([1.0, 2**-7, 2**-9])
        >>> product(W, v, "bfloat16").tolist()  # each term has 8 bits, their sum has 24
        [1.009765625]
    """
    # v is the first operand, so that the result of a batch has its rows in the order of the batch, without a transpose.
    # Not v @ W.T: in the backward pass over one sequence, XLA would transpose W.T at every step on a CPU, which takes
    # 242 us instead of 15 us for a W of shape (1024, 256).
    if compute_dtype is None:
        return jnp.tensordot(v, W, ((0,), (1,)))
    v_short, W_short = v.astype(compute_dtype), W.astype(compute_dtype)
    return jnp.tensordot(v_short, W_short, ((0,), (1,)), preferred_element_type=v.dtype)
