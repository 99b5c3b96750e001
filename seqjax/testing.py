"""The contract as a test suite: `check_cell(cell)` runs it on any cell, ours or yours.

Each check is a function of its own that raises `AssertionError` with what was expected, what came, and the likely fix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import Cell
from seqjax.sequence._step_errors import explain_step_error
from seqjax.sequence.unroll import length_mask, trajectory, unroll

BATCH, TIME = 3, 5


def check_cell(
    cell: Any, x: PyTree | None = None, *, key: Array | None = None, differentiable: bool = True
) -> list[str]:
    """Runs the contract of `seqjax.Cell` on a cell.

    Args:
        cell: any object that should be a cell.
        x: an example of one input at one time; needed only where the cell has no `input_shape`.
        key: a random key for parameters and inputs.
        differentiable: also check that gradients exist and are finite.

    Returns:
        The names of the checks that passed.

    Raises:
        AssertionError: the cell breaks the contract; the message says where, and the likely fix.

    Example:
        >>> import seqjax as sj
        >>> sj.testing.check_cell(sj.LSTM(3, 4))[:3]
        ['has the methods', 'is pure', 'keeps the type of its state']
    """
    _holds(
        isinstance(cell, Cell) and not isinstance(cell, type),
        f"expected an object with the methods init, initial_state and step, got {cell!r}",
    )
    key = jax.random.key(0) if key is None else key
    params = cell.init(key)
    x = _example_input(cell, key) if x is None else jax.tree.map(jnp.asarray, x)
    passed = ["has the methods"]
    checks = [_is_pure, _keeps_the_type_of_its_state, _follows_the_dtype_of_its_parameters, _takes_wrong_dtypes]
    checks += [_traces_once, _scans_as_it_loops, _holds_its_state_under_a_mask]
    if differentiable:
        checks.append(_has_finite_gradients)
    for check in checks:
        check(cell, params, x)
        passed.append(check.__name__.strip("_").replace("_", " "))
    return passed


def _holds(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _example_input(cell: Cell, key: Array) -> Array:
    shape = getattr(cell, "input_shape", None)
    _holds(
        shape is not None,
        f"expected an example input, since {type(cell).__name__} has no input_shape: check_cell(cell, x=jnp.ones(8))",
    )
    return jax.random.normal(key, shape) if shape else jnp.zeros((), int)


def _sequence(x: PyTree) -> PyTree:
    """(batch, time, ...) out of one input; floats, real or complex, differ from row to row and from step to step."""

    def spread(leaf: Array) -> Array:
        many = jnp.broadcast_to(leaf, (BATCH, TIME, *leaf.shape))
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return many
        angle = np.arange(BATCH * TIME).reshape(BATCH, TIME)
        turned = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        scale = jnp.asarray(np.exp(1j * angle) if turned else np.cos(angle), leaf.dtype)
        return jax.vmap(jax.vmap(jnp.multiply))(scale, many)

    return jax.tree.map(spread, x)


def _type(tree: PyTree) -> Any:
    """Structure, shapes, dtypes and weak types: what lax.scan compares."""
    return jax.tree.structure(tree), [jax.typeof(jnp.asarray(leaf)).str_short() for leaf in jax.tree.leaves(tree)]


def _pick(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The floating-point leaves in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def _close(a: PyTree, b: PyTree, tolerance: float = 1e-5) -> bool:
    def near(p: Array, q: Array) -> bool:
        kind = complex if jnp.iscomplexobj(p) or jnp.iscomplexobj(q) else float
        return np.allclose(np.asarray(p, kind), np.asarray(q, kind), rtol=tolerance, atol=tolerance)

    return all(map(near, jax.tree.leaves(a), jax.tree.leaves(b)))


def _is_pure(cell: Cell, params: PyTree, x: PyTree) -> None:
    state = cell.initial_state(params)
    inputs = [np.array(leaf) for leaf in jax.tree.leaves((params, state, x))]
    first, second = cell.step(params, state, x), cell.step(params, state, x)
    same = all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )
    _holds(
        same, "expected the same step twice to give the same result: the step reads something that is not an argument"
    )
    after = [np.array(leaf) for leaf in jax.tree.leaves((params, state, x))]
    kept = all(map(np.array_equal, inputs, after))
    _holds(kept, "expected the step to leave its arguments as they are, got one changed: return a new state")
    _leaks_nothing(cell, params, state, x)


def _leaks_nothing(cell: Cell, params: PyTree, state: PyTree, x: PyTree) -> None:
    try:
        with jax.checking_leaks():
            jax.eval_shape(cell.step, params, state, x)
    except Exception as error:
        if not str(error).startswith("Leaked trace"):
            raise AssertionError(str(explain_step_error(cell, error, params, x))) from error
        raise AssertionError(
            f"expected {type(cell).__name__}.step to keep no traced value outside its state, got one that outlives the "
            f"step: carry what a later step needs in the state, and return what you want to see as the output"
        ) from error


def _keeps_the_type_of_its_state(cell: Cell, params: PyTree, x: PyTree) -> None:
    state = jax.tree.map(jnp.asarray, cell.initial_state(params))
    result = cell.step(params, state, x)
    _holds(
        isinstance(result, tuple) and len(result) == 2, f"expected (new_state, output) from step, got {type(result)}"
    )
    old, new = _type(state), _type(result[0])
    _holds(
        old[0] == new[0] and [t.strip("~") for t in old[1]] == [t.strip("~") for t in new[1]],
        f"expected the new state to have the type of the old one, {old}, got {new}: lax.scan's order is "
        f"(new_state, output), and a dtype that drifts is cured by x.astype(state.dtype)",
    )


def _follows_the_dtype_of_its_parameters(cell: Cell, params: PyTree, x: PyTree) -> None:
    floating = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not floating:
        return
    half = _cast(params, jnp.bfloat16)
    state = cell.initial_state(half)
    wrong = [
        str(s.dtype)
        for s in jax.tree.leaves(state)
        if jnp.issubdtype(s.dtype, jnp.floating) and s.dtype != jnp.bfloat16
    ]
    _holds(not wrong, f"expected a bfloat16 state from bfloat16 parameters, got {wrong}: jnp.zeros_like(params.b)")
    _keeps_the_type_of_its_state(cell, half, x)


def _takes_wrong_dtypes(cell: Cell, params: PyTree, x: PyTree) -> None:
    if not jax.tree.leaves(params):
        return  # nothing fixes the dtype but the input itself
    for dtype in (jnp.bfloat16, jnp.float16):
        _keeps_the_type_of_its_state(cell, params, _cast(x, dtype))


def _traces_once(cell: Cell, params: PyTree, x: PyTree) -> None:
    traces = 0

    def step(params: PyTree, state: PyTree, x: PyTree) -> Any:
        nonlocal traces
        traces += 1
        return cell.step(params, state, x)

    compiled, state = jax.jit(step), jax.tree.map(jnp.asarray, cell.initial_state(params))
    state = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)
    for _ in range(3):
        state, _ = compiled(params, state, x)
    _holds(traces == 1, f"expected one trace for three steps, got {traces}: the state's type changes from step to step")


def _scans_as_it_loops(cell: Cell, params: PyTree, x: PyTree) -> None:
    xs = _sequence(x)
    final, outputs = unroll(cell, params, xs)
    for row in range(BATCH):
        state = cell.initial_state(params)
        for t in range(TIME):
            state, output = cell.step(params, state, _pick(xs, (row, t)))
            expected = _pick(outputs, (row, t))
            same = _close(output, expected)
            _holds(same, f"expected the loop's output at row {row}, time {t} from unroll: is step pure?")
        _holds(_close(state, _pick(final, row)), f"expected the loop's final state in row {row}: is step pure?")


def _holds_its_state_under_a_mask(cell: Cell, params: PyTree, x: PyTree) -> None:
    xs, mask = _sequence(x), length_mask(jnp.arange(BATCH), TIME)
    spoilt = jax.tree.map(lambda leaf: _spoil(leaf, mask), xs)
    final, outputs = unroll(cell, params, spoilt, mask=mask)
    states, whole = trajectory(cell, params, xs), unroll(cell, params, xs)[1]
    for row in range(BATCH):  # the row of so many valid steps
        valid, padding = (row, slice(0, row)), (row, slice(row, None))
        held = _close(_pick(final, row), _pick(states, (row, row)))
        _holds(held, f"expected padding after {row} steps to hold the state")
        same = _close(_pick(outputs, valid), _pick(whole, valid))
        _holds(same, f"expected the first {row} outputs to be those without padding: the step must not look ahead")
        silent = not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(_pick(outputs, padding)))
        _holds(silent, f"expected outputs of zero in padding after {row} steps")


def _spoil(leaf: Array, mask: Array) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    nan = complex(np.nan, np.nan) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else np.nan
    return jax.vmap(jax.vmap(lambda valid, x: jnp.where(valid, x, jnp.full_like(x, nan))))(mask, leaf)


def _has_finite_gradients(cell: Cell, params: PyTree, x: PyTree) -> None:
    def step_loss(params: PyTree, state: PyTree) -> Array:
        return _energy(cell.step(params, state, x))

    def padded_loss(params: PyTree) -> Array:
        return _energy(unroll(cell, params, _sequence(x), mask=length_mask(jnp.arange(BATCH), TIME)))

    state = jax.tree.map(jnp.asarray, cell.initial_state(params))
    gradients = jax.grad(step_loss, argnums=(0, 1), allow_int=True)(params, state)
    _finite(gradients, "at the initial state")
    _finite(jax.grad(padded_loss, allow_int=True)(params), "beside padding, where a step's input is zero")


def _energy(tree: PyTree) -> Array:
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    parts = [part for z in numbers for part in ([z.real, z.imag] if jnp.iscomplexobj(z) else [z])]
    return sum((jnp.sum(jnp.square(part)).astype(jnp.float32) for part in parts), jnp.zeros((), jnp.float32))


def _finite(gradients: PyTree, where: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if leaf.dtype != jax.dtypes.float0:
            finite = bool(jnp.all(jnp.isfinite(leaf)))
            _holds(finite, f"expected finite gradients {where}, got {leaf} in {jax.tree_util.keystr(path)}")
