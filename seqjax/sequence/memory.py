"""The memory that an unroll needs, from the compiler, before anything is allocated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Params, optional
from seqjax.cells.arguments import as_dtype
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._checks import check_methods
from seqjax.sequence.unroll import unroll


class MemoryEstimate(NamedTuple):
    """The bytes that a compiled unroll needs.

    Args:
        arguments: the parameters and the inputs.
        outputs: the results: the outputs, or the gradient of every parameter.
        temporaries: everything else. The largest part are the states that are saved for the backward pass.
    """

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{readable(size)} {name}" for name, size in self._asdict().items())
        return f"{readable(self.total)} ({parts})"


def memory_estimate(
    cell: Cell,
    batch: int,
    time: int,
    *,
    gradient: bool = True,
    checkpoint_every: int | None = None,
    dtype: DTypeLike | None = None,
) -> MemoryEstimate:
    """The memory of an unroll, or of backpropagation through it. The program is compiled but does not run.

        temporaries ~ batch * time * saved    saved ~ the leaves of the state that `seqjax.explain` lists as saved

    With `checkpoint_every` = k, replace time by time / k + k.

    Args:
        cell: any cell with an `input_shape`.
        batch: the number of sequences.
        time: the number of steps of each.
        gradient: whether to compute the gradient of the sum of the outputs with respect to the parameters, or the
            outputs only.
        checkpoint_every: as for `unroll`.
        dtype: the dtype of the inputs. The default is float32, or int32 for inputs without features, which are tokens.

    Returns:
        `MemoryEstimate`, bytes on the default device.

    Raises:
        TypeError: the cell has no `input_shape`.
        ValueError: a size is not positive.
        RuntimeError: the backend does not report the memory of a compiled function.

    Example:
        >>> import seqjax as sj
        >>> cell = sj.stack([sj.GRU(8, 32), sj.GRU(32, 32)])
        >>> all_states = sj.memory_estimate(cell, 4, 4096)
        >>> some = sj.memory_estimate(cell, 4, 4096, checkpoint_every=64)
        >>> some.temporaries < all_states.temporaries / 2
        True
    """
    check_methods(cell)
    shape = optional(cell, "input_shape")
    if shape is None:
        raise TypeError(
            f"expected a cell that says its input_shape, got {type(cell).__name__}: "
            f"give it a field or property input_shape, (features,) or () for tokens"
        )
    batch, time = (whole_number(name, size, 1, 2**31 - 1) for name, size in (("batch", batch), ("time", time)))
    dtype = as_dtype("dtype", dtype or (jnp.float32 if shape else jnp.int32))
    xs = jax.ShapeDtypeStruct((batch, time, *shape), dtype)

    def outputs(params: Params, xs: Array) -> PyTree:
        return unroll(cell, params, xs, checkpoint_every=checkpoint_every)[1]

    def loss(params: Params, xs: Array) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs(params, xs)))

    params = jax.eval_shape(cell.init, jax.random.key(0))
    # A cell may have integer parameters. Their gradients have no bytes.
    function = jax.grad(loss, allow_int=True) if gradient else outputs
    # The compiler reports the memory without a run, so estimates are possible for sizes that would not fit.
    used = jax.jit(function).lower(params, xs).compile().memory_analysis()
    if used is None:
        raise RuntimeError(f"the backend {jax.default_backend()} does not report the memory of a compiled function")
    return MemoryEstimate(used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes)


def readable(size: int) -> str:
    """A number of bytes with three digits and a unit."""
    power = 0 if size < 1000 else min(4, int(math.log10(size) / 3))
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
