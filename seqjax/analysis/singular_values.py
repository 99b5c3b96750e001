"""The largest singular values of a product of a hundred thousand Jacobians, without the product.

For M = J_t ... J_{s+1}, block iteration on M^T M: a frame of columns is pushed forward through all steps with jvps, and
the result pulled back through all of them with vjps, until the values stand still. QR after every few steps keeps the
columns apart; what QR takes out is kept as triangular factors, whose product has the singular values of M on that
frame. Multiplied out, the product of these factors would lose the small values as M itself would; kept as D U, with the
logarithms of the diagonal D and U of unit diagonal, it loses none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.analysis._flow import Driven, driven, flat_step, flat_trajectory, held, orthonormal, pull, random_frame
from seqjax.analysis._frames import (
    advance,
    check_count,
    log_diagonal,
    lost_directions,
    safe_interval,
    strain,
    sweep,
    whole_factor,
)
from seqjax.analysis.jacobians import check_span
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import compiled

OVERSAMPLED = 8  # columns beyond the k that are asked for: they make the k-th converge
MOST_SWEEPS = 30


class ProductSingularValues(NamedTuple):
    """Singular values of J_stop ... J_{start+1}.

    Attributes:
        log_values: (batch, k), natural logarithms, largest first; minus infinity where the product is singular.
        change: (batch, k), by how much each logarithm moved in the last sweep; zero where the k + 8 columns are all of
            the state, which needs no more than one sweep.
        converged: (batch, k), whether that, and what more sweeps would add to it, is within the tolerance.
        sweeps: forward sweeps that were made.
        qr_every: steps between two QRs.
    """

    log_values: Float[np.ndarray, "batch k"]
    change: Float[np.ndarray, "batch k"]
    converged: Bool[np.ndarray, "batch k"]
    sweeps: int
    qr_every: int


def product_singular_values(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    k: int | None = None,
    start: int = 0,
    stop: int | None = None,
    tolerance: float | None = None,
    key: Array | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> ProductSingularValues:
    """ln sigma_i(J_stop ... J_{start+1}), i = 1..k: how much the best directions grow or shrink over a span.

    Time is that of a few forward and backward passes with k + 8 columns; states are kept at sqrt(time) places only.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        k: how many; by default 8, or all of a smaller state.
        start, stop: the span, in steps; by default all of `xs`.
        tolerance: of a logarithm; by default 1e-4 in float32 and 1e-9 in float64, or the rounding error of so many
            steps, eps times their number, where that is more.
        key: draws the first frame.

    Returns:
        `ProductSingularValues`.

    Raises:
        ValueError: k is larger than the state, or the span or a shape does not fit.
        TypeError: the state cannot be differentiated.

    Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", section 4.5, with the factored form
        of Bojanczyk et al. 1992, "The periodic Schur decomposition", for the product.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 2, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.ones((2, 1)), W_hh=jnp.diag(jnp.array([0.9, 0.5])), b_h=jnp.zeros(2))
        >>> found = sj.analysis.product_singular_values(cell, params, jnp.ones((1, 1000, 1)))
        >>> found.log_values.round(1).tolist()  # 1000 ln 0.9 and 1000 ln 0.5: a ratio of 10^255
        [[-105.4, -693.1]]
    """
    given = driven(cell, params, xs, state, mask, reset)
    start, stop = check_span(start, stop, given.time)
    k = check_count(k, given.size)
    dtype = given.first.dtype
    if start == stop:
        zeros = np.zeros((given.batch, k))
        return ProductSingularValues(zeros, zeros, zeros == 0, 0, 1)
    if start:
        given = given._replace(first=compiled(advance, cell)(given.until(start)))
    given = given.between(start, stop)
    if tolerance is None:
        tolerance = max(1e-4 if dtype == jnp.float32 else 1e-9, given.time * float(jnp.finfo(dtype).eps))
    columns = min(given.size, k + OVERSAMPLED)
    frame = random_frame(jax.random.key(0) if key is None else key, columns, given.size, dtype)
    frames = jnp.broadcast_to(frame, (given.batch, columns, given.size))
    _, _, logs = compiled(sweep, cell, 1, log_diagonal)(given.until(min(stop - start, 32)), given.first, frames)
    every = safe_interval(np.asarray(logs, np.float64), dtype)
    gone = np.zeros(given.batch, bool)
    if reset is not None:
        gone |= np.asarray(given.inputs[2]).any(axis=1)
    log_values, sweeps = np.full((given.batch, columns), np.inf), 0
    forward, backward = compiled(_forward, cell, every), compiled(_backward, cell, every)
    while True:
        starts, ends, factors = forward(given, frames)
        factors = np.array(factors, np.float64)
        with np.errstate(divide="ignore"):
            logs = np.log(np.diagonal(factors, axis1=-2, axis2=-1))
        if every > 1 and strain(logs, dtype).max() > 1:
            every //= 2
            forward, backward = compiled(_forward, cell, every), compiled(_backward, cell, every)
            continue
        if every == 1:  # what a single step lost is rounding error, in whose place zero is the value
            factors[lost_directions(logs, dtype)] = 0
        sweeps, previous = sweeps + 1, log_values
        log_values = np.array([product_of_factors(row) for row in factors])
        log_values[gone] = -np.inf  # after a reset nothing of the state before is left
        change = _change(log_values, log_values if columns == given.size else previous)
        change[gone] = 0
        converged = ((change <= tolerance) & (_still_to_come(change, log_values) <= tolerance))[:, :k]
        if sweeps == MOST_SWEEPS or (converged | np.isnan(change[:, :k])).all():
            break
        frames = backward(given, starts, ends)
    return ProductSingularValues(log_values[:, :k], change[:, :k], converged, sweeps, every)


def _change(log_values: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """By how much logarithms moved: not at all from minus infinity to the same; NaN where they are not numbers."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_values) & np.isneginf(previous), 0.0, np.abs(log_values - previous))


