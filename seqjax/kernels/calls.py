"""The calls of the compiled loops: the arrays and attributes that `ffi.cpp` declares.

The arrays of a chunk have the axes (time, batch, ...), those of whole sequences (batch, time, ...). A drive is the part
of a gate's argument that does not depend on the state. An empty array stands for one that is not there. All arrays of
numbers of one call are float32, or all are float64.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.kernels.ensembles import Call, bind

CELLS = ("lstm", "gru", "vanilla", "relu", "identity", "unitwise")  # in the order of the source
LANES = 16  # the largest number of floats in one vector of the source

# The calls, with the axis of the batch in each argument and each result, None if it has none.
PACK = Call("pack", (None,), (None,))
FORWARD = Call("forward", (1, None, None, None, 0, 0, None, None, 1, 1, 0), (1, 1, 1, 1))
FORWARD_SAVING = Call("forward", (0, None, None, None, 0, 0, None, None, 0, 0, 0), (0, 0, 0, 0))
FORWARD_OF_TABLE = FORWARD_SAVING._replace(arguments=(None, *FORWARD_SAVING.arguments[1:]))
BACKWARD = Call("backward", (1, None, 1, None, 1, 1, 1, 0, 0, None, None, 1, 1), (0, 0, 0, 0, 1, 1))
BACKWARD_FROM_GATES = Call(
    "backward_from_gates", (0, 0, None, 0, 0, 0, 0, 0, 0, 0, None, None, 0, 0, 0), (0, 0, 0, 0, 0, None, None, None)
)
BACKWARD_OF_STATES = BACKWARD_FROM_GATES._replace(results=(0,) * 8)  # without the gradients, which sum over the batch
REPLAY = Call("replay", (1, None, 1, 0, None, 1, 1), (1,))


class Loop(NamedTuple):
    """What all calls of one loop read.

    Attributes:
        cell: one of CELLS.
        W_hh: the recurrent weights, (gates * n, n), with 4 gates for an LSTM, 3 for a GRU, and 1 for the others,
            which are vanilla networks with tanh, relu or no activation.
        bias: of the recurrent product, (gates * n,); None if there is none.
        drive_bias: of the drives, (gates * n,); None if there is none.
        valid, reset: the mask and the resets of all steps; None if all steps are valid, or if there is no reset.
        initial: what a reset sets: h, and c for an LSTM, (n,) each; empty if there is no reset.
        reverse: whether it runs from right to left.
    """

    cell: str
    W_hh: Array
    bias: Array | None = None
    drive_bias: Array | None = None
    valid: Array | None = None
    reset: Array | None = None
    initial: tuple[Array, ...] = ()
    reverse: bool = False


class Rows(NamedTuple):
    """Drives that are the rows of a table.

    Attributes:
        table: (rows, gates * n).
        tokens: the row of each step, int32 (batch, time).
    """

    table: Array
    tokens: Array


class SavedSteps(NamedTuple):
    """What the backward loop reads of every step of whole sequences.

    Attributes:
        gates: (batch, time, gates * n).
        candidate: the recurrent product of the candidate of a GRU, (batch, time, n); empty for other cells.
    """

    gates: Array
    candidate: Array


class Cotangents(NamedTuple):
    """What the backward loops compute.

    Attributes:
        before: of the state before the first step, (batch, n) each.
        initial: of the state after a reset, summed over the steps, (batch, n) each.
        drives: of every step.
    """

    before: list[Array]
    initial: list[Array]
    drives: Array


def run_forward(loop: Loop, state: list[Array], drives: Array) -> list[Array]:
    """Computes all states of a chunk.

    Args:
        loop: the loop.
        state: the state before the chunk: h, and c for an LSTM, (batch, n) each.
        drives: without their bias, (time, batch, gates * n).

    Returns:
        h, and c for an LSTM, (time, batch, n) each.
    """
    return _run_forward(loop, state, drives, saves=False)[: len(state)]


def run_forward_saving_gates(loop: Loop, state: list[Array], drives: Array | Rows) -> tuple[list[Array], SavedSteps]:
    """Like `run_forward`, for whole sequences. Returns also what the backward loop reads."""
    h, c, gates, candidate = _run_forward(loop, state, drives, saves=True)
    return [h, c][: len(state)], SavedSteps(gates, candidate)


def _run_forward(loop: Loop, state: list[Array], drives: Array | Rows, saves: bool) -> list[Array]:
    rows, n = loop.W_hh.shape
    gates = rows // n
    units = LANES * (2 if gates == 1 else 1)  # per panel, at most
    panels = _packed(loop, -(-n // units) * units * gates * n, backward=False)
    h_0, c_0 = _pair(state)
    if isinstance(drives, Rows):
        steps, (drives, tokens) = drives.tokens.shape, drives
    else:
        steps, tokens = drives.shape[:2], jnp.zeros(0, jnp.int32)
    has_c, has_candidate = len(state) == 2, saves and loop.cell == "gru"
    kinds = [_like(h_0, *steps, n), _like(h_0, *((*steps, n) if has_c else (0,)))]
    kinds += [_like(h_0, *((*steps, rows) if saves else (0,))), _like(h_0, *((*steps, n) if has_candidate else (0,)))]
    biases = [_or_empty(bias, panels) for bias in (loop.drive_bias, loop.bias)]
    arrays = (drives, biases[0], panels, biases[1], h_0, c_0, *_flags(loop), tokens)
    aliases = {0: 2} if saves and not tokens.size else None  # the drives have been read when the gates are written
    call = (FORWARD_OF_TABLE if tokens.size else FORWARD_SAVING) if saves else FORWARD
    return _call(call, loop, kinds, *arrays, aliases=aliases, saves=saves)


def run_backward(
    loop: Loop, steps: tuple[Array, Array, list[Array]], ct_after: list[Array], ct_outputs: Array
) -> tuple[Cotangents, Array]:
    """Runs the backward loop of a chunk.

    Args:
        loop: the loop.
        steps: the drives without their bias; the recurrent products with their bias, (time, batch, gates * n); and the
            states before each step and before its reset, (time, batch, n) each.
        ct_after: the cotangents of the state after the chunk, (batch, n) each.
        ct_outputs: the cotangents of h after each step, without those from later steps, (time, batch, n).

    Returns:
        The cotangents, and those of the recurrent products.
    """
    drives, recurrents, before = steps
    # The candidate of a GRU multiplies only its recurrent product by the reset gate. So the drive and the recurrent
    # product have different cotangents. In the other cells both are added, so their cotangents are equal.
    separate = loop.cell == "gru"
    kinds = [*_kinds_of_states(loop, ct_after), _like(drives, *drives.shape)]
    kinds.append(_like(drives, *(drives.shape if separate else (0,))))
    panels, bias = _packed_for_backward(loop), _or_empty(loop.drive_bias, drives)
    of_steps = (drives, bias, recurrents, panels, *_pair(before), ct_outputs)
    found = _call(BACKWARD, loop, kinds, *of_steps, *_pair(ct_after), *_flags(loop))
    cts = _cotangents(found, len(ct_after))
    return cts, found[5] if separate else cts.drives


def run_backward_from_gates(
    loop: Loop,
    steps: tuple[SavedSteps, list[Array], list[Array]],
    ct_after: list[Array],
    ct_outputs: Array,
    of_weights: bool,
    rows: Rows | None,
) -> tuple[Cotangents, tuple[Array, Array, Array]]:
    """Like `run_backward`, for whole sequences, with the gradients of the weights.

    Args:
        loop, ct_after, ct_outputs: as for `run_backward`.
        steps: what `run_forward_saving_gates` saved, the state before the first step, and the states after each step.
        of_weights: whether the gradient of the weights is wanted.
        rows: the drives if they are the rows of a table.

    Returns:
        The cotangents, and those of W_hh, of its bias and of the table. Those of the weights are empty if they are not
        wanted, and that of the table if there is none.
    """
    saved, first, states = steps
    W = loop.W_hh
    kinds = [*_kinds_of_states(loop, ct_after), _like(W, *saved.gates.shape)]
    kinds += [_like(W, *(W.shape if of_weights else (0,))), _like(W, W.shape[0] if of_weights else 0)]
    kinds.append(_like(W, *((0,) if rows is None else rows.table.shape)))
    of_steps = (*saved, _packed_for_backward(loop), *_pair(first), *_pair(states), ct_outputs)
    arrays = (*of_steps, *_pair(ct_after), *_flags(loop), jnp.zeros(0, jnp.int32) if rows is None else rows.tokens)
    call = BACKWARD_FROM_GATES if of_weights or rows is not None else BACKWARD_OF_STATES
    # The gates have been read when the cotangents of the drives are written.
    found = _call(call, loop, kinds, *arrays, aliases={0: 4})
    return _cotangents(found, len(ct_after)), (found[5], found[6], found[7])


def run_replay(loop: Loop, drives: Array, recurrents: Array, c_0: Array) -> Array:
    """Recomputes c before each step of an LSTM's chunk, (time, batch, n), from the first c and from the gate inputs."""
    _, initial_c, valid, reset = _flags(loop)
    arrays = (drives, _or_empty(loop.drive_bias, drives), recurrents, c_0, initial_c, valid, reset)
    numbers = {"reverse": loop.reverse}
    return bind(REPLAY, [_like(c_0, *drives.shape[:2], c_0.shape[-1])], arrays, numbers)[0]


