"""Perturbations pushed through the steps of any cell, with products that read the weights as is fastest for many rows.

    s_t = f(s_{t-1}, x_t),    V_t = J_t V_{t-1}

The state is one vector and each product with it reads W. The perturbations are k rows, and XLA's product of rows is two
times faster on W^T, which is stored once, before the loop over the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Params, State
from seqjax.sequence._partition.cuts import Cut
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.program import inline

if TYPE_CHECKING:  # only annotations need it
    from seqjax.sequence._partition.tracing import Traced
else:
    Traced = Any


def differentiable_step(traced: Traced, params: Params, rows: int) -> Callable[[State, PyTree], State]:
    """A masked step whose derivative is made for `rows` tangents at once.

    Args:
        traced: the masked step of a cell with a floating-point state, which emits nothing.
        params: the parameters. What depends only on them is computed here, once.
        rows: the number of tangents.

    Returns:
        A function of a state and of (x_t, mask_t, reset_t, noise_t) of one example at one time. It returns the new
        state, and is to be linearized with respect to the state.
    """
    parts = Parts(inline(traced.program), traced.n_params, traced.n_state, merge_sigmoids=False)
    hoisted = parts.hoist([*parts.consts, *map(jnp.asarray, jax.tree.leaves(params))])
    transposed = [
        W.T if cut.is_stored_transposed(rows) else None for cut, (W, _) in zip(parts.cuts, hoisted.weights, strict=True)
    ]

    def cut_value(i: int, v: Array) -> Array:
        cut, (W, b), W_T = parts.cuts[i], hoisted.weights[i], transposed[i]
        if W_T is None:
            return cut.value((W, b), v)
        r = _product(cut)(W, W_T, v)
        return r if b is None else r + b

    def step(state: State, at: PyTree) -> State:
        leaves, tree = jax.tree.flatten(state)
        drives = parts.compute_drives(hoisted, jax.tree.leaves(at))
        return tree.unflatten(parts.run_rest(hoisted, leaves, drives, cut_value)[0])

    return step


def _product(cut: Cut) -> Callable[[Array, Array, Array], Array]:
    """W v, with the derivative W dv from W^T."""

    @jax.custom_jvp
    def product(W: Array, W_T: Array, v: Array) -> Array:
        return cut.product(W, v)

    def rule(primals: Any, tangents: Any) -> tuple[Array, Any]:
        W, W_T, v = primals
        dW, _, dv = tangents
        # Zeros that are known to be zeros cost no product.
        terms = [] if _is_zero(dv) else [cut.product_with_transposed(W_T, dv)]
        terms += [] if _is_zero(dW) else [cut.product(dW, v)]
        r = product(W, W_T, v)
        return r, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(r)

    product.defjvp(rule, symbolic_zeros=True)
    return product


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
