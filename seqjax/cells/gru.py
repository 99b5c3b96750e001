"""The gated recurrent unit (Cho et al. 2014). Several different cells have this name; two options select one of them.

`reset`: the reset gate acts before the recurrent matrix product, U (r * h), or after it, r * (U h + b_hn). `update`:
the update gate z keeps the old state, h' = (1 - z) h~ + z h, or writes the new one, h' = (1 - z) h + z h~.

| reset, update    | used by                                         |
|------------------|-------------------------------------------------|
| after, keeps     | torch, cuDNN, flax, equinox, Keras              |
| before, writes   | Chung et al. 2014, haiku, most lecture notes    |
| before, keeps    | Cho et al. 2014                                 |
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.cell import as_feature
from seqjax.cells.arguments import check_choice, check_recurrent
from seqjax.cells.fields import check_chrono, check_fields
from seqjax.cells.product import product
from seqjax.initializers import Glorot, Initializer, Orthogonal, chrono_bias, gate_matrices

Reset = Literal["after", "before"]
Update = Literal["keeps", "writes"]


class GRUParams(NamedTuple):
    """Parameters of `gru_step`; d inputs, n hidden units, three blocks of n rows in the order r, z, h~."""

    W_xh: Float[Array, "3n d"]
    W_hh: Float[Array, "3n n"]
    b_h: Float[Array, " 3n"]
    b_hn: Float[Array, " n"] | None = None  # multiplied by the reset gate, so only if reset is "after"


class GRUState(NamedTuple):
    """The hidden state."""

    h: Float[Array, " n"]


class GRUGates(NamedTuple):
    """The gate activations of one step; the candidate lies in (-1, 1), the others in (0, 1)."""

    reset: Float[Array, " n"]
    update: Float[Array, " n"]
    candidate: Float[Array, " n"]


def gru_gates(
    params: GRUParams,
    state: GRUState,
    x: Float[Array, " d"],
    reset: Reset = "after",
    compute_dtype: DTypeLike | None = None,
) -> GRUGates:
    """The gates of one step.

        r = sigma(W_r [x, h] + b_r)    z = sigma(W_z [x, h] + b_z)
        h~ = tanh(W x + b + r * (U h + b_hn))   (reset after)
        h~ = tanh(W x + b + U (r * h))          (reset before)

    Args:
        params: W_xh (3n, d), W_hh (3n, n), b_h (3n,), rows in the order r, z, h~; b_hn (n,) for reset after.
        state: h_{t-1} (n,).
        x: x_t (d,).
        reset: "after" or "before".
        compute_dtype: the dtype of the operands of the products, such as "bfloat16"; None for no conversion.

    Returns:
        `GRUGates`, (n,) each.

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Source: Cho et al. 2014; Chung et al. 2014.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.GRUParams(jnp.zeros((3, 1)), jnp.zeros((3, 1)), jnp.array([0.0, 2.0, 0.0]), jnp.zeros(1))
        >>> round(float(sj.gru_gates(params, sj.GRUState(jnp.ones(1)), jnp.ones(1)).update[0]), 4)  # sigma(2)
        0.8808
    """
    check_recurrent("GRU", 3, params, state, ("h",))
    check_choice("reset", reset, ("after", "before"))
    W_xh, W_hh, b_h, b_hn = params
    h, n = state.h, state.h.size
    x = as_feature(x, W_xh.shape[1], W_xh.dtype, "GRU")
    x_r, x_z, x_n = jnp.split(product(W_xh, x, compute_dtype) + b_h, 3)
    # With reset "before", the rows of h~ multiply r * h, which needs r first.
    from_h = product(W_hh if reset == "after" else W_hh[: 2 * n], h, compute_dtype)
    r, z = jax.nn.sigmoid(x_r + from_h[:n]), jax.nn.sigmoid(x_z + from_h[n : 2 * n])
    if reset == "before":
        return GRUGates(r, z, jnp.tanh(x_n + product(W_hh[2 * n :], r * h, compute_dtype)))
    h_n = from_h[2 * n :] if b_hn is None else from_h[2 * n :] + b_hn
    return GRUGates(r, z, jnp.tanh(x_n + r * h_n))


def gru_step(
    params: GRUParams,
    state: GRUState,
    x: Float[Array, " d"],
    reset: Reset = "after",
    update: Update = "keeps",
    compute_dtype: DTypeLike | None = None,
) -> tuple[GRUState, Float[Array, " n"]]:
    """One step of the GRU.

        h_t = (1 - z) * h~ + z * h_{t-1}   (z keeps)
        h_t = (1 - z) * h_{t-1} + z * h~   (z writes)

    Args:
        params: W_xh (3n, d), W_hh (3n, n), b_h (3n,), rows in the order r, z, h~; b_hn (n,) for reset after.
        state: h_{t-1} (n,).
        x: x_t (d,).
        reset: "after" or "before" the recurrent matrix product.
        update: whether z "keeps" the old state or "writes" the new one.
        compute_dtype: the dtype of the operands of the products, such as "bfloat16"; None for no conversion.

    Returns:
        The new state and the output, which is h_t (n,).

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Source: Cho et al. 2014; Chung et al. 2014.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.GRUParams(jnp.zeros((3, 1)), jnp.zeros((3, 1)), jnp.array([0.0, 2.0, 0.0]), jnp.zeros(1))
        >>> state, output = sj.gru_step(params, sj.GRUState(jnp.ones(1)), jnp.ones(1))
        >>> round(float(output[0]), 4)  # sigma(2) of the old state, and h~ = 0
        0.8808
    """
    _, z, candidate = gru_gates(params, state, x, reset, compute_dtype)
    old, new = (z, 1 - z) if update == "keeps" else (1 - z, z)
    h = old * state.h + new * candidate
    return GRUState(h), h


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GRU:
    """The GRU cell; h_t is a weighted mean of h_{t-1} and h~, and the update gate z sets the weight.

    Args:
        input_size: d, features of one input.
        hidden_size: n, hidden units.
        reset: the reset gate acts "after" the recurrent product (torch, flax, Keras) or "before" it (Chung et al.).
        update: z "keeps" the old state or "writes" the new one. The default depends on `reset`: "keeps" if it is
            "after", "writes" if it is "before".
        chrono: the longest span to remember, in steps. If set, the bias of z is ln U[1, chrono - 1], with a minus sign
            if z writes (Tallec and Ollivier 2018). None for a bias of zero.
        input_init: draws the input matrix of each gate.
        recurrent_init: draws the recurrent matrix of each gate.
        dtype: the dtype of the parameters and of the state.
        compute_dtype: the dtype of the operands of the matrix products, such as "bfloat16". The sums of the products
            and the state have `dtype`. None for `dtype` everywhere.

    Raises:
        ValueError: a size is not positive, an option is unknown, or `chrono` is below 3.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.GRU(3, 5, reset="before")
        >>> cell.update
        'writes'
        >>> sj.unroll(cell, cell.init(jax.random.key(0)), jnp.ones((2, 7, 3)))[1].shape
        (2, 7, 5)
    """

    input_size: int
    hidden_size: int
    reset: Reset = "after"
    update: Update | None = None
    chrono: int | None = None
    input_init: Initializer = Glorot()
    recurrent_init: Initializer = Orthogonal()
    dtype: DTypeLike = "float32"
    compute_dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.update is None:
            object.__setattr__(self, "update", "keeps" if self.reset == "after" else "writes")
        check_fields(self, ("input_size", "hidden_size"), reset=("after", "before"), update=("keeps", "writes"))
        check_chrono(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,)"""
        return (self.input_size,)

    def init(self, key: Array) -> GRUParams:
        """Draws the matrices of each gate separately, and the biases."""
        key_x, key_h, key_b = jax.random.split(key, 3)
        d, n = self.input_size, self.hidden_size
        b_z = jnp.zeros(n, self.dtype)
        if self.chrono is not None:
            # sigma(chrono bias) is the initial factor of h_{t-1}: z if z keeps, and 1 - z = sigma(-b_z) if z writes.
            b_z = chrono_bias(key_b, n, self.chrono, self.dtype) * (1.0 if self.update == "keeps" else -1.0)
        return GRUParams(
            W_xh=gate_matrices(self.input_init, key_x, 3, (n, d), self.dtype),
            W_hh=gate_matrices(self.recurrent_init, key_h, 3, (n, n), self.dtype),
            b_h=jnp.concatenate([jnp.zeros(n, self.dtype), b_z, jnp.zeros(n, self.dtype)]),
            b_hn=jnp.zeros(n, self.dtype) if self.reset == "after" else None,
        )

    def initial_state(self, params: GRUParams) -> GRUState:
        """h_0 = 0."""
        # Not self.dtype: the parameters may have been cast since, and the state must have their dtype.
        return GRUState(jnp.zeros_like(params.W_hh, shape=params.W_hh.shape[1]))

    def step(self, params: GRUParams, state: GRUState, x: Float[Array, " d"]) -> tuple[GRUState, Float[Array, " n"]]:
        """`gru_step` with this cell's options."""
        # `update` is never None after __post_init__; `or` tells this to the type checker.
        return gru_step(params, state, x, self.reset, self.update or "keeps", self.compute_dtype)

    @property
    def gate_roles(self) -> dict[str, str]:
        """The roles of the gates, by the names that `gates` uses.

        The reset gate "reads" the old state. The update gate z "keeps" h_{t-1} if it multiplies it, and "replaces" it
        if 1 - z multiplies it. The "candidate" is signed: a new value and not a switch.
        """
        update = "keeps" if self.update == "keeps" else "replaces"
        return {"reset": "reads", "update": update, "candidate": "candidate"}

    @property
    def memory(self) -> str:
        """The field of the state that the update gate multiplies."""
        return "h"

    def gates(self, params: GRUParams, state: GRUState, x: Float[Array, " d"]) -> dict[str, Array]:
        """The gate activations by name: reset, update, candidate."""
        return gru_gates(params, state, x, self.reset, self.compute_dtype)._asdict()