class Layout(enum.IntEnum):
    """The axes of an array of a loop of instructions, in the order of the source."""

    STEPS = 0  # (time, batch, blocks * n)
    ROWS = 1  # (batch, blocks * n)
    SHARED = 2  # (blocks * n,)
    STEP_NUMBERS = 3  # (time, batch): one number for all units
    NUMBERS = 4  # one number for all units at each position
    BEFORE = 5  # (batch, n): the state before the first step. Later it is the state that was written at the last step.


AXES_OF_LAYOUT = {Layout.STEPS: (3, 1), Layout.ROWS: (2, 0), Layout.SHARED: (1, None), Layout.STEP_NUMBERS: (2, 1),
                  Layout.NUMBERS: (1, None), Layout.BEFORE: (2, 0)}  # fmt: skip


class UnitArray(NamedTuple):
    """An array of a loop of instructions.

    Attributes:
        name: its name.
        layout: its axes.
        blocks: the number of vectors of n numbers.
        of: for BEFORE the name of the result that has the states; for a result of ROWS the name of the array with which
            it begins, () for zeros.
    """

    name: tuple[Any, ...]
    layout: Layout
    blocks: int
    of: tuple[Any, ...] = ()


class UnitProduct(NamedTuple):
    """A product in a loop of instructions.

    Attributes:
        array, offset: where the operand of a row begins.
        depth: the blocks of the operand.
        blocks: the blocks of the result.
    """

    array: int
    offset: int
    depth: int
    blocks: int


