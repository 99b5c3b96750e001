"""The largest singular values of a product of many Jacobians, without forming the product.

For M = J_t ... J_{s+1} the algorithm is block iteration on M^T M. A frame of columns is pushed forward through all
steps with jvps, and the result is pulled back with vjps, until the values converge. A QR after every few steps keeps
the columns independent. The product of its triangular factors has the singular values of M on that frame.

Like M itself, an explicit product of these factors would lose the small values. The product is therefore stored as D U,
with the logarithms of the diagonal D and a U with unit diagonal, which loses none of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.analysis._flow import Sequences, check_arguments, random_frame
from seqjax.analysis._frames import (
    check_count,
    final_states,
    lost_directions,
    probed_interval,
    pull_frames,
    push_frames,
    strain,
)
from seqjax.analysis._recording import in_float64
from seqjax.analysis._spans import check_span
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes

OVERSAMPLED = 8  # additional columns, because a value converges at the rate of its ratio to the last column's value
MOST_SWEEPS = 30
MAX_EXPONENT = 600.0  # exp of more than 709 overflows in float64


class ProductSingularValues(NamedTuple):
    """Singular values of J_stop ... J_{start+1}.

    Attributes:
        log_values: (batch, k), natural logarithms, largest first; minus infinity if the product is singular.
        change: (batch, k), the change of each logarithm in the last sweep; zero if the k + 8 columns span the state, so
            that one sweep is exact.
        converged: (batch, k), whether the last change, and the estimated change in further sweeps, are within the
            tolerance.
        sweeps: the number of forward sweeps.
        qr_every: the number of steps between two QRs.
    """

    log_values: Float[np.ndarray, "batch k"]
    change: Float[np.ndarray, "batch k"]
    converged: Bool[np.ndarray, "batch k"]
    sweeps: int
    qr_every: int

    def __str__(self) -> str:
        return "\n".join(
            f"sequence {b}: ln of the largest singular value {values[0]:.4g}, of value {len(values)} {values[-1]:.4g}; "
            f"{int(good.sum())} of {len(good)} values converged in {self.sweeps} sweeps"
            for b, (values, good) in enumerate(zip(self.log_values, self.converged, strict=True))
        )


@for_automatic_axes
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
    """ln sigma_i(J_stop ... J_{start+1}), i = 1..k: the growth of the fastest directions over a span of steps.

    The cost is a few forward and backward passes with k + 8 columns. Only about sqrt(time) states are stored.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        k: the number of values; by default 8, or all of a smaller state.
        start, stop: the span, in steps; by default all of `xs`.
        tolerance: of a logarithm; by default 1e-4 in float32 and 1e-9 in float64, or eps * steps, the rounding error of
            the sum over all steps, if that is larger.
        key: for drawing the first frame.

    Returns:
        `ProductSingularValues`.

    Raises:
        ValueError: k is larger than the state, or the span or a shape does not match.
        TypeError: the state cannot be differentiated.

    Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", section 4.5, with the factored form
        of Bojanczyk et al. 1992, "The periodic Schur decomposition", for the product.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 2, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.ones((2, 1)), W_hh=jnp.diag(jnp.array([0.9, 0.5])), b_h=jnp.zeros(2))
        >>> result = sj.analysis.product_singular_values(cell, params, jnp.ones((1, 1000, 1)))
        >>> result.log_values.round(1).tolist()  # 1000 ln 0.9 and 1000 ln 0.5: a ratio of 10^255
        [[-105.4, -693.1]]
    """
    cell, sequences = check_arguments(cell, params, xs, state, mask, reset)
    start, stop = check_span(start, stop, sequences.time)
    k = check_count(k, sequences.size)
    if start == stop:
        zeros = np.zeros((sequences.batch, k))
        return ProductSingularValues(zeros, zeros, zeros == 0, 0, 1)
    if start:
        sequences = sequences._replace(first=precise_jit(final_states, cell)(sequences.until(start)))
    sequences = sequences.between(start, stop)
    if tolerance is None:
        dtype = sequences.first.dtype
        tolerance = max(1e-4 if dtype == jnp.float32 else 1e-9, sequences.time * float(jnp.finfo(dtype).eps))
    with in_float64(cell, sequences) as sequences:
        return _converge(cell, sequences, k, tolerance, jax.random.key(0) if key is None else key)


def _converge(cell: Cell, sequences: Sequences, k: int, tolerance: float, key: Array) -> ProductSingularValues:
    """Forward and backward sweeps until the values change by less than the tolerance."""
    dtype, columns = sequences.first.dtype, min(sequences.size, k + OVERSAMPLED)
    frame = random_frame(key, columns, sequences.size, dtype)
    frames = jnp.broadcast_to(frame, (sequences.batch, columns, sequences.size))
    every = probed_interval(cell, sequences, frames)
    has_reset = np.zeros(sequences.batch, bool)
    if sequences.inputs.reset is not None:
        has_reset |= np.asarray(sequences.inputs.reset).any(axis=1)
    log_values, sweeps = np.full((sequences.batch, columns), np.inf), 0
    while True:
        pushed = precise_jit(push_frames, cell, every)(sequences, frames)
        factors = np.array(pushed.factors, np.float64)
        with np.errstate(divide="ignore"):
            logs = np.log(np.diagonal(factors, axis1=-2, axis2=-1))
        if every > 1 and strain(logs, dtype).max() > 1:
            every //= 2
            continue
        if every == 1:  # the value of a direction that one step lost is a rounding error, and zero is correct
            factors[lost_directions(logs, dtype)] = 0
        sweeps, previous = sweeps + 1, log_values
        log_values = np.array([product_of_factors(row) for row in factors])
        log_values[has_reset] = -np.inf  # the Jacobian of a reset is zero, but `sweep` does not apply it to frames
        change = _change(log_values, log_values if columns == sequences.size else previous)
        change[has_reset] = 0
        converged = ((change <= tolerance) & (_remaining_change(change, log_values) <= tolerance))[:, :k]
        if sweeps == MOST_SWEEPS or (converged | np.isnan(change[:, :k])).all():
            break
        frames = precise_jit(pull_frames, cell, every)(sequences, pushed.starts, pushed.last)[0]
    return ProductSingularValues(log_values[:, :k], change[:, :k], converged, sweeps, every)


def _change(log_values: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """The absolute change of logarithms; zero between two values of minus infinity, and NaN for NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_values) & np.isneginf(previous), 0.0, np.abs(log_values - previous))


