"""The checked arguments of an analysis, and the operations that analyses share: trajectories, frames, padding.

`seqjax.sequence._flat_cell` defines the map of vectors and its Jacobian J_t, which is the identity at a masked step and
zero at a reset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, PyTree

from seqjax.analysis._floating_state import with_floating_state
from seqjax.cell import Cell, Params, State, cached_check
from seqjax.sequence._checks import batch_of_states, check_methods, check_sequences
from seqjax.sequence._flat_cell import FlatCell, flat_cell
from seqjax.sequence._masked_step import Inputs
from seqjax.sequence._parameter_checks import check_params

# Streams of a key: what is drawn for one purpose is independent of what is drawn for another.
LOSS, FRAME, DIRECTION, STARTS, AWAY = range(1, 6)


class Sequences(NamedTuple):
    """The checked arguments of an analysis, as arrays for compiled code.

    Attributes:
        params: of the cell.
        first: the flat states before the first step, (batch, n).
        inputs: the inputs, mask and reset, leaves (batch, time, ...), without noise.
    """

    params: Params
    first: Array
    inputs: Inputs

    @property
    def size(self) -> int:
        """n, the number of values in one state."""
        return self.first.shape[1]

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.first.shape[0]

    @property
    def time(self) -> int:
        """The number of steps of the padded sequences."""
        return self.inputs.time

    def between(self, start: int, stop: int) -> Sequences:
        """The same with only the inputs of the steps start+1..stop; `first` does not change."""
        return self._replace(inputs=jax.tree.map(lambda leaf: leaf[:, start:stop], self.inputs))

    def until(self, stop: int) -> Sequences:
        """The first `stop` steps."""
        return self.between(0, stop)


def check_arguments(
    cell: Cell,
    params: Params,
    xs: PyTree,
    state: State | None,
    mask: Bool[Any, "batch time"] | None,
    reset: Bool[Any, "batch time"] | None,
    *,
    backward: bool = False,
) -> tuple[Cell, Sequences]:
    """Checks the arguments of an analysis, before anything compiles.

    Floating-point values narrower than float32 are widened, because products of Jacobians need more digits. Leaves of
    the state that are not floating-point, such as a counter or a random key, have no derivative: they become inputs.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        backward: whether the analysis pulls gradients back through the step; otherwise it pushes perturbations forward.

    Returns:
        The cell whose state is analysed, which is `cell` if all leaves of its state are floating-point, and the
        sequences.

    Raises:
        ValueError: a shape does not match, or there is no sequence.
        TypeError: a dtype does not match, or the state cannot be differentiated.
    """
    inputs = check_sequences(cell, Inputs(xs, mask, reset))
    if not inputs.batch:
        raise ValueError("expected at least one sequence to analyse, got a batch of 0")
    states = batch_of_states(cell, params, state, inputs.batch)
    leaves = jax.tree.leaves(states)
    if not leaves:
        raise TypeError(f"expected a cell with a state, got {type(cell).__name__}, which carries none: nothing recurs")
    floating = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    if not any(floating):
        raise TypeError(
            f"expected a floating-point state to differentiate, got only {leaves[0].dtype} in {type(cell).__name__}'s "
            f"state: nothing has a derivative"
        )
    if not all(floating):
        cell, states, inputs = with_floating_state(cell, params, states, inputs)
    if any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(states)):
        params, states, inputs = cast_floats((params, states, inputs), jnp.float32)
    # From here on all states are vectors, so that no analysis depends on the structure of the state.
    sequences = Sequences(params, jax.vmap(flat_map(cell, params).ravel)(states), inputs)
    if inputs.time:
        _check_differentiable(cell, sequences, backward)
    return cell, sequences


def cast_floats(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts real floating-point leaves to `dtype`, and complex ones to the complex dtype of its precision."""
    # Not by `jnp.result_type`, because float64 and complex64 have no common dtype under strict promotion.
    complex_dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64

    def cast(leaf: ArrayLike) -> ArrayLike:
        kind = jnp.result_type(leaf)
        if not jnp.issubdtype(kind, jnp.inexact):
            return leaf
        wide = complex_dtype if jnp.issubdtype(kind, jnp.complexfloating) else dtype
        if isinstance(leaf, Tracer):
            return leaf.astype(wide)
        return jnp.asarray(np.asarray(leaf).astype(wide))  # numpy compiles nothing

    return jax.tree.map(cast, tree)


def _check_differentiable(cell: Cell, sequences: Sequences, backward: bool) -> None:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), sequences)
    leaves, tree = jax.tree.flatten(shapes)
    _check_derivative(cell, backward, tree, tuple(leaves))


