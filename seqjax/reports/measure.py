"""All measurements of a report on a cell. If one analysis fails, the others still run.

A report should take at most half a minute. So it measures only a few short sequences, and the page says how many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, PyTree

from seqjax.analysis.cell_gradient_path import cell_path
from seqjax.analysis.fixed_point_search import fixed_points
from seqjax.analysis.gates import gate_statistics
from seqjax.analysis.gradient_flow import gradient_by_lag
from seqjax.analysis.lyapunov import lyapunov_exponents
from seqjax.analysis.singular_values import product_singular_values
from seqjax.analysis.spectra import spectrum
from seqjax.analysis.verdicts import verdict
from seqjax.cell import Cell, Params, State, optional
from seqjax.sequence._checks import batch_of_states, check_flags, check_inputs
from seqjax.sequence.unroll import length_mask, trajectory

if TYPE_CHECKING:
    from seqjax.analysis.fixed_point_search import FixedPoints
    from seqjax.analysis.singular_values import ProductSingularValues
    from seqjax.analysis.spectra import Spectrum
else:  # needed only in annotations
    FixedPoints = ProductSingularValues = Spectrum = Any

ROWS, STEPS = 8, 128
# The largest states, in numbers, for which these measurements take only a few seconds.
LARGEST_JACOBIAN = 1024
LARGEST_SEARCH = 128


class Measured(NamedTuple):
    """The results of all analyses of a cell, and the reasons for missing ones.

    Attributes:
        found: the results by the name of the analysis.
        missing: the reason for each analysis without a result, without a full stop.
        about: a description of the cell and of the measured sequences, by name.
    """

    found: dict[str, Any]
    missing: dict[str, str]
    about: dict[str, Any]

    def why(self, name: str) -> str:
        """A sentence with the reason why this analysis has no result; empty if it has one."""
        return f"Left out: {self.missing[name]}." if name in self.missing else ""


def measure(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
    rows: int | None = None,
    steps: int = STEPS,
    everything: bool = True,
) -> Measured:
    """Runs all analyses of a cell on the first `rows` sequences and the first `steps` steps of `xs`.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        rows: the number of sequences; by default 8, or 4 if the state has more than 256 numbers.
        steps: the number of steps.
        everything: whether to run all analyses, or only the verdict with its exponents and its gradient by lag.

    Returns:
        The results, and the reasons for missing ones.

    Raises:
        ValueError, TypeError: a shape or a dtype does not match.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from seqjax.reports.measure import measure
        >>> cell = sj.VanillaRNN(2, 3)
        >>> measured = measure(cell, cell.init(jax.random.key(0)), jnp.ones((9, 40, 2)))
        >>> measured.about["read"], "gate_statistics" in measured.missing
        ('8 of 9 sequences, 40 of 40 steps each', True)
    """
    start_time = time.monotonic()
    xs, batch, length = check_inputs(cell, xs)
    if not batch or not length:
        raise ValueError(f"expected at least one sequence of one step, got xs ({batch}, {length}, ...)")
    mask, reset = check_flags("mask", mask, batch, length), check_flags("reset", reset, batch, length)
    state = batch_of_states(cell, params, state, batch)
    n = sum(leaf[0].size for leaf in jax.tree.leaves(state))
    rows = (ROWS if n <= 256 else ROWS // 2) if rows is None else rows
    if rows < 1 or steps < 1:
        raise ValueError(f"expected rows and steps of at least 1, got {rows} and {steps}")
    xs, mask, reset = jax.tree.map(lambda leaf: leaf[:rows, :steps], (xs, mask, reset))
    options = {"state": jax.tree.map(lambda leaf: leaf[:rows], state), "mask": mask, "reset": reset}
    about = {
        "cell": repr(cell),
        "numbers in the state": n,
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
        "read": f"{min(rows, batch)} of {batch} sequences, {min(steps, length)} of {length} steps each",
    }
    measured = Measured({}, {}, about)
    _try(measured, "verdict", lambda: verdict(cell, params, xs, **options))
    if result := measured.found.get("verdict"):
        measured.found.update({"lyapunov_exponents": result.exponents, "gradient_by_lag": result.by_lag})
    else:  # one of the two may still work
        _try(measured, "lyapunov_exponents", lambda: lyapunov_exponents(cell, params, xs, **options))
        _try(measured, "gradient_by_lag", lambda: gradient_by_lag(cell, params, xs, **options))
    if everything:
        _measure_rest(measured, n, cell, params, xs, options)
    about["seconds of measurement"] = round(time.monotonic() - start_time, 1)
    return measured


def _measure_rest(measured: Measured, n: int, cell: Cell, params: Params, xs: PyTree, options: dict[str, Any]) -> None:
    # The costly analyses read only one sequence.
    one_xs, one = jax.tree.map(lambda leaf: leaf[:1], (xs, options))
    if optional(cell, "gates") is not None:
        _try(measured, "gate_statistics", lambda: gate_statistics(cell, params, xs, **options))
    else:
        measured.missing["gate_statistics"] = f"{type(cell).__name__} does not name its gates with a method gates"
    _try(measured, "cell_path", lambda: cell_path(cell, params, one_xs, **one))
    if n <= LARGEST_JACOBIAN:
        _try(measured, "spectrum", lambda: _spectrum(cell, params, one_xs, n, one))
    else:
        measured.missing["spectrum"] = f"a Jacobian of {n} x {n} numbers takes too long for a report"
    _try(measured, "product_singular_values", lambda: _products(cell, params, one_xs, min(n, 4), one))
    _try(measured, "trajectory", lambda: trajectory(cell, params, xs, **options))
    if n <= LARGEST_SEARCH and "trajectory" in measured.found:
        _try(measured, "fixed_points", lambda: _fixed_points(measured, cell, params, xs))
    elif "trajectory" in measured.found:
        measured.missing["fixed_points"] = (
            f"a search among {n} numbers takes too long for a report, which searches up to {LARGEST_SEARCH}; "
            f"sj.analysis.fixed_points has no such limit"
        )


def _spectrum(cell: Cell, params: Params, xs: PyTree, n: int, options: dict[str, Any]) -> Spectrum:
    """The spectrum of five steps of one sequence, or of one step if the state is large."""
    length = jax.tree.leaves(xs)[0].shape[1]
    # One eigenvalue problem of a state with a thousand numbers takes about a second.
    times = np.unique(np.linspace(1, length, 6).astype(int)[1:]) if n <= 256 else np.array([length])
    return spectrum(cell, params, xs, times=times, numerical_radius=False, **options)


def _products(
    cell: Cell, params: Params, xs: PyTree, k: int, options: dict[str, Any]
) -> dict[int, ProductSingularValues]:
    """Singular values of products of several lengths in one call.

    The Jacobian of a masked step is the identity, so each row of the batch has a mask that ends after its length.
    """
    length = jax.tree.leaves(xs)[0].shape[1]
    lengths = sorted({max(1, length // part) for part in (1, 2, 8)})
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(lengths), axis=0), (xs, options))
    ends = length_mask(lengths, length)
    masked = rows[1] | {"mask": ends if rows[1]["mask"] is None else ends & rows[1]["mask"]}
    # The figure cannot show differences below a hundredth of a nat.
    batch = product_singular_values(cell, params, rows[0], k=k, tolerance=0.01, **masked)
    return {T: _row(batch, i) for i, T in enumerate(lengths)}


def _row(result: ProductSingularValues, i: int) -> ProductSingularValues:
    """Selects one sequence of a batch."""
    parts = {name: part[i : i + 1] for name, part in result._asdict().items() if np.ndim(part)}
    return result._replace(**parts)


def _fixed_points(measured: Measured, cell: Cell, params: Params, xs: PyTree) -> FixedPoints:
    def typical(leaf: ArrayLike) -> np.ndarray:
        leaf = np.asarray(leaf)
        flat = leaf.reshape(-1, *leaf.shape[2:])
        if np.issubdtype(flat.dtype, np.floating):
            return flat.mean(0)
        # The mean of tokens is not a token.
        values, counts = np.unique(flat, axis=0, return_counts=True)
        return values[counts.argmax()]

    measured.about["input of the fixed points"] = "the mean of the inputs, or the most frequent token, at every step"
    x, starts = jax.tree.map(typical, xs), measured.found["trajectory"]
    return fixed_points(cell, params, x, starts=starts, count=16)


def _try(measured: Measured, name: str, analyse: Callable[[], Any]) -> None:
    """Runs one analysis, and saves its result or the reason why it has none."""
    try:
        measured.found[name] = analyse()
    except (TypeError, ValueError) as error:  # it does not apply to this cell, and its message says why
        measured.missing[name] = _one_line(error)
    except Exception as error:  # noqa: BLE001 - the page is useful without this analysis
        measured.missing[name] = f"it failed with {type(error).__name__}, {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
