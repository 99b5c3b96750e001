"""The LSTM's additive path: the true dc_T/dc_0 beside the product of the forget gates.

c_t = f_t c_{t-1} + i_t c~_t suggests dc_T/dc_0 = prod_t f_t. That is only one of many paths: c also changes the gates
of later steps through h, and these paths can increase the derivative or dominate it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._flow import Sequences, cast_floats, check_arguments, flat_map, flat_trajectory, state_parts
from seqjax.analysis._padding import valid_steps_last
from seqjax.analysis._scaled import log_power, rescale
from seqjax.analysis._spans import check_horizon
from seqjax.cell import Cell, Params, State, optional
from seqjax.cells.learned_state import LearnedState
from seqjax.cells.stack import Stack
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._declared import declared
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence.unroll import gates


class CellPath(NamedTuple):
    """Natural logarithms of norms over the m numbers of c, by lag k from the end of the sequence.

    Attributes:
        lags: (K + 1,), in valid steps.
        log_true: (batch, K + 1), ln |dc_T/dc_{T-k}|_F / sqrt(m), through every path. NaN before the sequence begins.
        log_forget: (batch, K + 1), the same for the diagonal matrix of prod f over the k steps.
        log_true_units: (batch, m), ln |dc_{T,i}/dc_{T-k,i}| for each unit at the largest lag k, which is K or, in a
            shorter sequence, the number of its valid steps.
        log_forget_units: (batch, m), ln prod f_i for each unit at the same lag.
        reliable: whether no number is infinite in the wrong direction or, after the beginning of the sequence, NaN.
        reason: which sequences have such numbers, or empty.
    """

    lags: Int[np.ndarray, " lags"]
    log_true: Float[np.ndarray, "batch lags"]
    log_forget: Float[np.ndarray, "batch lags"]
    log_true_units: Float[np.ndarray, "batch m"]
    log_forget_units: Float[np.ndarray, "batch m"]
    reliable: bool
    reason: str

    def __str__(self) -> str:
        K = int(self.lags[-1])
        true, forget = (_mean_at_end(log) / math.log(10) for log in (self.log_true, self.log_forget))
        lines = [
            f"derivative of the memory after {K} steps, dc_T/dc_(T-{K}), as log10 of its norm",
            f"  through every path:                 {true:.4g}",
            f"  through only the forget gates:      {forget:.4g}",
            "reliable" if self.reliable else f"not reliable: {self.reason}",
        ]
        return "\n".join(lines)


def _mean_at_end(log: Float[np.ndarray, "batch lags"]) -> float:
    """The mean at the largest lag over the sequences that are long enough; NaN if none is."""
    known = log[:, -1][~np.isnan(log[:, -1])]
    return float(known.mean()) if known.size else math.nan


@for_automatic_axes
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
    """dc_T/dc_{T-k} through all paths, beside prod f, which is the path through only the cell state.

    Args:
        cell: an `LSTM`, a stack with one, or a cell with `gates` whose state has a memory besides the hidden state. The
            gate f is the one with the role "keeps" in the cell's `gate_roles`, and c is the field named by its
            `memory`. For a cell without these two, f is the gate named "forget" and c the field named "c".
        params, xs, state, mask, reset: as for `unroll`. Steps whose mask is False are left out, so the result is that
            of the sequences without them. A reset at such a step acts before the next valid one.
        horizon: K, the largest lag, in steps; by default the length of `xs`.
        layer: the layer of a stack, such as "1"; by default the first that has such a gate.

    Returns:
        `CellPath`.

    Raises:
        TypeError: the cell has no such gate or field.
        ValueError: the horizon is longer than the sequence, or a shape does not match.

    Source: Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(1, 2, forget_bias=1.0)
        >>> params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
        >>> params = params._replace(b_h=jnp.array([0.0, 0, 1, 1, 0, 0, 0, 0]))
        >>> path = sj.analysis.cell_path(cell, params, jnp.ones((1, 10, 1)))
        >>> path.log_true[0, -1].round(3), path.log_forget[0, -1].round(3)  # 10 ln sigma(1), since nothing reads h
        (np.float64(-3.133), np.float64(-3.133))
    """
    analysed, sequences = check_arguments(cell, params, xs, state, mask, reset)
    K = check_horizon(horizon, sequences.time, sequences.time)
    parts = state_parts(analysed, sequences.params)
    gate, field = _additive_path(cell, list(parts), layer) or ("", "")
    has_gates = field and optional(cell, "gates") is not None
    if sequences.params is not params:  # they were widened
        state = cast_floats(state, jnp.float32)
    activations = gates(cell, sequences.params, xs, state=state, mask=mask, reset=reset) if has_gates else {}
    if gate not in activations:
        raise TypeError(
            f"expected a cell with a state field c and a gate named forget, got {type(cell).__name__} with the fields "
            f"{', '.join(parts)}: declare gate_roles and memory if they have other names, or look at gradient_by_lag"
        )
    sequences, order = valid_steps_last(sequences)
    count = np.full(sequences.batch, sequences.time) if mask is None else np.asarray(mask).sum(axis=1)
    norms, units = precise_jit(_true_path, analysed, K, parts[field].start, parts[field].stop)(sequences)
    f = np.take_along_axis(np.asarray(activations[gate], np.float64), order[..., None], axis=1)
    # A step that is not valid does not change c, and a reset removes all of it.
    f = np.where(np.arange(sequences.time)[:, None] < sequences.time - count[:, None, None], 1.0, f)
    if sequences.inputs.reset is not None:
        f = np.where(np.asarray(sequences.inputs.reset)[..., None], 0.0, f)
    with np.errstate(divide="ignore"):
        log_f = np.log(f[:, sequences.time - K :][:, ::-1])
        products = np.concatenate([np.zeros_like(f[:, :1]), np.cumsum(log_f, axis=1)], axis=1)
        # ln of the root mean square of exp(products), which may underflow.
        log_forget = 0.5 * (np.logaddexp.reduce(2 * products, axis=-1) - np.log(f.shape[-1]))
    inside = np.arange(K + 1) <= count[:, None]
    log_true = np.where(inside, np.asarray(norms, np.float64), np.nan)
    log_true_units = np.asarray(units, np.float64)
    bad = ~((log_true < np.inf) | ~inside).all(axis=1) | ~(log_true_units < np.inf).all(axis=1)
    rows = ", ".join(map(str, np.flatnonzero(bad)))
    return CellPath(
        lags=np.arange(K + 1),
        log_true=log_true,
        log_forget=np.where(inside, log_forget, np.nan),
        log_true_units=log_true_units,
        log_forget_units=products[:, -1],
        reliable=not bad.any(),
        reason=f"the derivative is not finite in sequence {rows}" if bad.any() else "",
    )


def _additive_path(cell: Cell, fields: list[str], layer: str | None) -> tuple[str, str] | None:
    """The names of the gate and of the state field that it keeps, in the first layer with such a field.

    Args:
        cell: any cell.
        fields: all fields of the state, such as "1.c".
        layer: the only layer to look at, if it is not None.
    """
    named = _declared_gates(cell)
    prefixes = dict.fromkeys(field.rpartition(".")[0] for field in fields)
    for prefix in prefixes if layer is None else (layer,):
        roles, memory = named.get(prefix, ({"forget": "keeps"}, "c"))
        in_layer = [field for field in fields if field.rpartition(".")[0] == prefix]
        keeping = [gate for gate, role in roles.items() if role == "keeps"]
        # In a GRU the gate keeps the hidden state itself, so no path exists besides the one through h.
        if prefix in named and len(in_layer) < 2:
            continue
        field = f"{prefix}.{memory}".lstrip(".")
        if keeping and field in in_layer:
            return f"{prefix.replace('.', '/')}/{keeping[0]}".lstrip("/"), field
    return None


def _declared_gates(cell: Cell, prefix: str = "") -> dict[str, tuple[dict[str, str], str]]:
    """`gate_roles` and `memory` of every layer that declares them, by the path of the layer, such as "" or "1"."""
    if isinstance(cell, Stack):
        layers = [_declared_gates(inner, f"{prefix}.{i}".lstrip(".")) for i, inner in enumerate(cell.cells)]
        return {path: gates for layer in layers for path, gates in layer.items()}
    if isinstance(cell, LearnedState):
        return _declared_gates(cell.cell, prefix)
    roles, memory = declared(cell, "gate_roles"), declared(cell, "memory") or "c"
    return {} if roles is None else {prefix: (roles, memory)}


def _true_path(cell: Cell, K: int, start: int, stop: int, sequences: Sequences) -> tuple[Array, Array]:
    """ln |dc_T/dc_{T-k}|_F / sqrt(m) for k = 0..K, and the logarithms of the diagonal of the block at K.

    `start` and `stop` are the limits of c in the flat state.
    """
    flat, params, m = flat_map(cell, sequences.params), sequences.params, stop - start
    states = flat_trajectory(cell, sequences)[:, sequences.time - K : sequences.time]

    def one_sequence(before: Array, inputs: PyTree) -> tuple[Array, Array]:
        def log_norm(block: Array, exponent: Array) -> Array:
            mean = jnp.sum(block**2) / m
            return 0.5 * jnp.log(mean) + log_power(block, exponent)

        def back(carry: tuple[Array, Array], at: PyTree) -> tuple[tuple[Array, Array], Array]:
            rows, exponent = carry
            rows, shift = rescale(flat.pull(params, at[0], rows, at[1]))
            return (rows, exponent + shift), log_norm(rows[:, start:stop], exponent + shift)

        # The rows of dc_T/ds_T: the identity in the columns of c.
        rows = jnp.eye(m, sequences.size, start, dtype=sequences.first.dtype)
        (rows, exponent), norms = jax.lax.scan(back, (rows, jnp.zeros((), jnp.int32)), (before, inputs), reverse=True)
        diagonal = jnp.diagonal(rows[:, start:stop])
        units = jnp.log(jnp.abs(diagonal)) + log_power(rows, exponent)
        return jnp.concatenate([jnp.zeros(1, norms.dtype), norms[::-1]]), units

    return jax.vmap(one_sequence)(states, sequences.between(sequences.time - K, sequences.time).inputs)