def _remaining_change(change: np.ndarray, log_values: np.ndarray) -> np.ndarray:
    """An estimate of the change of logarithms in all further sweeps.

    Each sweep multiplies the change by r = (sigma_last / sigma_i)^2, so their sum is change * r / (1 - r). If r is near
    one this is too large, because a value cannot change by more than its distance to the last one.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        apart = log_values - log_values[:, -1:]
        return np.where(np.isneginf(log_values), 0.0, np.fmin(change / np.expm1(2 * apart), apart))


def product_of_factors(factors: np.ndarray) -> np.ndarray:
    """Logarithms of the singular values of R_m ... R_1, upper triangular factors (m, k, k), in descending order.

    The product is stored as D U with U of unit diagonal. From R D U follow D'_i = R_ii D_i and
    U'_ij = sum_l (R_il / R_ii) (D_l / D_i) U_lj, in which no ratio is extreme.
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
    """D_l / D_i for l >= i; zero below the diagonal, and if both are zero."""
    with np.errstate(invalid="ignore"):
        difference = log_d[None, :] - log_d[:, None]
    return np.triu(np.exp(np.clip(np.where(np.isnan(difference), -np.inf, difference), None, MAX_EXPONENT)))


def _graded_singular_values(log_d: np.ndarray, U: np.ndarray) -> np.ndarray:
    """ln sigma_i(D U), each to full relative precision, for any ratio between them.

    Repeated QRs of the transpose, U^T D = Q (S D), make D U converge to the diagonal matrix of the singular values. One
    QR is enough for values that are far apart. For groups of close values an ordinary SVD is precise.
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
        U = S / diagonal[:, None] * np.triu(np.exp(np.clip(log_d[None, :] - log_d[:, None], None, MAX_EXPONENT)))
        log_d, M = log_d_next, U.T
    order = np.argsort(-log_d)
    values, U = [], U[np.ix_(order, order)]
    log_d = log_d[order]
    # Between groups the ratio is more than exp(15), and each of the QRs above reduced their coupling by its square.
    for group in np.split(np.arange(len(log_d)), np.flatnonzero(-np.diff(log_d) > 15) + 1):
        top = log_d[group[0]]
        scaled = np.exp(log_d[group] - top)[:, None] * U[np.ix_(group, group)]
        values.append(top + np.log(np.linalg.svd(scaled, compute_uv=False)))
    # The rest stays minus infinity: one zero on the diagonal of a factor makes one singular value zero.
    log_values[: len(log_d)] = np.sort(np.concatenate(values))[::-1]
    return log_values
