"""Spectra of the matrices that multiply a gradient: the recurrent weights, and the Jacobian of every step.

The spectral radius is the growth rate in the limit of many equal steps. The largest singular value bounds the growth in
one step. They are equal only for normal matrices. A matrix with a radius below one can increase gradients for many
steps before they shrink. So both are computed, with measures of the departure from normality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float, Int, PyTree

from seqjax.analysis._flow import check_arguments
from seqjax.analysis._recurrent_products import recurrent_products
from seqjax.analysis._spans import check_times
from seqjax.analysis.jacobians import jacobians_at
from seqjax.cell import Cell, Params, State, optional
from seqjax.cells.arguments import as_numbers
from seqjax.cells.vanilla import VanillaRNN
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._checks import check_methods
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence._parameter_checks import check_params
from seqjax.sequence._partition.tracing import shapes_of_one

ANGLES = 32  # the first grid over half a circle; golden-section search then refines around its maximum


class MatrixSpectrum(NamedTuple):
    """Numbers that describe repeated multiplication by a matrix; leading axes are those of the matrices.

    Attributes:
        eigenvalues: (..., n), the largest in modulus first.
        singular_values: (..., n), the largest first.
        spectral_radius: max |eigenvalue|, the growth factor per step in the limit of many equal steps.
        norm: the largest singular value, the largest growth factor of one step.
        condition: the largest over the smallest singular value; inf for a singular matrix.
        departure: Henrici's departure from normality, sqrt(|A|_F^2 - sum |eigenvalue|^2); zero for a normal matrix.
        numerical_radius: w = max |v* A v| over unit v, between the spectral radius and the norm; the norm of A^k is at
            most 2 w^k. None if it was not requested.
    """

    eigenvalues: Complex[np.ndarray, "*batch n"]
    singular_values: Float[np.ndarray, "*batch n"]
    spectral_radius: Float[np.ndarray, "*batch"]
    norm: Float[np.ndarray, "*batch"]
    condition: Float[np.ndarray, "*batch"]
    departure: Float[np.ndarray, "*batch"]
    numerical_radius: Float[np.ndarray, "*batch"] | None

    def __str__(self) -> str:
        n, count = self.eigenvalues.shape[-1], int(np.prod(self.eigenvalues.shape[:-1]))
        lines = [f"{count} {'matrix' if count == 1 else 'matrices'} of {n} x {n}"]
        lines += [
            f"  {name}: {_range_of(values)}"
            for name, values in (
                ("spectral radius, the growth per step in the long run", self.spectral_radius),
                ("largest singular value, the largest growth in one step", self.norm),
                ("condition", self.condition),
                ("departure from normality", self.departure),
            )
        ]
        return "\n".join(lines)


def _range_of(values: Float[Any, "*batch"]) -> str:
    """The range of some numbers in words; of a single one, the number."""
    low, high = float(np.min(values)), float(np.max(values))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def matrix_spectrum(A: Float[Any, "*batch n n"], *, numerical_radius: bool = True) -> MatrixSpectrum:
    """Eigenvalues, singular values and non-normality of square matrices, in float64.

    Args:
        A: one matrix, or many, (..., n, n).
        numerical_radius: whether to compute it too, which costs about a hundred eigenvalue problems per matrix.

    Returns:
        `MatrixSpectrum`.

    Raises:
        ValueError: a matrix is not square, or not finite.

    Source: Horn and Johnson, "Topics in matrix analysis", chapter 1; Henrici 1962; Trefethen and Embree 2005.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> result = sj.analysis.matrix_spectrum(jnp.array([[0.9, 10.0], [0.0, 0.9]]))
        >>> [round(float(x), 4) for x in (result.spectral_radius, result.norm, result.numerical_radius)]
        [0.9, 10.0804, 5.9]
    """
    A = as_numbers("A", A)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"expected square matrices (..., n, n), got {A.shape}: a spectrum needs equal sides")
    if not np.isfinite(A).all():
        raise ValueError("expected finite matrices, got NaN or infinity: look at the trajectory first")
    eigenvalues = np.linalg.eigvals(A).astype(np.complex128)
    eigenvalues = np.take_along_axis(eigenvalues, np.argsort(-np.abs(eigenvalues), axis=-1), axis=-1)
    singular_values = np.linalg.svd(A, compute_uv=False)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        condition = np.where(singular_values[..., -1] > 0, singular_values[..., 0] / singular_values[..., -1], np.inf)
    # For a normal matrix this difference is zero, and rounding errors may make it negative.
    squares = (A**2).sum(axis=(-2, -1)) - (np.abs(eigenvalues) ** 2).sum(axis=-1)
    radius = _numerical_radius(A.reshape(-1, *A.shape[-2:])).reshape(A.shape[:-2]) if numerical_radius else None
    return MatrixSpectrum(
        eigenvalues=eigenvalues,
        singular_values=singular_values,
        spectral_radius=np.abs(eigenvalues[..., 0]),
        norm=singular_values[..., 0],
        condition=condition,
        departure=np.sqrt(np.maximum(squares, 0)),
        numerical_radius=radius,
    )


def _numerical_radius(A: np.ndarray) -> np.ndarray:
    """max over theta of the largest eigenvalue of the Hermitian part of exp(i theta) A, for each A of (m, n, n)."""

    def height(theta: np.ndarray) -> np.ndarray:
        rotated = np.exp(1j * theta)[..., None, None] * A
        return np.linalg.eigvalsh((rotated + np.conj(np.swapaxes(rotated, -1, -2))) / 2)[..., -1]

    # A real matrix has the same value for theta and -theta, so half the circle is enough.
    grid = np.linspace(0, math.pi, ANGLES)
    heights = np.stack([height(np.full(A.shape[:-2], theta)) for theta in grid])
    best = grid[np.argmax(heights, axis=0)]
    low, high, golden = best - grid[1], best + grid[1], (math.sqrt(5) - 1) / 2
    for _ in range(30):
        a, b = high - golden * (high - low), low + golden * (high - low)
        left = height(a) > height(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    return np.maximum(height((low + high) / 2), heights.max(axis=0))


class Spectrum(NamedTuple):
    """The spectra of a cell on its inputs.

    Attributes:
        steps: the spectra of J_t, with leading axes (batch, len(times)).
        times: the steps t, from 1 to T.
        recurrent: the spectrum of each square matrix of `recurrent_matrices`, by name, such as "W_hh" or an LSTM's
            "W_hh.forget".
        bound: gamma * norm(W_hh), the largest factor of a gradient in one step of a vanilla network; None for others.
        bound_holds: whether the bound is below one, so that gradients vanish for all inputs.
        largest_step_norm: (batch,), the largest norm of J_t among `times`; if it is below one, every gradient shrinks
            at these steps.
    """

    steps: MatrixSpectrum
    times: np.ndarray
    recurrent: dict[str, MatrixSpectrum]
    bound: float | None
    bound_holds: bool | None
    largest_step_norm: Float[np.ndarray, " batch"]

    def __str__(self) -> str:
        lines = [f"J_t at {len(self.times)} steps of {len(self.largest_step_norm)} sequences: {self.steps}"]
        lines += [
            f"{name}: spectral radius {float(matrix.spectral_radius):.4g}, largest singular value {matrix.norm:.4g}"
            for name, matrix in self.recurrent.items()
        ]
        if self.bound is not None:
            meaning = (
                "below 1, so gradients vanish for all inputs" if self.bound_holds else "not below 1, so it says nothing"
            )
            lines.append(f"bound on the growth of a gradient in one step: {self.bound:.4g}, {meaning}")
        return "\n".join(lines)


@for_automatic_axes
def spectrum(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    times: Sequence[int] | Int[Any, " times"] | None = None,
    gamma: float | None = None,
    numerical_radius: bool = True,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Spectrum:
    """Spectra of J_t at chosen steps and of W_hh, and the bound of Pascanu et al. for vanilla networks.

        norm(J_t) <= gamma * sigma_max(W_hh),    gamma = max |phi'|

    sigma_max(W_hh) < 1 / gamma is sufficient for gradients to vanish; a spectral radius below 1 / gamma is not.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        times: the steps, from 1 to T; by default up to 8, spread over the steps at which the fewest sequences are
            held. The Jacobian of a held step is the identity.
        gamma: the largest slope of the activation phi of a cell h_t = phi(W_xh x_t + W_hh h_{t-1} + b_h). It is 1 for
            `VanillaRNN`. None for another cell means no bound.
        numerical_radius: whether to compute that of each W_hh, as for `matrix_spectrum`.

    Returns:
        `Spectrum`.

    Raises:
        ValueError: a time is outside the sequence, or a shape does not match.
        TypeError: the state cannot be differentiated.

    Source: Pascanu, Mikolov and Bengio 2013, section 2.1.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(2, 8, recurrent_init=sj.Orthogonal(0.8))
        >>> result = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), jnp.ones((1, 5, 2)))
        >>> round(result.bound, 4), result.bound_holds
        (0.8, True)
    """
    analysed, sequences = check_arguments(cell, params, xs, state, mask, reset)
    if times is None and mask is not None:
        valid = np.asarray(mask).sum(axis=0)
        steps_of_most = 1 + np.flatnonzero(valid == valid.max())
        times = steps_of_most[check_times(None, 1, len(steps_of_most)) - 1]
    chosen = check_times(times, 1, sequences.time)
    jacobians, _ = precise_jit(jacobians_at, analysed, False)(sequences, jnp.asarray(chosen - 1))
    steps = matrix_spectrum(np.asarray(jacobians), numerical_radius=False)
    matrices = recurrent_products(cell, params, shapes_of_one(jax.tree.map(jnp.asarray, xs), 2))
    square = {name: W for name, W in matrices.items() if W.shape[0] == W.shape[1]}
    recurrent = {name: matrix_spectrum(W, numerical_radius=numerical_radius) for name, W in square.items()}
    if gamma is None and type(cell) is VanillaRNN:
        gamma = 1.0  # the largest slope of tanh, relu and the identity
    bound = (
        None
        if gamma is None or not len(recurrent) == len(matrices) == 1
        else gamma * float(next(iter(recurrent.values())).norm)
    )
    holds = None if bound is None else bound < 1
    return Spectrum(steps, chosen, recurrent, bound, holds, steps.norm.max(axis=1))


@for_automatic_axes
def recurrent_matrices(cell: Cell, params: Params, x: PyTree | None = None) -> dict[str, Float[np.ndarray, "out in"]]:
    """The matrices that multiply the state in a step, found in its program, by name.

    The names are those of the parameters. If only slices of a product are read, as by the gates of an LSTM, each slice
    is a matrix. So this works for any cell, without names that it must follow.

    Args:
        cell, params: any cell and its parameters.
        x: one input of one example; needed only if the cell has no `input_shape`.

    Returns:
        Matrices (out, in) by name: "W_hh" for a leaf of the parameters, "W_hh.forget" for the part of it that feeds a
        gate, if the cell declares its gates, "W_hh[0:8]" for another part, "product 1" for a matrix that the step
        computes from several leaves. A matrix that is not square, such as a projection, is one of them.

    Raises:
        TypeError: `x` is None and the cell has no `input_shape`.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.GRU(2, 3)
        >>> list(sj.analysis.recurrent_matrices(cell, cell.init(jax.random.key(0))))
        ['W_hh.reset', 'W_hh.update', 'W_hh.candidate']
    """
    check_methods(cell)
    check_params(cell, params)
    shape = optional(cell, "input_shape")
    if x is None and shape is None:
        raise TypeError(
            f"expected an example input, because {type(cell).__name__} has no input_shape: "
            f"recurrent_matrices(cell, params, x=jnp.ones(8))"
        )
    if x is None:
        x = jnp.zeros(shape) if shape else jnp.zeros((), int)
    return recurrent_products(cell, params, shapes_of_one(jax.tree.map(jnp.asarray, x), 0))