class UnitLoop(NamedTuple):
    """A loop of instructions.

    Attributes:
        size: n, the number of units.
        dtype: float32 or float64.
        arguments, results, scratch: its arrays.
        phases: the instructions, (operation, four numbers) each: those before the products, and those after each one.
        products: the products.
        constants: the array of this name.
    """

    size: int
    dtype: np.dtype
    arguments: tuple[UnitArray, ...]
    results: tuple[UnitArray, ...]
    scratch: tuple[UnitArray, ...]
    phases: list[list[tuple[int, ...]]]
    products: list[UnitProduct]
    constants: list[float]


def run_units(
    loop: UnitLoop, arrays: Mapping[tuple[Any, ...], Array], weights: Sequence[Array], transposed: bool, reverse: bool
) -> dict[tuple[Any, ...], Array]:
    """Runs a loop of instructions over a chunk.

    Args:
        loop: the loop.
        arrays: its arguments by name, without the constants.
        weights: the matrix of each product, (blocks * n, n).
        transposed: whether the operands are multiplied by the transposed matrices.
        reverse: whether it runs from right to left.

    Returns:
        The results by name.
    """
    n = loop.size
    given = {name: jnp.atleast_1d(array).astype(loop.dtype) for name, array in arrays.items()}
    # Not an array with these values, which would be a constant of the program: a program of several devices has none.
    given["constants", 0] = jnp.concatenate([jnp.full(1, value, loop.dtype) for value in (*loop.constants, 0.0)])
    weights = [W.astype(loop.dtype) for W in weights]
    arguments = [given[array.name] for array in loop.arguments]
    time, batch = next(a.shape for a, array in zip(arguments, loop.arguments, strict=True)
                       if array.layout in (Layout.STEPS, Layout.STEP_NUMBERS))[:2]  # fmt: skip
    numbers = {"backward": transposed, "cell": CELLS.index("unitwise")}
    sizes = [-(-n // (2 * LANES)) * 2 * LANES * W.shape[0] for W in weights]
    panels = [bind(PACK, [_like(W, size)], (W,), numbers)[0] for W, size in zip(weights, sizes, strict=True)]
    every = [*loop.arguments, *loop.results, *loop.scratch]
    names = [array.name for array in every]
    table = [
        (
            array.layout,
            1 if array.layout == Layout.STEP_NUMBERS else array.blocks * n,
            names.index(array.of) if array.of else -1,
        )
        for array in every
    ]
    shapes = {Layout.STEPS: (time, batch), Layout.ROWS: (batch,)}
    kinds = [_like(weights[0], *shapes[array.layout], array.blocks * n) for array in loop.results]
    axes = [AXES_OF_LAYOUT[array.layout] for array in [*loop.arguments, *loop.results]]
    count = len(loop.arguments)
    call = Call(
        "units", (*(axis for _, axis in axes[:count]), *[None] * len(panels)), tuple(axis for _, axis in axes[count:])
    )
    attributes = {
        "n": n,
        "reverse": reverse,
        "arrays": np.array(table, np.int64).ravel(),
        "axes": np.array([number for number, _ in axes], np.int64),
        "code": np.array([each for phase in loop.phases for each in phase], np.int32).ravel(),
        "ends": np.cumsum([5 * len(phase) for phase in loop.phases]).astype(np.int64),
        "products": np.array(loop.products, np.int64).ravel(),
    }
    found = bind(call, kinds, (*arguments, *panels), attributes)
    return dict(zip((array.name for array in loop.results), found, strict=True))


def _packed_for_backward(loop: Loop) -> Array:
    rows, n = loop.W_hh.shape
    return _packed(loop, -(-n // (2 * LANES)) * 2 * LANES * rows, backward=True)


def _packed(loop: Loop, size: int, backward: bool) -> Array:
    """The weights in the order in which a loop reads them."""
    numbers = {"backward": backward, "cell": CELLS.index(loop.cell)}
    return bind(PACK, [_like(loop.W_hh, size)], (loop.W_hh,), numbers)[0]


def _kinds_of_states(loop: Loop, ct_after: list[Array]) -> list[jax.ShapeDtypeStruct]:
    """The cotangents of h and c before the first step, and after a reset."""
    of_state = [_like(ct, *ct.shape) for ct in _pair(ct_after)]
    return of_state + [_like(ct, *(ct.shape if loop.reset is not None else (0,))) for ct in of_state]


def _cotangents(found: list[Array], count: int) -> Cotangents:
    return Cotangents(found[:count], found[2 : 2 + count], found[4])


def _pair(leaves: list[Array]) -> tuple[Array, Array]:
    """h and c, which is empty if the state has no c."""
    return leaves[0], leaves[1] if len(leaves) == 2 else _or_empty(None, leaves[0])


def _flags(loop: Loop) -> tuple[Array, Array, Array, Array]:
    """The initial h and c, the mask and the resets."""
    h, c = _pair(list(loop.initial) or [_or_empty(None, loop.W_hh)])
    valid, reset = (jnp.zeros(0, bool) if flag is None else flag for flag in (loop.valid, loop.reset))
    return h, c, valid, reset


def _or_empty(array: Array | None, like: Array) -> Array:
    return jnp.zeros(0, like.dtype) if array is None else array


def _like(array: Array | jax.ShapeDtypeStruct, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _call(
    call: Call,
    loop: Loop,
    kinds: list[jax.ShapeDtypeStruct],
    *arrays: Array,
    aliases: dict[int, int] | None = None,
    **attributes: bool,
) -> list[Array]:
    numbers = {"cell": CELLS.index(loop.cell), "reverse": loop.reverse, **attributes}
    return bind(call, kinds, arrays, numbers, aliases)
