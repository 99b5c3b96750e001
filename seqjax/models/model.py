"""A cell with a head: p(y_{1:T} | x_{1:T}) = prod_t p(y_t | x_{<=t})."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.cell import Cell, State
from seqjax.cells.arguments import check_arrays, described
from seqjax.models.heads import Head, head_log_probs
from seqjax.sequence.unroll import unroll


class ModelParams(NamedTuple):
    """The parameters of the cell and of the head."""

    cell: PyTree
    head: PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Model:
    """A cell with a head that reads out its outputs.

    Args:
        cell: any cell; `stack([Embedding(v, d), LSTM(d, n)])` for tokens.
        head: `Categorical`, `Gaussian`, or any object with their three methods.

    Raises:
        TypeError: the cell or the head lacks a method.

    Example:
        >>> import jax, seqjax as sj
        >>> model = sj.Model(sj.LSTM(8, 64), sj.Categorical(64, 10))
        >>> sum(leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0))))  # 4 * 64 * (8 + 64 + 1) + 10 * 65
        19338
    """

    cell: Cell
    head: Head

    def __post_init__(self) -> None:
        for name, kind in (("cell", Cell), ("head", Head)):
            part = getattr(self, name)
            # A class has the methods too, so it would pass the check of the protocol.
            if isinstance(part, type) or not isinstance(part, kind):
                methods = ", ".join(m for m in vars(kind) if not m.startswith("_") and callable(vars(kind)[m]))
                raise TypeError(f"expected a {name} with the methods {methods}, got {part!r}")

    def init(self, key: Array) -> ModelParams:
        """Draws the parameters of the cell and of the head."""
        key_cell, key_head = jax.random.split(key)
        return ModelParams(self.cell.init(key_cell), self.head.init(key_head))

    def head_params(self, params: ModelParams) -> PyTree:
        """The parameters that the methods of the head get: its own, and those that it shares with the cell."""
        with_cell = getattr(self.head, "with_cell", None)
        return params.head if with_cell is None else with_cell(params.head, params.cell)


def check_model(model: Any, params: Any) -> None:
    """Checks the first two arguments of a function of a model.

    Raises:
        TypeError: they are not a model and its parameters.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a sj.Model, got {described(model)}: sj.Model(cell, head)")
    if not hasattr(params, "cell") or not hasattr(params, "head"):
        raise TypeError(
            f"expected params of the model, ModelParams(cell, head), got {described(params)}: model.init(key)"
        )
    check_arrays("params", params)


def log_probs(
    model: Model,
    params: ModelParams,
    xs: PyTree,
    targets: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> tuple[State, Float[Array, "batch time"]]:
    """log p(y_t | x_{<=t}) of every step.

    Args:
        model: the cell and its head.
        params: their parameters.
        xs: inputs, leaves (batch, time, ...).
        targets: y, leaves (batch, time, ...); for a language model, xs = tokens[:, :-1] and targets = tokens[:, 1:].
        state, mask, reset: as for `unroll`.

    Returns:
        The final state, and the log-probabilities (batch, time) in nats; zero at steps whose mask is False.

    Raises:
        ValueError, TypeError: as for `unroll`, or the targets do not match the head.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.array([[0, 1, 2, 3]])
        >>> _, log_p = sj.log_probs(model, params, tokens[:, :-1], tokens[:, 1:])
        >>> [round(float(l), 4) for l in log_p[0]]  # -ln 4 each
        [-1.3863, -1.3863, -1.3863]
    """
    check_model(model, params)
    final, outputs = unroll(model.cell, params.cell, xs, state=state, mask=mask, reset=reset)
    return final, head_log_probs(model.head, model.head_params(params), outputs, targets, mask)


def sequence_log_prob(
    model: Model,
    params: ModelParams,
    xs: PyTree,
    targets: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Float[Array, " batch"]:
    """log p(y_{1:T} | x_{1:T}) = sum_t log p(y_t | x_{<=t}) of each sequence.

    For a text, xs = tokens[:, :-1] and targets = tokens[:, 1:] give log p(x_{2:T} | x_1). For log p(x_{1:T}), prepend a
    start token.

    Args:
        model, params, xs, targets, state, mask, reset: as for `log_probs`.

    Returns:
        The log-probability of each sequence (batch,), in nats.

    Raises:
        ValueError, TypeError: as for `log_probs`.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.array([[0, 1, 2, 3]])
        >>> round(float(sj.sequence_log_prob(model, params, tokens[:, :-1], tokens[:, 1:])[0]), 4)  # -3 ln 4
        -4.1589
    """
    _, log_p = log_probs(model, params, xs, targets, state=state, mask=mask, reset=reset)
    return jnp.sum(log_p, axis=1)
