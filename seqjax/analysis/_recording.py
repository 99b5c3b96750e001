"""What an analysis over time reads: the valid steps of each sequence up to its last finite state, in float64.

Held steps are removed, so a burn-in, a lag and a block of steps are counted in valid steps, wherever the padding is. A
sequence ends before the first step at which its state, in the user's own dtype, is not finite.

Derivatives are computed in float64, because rounding errors of float32 grow as fast as perturbations: in a chain of
units that transient growth amplifies, they exceed the product of the Jacobians by many orders. A cell that computes in
float32 whatever the dtype of its parameters is analysed in float32. So is a cell whose step draws random numbers from
a key in its state, because the same key gives other numbers in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params
from jaxtyping import Array, Bool, Float, Int, PyTree

from seqjax.analysis._flow import Sequences, cast_floats, check_arguments, flat_map
from seqjax.analysis._padding import without_held_steps
from seqjax.cell import Cell, Params, State, cached_check
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._masked_step import Inputs, emit_nothing, masked_step


class Problem(NamedTuple):
    """Why a sequence cannot be measured to its end.

    Attributes:
        cause: "input" or "parameters" if these are not finite; "overflow" if the state grew beyond the range of its
            dtype; "undefined" if a step made NaN of finite numbers; "padding" if no step is valid.
        text: the reason, without a full stop.
        step: the user's number of the first step with a state that is not finite, from 1; 0 for the initial state.
    """

    cause: Literal["input", "parameters", "overflow", "undefined", "padding"]
    text: str
    step: int


class Recording(NamedTuple):
    """The sequences that an analysis reads.

    Attributes:
        cell: the cell whose state is analysed.
        sequences: without held steps; rows shorter than the longest one end with masked steps.
        lengths: (batch,), the number of valid steps with a finite state.
        numbers: (batch, time), the user's number of each valid step, from 1.
        position: (batch, T + 1), the number of valid steps up to each of the user's steps.
        rms: (batch, time + 1, fields), the root mean square of each field of the state, in the user's own dtype.
        problems: the reason for each sequence that ends early or has no step.
        dtype: of the user's state; the analysis computes in `sequences.first.dtype`.
    """

    cell: Cell
    sequences: Sequences
    lengths: Int[np.ndarray, " batch"]
    numbers: Int[np.ndarray, "batch time"]
    position: Int[np.ndarray, "batch time1"]
    rms: Float[np.ndarray, "batch time1 fields"]
    problems: dict[int, Problem]
    dtype: np.dtype

    @property
    def time(self) -> int:
        """The number of steps of the longest sequence."""
        return self.sequences.time

    def reasons(self) -> dict[int, str]:
        """The text of each problem."""
        return {b: problem.text for b, problem in self.problems.items()}


def by_sequence(texts: dict[int, str]) -> list[str]:
    """One sentence for each different text, with the sequences that it belongs to.

    Example:
        >>> from seqjax.analysis._recording import by_sequence
        >>> by_sequence({0: "too short", 2: "too short", 1: "not finite"})
        ['sequences 0, 2: too short', 'sequence 1: not finite']
    """
    rows: dict[str, list[int]] = {}
    for b, text in sorted(texts.items()):
        rows.setdefault(text, []).append(b)
    return [f"sequence{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {text}" for text, at in rows.items()]


@contextlib.contextmanager
def recording(
    cell: Cell,
    params: Params,
    xs: PyTree,
    state: State | None,
    mask: Bool[Any, "batch time"] | None,
    reset: Bool[Any, "batch time"] | None,
    *,
    backward: bool = False,
) -> Iterator[Recording]:
    """Checks the arguments and gives the recording. Within the block JAX computes in float64 if the cell does.

    Raises:
        ValueError: a shape does not match, there is no sequence or no step, or no step of any sequence is valid.
        TypeError: a dtype does not match, or the state cannot be differentiated.
    """
    cell, sequences = check_arguments(cell, params, xs, state, mask, reset, backward=backward)
    with _recording(cell, params, sequences) as record:
        yield record


@contextlib.contextmanager
def _recording(cell: Cell, params: Params, sequences: Sequences) -> Iterator[Recording]:
    if not sequences.time:
        raise ValueError("expected at least one step to analyse, got T = 0")
    dtype = np.dtype(max((leaf.dtype for leaf in jax.tree.leaves(_state(cell, params))), key=_width))
    inputs, numbers, position = without_held_steps(sequences.inputs)
    sequences = sequences._replace(inputs=inputs)
    valid = position[:, -1]
    if not valid.any():
        raise ValueError("expected at least one valid step to analyse, got a mask that is False everywhere")
    sizes, rms = (np.asarray(each, np.float64) for each in precise_jit(_sizes, cell)(sequences))
    problems = {
        b: problem
        for b in range(sequences.batch)
        if (problem := _problem(sequences, b, sizes[b], numbers[b], int(valid[b]))) is not None
    }
    finite = np.isfinite(sizes)
    # The first column is the initial state, so the index of the first bad column is the number of finite steps plus 1.
    lengths = np.minimum(np.where(finite.all(axis=1), valid, np.maximum(finite.argmin(axis=1) - 1, 0)), valid)
    longest = max(1, int(lengths.max()))
    sequences = sequences.until(longest) if longest < sequences.time else sequences
    if (lengths < longest).any():
        rows = np.arange(longest) < lengths[:, None]
        sequences = sequences._replace(inputs=sequences.inputs._replace(mask=jnp.asarray(rows)))
    with in_float64(cell, sequences) as sequences:
        yield Recording(
            cell, sequences, lengths, numbers[:, :longest], position, rms[:, : longest + 1], problems, dtype
        )


@contextlib.contextmanager
def in_float64(cell: Cell, sequences: Sequences) -> Iterator[Sequences]:
    """Gives the sequences in float64, with JAX in this precision, if the cell computes in it; else as they are."""
    if not _computes_in_float64(cell, sequences):
        yield sequences
        return
    with jax.enable_x64(True):
        yield cast_floats(sequences, jnp.float64)


def _state(cell: Cell, params: Params) -> State:
    return jax.eval_shape(cell.initial_state, params)


def _width(dtype: Any) -> float:
    return -float(jnp.finfo(dtype).eps)


def _sizes(cell: Cell, sequences: Sequences) -> tuple[Array, Array]:
    """The largest absolute value of each state s_0..s_T, and the root mean square of each field of it."""
    flat, params = flat_map(cell, sequences.params), sequences.params

    def size(v: Array) -> tuple[Array, Array]:
        largest = jnp.max(jnp.abs(v))
        scaled = v / jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)  # so that no square overflows
        return largest, largest * jnp.stack([jnp.sqrt(jnp.mean(scaled[part] ** 2)) for part in flat.parts.values()])

    def one_sequence(v: Array, inputs: Inputs) -> tuple[Array, Array]:
        def advance(state: State, at: Inputs) -> tuple[State, tuple[Array, Array]]:
            after, _ = masked_step(cell, params, state, at, emit_nothing)
            return after, size(flat.ravel(after))

        later = jax.lax.scan(advance, flat.unravel(v), inputs)[1]
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), size(v), later)

    return jax.vmap(one_sequence)(sequences.first, sequences.inputs)


def _problem(sequences: Sequences, b: int, sizes: np.ndarray, numbers: np.ndarray, valid: int) -> Problem | None:
    """Why sequence b ends early; None if it does not."""
    bad = np.flatnonzero(~np.isfinite(sizes[: valid + 1]))
    if not valid:
        return Problem("padding", "no step is valid: its mask is False everywhere", 0)
    if not bad.size:
        return None
    t = int(bad[0])  # s_t is not finite
    if t == 0:
        return Problem("parameters", "the initial state is not finite", 0)
    number = int(numbers[t - 1])
    text = f"the state is not finite from step {number} on"
    x = jax.tree.map(lambda leaf: np.asarray(leaf[b, t - 1]), sequences.inputs.x)
    if not _all_finite(sequences.params):
        return Problem("parameters", f"{text}: a parameter is not finite", number)
    if not _all_finite(x):
        return Problem("input", f"{text}: the input of this step is not finite", number)
    dtype = sequences.first.dtype
    if np.isposinf(sizes[t]) or sizes[t - 1] > float(jnp.finfo(dtype).max) ** 0.25:
        return Problem("overflow", f"{text}: it exceeds the range of {dtype}", number)
    return Problem("undefined", f"{text}: the step makes NaN of finite numbers", number)


def _all_finite(tree: PyTree) -> bool:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return all(np.isfinite(leaf.astype(np.complex128)).all() for leaf in leaves)


def _computes_in_float64(cell: Cell, sequences: Sequences) -> bool:
    """Whether a step with parameters, state and input in float64 returns a state in float64, without random draws."""
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda s: cast_floats(s, jnp.float64), sequences)
        leaves, tree = jax.tree.flatten(shapes)
        return _check_float64(cell, tree, tuple(leaves))


@cached_check
def _check_float64(cell: Cell, tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
    sequences = jax.tree.unflatten(tree, leaves)
    flat = flat_map(cell, sequences.params)
    if any(jnp.finfo(leaf.dtype).bits % 64 for leaf in jax.tree.leaves(flat.like)):
        return False

    def one_step(params: Params, first: Array, inputs: Inputs) -> State:
        at = jax.tree.map(lambda leaf: leaf[0, 0], inputs)
        return flat.run(params, first[0], at)[0]

    try:
        program, after = jax.make_jaxpr(one_step, return_shape=True)(*sequences)
    except Exception:  # noqa: BLE001 - whatever a step in mixed dtypes raises, it does not compute in float64
        return False
    wide = all(leaf.dtype in (jnp.float64, jnp.complex128) for leaf in jax.tree.leaves(after))
    return wide and not _draws(program.jaxpr)


def _draws(jaxpr: Jaxpr) -> bool:
    """Whether a program draws random numbers."""
    inner = [getattr(each, "jaxpr", each) for e in jaxpr.eqns for each in jaxprs_in_params(e.params)]
    return any(e.primitive.name == "random_bits" for e in jaxpr.eqns) or any(map(_draws, inner))
