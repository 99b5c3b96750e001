"""The damped Newton step of ELK as a Kalman smoother, in few sweeps over the sequence.

Levenberg-Marquardt asks for the change d of the trajectory that minimises

    sum_t |d_t - J_t d_{t-1} - r_t|^2 + mu sum_t |d_t|^2,    d_0 = 0,

which is the most probable path of the linear Gaussian model d_t = J_t d_{t-1} + r_t + w_t, w_t ~ N(0, I), that is
observed to be zero with noise of variance 1 / mu. Filtering it is associative (Saerkkae and Garcia-Fernandez 2021), and
so is the way back, of which the means alone are wanted.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.parallel._algebra import Algebra
from seqjax.parallel._linear_scan import advanced, linear_scan
from seqjax.parallel._prefixes import running_joins


class Segment(NamedTuple):
    """A stretch of steps: p(d_end | d_start, zeros) = N(A d_start + b, C), and p(zeros | d_start) by eta and Omega."""

    A: Array
    b: Array
    C: Array
    eta: Array
    Omega: Array


def smoothed_step(algebra: Algebra, J: Array, r: Array, mu: Array) -> Array:
    """The change d that minimises sum_t |d_t - J_t d_{t-1} - r_t|^2 + mu |d_t|^2.

    Args:
        algebra: of the Jacobians, `DENSE` or `DIAGONAL`.
        J: J_1..J_T, (time, n, n), or their diagonals (time, n); J_1 is not used.
        r: f(s_{t-1}) - s_t, (time, n).
        mu: the damping, a positive number.

    Returns:
        d_1..d_T, (time, n).

    Source: Gonzalez, Warrington, Smith and Linderman 2024, "Towards scalable and stable parallelization of nonlinear
        RNNs"; Saerkkae and Garcia-Fernandez 2021, "Temporal parallelization of Bayesian smoothers".

    Example:
        >>> import jax.numpy as jnp
        >>> from seqjax.parallel._algebra import DIAGONAL
        >>> from seqjax.parallel._smoother import smoothed_step
        >>> d = smoothed_step(DIAGONAL, jnp.zeros((3, 1)), jnp.ones((3, 1)), jnp.array(0.25))
        >>> [round(float(x), 6) for x in d[:, 0]]  # nothing recurs: 1 / (1 + mu)
        [0.8, 0.8, 0.8]
    """
    J = J.at[0].set(jnp.zeros_like(J[0]))  # the state before the first step is known
    join, finish = partial(_join, algebra), partial(_filtered, algebra)
    mean, covariance = running_joins(join, finish, _segments(algebra, J, r, mu))

    def way_back(mean: Array, P: Array, J_next: Array, r_next: Array) -> tuple[Array, Array]:
        to_next = algebra.product(P, algebra.transpose(J_next))
        spread = algebra.product(J_next, to_next) + algebra.identity(len(mean), mean.dtype)
        gain = algebra.product(to_next, algebra.inverse(spread))
        return gain, mean - algebra.apply(gain, algebra.apply(J_next, mean) + r_next)

    gains, offsets = jax.vmap(way_back)(mean, covariance, advanced(J), advanced(r))
    return linear_scan(algebra, gains, offsets, reverse=True)


def _segments(algebra: Algebra, J: Array, r: Array, mu: Array) -> Segment:
    """Single steps: the prediction J d + r of variance 1, seen as zero with variance 1 / mu."""
    gain = mu / (1 + mu)

    def one(J: Array, r: Array) -> Segment:
        transposed = algebra.transpose(J)
        return Segment(
            A=(1 - gain) * J,
            b=(1 - gain) * r,
            C=(1 - gain) * algebra.identity(len(r), r.dtype),
            eta=-gain * algebra.apply(transposed, r),
            Omega=gain * algebra.product(transposed, J),
        )

    return jax.vmap(one)(J, r)


def _join(algebra: Algebra, i: Segment, j: Segment) -> Segment:
    """Segment i and then segment j. With C and Omega symmetric, (I + Omega C)^-1 = I - Omega (I + C Omega)^-1 C."""
    product, apply, transpose = algebra.product, algebra.apply, algebra.transpose
    between = _between(algebra, i, j)
    A, C, back = product(between, i.A), product(between, i.C), transpose(i.A)
    news = j.eta - apply(j.Omega, i.b)
    return Segment(
        A=product(j.A, A),
        b=apply(j.A, apply(between, i.b + apply(i.C, j.eta))) + j.b,
        C=product(product(j.A, C), transpose(j.A)) + j.C,
        eta=apply(back, news - apply(j.Omega, apply(C, news))) + i.eta,
        Omega=product(back, product(j.Omega, A)) + i.Omega,
    )


def _filtered(algebra: Algebra, i: Segment, j: Segment) -> tuple[Array, Array]:
    """b and C of both: the mean and the covariance of the state at the end, from a known one at the start."""
    between = _between(algebra, i, j)
    C = algebra.product(j.A, algebra.product(algebra.product(between, i.C), algebra.transpose(j.A)))
    return algebra.apply(j.A, algebra.apply(between, i.b + algebra.apply(i.C, j.eta))) + j.b, C + j.C


def _between(algebra: Algebra, i: Segment, j: Segment) -> Array:
    return algebra.inverse(algebra.identity(len(i.b), i.b.dtype) + algebra.product(i.C, j.Omega))
