"""Initializers of weights: functions of (key, shape, dtype), as frozen dataclasses.

The initializers of `jax.nn` are closures, so two equivalent ones are unequal, and a cell with one of them would be
compiled again whenever it is rebuilt. The initializers here compare by value. A cell accepts any other function of
(key, shape, dtype) as well.

A matrix of shape (n, m) maps m inputs to n outputs. Cells with several gates call the initializer once per gate:
the blocks of one large orthogonal matrix are not orthogonal themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

Initializer = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """W^T W = gain^2 I: every singular value is `gain` (Saxe, McClelland and Ganguli 2014).

    Args:
        gain: the singular value of every direction.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> W = sj.Orthogonal(gain=0.8)(jax.random.key(0), (4, 4))
        >>> [round(float(s), 4) for s in jnp.linalg.svd(W, compute_uv=False)]
        [0.8, 0.8, 0.8, 0.8]
    """

    gain: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """Draws a matrix."""
        wide = _at_least_float32(dtype)
        return jax.nn.initializers.orthogonal(self.gain)(key, shape, wide).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Glorot:
    """U(-a, a) with a = sqrt(6 / (n + m)), which preserves variance forward and backward (Glorot and Bengio 2010).

    Example:
        >>> import jax, seqjax as sj
        >>> float(abs(sj.Glorot()(jax.random.key(0), (50, 100))).max()) < (6 / 150) ** 0.5
        True
    """

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """Draws a matrix."""
        return jax.nn.initializers.glorot_uniform(in_axis=-1, out_axis=-2)(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """U(-a, a). The default a = 1 / sqrt(n), with n outputs, is that of the recurrent layers of `torch.nn`.

    Args:
        bound: a, or None for 1 / sqrt(n).

    Example:
        >>> import jax, seqjax as sj
        >>> float(abs(sj.Uniform()(jax.random.key(0), (100, 20))).max()) < 0.1
        True
    """

    bound: float | None = None

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """Draws a matrix."""
        bound = 1 / math.sqrt(shape[0]) if self.bound is None else self.bound
        return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class SpectralRadius:
    """A Gaussian matrix scaled so that its largest eigenvalue has modulus `radius` (Jaeger 2001).

    Args:
        radius: rho(W), the spectral radius.

    Source: rho(A) = lim |A^m|^(1/m) (Gelfand 1941), evaluated at m = 2^24. The matrix is squared 24 times, and
        divided by its norm each time. This works under jit and on every device, unlike `jnp.linalg.eig`.

    Example:
        >>> import jax, numpy as np, seqjax as sj
        >>> W = sj.SpectralRadius(0.9)(jax.random.key(0), (32, 32))
        >>> round(float(max(abs(np.linalg.eigvals(W)))), 4)
        0.9
    """

    radius: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """Draws a square matrix.

        Raises:
            ValueError: the shape is not square.
        """
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"expected a square matrix for a spectral radius, got {shape}: use it for W_hh")
        wide = _at_least_float32(dtype)
        W = jax.random.normal(key, shape, wide)

        def square(j: ArrayLike, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            power, log_norm = carry
            # The default precision of a GPU or TPU may round the operands to 10 or 8 bits.
            power = jnp.matmul(power, power, precision="highest")
            norm = jnp.linalg.norm(power)
            # W^(2^(j+1)) = power * exp(2^(j+1) log_norm), so each new norm counts half as much as the one before.
            return power / norm, log_norm + jnp.log(norm) * 0.5 ** (j + 1)

        start = jnp.linalg.norm(W)
        # Any norm of W^m is rho^m up to a factor that is at most polynomial in m. At m = 2^24, the m-th root of this
        # factor differs from 1 by about the precision of float32.
        _, log_radius = jax.lax.fori_loop(0, 24, square, (W / start, jnp.log(start)))
        return (W * (self.radius / jnp.exp(log_radius))).astype(dtype)


def _at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The dtype, or float32 for half precision, because matrix factorizations need float32 or float64."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def gate_matrices(initializer: Initializer, key: Array, gates: int, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Draws `gates` matrices separately and concatenates their rows: (gates * n, m)."""
    return jnp.concatenate([initializer(k, shape, dtype) for k in jax.random.split(key, gates)])


def chrono_bias(key: Array, size: int, longest: int, dtype: DTypeLike) -> Array:
    """b ~ ln U[1, longest - 1], so that sigmoid(b) forgets over 2 to `longest` steps (Tallec and Ollivier 2018)."""
    return jnp.log(jax.random.uniform(key, (size,), dtype, 1.0, longest - 1.0))
