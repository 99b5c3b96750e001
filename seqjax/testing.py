"""Test suites for users: `check_cell` tests a cell against the contract, `check_analysis` the analyses on this machine.

Each check of a cell is one function. It raises `AssertionError` with the expected result, the actual one and the likely
fix. The checks of the analyses return a table.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.cell import Cell, Output, State, optional, strong_type
from seqjax.sequence._step_errors import explain_step_error
from seqjax.sequence.unroll import length_mask, trajectory, unroll

BATCH, TIME = 3, 5  # more steps than rows, so that every row of the masked check has padding


def check_cell(
    cell: Any, x: PyTree | None = None, *, key: Array | None = None, differentiable: bool = True
) -> list[str]:
    """Tests that a cell satisfies the contract of `seqjax.Cell`.

    Args:
        cell: any object that should be a cell.
        x: an example of one input at one time; needed only if the cell has no `input_shape`.
        key: a random key for parameters and inputs.
        differentiable: also check that gradients exist and are finite.

    Returns:
        The names of the checks that passed.

    Raises:
        AssertionError: the cell violates the contract.

    Example:
        >>> import seqjax as sj
        >>> sj.testing.check_cell(sj.LSTM(3, 4))[:3]
        ['has the methods', 'is pure', 'keeps the type of its state']
    """
    if not isinstance(cell, Cell) or isinstance(cell, type):
        raise AssertionError(f"expected an object with the methods init, initial_state and step, got {cell!r}")
    key = jax.random.key(0) if key is None else key
    params = cell.init(key)
    x = _example_input(cell, key) if x is None else jax.tree.map(jnp.asarray, x)
    passed = ["has the methods"]
    checks = [_is_pure, _keeps_the_type_of_its_state, _follows_the_dtype_of_its_parameters, _accepts_other_dtypes]
    checks += [_traces_once, _unrolls_like_a_loop, _keeps_its_state_at_masked_steps]
    if differentiable:
        checks.append(_has_finite_gradients)
    for check in checks:
        check(cell, params, x)
        passed.append(check.__name__.strip("_").replace("_", " "))
    return passed


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _example_input(cell: Cell, key: Array) -> Array:
    shape = optional(cell, "input_shape")
    _require(
        shape is not None,
        f"expected an example input, since {type(cell).__name__} has no input_shape: check_cell(cell, x=jnp.ones(8))",
    )
    return jax.random.normal(key, shape) if shape else jnp.zeros((), int)


def _sequence(x: PyTree) -> PyTree:
    """A batch of sequences (batch, time, ...) from one input. Floating-point inputs differ between rows and steps."""

    def spread(leaf: Array) -> Array:
        repeated = jnp.broadcast_to(leaf, (BATCH, TIME, *leaf.shape))
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return repeated
        # Factors of modulus at most 1, so that the inputs stay in the range of the example.
        angle = np.arange(BATCH * TIME).reshape(BATCH, TIME)
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        scale = jnp.asarray(np.exp(1j * angle) if is_complex else np.cos(angle), leaf.dtype)
        return jax.vmap(jax.vmap(jnp.multiply))(scale, repeated)

    return jax.tree.map(spread, x)


def _type(tree: PyTree) -> tuple[Any, list[str]]:
    """Structure, shapes, dtypes and weak types, which `lax.scan` compares."""
    return jax.tree.structure(tree), [jax.typeof(jnp.asarray(leaf)).str_short() for leaf in jax.tree.leaves(tree)]


def _pick(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Converts the floating-point leaves to another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def _close(a: PyTree, b: PyTree, tolerance: float = 1e-5) -> bool:
    def near(p: Array, q: Array) -> bool:
        # Double precision, because numpy cannot compare bfloat16 with a tolerance.
        kind = complex if jnp.iscomplexobj(p) or jnp.iscomplexobj(q) else float
        return np.allclose(np.asarray(p, kind), np.asarray(q, kind), rtol=tolerance, atol=tolerance)

    return all(map(near, jax.tree.leaves(a), jax.tree.leaves(b)))


def _is_pure(cell: Cell, params: PyTree, x: PyTree) -> None:
    state = cell.initial_state(params)
    # Copies, because a step could change a numpy array in place.
    inputs = [np.array(leaf) for leaf in jax.tree.leaves((params, state, x))]
    first, second = cell.step(params, state, x), cell.step(params, state, x)
    same = all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )
    _require(
        same, "expected the same step twice to give the same result: the step reads something that is not an argument"
    )
    after = [np.array(leaf) for leaf in jax.tree.leaves((params, state, x))]
    unchanged = all(map(np.array_equal, inputs, after))
    _require(unchanged, "expected the step to leave its arguments as they are, got one changed: return a new state")
    _stores_no_tracers(cell, params, state, x)


def _stores_no_tracers(cell: Cell, params: PyTree, state: PyTree, x: PyTree) -> None:
    try:
        with jax.checking_leaks():
            jax.eval_shape(cell.step, params, state, x)
    except Exception as error:
        # JAX raises a bare Exception for a leaked trace, so only the message identifies it.
        if not str(error).startswith("Leaked trace"):
            raise AssertionError(str(explain_step_error(cell, error, params, x))) from error
        raise AssertionError(
            f"expected {type(cell).__name__}.step to keep no traced value outside its state, got one that outlives the "
            f"step: carry what a later step needs in the state, and return what you want to see as the output"
        ) from error


def _keeps_the_type_of_its_state(cell: Cell, params: PyTree, x: PyTree) -> None:
    state = jax.tree.map(jnp.asarray, cell.initial_state(params))
    result = cell.step(params, state, x)
    _require(
        isinstance(result, tuple) and len(result) == 2, f"expected (new_state, output) from step, got {type(result)}"
    )
    old, new = _type(state), _type(result[0])
    # str_short marks a weak type with ~, which may differ: unroll removes it.
    _require(
        old[0] == new[0] and [t.strip("~") for t in old[1]] == [t.strip("~") for t in new[1]],
        f"expected the new state to have the type of the old one, {old}, got {new}: lax.scan's order is "
        f"(new_state, output), and x.astype(state.dtype) corrects a wrong dtype",
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
    _require(not wrong, f"expected a bfloat16 state from bfloat16 parameters, got {wrong}: jnp.zeros_like(params.b)")
    _keeps_the_type_of_its_state(cell, half, x)


def _accepts_other_dtypes(cell: Cell, params: PyTree, x: PyTree) -> None:
    if not jax.tree.leaves(params):
        return  # without parameters, the input decides the dtype
    for dtype in (jnp.bfloat16, jnp.float16):
        _keeps_the_type_of_its_state(cell, params, _cast(x, dtype))


def _traces_once(cell: Cell, params: PyTree, x: PyTree) -> None:
    traces = 0

    def step(params: PyTree, state: State, x: PyTree) -> tuple[State, Output]:
        nonlocal traces
        traces += 1
        return cell.step(params, state, x)

    compiled, state = jax.jit(step), jax.tree.map(jnp.asarray, cell.initial_state(params))
    # Without weak types, which would cost a second trace in any cell.
    state = strong_type(state)
    for _ in range(3):
        state, _ = compiled(params, state, x)
    _require(
        traces == 1, f"expected one trace for three steps, got {traces}: the type of the state changes between steps"
    )


def _unrolls_like_a_loop(cell: Cell, params: PyTree, x: PyTree) -> None:
    xs = _sequence(x)
    final, outputs = unroll(cell, params, xs)
    for row in range(BATCH):
        state = cell.initial_state(params)
        for t in range(TIME):
            state, output = cell.step(params, state, _pick(xs, (row, t)))
            expected = _pick(outputs, (row, t))
            same = _close(output, expected)
            _require(same, f"expected the loop's output at row {row}, time {t} from unroll: is step pure?")
        _require(_close(state, _pick(final, row)), f"expected the loop's final state in row {row}: is step pure?")


def _keeps_its_state_at_masked_steps(cell: Cell, params: PyTree, x: PyTree) -> None:
    xs, mask = _sequence(x), length_mask(jnp.arange(BATCH), TIME)
    # NaN in the padding, which would spread to any value that depends on it.
    padded = jax.tree.map(lambda leaf: _fill_padding(leaf, mask), xs)
    final, outputs = unroll(cell, params, padded, mask=mask)
    states, whole = trajectory(cell, params, xs), unroll(cell, params, xs)[1]
    for row in range(BATCH):  # row b has b valid steps
        valid, padding = (row, slice(0, row)), (row, slice(row, None))
        same = _close(_pick(final, row), _pick(states, (row, row)))
        _require(same, f"expected the state to stay unchanged in padding after {row} steps")
        same = _close(_pick(outputs, valid), _pick(whole, valid))
        _require(same, f"expected the first {row} outputs to be those without padding: the step must not look ahead")
        zero = not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(_pick(outputs, padding)))
        _require(zero, f"expected outputs of zero in padding after {row} steps")


def _fill_padding(leaf: Array, mask: Array) -> Array:
    """NaN at the steps whose mask is False."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    nan = complex(np.nan, np.nan) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else np.nan
    return jax.vmap(jax.vmap(lambda valid, x: jnp.where(valid, x, jnp.full_like(x, nan))))(mask, leaf)