# One trace per cell and shapes, because tracing costs more than many of the analyses of a small cell.
@cached_check
def _check_derivative(cell: Cell, backward: bool, tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    """Traces one step and its derivative; `tree` and `leaves` are `Sequences` as its treedef and shapes."""
    sequences = jax.tree.unflatten(tree, leaves)
    flat = flat_map(cell, sequences.params)

    def first_step(first: Array, inputs: Inputs) -> tuple[Array, Inputs]:
        return first[0], jax.tree.map(lambda leaf: leaf[0, 0], inputs)

    def step(params: Params, first: Array, inputs: Inputs) -> Array:
        return flat.step(params, *first_step(first, inputs))

    def derivative(params: Params, first: Array, inputs: Inputs) -> PyTree:
        v, at = first_step(first, inputs)
        return flat.pull(params, v, v[None], at) if backward else flat.push(params, v, v[None], at)

    # First without a derivative, so that an error of the step itself reaches the user as it is.
    jax.eval_shape(step, *sequences)
    try:  # the derivative must be used, because that of a jax.custom_vjp fails only then
        jax.eval_shape(derivative, *sequences)
    except Exception as error:
        raise TypeError(
            f"expected a step that JAX can differentiate, got {type(cell).__name__}.step, for which JAX reports: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}; define a jax.custom_jvp rule for the part "
            f"without a derivative"
        ) from error


def flat_map(cell: Cell, params: Params) -> FlatCell:
    """The cell as a map of vectors, in its normal form because analyses push and pull many columns."""
    return flat_cell(cell, params, normal_form=True)


def unflatten(cell: Cell, params: Params, v: Array) -> State:
    """Converts flat states (..., n) to the cell's own, leaves (..., *shape)."""
    unravel = flat_map(cell, params).unravel
    for _ in v.shape[:-1]:
        unravel = jax.vmap(unravel)
    return unravel(v)


def state_parts(cell: Cell, params: Params) -> dict[str, slice]:
    """The position of each field of the state in the flat state, by name.

    Args:
        cell, params: any cell and its parameters.

    Returns:
        Slices of 0..n by name: {"h": ..., "c": ...} for an LSTM, {"0.h": ..., "1.h": ...} for a stack, {"state": ...}
        if the state is one array.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> sj.analysis.state_parts(cell, cell.init(jax.random.key(0)))
        {'h': slice(0, 3, None), 'c': slice(3, 6, None)}
    """
    check_methods(cell)
    check_params(cell, params)
    return flat_map(cell, params).parts


def flat_trajectory(cell: Cell, sequences: Sequences) -> Array:
    """The flat states s_0..s_T, (batch, time + 1, n)."""
    flat, params = flat_map(cell, sequences.params), sequences.params

    def one_sequence(v: Array, inputs: PyTree) -> Array:
        def advance(v: Array, at: PyTree) -> tuple[Array, Array]:
            after = flat.step(params, v, at)
            return after, after

        return jnp.concatenate([v[None], jax.lax.scan(advance, v, inputs)[1]])

    return jax.vmap(one_sequence)(sequences.first, sequences.inputs)


def pad_with_masked_steps(sequences: Sequences, time: int) -> Sequences:
    """Appends masked steps up to `time`; they change neither the state nor a perturbation."""
    inputs = sequences.inputs
    if inputs.mask is None:
        inputs = inputs._replace(mask=jnp.ones((sequences.batch, sequences.time), bool))
    if time == sequences.time:
        return sequences
    # The last step is repeated, because a random key has no zero; a masked step does not read its input.
    steps = jnp.arange(time)
    x, mask, reset, noise = jax.tree.map(lambda leaf: leaf[:, jnp.minimum(steps, sequences.time - 1)], inputs)
    inside = (steps < sequences.time)[None]
    return sequences._replace(inputs=Inputs(x, mask & inside, None if reset is None else reset & inside, noise))


def orthonormal(frame: Array) -> tuple[Array, Array]:
    """Orthonormalizes rows, V^T = Q R with a positive diagonal of R.

    Args:
        frame: rows (k, n), k <= n.

    Returns:
        The rows of Q (k, n), and R (k, k) upper triangular.
    """
    Q, R = jnp.linalg.qr(frame.T)
    # The sign of each column of Q is arbitrary, and ln R_ii needs a positive diagonal.
    sign = jnp.where(jnp.diagonal(R) < 0, -1, 1).astype(R.dtype)
    return (Q * sign[None]).T, R * sign[:, None]


def random_frame(key: Array, rows: int, size: int, dtype: DTypeLike, stream: int = 0) -> Array:
    """`rows` random orthonormal rows of length `size`; each `stream` of a key is independent of the others."""
    # numpy, because to compile the drawing and the QR takes longer than many an analysis.
    Q, R = np.linalg.qr(normal_numbers(key, (size, rows), stream))
    return jnp.asarray((Q * np.sign(np.diagonal(R))).T, dtype)


def normal_numbers(key: Array, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Independent numbers from N(0, 1) in float64, drawn by numpy with the key and the stream as the seed."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    # The first number keeps the stream apart from that of a user who seeds numpy with 0.
    return np.random.default_rng([2013, *np.asarray(data).ravel().tolist(), stream]).normal(size=shape)
