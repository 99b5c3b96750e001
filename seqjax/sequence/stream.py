"""A cell whose input arrives step by step or in chunks: the state is kept between the calls.

s_t, o_t = step(theta, s_{t-1}, x_t),    t = 1, 2, ... in chunks of any length
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from seqjax.cell import Cell, Output, Params, State, names_of_state
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._checks import batch_of_states, check_methods
from seqjax.sequence.unroll import unroll


class Stream:
    """A running cell. `stream` builds it.

    Attributes:
        cell, params: what runs.
        state: the state after the last step, leaves (batch, ...), or (...) without a batch.
    """

    def __init__(self, cell: Cell, params: Params, state: State, has_batch: bool) -> None:
        self.cell, self.params, self.state = cell, params, state
        self._has_batch = has_batch
        self._push, self._step = (cached_jit(function, cell, has_batch) for function in (_push, _step))

    def push(self, xs: PyTree) -> Output:
        """Runs the next steps and returns their outputs. It compiles once for each number of steps.

        Args:
            xs: leaves (batch, time, ...), or (time, ...) without a batch.

        Returns:
            The outputs of these steps, the same bits as those of `unroll` from the state before them.

        Raises:
            ValueError, TypeError: as for `unroll`. The state then stays as it was.

        Example:
            >>> import jax.numpy as jnp, seqjax as sj
            >>> cell = sj.VanillaRNN(1, 1, activation="identity")
            >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.5 * jnp.eye(1), b_h=jnp.zeros(1))
            >>> stream = sj.stream(cell, params)
            >>> stream.push(jnp.ones((2, 1)))[:, 0].tolist(), stream.push(jnp.ones((1, 1)))[:, 0].tolist()
            ([1.0, 1.5], [1.75])
        """
        self.state, outputs = self._push(self.params, self.state, xs)
        return outputs

    def step(self, x: PyTree) -> Output:
        """Runs one step and returns its output: `push` without the axis of time.

        Args:
            x: leaves (batch, ...), or (...) without a batch.

        Returns:
            The output, leaves (batch, ...), or (...).

        Raises:
            ValueError, TypeError: as for `unroll`.

        Example:
            >>> import jax, jax.numpy as jnp, seqjax as sj
            >>> cell = sj.GRU(2, 3)
            >>> stream = sj.stream(cell, cell.init(jax.random.key(0)), batch=5)
            >>> stream.step(jnp.ones((5, 2))).shape
            (5, 3)
        """
        self.state, outputs = self._step(self.params, self.state, x)
        return outputs

    def to_bytes(self) -> bytes:
        """The state as bytes, for another process. They hold numbers only, and no parameters.

        Returns:
            What `from_bytes` reads.

        Example:
            >>> import jax, seqjax as sj
            >>> cell = sj.LSTM(2, 3)
            >>> len(sj.stream(cell, cell.init(jax.random.key(0))).to_bytes()) < 200
            True
        """
        from flax.serialization import msgpack_serialize

        return msgpack_serialize({str(i): leaf for i, leaf in enumerate(_numbers(self.state))})

    def from_bytes(self, data: bytes) -> None:
        """Sets the state to that of another stream of the same cell.

        Args:
            data: from `to_bytes`.

        Raises:
            ValueError: the bytes are not those of such a state. The state then stays as it was.

        Example:
            >>> import jax, jax.numpy as jnp, seqjax as sj
            >>> cell = sj.LSTM(2, 3)
            >>> params = cell.init(jax.random.key(0))
            >>> one, other = sj.stream(cell, params), sj.stream(cell, params)
            >>> _ = one.push(jnp.ones((7, 2)))
            >>> other.from_bytes(one.to_bytes())
            >>> bool((other.step(jnp.ones(2)) == one.step(jnp.ones(2))).all())
            True
        """
        from flax.serialization import msgpack_restore

        try:
            found: Any = msgpack_restore(data)
            leaves = [np.asarray(found.pop(str(i))) for i in range(len(found))]
        except Exception as error:  # noqa: BLE001 - msgpack has errors of several modules
            why = str(error).partition("\n")[0]
            raise ValueError(f"expected the bytes of a stream's state, got {len(data)} other bytes: {why}") from None
        expected, names = _numbers(self.state), names_of_state(self.cell, self.state)
        kinds = [[(leaf.shape, leaf.dtype) for leaf in each] for each in (expected, leaves)]
        if kinds[0] != kinds[1]:
            of_each = [", ".join(f"{dtype}{list(shape)}" for shape, dtype in each) for each in kinds]
            raise ValueError(
                f"expected {', '.join(names)} of {type(self.cell).__name__} as {of_each[0]}, got {of_each[1]}: "
                f"the bytes are from another cell or another batch"
            )
        old, structure = jax.tree.flatten(self.state)
        self.state = structure.unflatten([_like(new, leaf) for new, leaf in zip(leaves, old, strict=True)])


def stream(cell: Cell, params: Params, *, batch: int | None = None, state: State | None = None) -> Stream:
    """Runs a cell on an input that arrives step by step or in chunks.

    Args:
        cell: any object with `init`, `initial_state` and `step`.
        params: the cell's parameters.
        batch: the number of sequences that run side by side; None for one, whose arrays have no axis of the batch.
        state: the state before the first step, leaves (batch, ...), or (...) without a batch; by default the cell's
            initial state.

    Returns:
        A `Stream` with the methods `push`, `step`, `to_bytes` and `from_bytes`.

    Raises:
        ValueError: the batch is not a whole number above zero, or a shape of the state does not fit.
        TypeError: a dtype of the state does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(1, 8)
        >>> params, xs = cell.init(jax.random.key(0)), jnp.sin(jnp.arange(20.0))[:, None]
        >>> stream = sj.stream(cell, params)
        >>> halves = jnp.concatenate([stream.push(xs[:10]), stream.push(xs[10:])])
        >>> bool(abs(halves - sj.unroll(cell, params, xs[None])[1][0]).max() < 1e-6)
        True
    """
    check_methods(cell)
    if batch is not None:
        batch = whole_number("batch", batch, 1, hint="None runs one sequence")
    if state is not None and batch is None:
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    first = batch_of_states(cell, params, state, batch or 1)
    return Stream(cell, params, first if batch else jax.tree.map(lambda leaf: leaf[0], first), batch is not None)


def _push(cell: Cell, has_batch: bool, params: Params, state: State, xs: PyTree) -> tuple[State, Output]:
    if has_batch:
        return unroll(cell, params, xs, state=state)
    state, xs = jax.tree.map(lambda leaf: leaf[None], (state, xs))
    return jax.tree.map(lambda leaf: leaf[0], unroll(cell, params, xs, state=state))


def _step(cell: Cell, has_batch: bool, params: Params, state: State, x: PyTree) -> tuple[State, Output]:
    axis = 1 if has_batch else 0
    state, outputs = _push(cell, has_batch, params, state, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axis), x))
    return state, jax.tree.map(lambda leaf: leaf.take(0, axis), outputs)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(state: State) -> list[np.ndarray]:
    """The leaves of a state; the numbers of a random key."""
    return [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in jax.tree.leaves(state)]


def _like(numbers: np.ndarray, leaf: Any) -> Any:
    array = jnp.asarray(numbers)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
