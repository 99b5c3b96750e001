"""Step Jacobians J_t = ds_t/ds_{t-1} and their products: what one step, and many, do to a perturbation of the state."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.analysis._flow import Driven, driven, flat_step, flat_trajectory, push, state_parts, unflatten
from seqjax.analysis._scaled import log_of_power, rescaled
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence._execution.jacobian import step_jacobian
from seqjax.sequence._partition.plan import shapes_of_one


class StepJacobians(NamedTuple):
    """The derivatives of every step; all are change of a state for each unit of change of what it depends on.

    Attributes:
        by_state: J_t = ds_t/ds_{t-1}, (batch, time, n, n); the identity where a step is held, zero where it is reset.
        by_input: ds_t/dx_t, (batch, time, n, m), where it was asked for.
        parts: where each field of the state lies in 0..n, by name.
    """

    by_state: Float[Array, "batch time n n"]
    by_input: Float[Array, "batch time n m"] | None
    parts: dict[str, slice]

    def block(self, of: str, by: str) -> Float[Array, "batch time a b"]:
        """One block, such as dh_t/dc_{t-1} = block("h", "c").

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

    from the parts of the step (`seqjax.sequence._execution.jacobian`), for any cell. Memory grows with
    batch * time * n^2. The other functions of this package never form these matrices.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        inputs: also ds_t/dx_t, over the inputs of one step as one vector of m numbers.

    Returns:
        `StepJacobians`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the state, or the inputs where they are asked for, cannot be differentiated.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks".

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1)
        >>> params = sj.VanillaParams(W_xh=jnp.zeros((1, 1)), W_hh=jnp.array([[2.0]]), b_h=jnp.zeros(1))
        >>> J = sj.analysis.step_jacobians(cell, params, jnp.ones((1, 3, 1))).by_state
        >>> J[0, :, 0, 0].tolist()  # at h = 0, 2 tanh'(0)
        [2.0, 2.0, 2.0]
    """
    given = driven(cell, params, xs, state, mask, reset)
    if inputs and not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(given.inputs[0])):
        raise TypeError(
            f"expected floating-point xs for ds_t/dx_t, got {jax.tree.leaves(given.inputs[0])[0].dtype}: "
            f"leave inputs=False for tokens, or analyse the layers above the embedding"
        )
    by_state, by_input = compiled(jacobians_at, cell, inputs)(given, jnp.arange(given.time))
    return StepJacobians(by_state, by_input, state_parts(cell, params))


def jacobians_at(cell: Cell, inputs: bool, given: Driven, times: Array) -> tuple[Array, Array | None]:
    """`StepJacobians` of the steps `times`, from 0, alone."""
    before, drive = jax.tree.map(lambda leaf: leaf[:, times], (flat_trajectory(cell, given), given.inputs))
    step, params = flat_step(cell, given.params), given.params
    unravel = partial(unflatten, cell, params)
    like, at = shapes_of_one(before, 2), shapes_of_one((*drive, None), 2)
    jacobian = step_jacobian(cell, params, jax.eval_shape(unravel, like), at)

    def by_state(v: Array, at: PyTree) -> Array:
        return jacobian(unravel(v), (*at, None)).astype(v.dtype)

    def by_input(v: Array, at: PyTree) -> Array:
        x, unravel = ravel_pytree(at[0])
        return jax.jacfwd(lambda x: step(params, v, (unravel(x), *at[1:])))(x)

    def everywhere(derivative: Any) -> Array:
        return jax.vmap(jax.vmap(derivative))(before, drive)

    return everywhere(by_state), everywhere(by_input) if inputs else None


class JacobianProduct(NamedTuple):
    """J_stop ... J_{start+1} = exp(log_scale) * matrix.

    Attributes:
        matrix: (batch, n, n), scaled so that its largest entry lies between 1/2 and 1.
        log_scale: (batch,), in nats; minus infinity where the product is zero.
    """

    matrix: Float[Array, "batch n n"]
    log_scale: Float[Array, " batch"]


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
    """ds_stop/ds_start = J_stop ... J_{start+1}, with its scale kept as a logarithm.

    The scale neither overflows nor vanishes at any lag. The *small* singular values of a long product are lost all the
    same, as in any product that is multiplied out: `product_singular_values` and `lyapunov_exponents` keep them.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        start: s, in steps from 0.
        stop: t, in steps up to the time of `xs`, which is the default.

    Returns:
        `JacobianProduct`.

    Raises:
        ValueError: start and stop are not in order within the sequence, or a shape does not fit.
        TypeError: the state cannot be differentiated.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.8 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> product = sj.analysis.jacobian_product(cell, params, jnp.ones((1, 100_000, 1)))
        >>> round(float(product.log_scale[0]))  # 100 000 ln 0.8, far below the smallest float
        -22314
    """
    given = driven(cell, params, xs, state, mask, reset)
    start, stop = check_span(start, stop, given.time)
    return compiled(_jacobian_product, cell, start, stop)(given)


def check_span(start: int, stop: int | None, time: int) -> tuple[int, int]:
    """Returns a span of steps, 0 <= start <= stop <= time, as two whole numbers.

    Raises:
        ValueError: it is not one.
    """
    stop = time if stop is None else stop
    if not 0 <= start <= stop <= time:
        raise ValueError(f"expected 0 <= start <= stop <= time = {time}, got start {start} and stop {stop}")
    return int(start), int(stop)


def _jacobian_product(cell: Cell, start: int, stop: int, given: Driven) -> JacobianProduct:
    states = flat_trajectory(cell, given.until(stop))
    step, params = flat_step(cell, given.params), given.params

    def one(v: Array, inputs: PyTree) -> JacobianProduct:
        def advance(carry: tuple[Array, Array, Array], at: PyTree) -> tuple[tuple[Array, Array, Array], None]:
            v, columns, exponent = carry
            v, columns = push(step, params, v, columns, at)
            columns, more = rescaled(columns)
            return (v, columns, exponent + more), None

        first = (v, jnp.eye(v.size, dtype=v.dtype), jnp.zeros((), jnp.int32))
        (_, columns, exponent), _ = jax.lax.scan(advance, first, inputs)
        return JacobianProduct(columns.T, log_of_power(columns, exponent))

    return jax.vmap(one)(states[:, start], given.between(start, stop).inputs)
