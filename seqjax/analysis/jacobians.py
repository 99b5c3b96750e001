"""Step Jacobians J_t = ds_t/ds_{t-1} and their products: the effect of one or many steps on a perturbation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.analysis._flow import Sequences, check_arguments, flat_map, flat_trajectory, state_parts
from seqjax.analysis._frames import final_states
from seqjax.analysis._leaves import floating_leaves, with_leaves
from seqjax.analysis._recording import in_float64
from seqjax.analysis._scaled import log_power, rescale
from seqjax.analysis._spans import check_span
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes, on_any_mesh
from seqjax.sequence._masked_step import Inputs
from seqjax.sequence._partition.tracing import shapes_of_one


class StepJacobians(NamedTuple):
    """The derivatives of every step, in change of the state per unit of change of the other variable.

    Attributes:
        by_state: J_t = ds_t/ds_{t-1}, (batch, time, n, n); the identity at a masked step, and zero at a reset.
        by_input: ds_t/dx_t, (batch, time, n, m); None if it was not requested.
        parts: the position of each field of the state in 0..n, by name.
    """

    by_state: Float[Array, "batch time n n"]
    by_input: Float[Array, "batch time n m"] | None
    parts: dict[str, slice]

    def __str__(self) -> str:
        batch, time, n, _ = self.by_state.shape
        parts = ", ".join(f"{name} {part.start}..{part.stop - 1}" for name, part in self.parts.items())
        norm = jnp.linalg.norm(self.by_state, axis=(-2, -1)) / n**0.5
        lines = [
            f"Jacobians of {time} steps of {batch} sequences, {n} x {n}, over {parts}",
            f"  |J_t|_F / sqrt({n}), the growth of a random perturbation: {norm.min():.4g} to {norm.max():.4g}",
        ]
        if self.by_input is not None:
            lines.append(f"  and ds_t/dx_t, {n} x {self.by_input.shape[-1]}")
        return "\n".join(lines)

    def block(self, of: str, by: str) -> Float[Array, "batch time a b"]:
        """One block of `by_state`, such as dh_t/dc_{t-1} = block("h", "c").

        Raises:
            ValueError: the state has no field of that name.
        """
        for name in (of, by):
            if name not in self.parts:
                raise ValueError(f"expected a field of the state, one of {', '.join(self.parts)}, got {name!r}")
        return self.by_state[:, :, self.parts[of], self.parts[by]]


def step_jacobians(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    inputs: bool = False,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> StepJacobians:
    """J_t = ds_t/ds_{t-1} at every step, over the whole state.

        J_t = D_s + sum_i D_i W_i

    It is computed from the parts of the step (`seqjax.sequence._execution.jacobian`), for any cell. Memory grows with
    batch * time * n^2. Most other functions of this package never form these matrices.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        inputs: whether to compute ds_t/dx_t too, with all inputs of one step as one vector of m numbers.

    Returns:
        `StepJacobians`.

    Raises:
        ValueError: a shape does not match.
        TypeError: the state cannot be differentiated, or `inputs` is True and the inputs cannot be.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks".

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1)
        >>> params = sj.VanillaParams(W_xh=jnp.zeros((1, 1)), W_hh=jnp.array([[2.0]]), b_h=jnp.zeros(1))
        >>> J = sj.analysis.step_jacobians(cell, params, jnp.ones((1, 3, 1))).by_state
        >>> J[0, :, 0, 0].tolist()  # at h = 0, 2 tanh'(0)
        [2.0, 2.0, 2.0]
    """
    cell, sequences = check_arguments(cell, params, xs, state, mask, reset)
    fixed = [kind for leaf in jax.tree.leaves(xs) if not jnp.issubdtype(kind := jnp.result_type(leaf), jnp.floating)]
    if inputs and fixed:
        raise TypeError(
            f"expected floating-point xs for ds_t/dx_t, got {fixed[0]}: leave inputs=False for tokens, or analyse the "
            f"layers above the embedding"
        )
    by_state, by_input = precise_jit(jacobians_at, cell, inputs)(sequences, jnp.arange(sequences.time))
    return StepJacobians(by_state, by_input, state_parts(cell, params))


def jacobians_at(cell: Cell, inputs: bool, sequences: Sequences, times: Array) -> tuple[Array, Array | None]:
    """The derivatives of `StepJacobians` at only the steps `times`, counted from 0."""
    return on_any_mesh(partial(_jacobians_at, cell, inputs), sequences.inputs.x, sequences, times)


def _jacobians_at(cell: Cell, inputs: bool, sequences: Sequences, times: Array) -> tuple[Array, Array | None]:
    before, inputs_at = jax.tree.map(lambda leaf: leaf[:, times], (flat_trajectory(cell, sequences), sequences.inputs))
    flat, params = flat_map(cell, sequences.params), sequences.params
    by_state = flat.jacobian(params, shapes_of_one((before, inputs_at), 2))

    def by_input(v: Array, at: Inputs) -> Array:
        # Inputs are no state, so `FlatCell` does not flatten them. A counter or a key among them has no derivative.
        x, unravel = ravel_pytree(list(floating_leaves(at.x).values()))
        return jax.jacfwd(lambda x: flat.step(params, v, at._replace(x=with_leaves(at.x, unravel(x)))))(x)

    def at_all_steps(derivative: Callable[[Array, Inputs], Array]) -> Array:
        return jax.vmap(jax.vmap(derivative))(before, inputs_at)

    return at_all_steps(by_state), at_all_steps(by_input) if inputs else None


class JacobianProduct(NamedTuple):
    """J_stop ... J_{start+1} = exp(log_scale) * matrix.

    Attributes:
        matrix: (batch, n, n), scaled so that its largest entry is between 1/2 and 1.
        log_scale: (batch,), in nats; minus infinity if the product is zero.
    """

    matrix: Float[np.ndarray, "batch n n"]
    log_scale: Float[np.ndarray, " batch"]

    def __str__(self) -> str:
        batch, n, _ = self.matrix.shape
        with np.errstate(divide="ignore"):
            growth = self.log_scale + np.log(np.linalg.norm(self.matrix, axis=(1, 2)) / n**0.5)
        return (
            f"products of step Jacobians of {batch} sequences, {n} x {n}: ln of the growth of a random perturbation "
            f"{growth.min():.4g} to {growth.max():.4g}"
        )


@for_automatic_axes
def jacobian_product(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    start: int = 0,
    stop: int | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> JacobianProduct:
    """ds_stop/ds_start = J_stop ... J_{start+1}, with its scale as a separate logarithm.

    So the product neither overflows nor underflows at any lag. It is computed in float64, because rounding errors of
    float32 grow as fast as perturbations. But like every explicit product of many matrices, it loses the *small*
    singular values; `product_singular_values` and `lyapunov_exponents` compute them.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        start: the first state, in steps from 0.
        stop: the last state, in steps; by default the last step of `xs`.

    Returns:
        `JacobianProduct`.

    Raises:
        ValueError: `start` and `stop` are not in order within the sequence, or a shape does not match.
        TypeError: the state cannot be differentiated.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.8 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> product = sj.analysis.jacobian_product(cell, params, jnp.ones((1, 100_000, 1)))
        >>> round(float(product.log_scale[0]))  # 100 000 ln 0.8, far below the smallest float
        -22314
    """
    cell, sequences = check_arguments(cell, params, xs, state, mask, reset)
    start, stop = check_span(start, stop, sequences.time)
    if start:
        sequences = sequences._replace(first=precise_jit(final_states, cell)(sequences.until(start)))
    with in_float64(cell, sequences.between(start, stop)) as sequences:
        product = precise_jit(_jacobian_product, cell)(sequences)
        return JacobianProduct(*(np.asarray(each, np.float64) for each in product))


def _jacobian_product(cell: Cell, sequences: Sequences) -> tuple[Array, Array]:
    """The matrix and its scale, over all steps."""
    flat, params = flat_map(cell, sequences.params), sequences.params

    def one_sequence(v: Array, inputs: PyTree) -> tuple[Array, Array]:
        def advance(carry: tuple[Array, Array, Array], at: PyTree) -> tuple[tuple[Array, Array, Array], None]:
            v, columns, exponent = carry
            v, columns = flat.push(params, v, columns, at)
            columns, shift = rescale(columns)
            return (v, columns, exponent + shift), None

        first = (v, jnp.eye(v.size, dtype=v.dtype), jnp.zeros((), jnp.int32))
        (_, columns, exponent), _ = jax.lax.scan(advance, first, inputs)
        return columns.T, log_power(columns, exponent)  # `push` stores columns as rows

    return jax.vmap(one_sequence)(sequences.first, sequences.inputs)
