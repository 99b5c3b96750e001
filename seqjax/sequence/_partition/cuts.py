"""Cuts: the products at which the backward pass cuts a step open.

The forward loop computes W v at every step. The backward pass knows every v, so it computes W v for a whole chunk as
one product before its loop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array

from seqjax.sequence._partition.program import Eqn, Var, bind, contracted_axis
from seqjax.sequence._sizes import is_known

# Entries of a matrix. A batch of one row gains little from W^T, and above this size the transposition costs more.
LARGE = 2**14


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """r = W v + b: a product of a value that depends on the state with weights that depend on parameters only.

    Attributes:
        eqn: the product.
        operand: the variable v.
        weights: the variable W.
        bias: the equation that adds b, and the variable b; None if there is none.
        is_matrix: whether v is one vector and W one matrix (out, in).
    """

    eqn: Eqn
    operand: Var
    weights: Var
    bias: tuple[Eqn, Var] | None
    is_matrix: bool

    @property
    def out(self) -> Var:
        """The variable r."""
        return self.eqn.outvars[0] if self.bias is None else self.bias[0].outvars[0]

    @property
    def eqns(self) -> list[Eqn]:
        """The equations that need not run when r is known."""
        return [self.eqn] if self.bias is None else [self.eqn, self.bias[0]]

    def product(self, W: ArrayLike, v: ArrayLike) -> Array:
        """W v, without b."""
        return bind(self.eqn, [v if a is self.operand else W for a in self.eqn.invars])[0]

    def is_stored_transposed(self, batch: int) -> bool:
        """Whether the loop reads W^T.

        XLA's CPU product is faster on W^T, except for a batch of one row with a large matrix.
        """
        e = self.eqn
        if e.primitive.name != "dot_general" or self.weights.aval.ndim != 2:
            return False
        position = self._position_of_weights
        is_faster = not is_known(batch) or batch > 1 or self.weights.aval.size <= LARGE
        return contracted_axis(e, position) == position and is_faster

    def product_with_transposed(self, W_T: ArrayLike, v: ArrayLike) -> Array:
        """W v from W^T."""
        # `primitive.bind` and not `bind`, because the equation has other axes than these.
        position = self._position_of_weights
        axes, batch = self.eqn.params["dimension_numbers"]
        new_axes = tuple((1 - axes[position][0],) if k == position else axes[k] for k in (0, 1))
        operands = [v if a is self.operand else W_T for a in self.eqn.invars]
        return self.eqn.primitive.bind(*operands, **{**self.eqn.params, "dimension_numbers": (new_axes, batch)})

    @property
    def _position_of_weights(self) -> int:
        return 0 if self.eqn.invars[0] is self.weights else 1

    def value(self, weight: tuple[Any, Any], v: ArrayLike) -> Array:
        """W v + b."""
        W, b = weight
        r = self.product(W, v)
        return r if b is None else r + b


def with_known_value(cut: Cut, r: ArrayLike, v: ArrayLike, W: ArrayLike) -> Array:
    """r, which is W v + b, with the derivative W dv + dr, as if it were a function of v and of a free term r."""

    # The derivative of W v + b itself would compute the product a second time. With this one the backward pass computes
    # W^T ct only.
    @jax.custom_jvp
    def value(r: Array, v: Array) -> Array:
        return r

    value.defjvp(lambda primals, tangents: (primals[0], tangents[0] + cut.product(W, tangents[1])))
    return value(r, v)
