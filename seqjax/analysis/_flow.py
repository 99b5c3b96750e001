"""A cell on a batch of sequences as a map of flat states, s_t = F(s_{t-1}, x_t), and what every analysis does with it.

The state is one vector of n numbers, whatever the cell: an LSTM's is (h, c), a stack's is that of all its layers. With
J_t = ds_t/ds_{t-1}, perturbations of a state are pushed forward, v <- J_t v, and gradients are pulled back,
g <- J_t^T g, a few columns at a time. The n x n matrix J_t is formed only where it is itself the answer.

A held step (mask False) is the identity, and a reset makes J_t zero: what came before is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Params, State, is_value, strong_type
from seqjax.sequence._checks import batch_of_states, check_flags, check_inputs
from seqjax.sequence._partition.plan import normal_step


class Driven(NamedTuple):
    """What drives a cell, checked: the arrays that compiled code takes.

    Attributes:
        params: of the cell.
        first: the states before the first step, flat, (batch, n).
        inputs: (xs, mask, reset), leaves (batch, time, ...); None for a mask or a reset that is not there.
    """

    params: Params
    first: Array
    inputs: tuple[PyTree, Array | None, Array | None]

    @property
    def size(self) -> int:
        """n, the numbers in one state."""
        return self.first.shape[1]

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.first.shape[0]

    @property
    def time(self) -> int:
        """Steps of the padded sequences."""
        return jax.tree.leaves(self.inputs)[0].shape[1]

    def between(self, start: int, stop: int) -> Driven:
        """The same with the inputs of steps start+1..stop alone; `first` stays."""
        return self._replace(inputs=jax.tree.map(lambda leaf: leaf[:, start:stop], self.inputs))

    def until(self, stop: int) -> Driven:
        """The first `stop` steps."""
        return self.between(0, stop)


Step = Callable[[Params, Array, PyTree], Array]  # (theta, s_{t-1}, (x_t, valid, restart)) -> s_t, flat


def driven(
    cell: Cell, params: Params, xs: PyTree, state: State | None, mask: Any, reset: Any, *, backward: bool = False
) -> Driven:
    """Checks what an analysis was given, before anything compiles.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        backward: whether gradients are pulled back through the step, and not perturbations pushed forward.

    Raises:
        ValueError: a shape does not fit, or there is no sequence.
        TypeError: a dtype does not fit, or the state cannot be differentiated.
    """
    xs, batch, time = check_inputs(cell, xs)
    if not batch:
        raise ValueError("expected at least one sequence to analyse, got a batch of 0")
    mask, reset = check_flags("mask", mask, batch, time), check_flags("reset", reset, batch, time)
    states = batch_of_states(cell, params, state, batch)
    leaves = jax.tree_util.tree_leaves_with_path(states)
    if not leaves:
        raise TypeError(f"expected a cell with a state, got {type(cell).__name__}, which carries none: nothing recurs")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"expected a floating-point state to differentiate, got {leaf.dtype} in "
                f"{type(cell).__name__}'s state{jax.tree_util.keystr(path)}: carry it as an input instead"
            )
        if leaf.dtype.itemsize < 4:
            raise TypeError(
                f"expected a state in float32 or float64, got {leaf.dtype}, too coarse for derivatives: analyse "
                f"jax.tree.map(lambda p: p.astype('float32'), params)"
            )
    given = Driven(params, _flattened(states), (xs, mask, reset))
    if time:
        _check_differentiable(cell, given, pull if backward else push)
    return given


_flattened = jax.jit(jax.vmap(lambda state: ravel_pytree(state)[0]))


def _check_differentiable(cell: Cell, given: Driven, use: Callable[..., Any]) -> None:
    arrays = given.params, (given.first, given.inputs[1:]), given.inputs[0]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), arrays)
    leaves, tree = jax.tree.flatten(shapes)
    check = _differentiated_once if is_value(cell) else _differentiated
    check(cell, use, tree, tuple(leaves))


def _differentiated(cell: Cell, use: Callable[..., Any], tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    """Traces one step and its derivative; `leaves` are the shapes of the parameters, states, flags and inputs."""
    params, (first, flags), xs = jax.tree.unflatten(tree, leaves)

    def of_one(params: Params, first: Array, flags: PyTree, xs: PyTree) -> tuple[Array, PyTree]:
        return first[0], jax.tree.map(lambda leaf: leaf[0, 0], (xs, *flags))

    def stepped(*arrays: PyTree) -> Array:
        return flat_step(cell, params)(arrays[0], *of_one(*arrays))

    def used(*arrays: PyTree) -> PyTree:
        v, inputs = of_one(*arrays)
        return use(flat_step(cell, params), arrays[0], v, v[None], inputs)

    jax.eval_shape(stepped, params, first, flags, xs)  # an error of the step itself is the cell's
    try:  # a derivative may fail only when it is used, as that of a jax.custom_vjp does
        jax.eval_shape(used, params, first, flags, xs)
    except Exception as error:
        raise TypeError(
            f"expected a step that JAX can differentiate, got {type(cell).__name__}.step, of which it says: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}; give the part that it cannot a "
            f"jax.custom_jvp rule"
        ) from error


_differentiated_once = functools.lru_cache(maxsize=256)(_differentiated)


def flat_step(cell: Cell, params: Params) -> Step:
    """The cell's masked step on flat states, one example at one time, with one product for all that read a vector."""
    _, unravel = _ravel_one(cell, params)

    def step(params: Params, v: Array, inputs: PyTree) -> Array:
        after, _ = normal_step(cell, params, unravel(v), (*inputs, None))
        return ravel_pytree(after)[0]

    return step


