"""Matrices of one step, whole or by their diagonal, so that every scan over time is written once for both.

A whole matrix is (n, n); a diagonal one is kept as (n,), in n numbers instead of n^2 and with products of n operations
instead of n^3.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

PRECISION = "highest"  # the default of some accelerators has ten bits, which gradients would keep


@runtime_checkable
class Algebra(Protocol):
    """What a scan needs of its matrices, one step at a time."""

    def identity(self, size: int, dtype: DTypeLike) -> Array:
        """I."""
        ...

    def product(self, A: Array, B: Array) -> Array:
        """A B."""
        ...

    def apply(self, A: Array, v: Array) -> Array:
        """A v."""
        ...

    def transpose(self, A: Array) -> Array:
        """A^T."""
        ...

    def inverse(self, A: Array) -> Array:
        """A^-1."""
        ...


class Dense:
    """Matrices (n, n)."""

    def identity(self, size: int, dtype: DTypeLike) -> Array:
        """I (n, n)."""
        return jnp.eye(size, dtype=dtype)

    def product(self, A: Array, B: Array) -> Array:
        """A B (n, n)."""
        return jnp.matmul(A, B, precision=PRECISION)

    def apply(self, A: Array, v: Array) -> Array:
        """A v (n,)."""
        return jnp.matmul(A, v, precision=PRECISION)

    def transpose(self, A: Array) -> Array:
        """A^T (n, n)."""
        return A.T

    def inverse(self, A: Array) -> Array:
        """A^-1 (n, n)."""
        return jnp.linalg.inv(A)


class Diagonal:
    """Diagonal matrices, as (n,)."""

    def identity(self, size: int, dtype: DTypeLike) -> Array:
        """Ones (n,)."""
        return jnp.ones(size, dtype)

    def product(self, A: Array, B: Array) -> Array:
        """The products of the entries (n,)."""
        return A * B

    def apply(self, A: Array, v: Array) -> Array:
        """The products of the entries (n,)."""
        return A * v

    def transpose(self, A: Array) -> Array:
        """Itself."""
        return A

    def inverse(self, A: Array) -> Array:
        """One over each entry (n,)."""
        return 1 / A


DENSE, DIAGONAL = Dense(), Diagonal()
