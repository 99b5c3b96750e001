"""The ways to step towards the trajectory, as values: which Jacobians they keep, and how they damp the step.

All look for the root of r_t = f(s_{t-1}) - s_t. With J_t = df/ds_{t-1}, Newton's step solves d_t = J_t d_{t-1} + r_t.

| method    | Jacobians | step         | memory  | work of an iteration |
|-----------|-----------|--------------|---------|----------------------|
| DEER      | whole     | Newton's     | T n^2   | T n^3                |
| QuasiDEER | diagonal  | Newton's     | T n     | T n, and the diagonals |
| ELK       | whole     | damped       | T n^2   | T n^3, some ten times that of DEER |
| QuasiELK  | diagonal  | damped       | T n     | T n, and the diagonals |

All are exact after at most T iterations, since each iteration makes at least one more step exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from seqjax.parallel._algebra import DENSE, DIAGONAL, Algebra
from seqjax.parallel._linear_scan import linear_scan
from seqjax.parallel._smoother import smoothed_step


@runtime_checkable
class Method(Protocol):
    """A way to step: the Jacobians that it keeps, its first damping (0 for none), and the change of the trajectory."""

    @property
    def algebra(self) -> Algebra:
        """`DENSE` or `DIAGONAL`."""
        ...

    @property
    def damping(self) -> float:
        """mu of the first iteration; 0 where every step is taken as it is."""
        ...

    def change(self, J: Array, r: Array, mu: Array) -> Array:
        """d_1..d_T (time, n) for Jacobians J, residuals r (time, n) and damping mu."""
        ...


class _Newton:
    """Newton's step, d_t = J_t d_{t-1} + r_t."""

    damping = 0.0

    def change(self: Any, J: Array, r: Array, mu: Array) -> Array:
        """One linear scan."""
        return linear_scan(self.algebra, J, r)


class _Damped:
    """The step of Levenberg and Marquardt. Taken only where it makes sum_t |r_t|^2 smaller, which sets mu."""

    def __post_init__(self: Any) -> None:
        mu = self.damping
        number = isinstance(mu, (int, float)) and not isinstance(mu, bool)
        if not number or not 0 < mu < math.inf:
            raise ValueError(
                f"expected {type(self).__name__} damping, mu at the start, to be a positive number, got {mu!r}: "
                f"0 is {'DEER' if self.algebra is DENSE else 'QuasiDEER'}()"
            )
        object.__setattr__(self, "damping", float(mu))

    def change(self: Any, J: Array, r: Array, mu: Array) -> Array:
        """One Kalman smoother."""
        return smoothed_step(self.algebra, J, r, mu)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DEER(_Newton):
    """Newton's method with whole Jacobians, d_t = J_t d_{t-1} + r_t.

    The fewest iterations: one for a linear cell, some five to ten for a contracting one. Each costs T n^3.

    Source: Lim, Zhu, Selfridge and Kasim 2024, "Parallelizing non-linear sequential models over the sequence length".

    Example:
        >>> import seqjax as sj
        >>> sj.DEER() == sj.DEER()
        True
    """

    @property
    def algebra(self) -> Algebra:
        """Whole matrices."""
        return DENSE


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class QuasiDEER(_Newton):
    """Newton's method with the diagonals of the Jacobians alone, d_t = diag(J_t) * d_{t-1} + r_t.

    More iterations than DEER, each in memory T n; the same as DEER where units do not mix.

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
    """Levenberg-Marquardt with whole Jacobians: the d that minimises sum_t |d_t - J_t d_{t-1} - r_t|^2 + mu |d_t|^2.

    For recurrences that contract, but not where Newton's first steps lead: far from the trajectory of a polynomial
    cell, say, where DEER overflows. A step is taken only where it makes sum_t |r_t|^2 smaller, and then mu falls;
    otherwise mu grows.

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
        """Whole matrices."""
        return DENSE


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class QuasiELK(_Damped):
    """ELK with the diagonals of the Jacobians alone, in memory T n.

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
