"""Spectra of the matrices that a gradient meets: the recurrent weights, and the Jacobian of every step.

The spectral radius says what happens in the limit of many equal steps; the largest singular value bounds a single one.
They agree for normal matrices alone. A matrix whose radius is below one can make gradients grow for many steps before
they shrink, so both are reported, with how far from normal the matrix is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float, Int, PyTree

from seqjax.analysis._flow import driven
from seqjax.analysis._spans import check_times
from seqjax.analysis.jacobians import jacobians_at
from seqjax.cell import Cell, Params, State
from seqjax.cells.vanilla import VanillaRNN
from seqjax.sequence._cached_jit import compiled

BLOCKS = {1: ("",), 3: ("r", "z", "h~"), 4: ("i", "f", "c~", "o")}  # gates in the rows of our cells' W_hh
ANGLES = 32


class MatrixSpectrum(NamedTuple):
    """What repeated multiplication by a matrix does; leading axes are those of the matrices.

    Attributes:
        eigenvalues: (..., n), the largest in modulus first.
        singular_values: (..., n), the largest first.
        spectral_radius: max |eigenvalue|: the growth of a step in the limit of many equal ones.
        norm: the largest singular value: the most that one step can do.
        condition: largest over smallest singular value; inf for a singular matrix.
        departure: Henrici's, sqrt(|A|_F^2 - sum |eigenvalue|^2): zero for a normal matrix.
        numerical_radius: max |v* A v| over unit v, between the spectral radius and the norm; powers of A grow at most
            to twice its power. None where it was not asked for.
    """

    eigenvalues: Complex[np.ndarray, "*batch n"]
    singular_values: Float[np.ndarray, "*batch n"]
    spectral_radius: Float[np.ndarray, "*batch"]
    norm: Float[np.ndarray, "*batch"]
    condition: Float[np.ndarray, "*batch"]
    departure: Float[np.ndarray, "*batch"]
    numerical_radius: Float[np.ndarray, "*batch"] | None


def matrix_spectrum(A: Float[Any, "*batch n n"], *, numerical_radius: bool = True) -> MatrixSpectrum:
    """Eigenvalues, singular values and non-normality of square matrices, in float64.

    Args:
        A: one matrix, or many, (..., n, n).
        numerical_radius: also the numerical radius, which costs some fifty eigenvalue problems a matrix.

    Returns:
        `MatrixSpectrum`.

    Raises:
        ValueError: a matrix is not square, or not finite.

    Source: Horn and Johnson, "Topics in matrix analysis", chapter 1; Henrici 1962; Trefethen and Embree 2005.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> found = sj.analysis.matrix_spectrum(jnp.array([[0.9, 10.0], [0.0, 0.9]]))
        >>> round(float(found.spectral_radius), 4), round(float(found.norm), 4), round(float(found.numerical_radius), 4)
        (0.9, 10.0804, 5.9)
    """
    A = np.asarray(A, np.float64)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"expected square matrices (..., n, n), got {A.shape}: a spectrum needs equal sides")
    if not np.isfinite(A).all():
        raise ValueError("expected finite matrices, got NaN or infinity: look at the trajectory first")
    eigenvalues = np.linalg.eigvals(A).astype(np.complex128)
    eigenvalues = np.take_along_axis(eigenvalues, np.argsort(-np.abs(eigenvalues), axis=-1), axis=-1)
    singular_values = np.linalg.svd(A, compute_uv=False)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        condition = np.where(singular_values[..., -1] > 0, singular_values[..., 0] / singular_values[..., -1], np.inf)
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
    """max over theta of the largest eigenvalue of the Hermitian part of exp(i theta) A, of each of many (m, n, n)."""

    def height(theta: np.ndarray) -> np.ndarray:
        turned = np.exp(1j * theta)[..., None, None] * A
        return np.linalg.eigvalsh((turned + np.conj(np.swapaxes(turned, -1, -2))) / 2)[..., -1]

    # For a real matrix theta and -theta give the same, so half the circle is enough.
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
        steps: of J_t, leading axes (batch, len(times)).
        times: the steps t that were looked at, from 1 to T.
        recurrent: of each recurrent matrix W_hh by name, such as "W_hh" or an LSTM's "W_hh.f"; empty for a cell whose
            parameters have no W_hh.
        bound: gamma * norm(W_hh), the most that one step of a vanilla network multiplies a gradient by; else None.
        bound_holds: whether it is below one, so that gradients must vanish whatever the inputs.
        largest_step_norm: (batch,), the largest norm of J_t among `times`; below one, every gradient there shrinks.
    """

    steps: MatrixSpectrum
    times: np.ndarray
    recurrent: dict[str, MatrixSpectrum]
    bound: float | None
    bound_holds: bool | None
    largest_step_norm: Float[np.ndarray, " batch"]


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
    """Spectra of J_t at chosen steps and of W_hh, and the bound of Pascanu et al. where it applies.

        norm(J_t) <= gamma * sigma_max(W_hh),    gamma = max |phi'|

    sigma_max(W_hh) < 1 / gamma is enough for gradients to vanish; a spectral radius below 1 / gamma is not.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        times: which steps, from 1 to T; by default 8 spread over the sequence.
        gamma: the largest slope of the cell's activation; known for `VanillaRNN` (1) and else None for no bound. It
            speaks of h_t = phi(W_xh x_t + W_hh h_{t-1} + b_h) alone.
        numerical_radius: also that of each W_hh, as for `matrix_spectrum`.

    Returns:
        `Spectrum`.

    Raises:
        ValueError: a time lies outside the sequence, or a shape does not fit.
        TypeError: the state cannot be differentiated.

    Source: Pascanu, Mikolov and Bengio 2013, section 2.1.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(2, 8, recurrent_init=sj.Orthogonal(0.8))
        >>> found = sj.analysis.spectrum(cell, cell.init(jax.random.key(0)), jnp.ones((1, 5, 2)))
        >>> round(found.bound, 4), found.bound_holds
        (0.8, True)
    """
    given = driven(cell, params, xs, state, mask, reset)
    T = given.time
    chosen = check_times(times, 1, T)
    jacobians, _ = compiled(jacobians_at, cell, False)(given, jnp.asarray(chosen - 1))
    steps = matrix_spectrum(np.asarray(jacobians), numerical_radius=False)
    matrices = recurrent_matrices(params)
    recurrent = {name: matrix_spectrum(W, numerical_radius=numerical_radius) for name, W in matrices.items()}
    if gamma is None and type(cell) is VanillaRNN:
        gamma = 1.0  # tanh, relu, identity
    bound = None if gamma is None or len(recurrent) != 1 else gamma * float(next(iter(recurrent.values())).norm)
    holds = None if bound is None else bound < 1
    return Spectrum(steps, chosen, recurrent, bound, holds, steps.norm.max(axis=1))


def recurrent_matrices(params: Params) -> dict[str, np.ndarray]:
    """The square matrices among the parameters that are named W_hh, gate by gate, by their path.

    Args:
        params: of a cell, a stack or anything that holds some.

    Returns:
        Matrices (n, n) by name.

    Example:
        >>> import jax, seqjax as sj
        >>> list(sj.analysis.recurrent_matrices(sj.GRU(2, 3).init(jax.random.key(0))))
        ['W_hh.r', 'W_hh.z', 'W_hh.h~']
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.split(".")[-1] != "W_hh" or leaf.ndim != 2 or leaf.shape[0] % leaf.shape[1]:
            continue
        count = leaf.shape[0] // leaf.shape[1]
        names = BLOCKS.get(count, tuple(map(str, range(count))))
        for block, W in zip(names, np.split(np.asarray(leaf), count), strict=True):
            found[f"{name}.{block}" if block else name] = W
    return found
