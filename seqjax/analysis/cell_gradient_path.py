"""The LSTM's additive path, measured: the true dc_T/dc_0 beside the product of its forget gates.

c_t = f_t c_{t-1} + i_t c~_t suggests dc_T/dc_0 = prod_t f_t. That is one path of many: c also moves the gates of later
steps through h, and those paths can add to it or outgrow it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._flow import Driven, driven, flat_step, flat_trajectory, pull, state_parts
from seqjax.analysis._scaled import log_of_power, rescaled
from seqjax.analysis._spans import check_horizon
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence.unroll import gates


class CellPath(NamedTuple):
    """Norms over the m numbers of c as natural logarithms, by lag k from the end of the sequence.

    Attributes:
        lags: (K + 1,), in steps.
        log_true: (batch, K + 1), ln |dc_T/dc_{T-k}|_F / sqrt(m), through every path.
        log_forget: (batch, K + 1), the same of the diagonal matrix of prod f over the k steps.
        log_true_units: (batch, m), ln |dc_{T,i}/dc_{T-K,i}| of each unit at the largest lag.
        log_forget_units: (batch, m), ln prod f_i at the largest lag.
    """

    lags: Int[np.ndarray, " lags"]
    log_true: Float[np.ndarray, "batch lags"]
    log_forget: Float[np.ndarray, "batch lags"]
    log_true_units: Float[np.ndarray, "batch m"]
    log_forget_units: Float[np.ndarray, "batch m"]


def cell_path(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    horizon: int | None = None,
    layer: str | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> CellPath:
    """dc_T/dc_{T-k} through all paths, beside prod f through the cell state alone.

    Args:
        cell: one with a state field c and a gate named forget, such as `LSTM`, or a stack that holds one.
        params, xs, state, mask, reset: as for `unroll`.
        horizon: K, the largest lag, in steps; by default all of `xs`.
        layer: which layer of a stack, such as "1"; by default the first that fits.

    Returns:
        `CellPath`.

    Raises:
        TypeError: the cell has no such field or gate.
        ValueError: the horizon lies outside the sequence, or a shape does not fit.

    Source: Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(1, 2, forget_bias=1.0)
        >>> params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        >>> params = params._replace(b_h=jnp.array([0.0, 0, 1, 1, 0, 0, 0, 0]))
        >>> path = sj.analysis.cell_path(cell, params, jnp.ones((1, 10, 1)))
        >>> path.log_true[0, -1].round(3), path.log_forget[0, -1].round(3)  # 10 ln sigma(1): nothing reads h
        (np.float64(-3.133), np.float64(-3.133))
    """
    given = driven(cell, params, xs, state, mask, reset)
    K = check_horizon(horizon, given.time, given.time)
    parts = state_parts(cell, params)
    layers = [name[:-1].rstrip(".") for name in parts if name.split(".")[-1] == "c"]
    if layer is not None:
        layers = [name for name in layers if name == layer]
    f = None
    if layers and hasattr(cell, "gates"):
        f = gates(cell, params, xs, state=state, mask=mask, reset=reset).get(
            "/".join([*layers[:1], "forget"]).lstrip("/")
        )
    if f is None:
        raise TypeError(
            f"expected a cell with a state field c and a gate named forget, got {type(cell).__name__} with the fields "
            f"{', '.join(parts)}: it has no such path; look at gradient_by_lag"
        )
    where = parts[".".join([*layers[:1], "c"]).lstrip(".")]
    norms, units = compiled(_true_path, cell, K, where.start, where.stop)(given)
    f = np.asarray(f, np.float64)
    if mask is not None:
        f = np.where(np.asarray(mask)[..., None], f, 1.0)
    if reset is not None:
        f = np.where(np.asarray(reset)[..., None], 0.0, f)
    with np.errstate(divide="ignore"):
        log_f = np.log(f[:, given.time - K :][:, ::-1])
        products = np.concatenate([np.zeros_like(f[:, :1]), np.cumsum(log_f, axis=1)], axis=1)
        log_forget = 0.5 * (np.logaddexp.reduce(2 * products, axis=-1) - np.log(f.shape[-1]))
    return CellPath(
        lags=np.arange(K + 1),
        log_true=np.asarray(norms, np.float64),
        log_forget=log_forget,
        log_true_units=np.asarray(units, np.float64),
        log_forget_units=products[:, -1],
    )


def _true_path(cell: Cell, K: int, start: int, stop: int, given: Driven) -> tuple[Array, Array]:
    """ln |dc_T/dc_{T-k}|_F / sqrt(m) for k = 0..K, and ln of the diagonal's entries at K."""
    step, params, m = flat_step(cell, given.params), given.params, stop - start
    states = flat_trajectory(cell, given)[:, given.time - K : given.time]

    def one(before: Array, inputs: PyTree) -> tuple[Array, Array]:
        def log_norm(block: Array, exponent: Array) -> Array:
            mean = jnp.sum(block**2) / m
            return 0.5 * jnp.log(mean) + log_of_power(block, exponent)

        def back(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], Array]:
            rows, exponent = carry
            rows, more = rescaled(pull(step, params, at[0], rows, at[1]))
            return (rows, exponent + more), log_norm(rows[:, start:stop], exponent + more)

        rows = jnp.eye(m, given.size, start, dtype=given.first.dtype)
        (rows, exponent), norms = jax.lax.scan(back, (rows, jnp.zeros((), jnp.int32)), (before, inputs), reverse=True)
        diagonal = jnp.diagonal(rows[:, start:stop])
        units = jnp.log(jnp.abs(diagonal)) + log_of_power(rows, exponent)
        return jnp.concatenate([jnp.zeros(1, norms.dtype), norms[::-1]]), units

    return jax.vmap(one)(states, given.between(given.time - K, given.time).inputs)
