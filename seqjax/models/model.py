"""A cell and a head together: p(y_{1:T} | x_{1:T}) = prod_t p(y_t | x_{<=t})."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.cell import Cell, State
from seqjax.models.heads import Head
from seqjax.sequence.unroll import unroll


class ModelParams(NamedTuple):
    """Parameters of the cell and of the head."""

    cell: PyTree
    head: PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Model:
    """A cell that carries the state and a head that reads it out.

    Args:
        cell: any cell; `stack([Embedding(v, d), LSTM(d, n)])` for tokens.
        head: `Categorical`, `Gaussian`, or any object with their three methods.

    Raises:
        TypeError: one of them lacks a method.

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
            if isinstance(part, type) or not isinstance(part, kind):
                methods = ", ".join(m for m in vars(kind) if not m.startswith("_") and callable(vars(kind)[m]))
                raise TypeError(f"expected a {name} with the methods {methods}, got {part!r}")

    def init(self, key: Array) -> ModelParams:
        """Draws the parameters of both."""
        key_cell, key_head = jax.random.split(key)
        return ModelParams(self.cell.init(key_cell), self.head.init(key_head))


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
        The final state, and the log-probabilities (batch, time) in nats; zero where the mask is False.

    Raises:
        ValueError, TypeError: as for `unroll`, or the targets do not fit the head.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.array([[0, 1, 2, 3]])
        >>> _, log_p = sj.log_probs(model, params, tokens[:, :-1], tokens[:, 1:])
        >>> [round(float(l), 4) for l in log_p[0]]  # -ln 4 each
        [-1.3863, -1.3863, -1.3863]
    """
    final, outputs = unroll(model.cell, params.cell, xs, state=state, mask=mask, reset=reset)
    return final, head_log_probs(model.head, params.head, outputs, targets, mask)


def head_log_probs(
    head: Head, params: PyTree, outputs: PyTree, targets: PyTree, mask: Bool[Any, "batch time"] | None = None
) -> Float[Array, "batch time"]:
    """log p(y_t | h_t) of every step, from the outputs of a cell.

    Args:
        head: the readout.
        params: its parameters.
        outputs: what `unroll` returned, leaves (batch, time, ...).
        targets: y, leaves (batch, time, ...).
        mask: where False, the result is zero, and neither outputs nor targets reach values or gradients.

    Returns:
        Log-probabilities (batch, time), in nats.

    Raises:
        ValueError: the targets have another (batch, time) than the outputs.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> head, zero = sj.Categorical(3, 4), sj.ReadoutParams(jnp.zeros((4, 3)), jnp.zeros(4))
        >>> log_p = sj.head_log_probs(head, zero, jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int))
        >>> round(float(log_p.sum()), 4)  # -10 ln 4
        -13.8629
    """
    targets = jax.tree.map(jnp.asarray, targets)
    expected = jax.tree.leaves(outputs)[0].shape[:2]
    for leaf in jax.tree.leaves(targets):
        if leaf.shape[:2] != expected:
            raise ValueError(
                f"expected targets (batch, time, ...) = ({expected[0]}, {expected[1]}, ...) as in the outputs, "
                f"got {leaf.shape}: one target a step, or read one state a sequence with sj.last_valid"
            )

    def one(h: PyTree, y: PyTree, valid: Array | None) -> Array:
        if valid is None:
            return head.log_prob(params, h, y)
        h, y = jax.tree.map(lambda leaf: jnp.where(valid, leaf, jnp.zeros_like(leaf)), (h, y))
        return jnp.where(valid, head.log_prob(params, h, y), 0)

    return jax.vmap(jax.vmap(one))(outputs, targets, mask)