def _has_finite_gradients(cell: Cell, params: PyTree, x: PyTree) -> None:
    def step_loss(params: PyTree, state: PyTree) -> Array:
        return _sum_of_squares(cell.step(params, state, x))

    def padded_loss(params: PyTree) -> Array:
        return _sum_of_squares(unroll(cell, params, _sequence(x), mask=length_mask(jnp.arange(BATCH), TIME)))

    state = jax.tree.map(jnp.asarray, cell.initial_state(params))
    gradients = jax.grad(step_loss, argnums=(0, 1), allow_int=True)(params, state)
    _check_finite(gradients, "at the initial state")
    _check_finite(jax.grad(padded_loss, allow_int=True)(params), "with padding, in which the input of a step is zero")


def _sum_of_squares(tree: PyTree) -> Array:
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # Real and imaginary parts, because `jax.grad` needs a real loss.
    parts = [part for z in numbers for part in ([z.real, z.imag] if jnp.iscomplexobj(z) else [z])]
    return sum((jnp.sum(jnp.square(part)).astype(jnp.float32) for part in parts), jnp.zeros((), jnp.float32))


def _check_finite(gradients: PyTree, where: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if leaf.dtype != jax.dtypes.float0:
            finite = bool(jnp.all(jnp.isfinite(leaf)))
            _require(finite, f"expected finite gradients {where}, got {leaf} in {jax.tree_util.keystr(path)}")


class AnalysisCheck(NamedTuple):
    """One case of `check_analysis`.

    Attributes:
        case: what was computed.
        expected, got: the number or word that is known, and that of the analysis.
        error: |got - expected|; for words 0 if they are the same, otherwise infinity.
        tolerance: the largest error that passes.
        ok: whether the case passed; a value that is not a number does not.
    """

    case: str
    expected: float | str
    got: float | str
    error: float
    tolerance: float
    ok: bool


class AnalysisChecks(NamedTuple):
    """The result of `check_analysis`, which prints as a table.

    Attributes:
        rows: one `AnalysisCheck` per case.
        dtype: the dtype of the networks.
        seconds: the time that all cases took, most of it to compile.
        ok: whether all cases passed.
    """

    rows: tuple[AnalysisCheck, ...]
    dtype: str
    seconds: float
    ok: bool

    def __str__(self) -> str:
        heads = (f"{'case':52} {'expected':>12} {'got':>12} {'error':>9} {'tolerance':>9}  ok",)
        lines = (
            f"{r.case:52} {_shown(r.expected):>12} {_shown(r.got):>12} {r.error:9.1e} {r.tolerance:9.1e}  "
            f"{'yes' if r.ok else 'NO'}"
            for r in self.rows
        )
        passed = sum(r.ok for r in self.rows)
        last = f"{passed} of {len(self.rows)} passed in {self.dtype}, {self.seconds:.0f} seconds"
        return "\n".join([*heads, *lines, last])


def check_analysis(dtype: DTypeLike | None = None) -> AnalysisChecks:
    """Compares the analyses with closed forms and published numbers, on this machine, in less than a minute.

    The cases are exponents of linear, gated and chaotic maps, their sum rule, norms of products of Jacobians by lag,
    fixed points, and regimes of verdicts.

    Args:
        dtype: of the networks, float32 or float64; by default float32. For float64, 64-bit types are enabled during
            the call only.

    Returns:
        `AnalysisChecks`: `ok` is whether all cases passed, and `print` shows the table.

    Raises:
        ValueError: the dtype is neither float32 nor float64.

    Source: Henon 1976; Newman 1986, "The distribution of Lyapunov exponents"; the other cases are closed forms.

    Example:
        >>> import seqjax as sj
        >>> result = sj.testing.check_analysis()
        >>> result.ok, round(float(result.rows[0].got), 3)  # ln 0.8
        (True, -0.223)
    """
    from seqjax.analysis._closed_forms import CASES  # here, because it imports all analyses

    name = jnp.dtype("float32" if dtype is None else dtype).name
    if name not in ("float32", "float64"):
        raise ValueError(f"expected the dtype float32 or float64, got {name}: analyses need at least 32 bits")
    began, exact = time.perf_counter(), 2e-6 if name == "float32" else 1e-12
    with jax.enable_x64(True) if name == "float64" else contextlib.nullcontext():
        rows = tuple(_compared(*row) for case in CASES for row in case(name, exact))
    return AnalysisChecks(rows, name, time.perf_counter() - began, all(row.ok for row in rows))


def _compared(case: str, expected: float | str, got: float | str, tolerance: float) -> AnalysisCheck:
    if isinstance(expected, str) or isinstance(got, str):
        error = 0.0 if expected == got else float("inf")
    else:
        error = abs(got - expected)
    return AnalysisCheck(case, expected, got, error, tolerance, bool(error <= tolerance))


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