def flat_initial(cell: Cell, params: Params) -> Array:
    """The cell's initial state, flat, (n,)."""
    return ravel_pytree(strong_type(cell.initial_state(params)))[0]


def unflatten(cell: Cell, params: Params, v: Array) -> State:
    """Flat states (..., n) as the cell's own, leaves (..., *shape)."""
    _, unravel = _ravel_one(cell, params)
    for _ in v.shape[:-1]:
        unravel = jax.vmap(unravel)
    return unravel(v)


def _ravel_one(cell: Cell, params: Params) -> tuple[Array, Callable[[Array], State]]:
    shapes = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    return ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def state_parts(cell: Cell, params: Params) -> dict[str, slice]:
    """Where each field of the state lies in the flat one, by name.

    Args:
        cell, params: any cell and its parameters.

    Returns:
        Slices of 0..n by name: {"h": ..., "c": ...} for an LSTM, {"0.h": ..., "1.h": ...} for a stack, "state" where
        the state is one array.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> sj.analysis.state_parts(cell, cell.init(jax.random.key(0)))
        {'h': slice(0, 3, None), 'c': slice(3, 6, None)}
    """
    shapes = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    parts, start = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        stop = start + int(np.prod(leaf.shape))
        parts[jax.tree_util.keystr(path, simple=True, separator=".") or "state"] = slice(start, stop)
        start = stop
    return parts


def flat_trajectory(cell: Cell, given: Driven) -> Array:
    """Every state s_0..s_T, flat, (batch, time + 1, n)."""
    step = flat_step(cell, given.params)

    def one(v: Array, inputs: PyTree) -> Array:
        def advance(v: Array, at: PyTree) -> tuple[Array, Array]:
            after = step(given.params, v, at)
            return after, after

        return jnp.concatenate([v[None], jax.lax.scan(advance, v, inputs)[1]])

    return jax.vmap(one)(given.first, given.inputs)


def push(step: Step, params: Params, v: Array, frame: Array, inputs: PyTree) -> tuple[Array, Array]:
    """One step of a state and of perturbations of it: s_t = F(s_{t-1}) and V_t = J_t V_{t-1}.

    Args:
        step: from `flat_step`.
        params: of the cell.
        v: s_{t-1} (n,).
        frame: k perturbations as rows, (k, n).
        inputs: (x_t, valid, restart) of one example.

    Returns:
        s_t (n,) and the pushed rows (k, n).
    """
    after, tangent = jax.linearize(lambda s: step(params, s, inputs), v)
    return after, jax.vmap(tangent)(frame)


def pull(step: Step, params: Params, v: Array, frame: Array, inputs: PyTree) -> Array:
    """Gradients by s_t pulled back to s_{t-1}: G_{t-1} = J_t^T G_t, rows (k, n)."""
    _, cotangent = jax.vjp(lambda s: step(params, s, inputs), v)
    return jax.vmap(lambda g: cotangent(g)[0])(frame)


def held(given: Driven, time: int) -> Driven:
    """The same inputs followed by held steps up to `time`, which change nothing."""
    xs, mask, reset = given.inputs
    valid = jnp.ones((given.batch, given.time), bool) if mask is None else mask
    if time == given.time:
        return given

    def longer(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, 0), (0, time - given.time), *[(0, 0)] * (leaf.ndim - 2)])

    return given._replace(inputs=jax.tree.map(longer, (xs, valid, reset)))


def orthonormal(frame: Array) -> tuple[Array, Array]:
    """Rows made orthonormal, V^T = Q R with a positive diagonal of R.

    Args:
        frame: rows (k, n), k <= n.

    Returns:
        The rows of Q (k, n), and R (k, k) upper triangular.
    """
    Q, R = jnp.linalg.qr(frame.T)
    sign = jnp.where(jnp.diagonal(R) < 0, -1, 1).astype(R.dtype)
    return (Q * sign[None]).T, R * sign[:, None]


def random_frame(key: Array, rows: int, size: int, dtype: DTypeLike) -> Array:
    """`rows` random orthonormal rows of length `size`."""
    return orthonormal(jax.random.normal(key, (rows, size), dtype))[0]
