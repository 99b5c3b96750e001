"""Operations on dense and on diagonal matrices with the same interface, so that each scan is written only once.

A dense matrix is an array (n, n). A diagonal matrix is an array (n,) of its diagonal, which needs n numbers instead of
n^2, and n operations instead of n^3 for a product.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

# The default on some accelerators has 10 bits of mantissa. Newton's method would correct such errors of the states, but
# the gradients are computed by one linear scan.
PRECISION = "highest"


@runtime_checkable
class Algebra(Protocol):
    """The operations of a scan on the matrices of single steps."""

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
    """Dense matrices, as arrays (n, n)."""

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
    """Diagonal matrices, as arrays (n,)."""

    def identity(self, size: int, dtype: DTypeLike) -> Array:
        """Ones (n,)."""
        return jnp.ones(size, dtype)

    def product(self, A: Array, B: Array) -> Array:
        """The elementwise product (n,)."""
        return A * B

    def apply(self, A: Array, v: Array) -> Array:
        """The elementwise product (n,)."""
        return A * v

    def transpose(self, A: Array) -> Array:
        """The same matrix."""
        return A

    def inverse(self, A: Array) -> Array:
        """The reciprocals (n,)."""
        return 1 / A


DENSE, DIAGONAL = Dense(), Diagonal()
