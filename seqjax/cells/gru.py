"""The gated recurrent unit (Cho et al. 2014). Several different cells carry this name; here each has its own.

Two choices tell them apart. `reset`: the reset gate acts before the recurrent matrix product, U (r * h), or after it,
r * (U h + b_hn). `update`: the update gate z keeps the old state, h' = (1 - z) h~ + z h, or writes the new one,
h' = (1 - z) h + z h~.

| reset, update    | who                                             |
|------------------|-------------------------------------------------|
| after, keeps     | torch, cuDNN, flax, equinox, Keras              |
| before, writes   | Chung et al. 2014, haiku, most lecture notes    |
| before, keeps    | Cho et al. 2014                                 |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqjax.cell import as_feature
from seqjax.cells.fields import check_chrono, check_fields
from seqjax.cells.gates import sigmoids
from seqjax.cells.product import product, rounded
from seqjax.initializers import Glorot, Initializer, Orthogonal, chrono_bias, gate_matrices

Reset = Literal["after", "before"]
Update = Literal["keeps", "writes"]


class GRUParams(NamedTuple):
    """Parameters of `gru_step`; d inputs, n hidden units, three blocks of n rows in the order r, z, h~."""

    W_xh: Float[Array, "3n d"]
    W_hh: Float[Array, "3n n"]
    b_h: Float[Array, " 3n"]
    b_hn: Float[Array, " n"] | None = None  # inside the reset gate's product, so only where reset is "after"


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
        compute_dtype: of the operands of the products, such as "bfloat16"; None leaves them as they are.

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
    drive = _drive(params, x, compute_dtype)
    if reset == "after":
        return _gates_after(drive, _recur_after(params, state, compute_dtype))
    from_h = _recur_before(params, state, compute_dtype)
    from_rh = _recur_inner(params, _inner(state, drive, from_h), compute_dtype)
    return _gates_before(drive, from_h, from_rh)


def _drive(params: GRUParams, x: Float[Array, " d"], compute_dtype: DTypeLike | None) -> Float[Array, " gates"]:
    W_xh = params.W_xh
    return product(W_xh, as_feature(x, W_xh.shape[1], W_xh.dtype, "GRU"), compute_dtype) + params.b_h


def _recur_after(params: GRUParams, state: GRUState, compute_dtype: DTypeLike | None) -> Float[Array, " gates"]:
    from_h = product(params.W_hh, state.h, compute_dtype)
    return from_h if params.b_hn is None else from_h + jnp.pad(params.b_hn, (2 * state.h.size, 0))


def _gates_after(drive: Float[Array, " gates"], recurrent: Float[Array, " gates"]) -> GRUGates:
    n = drive.size // 3
    r, z = sigmoids(drive[:n] + recurrent[:n], drive[n : 2 * n] + recurrent[n : 2 * n])
    return GRUGates(r, z, jnp.tanh(drive[2 * n :] + r * recurrent[2 * n :]))


def _recur_before(params: GRUParams, state: GRUState, compute_dtype: DTypeLike | None) -> Float[Array, " gates"]:
    return product(params.W_hh[: 2 * state.h.size], state.h, compute_dtype)


def _inner(state: GRUState, drive: Float[Array, " gates"], from_h: Float[Array, " two"]) -> Float[Array, " n"]:
    n = state.h.size
    return jax.nn.sigmoid(drive[:n] + from_h[:n]) * state.h


def _recur_inner(params: GRUParams, rh: Float[Array, " n"], compute_dtype: DTypeLike | None) -> Float[Array, " n"]:
    return product(params.W_hh[2 * rh.size :], rh, compute_dtype)


def _gates_before(drive: Float[Array, " gates"], from_h: Float[Array, " two"], from_rh: Float[Array, " n"]) -> GRUGates:
    n = from_rh.size
    r, z = sigmoids(drive[:n] + from_h[:n], drive[n : 2 * n] + from_h[n:])
    return GRUGates(r, z, jnp.tanh(drive[2 * n :] + from_rh))


def _mix(state: GRUState, gates: GRUGates, update: Update) -> tuple[GRUState, Float[Array, " n"]]:
    _, z, candidate = gates
    old, new = (z, 1 - z) if update == "keeps" else (1 - z, z)
    h = old * state.h + new * candidate
    return GRUState(h), h


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
        compute_dtype: of the operands of the products, such as "bfloat16"; None leaves them as they are.

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
    return _mix(state, gru_gates(params, state, x, reset, compute_dtype), update)


def gru_jacobian(
    params: GRUParams,
    state: GRUState,
    x: Float[Array, " d"],
    reset: Reset = "after",
    update: Update = "keeps",
    compute_dtype: DTypeLike | None = None,
) -> Float[Array, "n n"]:
    """dh_t/dh_{t-1} in closed form, for z that keeps; z that writes exchanges z and 1 - z.

        dh_t/dh = diag(z) + diag(h - h~) dz/dh + diag(1 - z) dh~/dh
        dh~/dh = diag(h~') (diag(r) U + diag(U h + b_hn) dr/dh)   (reset after)
        dh~/dh = diag(h~') U (diag(r) + diag(h) dr/dh)            (reset before)

    Args:
        params, state, x, reset, update, compute_dtype: as for `gru_step`.

    Returns:
        The matrix (n, n).

    Raises:
        ValueError, TypeError: `x` is not one vector of d floating-point features.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> params = sj.GRUParams(jnp.zeros((3, 1)), jnp.zeros((3, 1)), jnp.array([0.0, 2.0, 0.0]), jnp.zeros(1))
        >>> J = sj.gru_jacobian(params, sj.GRUState(jnp.ones(1)), jnp.ones(1))
        >>> round(float(J[0, 0]), 4)  # sigma(2): nothing reads h
        0.8808
    """
    r, z, candidate = gru_gates(params, state, x, reset, compute_dtype)
    W_r, W_z, U = jnp.split(rounded(params.W_hh, compute_dtype), 3)
    r_by_h = (r * (1 - r))[:, None] * W_r
    z_by_h = (z * (1 - z))[:, None] * W_z
    if reset == "after":
        inner = _recur_after(params, state, compute_dtype)[-state.h.size :]
        inside = r[:, None] * U + inner[:, None] * r_by_h
    else:
        inside = U @ rounded(jnp.diag(r) + state.h[:, None] * r_by_h, compute_dtype)
    candidate_by_h = (1 - candidate**2)[:, None] * inside
    old, new, sign = (z, 1 - z, 1) if update == "keeps" else (1 - z, z, -1)
    return jnp.diag(old) + sign * (state.h - candidate)[:, None] * z_by_h + new[:, None] * candidate_by_h


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GRU:
    """The GRU cell, h_t between h_{t-1} and h~ as the update gate z says.

    Args:
        input_size: d, features of one input.
        hidden_size: n, hidden units.
        reset: the reset gate acts "after" the recurrent product (torch, flax, Keras) or "before" it (Chung et al.).
        update: z "keeps" the old state or "writes" the new one; by default the usual partner of `reset`, "keeps" with
            "after" and "writes" with "before".
        chrono: the longest span to remember, in steps; then the bias of z is ln U[1, chrono - 1], negative where z
            writes (Tallec and Ollivier 2018). None for zero.
        input_init: draws the input matrix of each gate.
        recurrent_init: draws the recurrent matrix of each gate.
        dtype: of the parameters, and so of the state.
        compute_dtype: of the operands of the matrix products, such as "bfloat16"; their sums, and so the state, keep
            `dtype`. None computes in `dtype` throughout.

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
        """Draws each gate's matrices on its own, and the biases."""
        key_x, key_h, key_b = jax.random.split(key, 3)
        d, n = self.input_size, self.hidden_size
        b_z = jnp.zeros(n, self.dtype)
        if self.chrono is not None:
            b_z = chrono_bias(key_b, n, self.chrono, self.dtype) * (1.0 if self.update == "keeps" else -1.0)
        return GRUParams(
            W_xh=gate_matrices(self.input_init, key_x, 3, (n, d), self.dtype),
            W_hh=gate_matrices(self.recurrent_init, key_h, 3, (n, n), self.dtype),
            b_h=jnp.concatenate([jnp.zeros(n, self.dtype), b_z, jnp.zeros(n, self.dtype)]),
            b_hn=jnp.zeros(n, self.dtype) if self.reset == "after" else None,
        )

    def initial_state(self, params: GRUParams) -> GRUState:
        """h_0 = 0."""
        return GRUState(jnp.zeros_like(params.W_hh, shape=params.W_hh.shape[1]))

    def step(self, params: GRUParams, state: GRUState, x: Float[Array, " d"]) -> tuple[GRUState, Float[Array, " n"]]:
        """`gru_step` with this cell's conventions."""
        return gru_step(params, state, x, self.reset, self.update or "keeps", self.compute_dtype)

    def drive(self, params: GRUParams, x: Float[Array, " d"]) -> Float[Array, " gates"]:
        """The input half of the step, W_xh x_t + b_h."""
        return _drive(params, x, self.compute_dtype)

    def recur(self, params: GRUParams, state: GRUState) -> Float[Array, " rows"]:
        """The recurrent product: W_hh h_{t-1} with b_hn, or of the two gates alone where the reset stands before."""
        recur = _recur_after if self.reset == "after" else _recur_before
        return recur(params, state, self.compute_dtype)

    @property
    def inner(self) -> Callable[[GRUState, Array, Array], Float[Array, " n"]]:
        """What the second product takes where the reset gate stands before it, r * h_{t-1}."""
        if self.reset == "after":
            raise AttributeError("with the reset gate after the product there is one product alone")
        return _inner

    def recur_inner(self, params: GRUParams, rh: Float[Array, " n"]) -> Float[Array, " n"]:
        """The second product, U (r * h_{t-1})."""
        return _recur_inner(params, rh, self.compute_dtype)

    def advance(
        self, state: GRUState, drive: Float[Array, " gates"], recurrent: Any
    ) -> tuple[GRUState, Float[Array, " n"]]:
        """The rest of the step: the gates of drive and product, or products, then h_t."""
        gates = _gates_after(drive, recurrent) if self.reset == "after" else _gates_before(drive, *recurrent)
        return _mix(state, gates, self.update or "keeps")

    @property
    def native_loop(self) -> Callable[[GRUParams], tuple[int, Array, Array | None]] | None:
        """What `seqjax.native` runs, for torch's kind of GRU: three gates, their recurrent weights, and b_hn."""
        if (self.reset, self.update, self.compute_dtype) != ("after", "keeps", None):
            return None

        def loop(params: GRUParams) -> tuple[int, Array, Array | None]:
            b_hn = params.b_hn
            return 3, params.W_hh, None if b_hn is None else jnp.pad(b_hn, (2 * b_hn.size, 0))

        return loop

    def jacobian(self, params: GRUParams, state: GRUState, x: Float[Array, " d"]) -> Float[Array, "n n"]:
        """`gru_jacobian` with this cell's conventions."""
        return gru_jacobian(params, state, x, self.reset, self.update or "keeps", self.compute_dtype)

    def gates(self, params: GRUParams, state: GRUState, x: Float[Array, " d"]) -> dict[str, Array]:
        """The activations by name: reset, update, candidate."""
        return gru_gates(params, state, x, self.reset, self.compute_dtype)._asdict()
