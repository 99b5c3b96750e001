"""The damped Newton step of ELK as a Kalman smoother, by an associative scan.

Levenberg-Marquardt computes the change d of the trajectory that minimises

    sum_t |d_t - J_t d_{t-1} - r_t|^2 + mu sum_t |d_t|^2,    d_0 = 0,

This is the most probable path of the linear Gaussian model d_t = J_t d_{t-1} + r_t + w_t, w_t ~ N(0, I), if every
observation of d_t is zero with a noise variance of 1 / mu. The filter is an associative operation (Saerkkae and
Garcia-Fernandez 2021). So is the smoother, which is a linear recurrence because only its means are needed.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.parallel._algebra import Algebra
from seqjax.parallel._linear_scan import linear_scan, next_matrices
from seqjax.parallel._prefixes import prefix_scan


class Segment(NamedTuple):
    """The filter of several consecutive steps, given that all their observations are zero.

    p(d_end | d_start, zeros) = N(A d_start + b, C), and p(zeros | d_start) is proportional to
    exp(eta^T d_start - d_start^T Omega d_start / 2).
    """

    A: Array
    b: Array
    C: Array
    eta: Array
    Omega: Array


def smoothed_step(algebra: Algebra, J: Array, r: Array, mu: Array) -> Array:
    """The change d that minimises sum_t |d_t - J_t d_{t-1} - r_t|^2 + mu |d_t|^2.

    Args:
        algebra: the operations on the Jacobians, `DENSE` or `DIAGONAL`.
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
        >>> [round(float(x), 6) for x in d[:, 0]]  # without a recurrence, d = r / (1 + mu)
        [0.8, 0.8, 0.8]
    """
    J = J.at[0].set(jnp.zeros_like(J[0]))  # because d_0 = 0
    join, finish = partial(_join, algebra), partial(_filter, algebra)
    mean, covariance = prefix_scan(join, finish, _segments(algebra, J, r, mu))

    # The Rauch-Tung-Striebel smoother: d_t = gain d_{t+1} + offset.
    def smooth(mean: Array, P: Array, J_next: Array, r_next: Array) -> tuple[Array, Array]:
        to_next = algebra.product(P, algebra.transpose(J_next))
        predicted = algebra.product(J_next, to_next) + algebra.identity(len(mean), mean.dtype)
        gain = algebra.product(to_next, algebra.inverse(predicted))
        return gain, mean - algebra.apply(gain, algebra.apply(J_next, mean) + r_next)

    gains, offsets = jax.vmap(smooth)(mean, covariance, next_matrices(J), next_matrices(r))
    return linear_scan(algebra, gains, offsets, reverse=True)


def _segments(algebra: Algebra, J: Array, r: Array, mu: Array) -> Segment:
    """Single steps: a prediction J d + r of variance 1, and an observation of zero of variance 1 / mu."""
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
    """Joins segment i with the later segment j."""
    # C and Omega are symmetric, so (I + Omega C)^-1 = I - Omega (I + C Omega)^-1 C, and one inverse is enough.
    product, apply, transpose = algebra.product, algebra.apply, algebra.transpose
    between = _between(algebra, i, j)
    A, C, A_T = product(between, i.A), product(between, i.C), transpose(i.A)
    innovation = j.eta - apply(j.Omega, i.b)
    return Segment(
        A=product(j.A, A),
        b=apply(j.A, apply(between, i.b + apply(i.C, j.eta))) + j.b,
        C=product(product(j.A, C), transpose(j.A)) + j.C,
        eta=apply(A_T, innovation - apply(j.Omega, apply(C, innovation))) + i.eta,
        Omega=product(A_T, product(j.Omega, A)) + i.Omega,
    )


def _filter(algebra: Algebra, i: Segment, j: Segment) -> tuple[Array, Array]:
    """b and C of the joined segment: the mean and the covariance of d_end, if d_start is zero."""
    between = _between(algebra, i, j)
    C = algebra.product(j.A, algebra.product(algebra.product(between, i.C), algebra.transpose(j.A)))
    return algebra.apply(j.A, algebra.apply(between, i.b + algebra.apply(i.C, j.eta))) + j.b, C + j.C


def _between(algebra: Algebra, i: Segment, j: Segment) -> Array:
    """(I + C_i Omega_j)^-1."""
    return algebra.inverse(algebra.identity(len(i.b), i.b.dtype) + algebra.product(i.C, j.Omega))
