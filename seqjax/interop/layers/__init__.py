"""A cell of seqjax as a layer of flax.linen, flax.nnx or equinox: parameters in the module's tree, unrolled over time.

The call has the arguments and results of `unroll`. Each library is imported only when its function is called.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from seqjax.cell import Cell
from seqjax.sequence._checks import check_methods


def as_linen(cell: Cell, name: str | None = None) -> Any:
    """A flax.linen module that unrolls a cell.

    `layer(xs, state=None, *, mask=None, reset=None, **options)` returns the final state and the outputs, as `unroll`
    does with the same arguments. If `rngs` of `apply` has a key "dropout", cells such as `Dropout` draw noise.

    Args:
        cell: any object with `init`, `initial_state` and `step`.
        name: the name of the layer inside another module; by default flax chooses one.

    Returns:
        A `flax.linen.Module`. Its variables are {"params": {"cell": ...}}, the parameters of the cell as nested
        dictionaries; `layer.params_from(variables)` returns them as the cell has them, for the analyses of seqjax.

    Raises:
        TypeError: `cell` is not a cell.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, seqjax as sj
        >>> class Tagger(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, xs, mask=None):
        ...         _, outputs = sj.as_linen(sj.GRU(3, 8))(xs, mask=mask)
        ...         return nn.Dense(5)(outputs)
        >>> variables = Tagger().init(jax.random.key(0), jnp.ones((1, 1, 3)))
        >>> Tagger().apply(variables, jnp.ones((2, 7, 3))).shape
        (2, 7, 5)
        >>> sorted(variables["params"]), sorted(variables["params"]["CellLayer_0"]["cell"])
        (['CellLayer_0', 'Dense_0'], ['W_hh', 'W_xh', 'b_h', 'b_hn'])
    """
    check_methods(cell)
    from seqjax.interop.layers import linen

    return linen.CellLayer(cell, name=name)


def as_nnx(cell: Cell, *, rngs: Any) -> Any:
    """A flax.nnx module that unrolls a cell.

    `layer(xs, state=None, *, mask=None, reset=None, rngs=None, **options)` returns the final state and the outputs, as
    `unroll` does with the same arguments. With `rngs`, cells such as `Dropout` draw noise from `rngs.dropout()`.

    Args:
        cell: any object with `init`, `initial_state` and `step`.
        rngs: a `flax.nnx.Rngs`; `rngs.params()` draws the parameters.

    Returns:
        A `flax.nnx.Module`, whose attribute `weights` has the parameters of the cell as `nnx.Param`s. `layer.params`
        returns them as the cell has them, for the analyses of seqjax.

    Raises:
        TypeError: `cell` is not a cell.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> from flax import nnx
        >>> layer = sj.as_nnx(sj.LSTM(3, 8), rngs=nnx.Rngs(0))
        >>> state, outputs = layer(jnp.ones((2, 7, 3)))
        >>> outputs.shape, layer.params.W_hh.shape
        ((2, 7, 8), (32, 8))
    """
    check_methods(cell)
    from seqjax.interop.layers import nnx

    return nnx.CellLayer(cell, rngs)


def as_equinox(cell: Cell, *, key: Array) -> Any:
    """An equinox module that unrolls a cell.

    `layer(xs, state=None, *, mask=None, reset=None, key=None, **options)` returns the final state and the outputs, as
    `unroll` does with the same arguments. With a key, cells such as `Dropout` draw noise. `xs` has a batch, unlike the
    inputs of the layers of equinox.

    Args:
        cell: any object with `init`, `initial_state` and `step`.
        key: draws the parameters.

    Returns:
        An `equinox.Module`. Its fields are `params`, the parameters of the cell, and `cell`, which is static.

    Raises:
        TypeError: `cell` is not a cell.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> layer = sj.as_equinox(sj.LSTM(3, 8), key=jax.random.key(0))
        >>> state, outputs = layer(jnp.ones((2, 7, 3)))
        >>> outputs.shape, layer.params.W_hh.shape
        ((2, 7, 8), (32, 8))
    """
    check_methods(cell)
    from seqjax.interop.layers import equinox

    return equinox.CellLayer(cell.init(key), cell)
