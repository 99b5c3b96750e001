"""The methods for the search of the trajectory, which differ in their Jacobians and in their damping.

All search for the root of r_t = f(s_{t-1}) - s_t. With J_t = df/ds_{t-1}, Newton's change d of the trajectory solves
d_t = J_t d_{t-1} + r_t.

| method    | Jacobians | change       | memory  | operations per iteration            |
|-----------|-----------|--------------|---------|-------------------------------------|
| DEER      | dense     | Newton's     | T n^2   | T n^3                               |
| QuasiDEER | diagonal  | Newton's     | T n     | T n, and the diagonals of the J_t   |
| ELK       | dense     | damped       | T n^2   | T n^3, about ten times those of DEER |
| QuasiELK  | diagonal  | damped       | T n     | T n, and the diagonals of the J_t   |

All are exact after at most T iterations, because each iteration makes at least one more step exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array

from seqjax.parallel._algebra import DENSE, DIAGONAL, Algebra
from seqjax.parallel._linear_scan import linear_scan
from seqjax.parallel._smoother import smoothed_step


@runtime_checkable
class Method(Protocol):
    """A search method: its Jacobians, its first damping, and its change of the trajectory per iteration."""

    @property
    def algebra(self) -> Algebra:
        """`DENSE` or `DIAGONAL`."""
        ...

    @property
    def damping(self) -> float:
        """mu of the first iteration; 0 for a method without damping, which accepts every change."""
        ...

    def change(self, J: Array, r: Array, mu: Array) -> Array:
        """The change d_1..d_T (time, n) for Jacobians J, residuals r (time, n) and damping mu."""
        ...


class _Newton:
    """Newton's change, d_t = J_t d_{t-1} + r_t."""

    damping = 0.0

    def change(self: Method, J: Array, r: Array, mu: Array) -> Array:
        """Solves d_t = J_t d_{t-1} + r_t by one linear scan."""
        return linear_scan(self.algebra, J, r)


class _Damped:
    """The change of Levenberg and Marquardt, which is accepted only if it decreases sum_t |r_t|^2."""

    def __post_init__(self: Method) -> None:
        mu = self.damping
        number = isinstance(mu, (int, float)) and not isinstance(mu, bool)
        if not number or not 0 < mu < math.inf:
            raise ValueError(
                f"expected {type(self).__name__} damping, the first mu, to be a positive number, got {mu!r}: "
                f"0 is {'DEER' if self.algebra is DENSE else 'QuasiDEER'}()"
            )
        # A frozen dataclass has no other way. As a float, 1 and 1.0 have the same repr.
        object.__setattr__(self, "damping", float(mu))

    def change(self: Method, J: Array, r: Array, mu: Array) -> Array:
        """Computes the damped change by one Kalman smoother."""
        return smoothed_step(self.algebra, J, r, mu)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DEER(_Newton):
    """Newton's method with dense Jacobians, d_t = J_t d_{t-1} + r_t.

    It needs the fewest iterations: one for a linear cell, and about five to ten for a contracting one. Each iteration
    takes T n^3 operations.

    Source: Lim, Zhu, Selfridge and Kasim 2024, "Parallelizing non-linear sequential models over the sequence length".

    Example:
        >>> import seqjax as sj
        >>> sj.DEER() == sj.DEER()
        True
    """

    @property
    def algebra(self) -> Algebra:
        """Dense matrices."""
        return DENSE


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class QuasiDEER(_Newton):
    """Newton's method with only the diagonals of the Jacobians, d_t = diag(J_t) * d_{t-1} + r_t.

    It needs more iterations than DEER, but only T n memory. It is equal to DEER if no unit reads another unit.

    Source: Gonzalez, Warrington, Smith and Linderman 2024, "Towards scalable and stable parallelization of nonlinear
        RNNs".

    Example:
        >>> import seqjax as sj
        >>> sj.QuasiDEER()
        QuasiDEER()
    """

    @property
    def algebra(self) -> Algebra:
        """Diagonal matrices."""
        return DIAGONAL


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ELK(_Damped):
    """Levenberg-Marquardt with dense Jacobians: d minimises sum_t |d_t - J_t d_{t-1} - r_t|^2 + mu |d_t|^2.

    It is for recurrences that contract near the trajectory, but not at the first iterates of Newton's method. For
    example, DEER overflows far from the trajectory of a cell that is a polynomial. A change is accepted only if it
    decreases sum_t |r_t|^2. Then mu decreases; otherwise it increases.

    Args:
        damping: mu of the first iteration.

    Raises:
        ValueError: the damping is not a positive number.

    Source: Gonzalez, Warrington, Smith and Linderman 2024, "Towards scalable and stable parallelization of nonlinear
        RNNs", where mu is fixed.

    Example:
        >>> import seqjax as sj
        >>> sj.ELK(damping=0.1)
        ELK(damping=0.1)
    """

    damping: float = 1.0

    @property
    def algebra(self) -> Algebra:
        """Dense matrices."""
        return DENSE


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class QuasiELK(_Damped):
    """ELK with only the diagonals of the Jacobians, in T n memory.

    Args:
        damping: mu of the first iteration.

    Raises:
        ValueError: the damping is not a positive number.

    Source: Gonzalez, Warrington, Smith and Linderman 2024, "Towards scalable and stable parallelization of nonlinear
        RNNs".

    Example:
        >>> import seqjax as sj
        >>> sj.QuasiELK().damping
        1.0
    """

    damping: float = 1.0

    @property
    def algebra(self) -> Algebra:
        """Diagonal matrices."""
        return DIAGONAL
