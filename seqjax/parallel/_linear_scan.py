"""The linear recurrence d_t = A_t d_{t-1} + b_t for all t, by an associative scan.

Two steps together have the form of one step,

    (A_2, b_2) after (A_1, b_1)  =  (A_2 A_1, A_2 b_1 + b_2),

so steps can be combined in any grouping.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from seqjax.parallel._algebra import Algebra
from seqjax.parallel._prefixes import prefix_scan

Affine = tuple[Array, Array]


def linear_scan(algebra: Algebra, A: Array, b: Array, reverse: bool = False) -> Array:
    """Solves d_t = A_t d_{t-1} + b_t with d_0 = 0 for all t.

    Args:
        algebra: the operations on the matrices, `DENSE` or `DIAGONAL`.
        A: A_1..A_T, (time, n, n), or their diagonals (time, n); A_1 is not used.
        b: b_1..b_T, (time, n).
        reverse: whether to solve d_t = A_t d_{t+1} + b_t with d_{T+1} = 0 instead; A_T is then not used.

    Returns:
        d_1..d_T, (time, n).

    Source: Blelloch 1990, "Prefix sums and their applications".

    Example:
        >>> import jax.numpy as jnp
        >>> from seqjax.parallel._algebra import DIAGONAL
        >>> from seqjax.parallel._linear_scan import linear_scan
        >>> linear_scan(DIAGONAL, jnp.full((4, 1), 0.5), jnp.ones((4, 1)))[:, 0].tolist()
        [1.0, 1.5, 1.75, 1.875]
    """

    def join(first: Affine, second: Affine) -> Affine:
        (A_1, b_1), (A_2, b_2) = first, second
        return algebra.product(A_2, A_1), algebra.apply(A_2, b_1) + b_2

    # Only d is needed in the end, which saves the last product of matrices.
    def finish(first: Affine, second: Affine) -> Array:
        return algebra.apply(second[0], first[1]) + second[1]

    return prefix_scan(join, finish, (A, b), reverse)


def previous_states(first: Array, states: Array) -> Array:
    """The state before each step: s_0..s_{T-1} from s_0 (n,) and s_1..s_T (time, n)."""
    return jnp.concatenate([first[None], states])[:-1]


def next_matrices(matrices: Array) -> Array:
    """The matrix of the step after each step: A_2..A_T, and zero for the last one."""
    return jnp.concatenate([matrices[1:], jnp.zeros_like(matrices[:1])])