def _still_to_come(change: np.ndarray, log_values: np.ndarray) -> np.ndarray:
    """By how much logarithms will move yet: a sweep shrinks the change by r = (sigma_last / sigma_i)^2, so r / (1 - r).

    Values that lie close together move slowly and not far: no further than they lie apart.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        apart = log_values - log_values[:, -1:]
        return np.where(np.isneginf(log_values), 0.0, np.fmin(change / np.expm1(2 * apart), apart))


def _chunks(given: Driven, every: int) -> PyTree:
    """The inputs in chunks of about sqrt(time * every) steps, leaves (chunks, batch, steps, ...), held at the end."""
    blocks = math.isqrt(math.ceil(given.time / every) - 1) + 1 if given.time > every else 1
    steps = every * blocks
    count = math.ceil(given.time / steps)
    inputs = held(given, count * steps).inputs

    def split(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(given.batch, count, steps, *leaf.shape[2:]), 0, 1)

    return jax.tree.map(split, inputs)


def _forward(cell: Cell, every: int, given: Driven, frames: Array) -> tuple[Array, Array, Array]:
    """M V^T = Q R_m ... R_1: the states where chunks start, (chunks, batch, n), Q as rows, and all R."""

    def chunk(carry: tuple[Array, Array], inputs: PyTree) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        states, frames = carry
        part = given._replace(inputs=inputs)
        after, frames, factors = sweep(cell, every, whole_factor, part, states, frames)
        return (after, frames), (states, factors)

    (_, frames), (starts, factors) = jax.lax.scan(chunk, (given.first, frames), _chunks(given, every))
    chunks, batch, blocks, k, _ = factors.shape
    return starts, frames, jnp.swapaxes(factors, 0, 1).reshape(batch, chunks * blocks, k, k)


def _backward(cell: Cell, every: int, given: Driven, starts: Array, frames: Array) -> Array:
    """An orthonormal frame of M^T Q, rows (batch, k, n); each chunk's states are computed again from its start."""
    step, params = flat_step(cell, given.params), given.params

    def one(frame: Array, before: Array, inputs: PyTree) -> Array:
        def pulled(frame: Array, at: tuple[Array, PyTree]) -> tuple[Array, None]:
            return pull(step, params, at[0], frame, at[1]), None

        def block(frame: Array, at: PyTree) -> tuple[Array, None]:
            return orthonormal(jax.lax.scan(pulled, frame, at, reverse=True)[0])[0], None

        blocks = jax.tree.map(lambda leaf: leaf.reshape(len(leaf) // every, every, *leaf.shape[1:]), (before, inputs))
        return jax.lax.scan(block, frame, blocks, reverse=True)[0]

    def chunk(frames: Array, at: tuple[Array, PyTree]) -> tuple[Array, None]:
        first, inputs = at
        before = flat_trajectory(cell, Driven(params, first, inputs))[:, :-1]
        return jax.vmap(one)(frames, before, inputs), None

    return jax.lax.scan(chunk, frames, (starts, _chunks(given, every)), reverse=True)[0]


def product_of_factors(factors: np.ndarray) -> np.ndarray:
    """Logarithms of the singular values of R_m ... R_1, upper triangular factors (m, k, k), in descending order.

    The product is kept as D U with U of unit diagonal: from R D U, D'_i = R_ii D_i and
    U'_ij = sum_l (R_il / R_ii) (D_l / D_i) U_lj, in which every ratio is moderate.
    """
    k = factors.shape[-1]
    log_d, U = np.zeros(k), np.eye(k)
    for R in factors:
        diagonal = np.diagonal(R)
        safe = np.where(diagonal > 0, diagonal, 1.0)
        U = (R / safe[:, None] * _ratios(log_d)) @ U
        with np.errstate(divide="ignore"):
            log_d = log_d + np.log(np.maximum(diagonal, 0))
    return _graded_singular_values(log_d, U)


def _ratios(log_d: np.ndarray) -> np.ndarray:
    """D_l / D_i for l >= i, zero below the diagonal and where both are zero."""
    with np.errstate(invalid="ignore"):
        difference = log_d[None, :] - log_d[:, None]
    return np.triu(np.exp(np.clip(np.where(np.isnan(difference), -np.inf, difference), None, 600.0)))


def _graded_singular_values(log_d: np.ndarray, U: np.ndarray) -> np.ndarray:
    """ln sigma_i(D U), each to full relative precision however far apart they are.

    A QR of the transpose again and again, U^T D = Q (S D), brings D U towards its diagonal of singular values: at once
    where neighbours are far apart, and for groups of close ones an ordinary SVD is precise.
    """
    alive = np.isfinite(log_d)
    log_values = np.full(len(log_d), np.nan if np.isnan(log_d).any() or np.isnan(U).any() else -np.inf)
    if np.isnan(log_values).any() or not alive.any():
        return log_values
    log_d, M = log_d[alive], U[alive].T
    for _ in range(10):
        S = np.linalg.qr(M, mode="r")
        diagonal = np.diagonal(S)
        log_d_next = log_d + np.log(np.abs(diagonal))
        U = S / diagonal[:, None] * np.triu(np.exp(np.clip(log_d[None, :] - log_d[:, None], None, 600.0)))
        log_d, M = log_d_next, U.T
    order = np.argsort(-log_d)
    found, U = [], U[np.ix_(order, order)]
    log_d = log_d[order]
    for group in np.split(np.arange(len(log_d)), np.flatnonzero(-np.diff(log_d) > 15) + 1):
        top = log_d[group[0]]
        scaled = np.exp(log_d[group] - top)[:, None] * U[np.ix_(group, group)]
        found.append(top + np.log(np.linalg.svd(scaled, compute_uv=False)))
    values = np.sort(np.concatenate(found))[::-1]
    log_values[: len(values)] = values
    return log_values
