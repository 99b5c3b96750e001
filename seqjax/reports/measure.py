"""Everything that a report tells of a cell, measured one analysis after the other; one that fails takes no other along.

A report is to be there in half a minute, so it reads a few short sequences, and says which.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from seqjax.analysis.cell_gradient_path import cell_path
from seqjax.analysis.fixed_point_search import fixed_points
from seqjax.analysis.gates import gate_statistics
from seqjax.analysis.gradient_flow import gradient_by_lag
from seqjax.analysis.lyapunov import lyapunov_exponents
from seqjax.analysis.singular_values import product_singular_values
from seqjax.analysis.spectra import Spectrum, spectrum
from seqjax.analysis.verdicts import verdict
from seqjax.cell import Cell, Params, State
from seqjax.sequence._checks import batch_of_states, check_flags, check_inputs
from seqjax.sequence.unroll import length_mask, trajectory

ROWS, STEPS = 8, 128
MOST_STATE = 1024  # numbers in a state of which whole Jacobians are formed
MOST_SEARCHED = 128  # numbers in a state in which fixed points are looked for


class Measured(NamedTuple):
    """What was found about a cell, and why the rest was not.

    Attributes:
        found: results by the name of their analysis.
        missing: a sentence for each analysis that gave none.
        about: what was measured, in words and numbers.
    """

    found: dict[str, Any]
    missing: dict[str, str]
    about: dict[str, Any]

    def why(self, name: str) -> str:
        """Why there is no result of this name, as a sentence; empty where there is one."""
        return f"Left out: {self.missing[name]}." if name in self.missing else ""


def measure(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    state: State | None = None,
    mask: Any = None,
    reset: Any = None,
    rows: int | None = None,
    steps: int = STEPS,
    everything: bool = True,
) -> Measured:
    """All analyses of a cell on the first `rows` sequences and the first `steps` steps of what it is given.

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`.
        rows, steps: how much of `xs` is read; by default 8 sequences, or 4 where the state has more than 256 numbers.
        everything: False for the verdict alone, with its exponents and its gradient by lag.

    Returns:
        What was found, and why the rest was not.

    Raises:
        ValueError, TypeError: a shape or a dtype does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from seqjax.reports.measure import measure
        >>> cell = sj.VanillaRNN(2, 3)
        >>> measured = measure(cell, cell.init(jax.random.key(0)), jnp.ones((9, 40, 2)))
        >>> measured.about["read"], "gate_statistics" in measured.missing
        ('8 of 9 sequences, 40 of 40 steps each', True)
    """
    began = time.monotonic()
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
    if said := measured.found.get("verdict"):
        measured.found.update({"lyapunov_exponents": said.exponents, "gradient_by_lag": said.by_lag})
    else:
        _try(measured, "lyapunov_exponents", lambda: lyapunov_exponents(cell, params, xs, **options))
        _try(measured, "gradient_by_lag", lambda: gradient_by_lag(cell, params, xs, **options))
    if everything:
        _measure_rest(measured, n, cell, params, xs, options)
    about["seconds of measuring"] = round(time.monotonic() - began, 1)
    return measured


def _measure_rest(measured: Measured, n: int, cell: Cell, params: Params, xs: PyTree, options: dict[str, Any]) -> None:
    one = jax.tree.map(lambda leaf: leaf[:1], (xs, options))
    if hasattr(cell, "gates"):
        _try(measured, "gate_statistics", lambda: gate_statistics(cell, params, xs, **options))
    else:
        measured.missing["gate_statistics"] = f"{type(cell).__name__} does not name its gates with a method gates"
    _try(measured, "cell_path", lambda: cell_path(cell, params, one[0], **one[1]))
    if n <= MOST_STATE:
        _try(measured, "spectrum", lambda: _spectrum(cell, params, one[0], n, one[1]))
    else:
        measured.missing["spectrum"] = f"a Jacobian of {n} x {n} numbers takes too long for a report"
    _try(measured, "product_singular_values", lambda: _products(cell, params, one[0], min(n, 4), one[1]))
    _try(measured, "trajectory", lambda: trajectory(cell, params, xs, **options))
    if n <= MOST_SEARCHED and "trajectory" in measured.found:
        _try(measured, "fixed_points", lambda: _fixed_points(measured, cell, params, xs))
    elif "trajectory" in measured.found:
        measured.missing["fixed_points"] = (
            f"a search among {n} numbers takes too long for a report, which searches up to {MOST_SEARCHED}; "
            f"sj.analysis.fixed_points has no such limit"
        )


def _spectrum(cell: Cell, params: Params, xs: PyTree, n: int, options: dict[str, Any]) -> Spectrum:
    """That of a few steps of one sequence; an eigenvalue problem of many numbers takes a second."""
    length = jax.tree.leaves(xs)[0].shape[1]
    times = np.unique(np.linspace(1, length, 6).astype(int)[1:]) if n <= 256 else np.array([length])
    return spectrum(cell, params, xs, times=times, numerical_radius=False, **options)


def _products(cell: Cell, params: Params, xs: PyTree, k: int, options: dict[str, Any]) -> dict[int, Any]:
    """Products of several lengths in one call: a held step is the identity, so a mask ends a product.

    A hundredth of a nat is as fine as the figure shows.
    """
    length = jax.tree.leaves(xs)[0].shape[1]
    lengths = sorted({max(1, length // part) for part in (1, 2, 8)})
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(lengths), axis=0), (xs, options))
    ends = length_mask(lengths, length)
    masked = rows[1] | {"mask": ends if rows[1]["mask"] is None else ends & rows[1]["mask"]}
    together = product_singular_values(cell, params, rows[0], k=k, tolerance=0.01, **masked)
    return {T: _row(together, i) for i, T in enumerate(lengths)}


def _row(result: Any, i: int) -> Any:
    """One sequence of a result of several."""
    parts = {name: part[i : i + 1] for name, part in result._asdict().items() if np.ndim(part)}
    return result._replace(**parts)


def _fixed_points(measured: Measured, cell: Cell, params: Params, xs: PyTree) -> Any:
    def typical(leaf: Any) -> Any:
        flat = np.asarray(leaf).reshape(-1, *leaf.shape[2:])
        if np.issubdtype(flat.dtype, np.floating):
            return flat.mean(0)
        values, counts = np.unique(flat, axis=0, return_counts=True)
        return values[counts.argmax()]

    measured.about["input of the fixed points"] = "constant: the mean of the inputs, or the most frequent token"
    x, starts = jax.tree.map(typical, xs), measured.found["trajectory"]
    return fixed_points(cell, params, x, starts=starts, count=16)


def _try(measured: Measured, name: str, analyse: Callable[[], Any]) -> None:
    try:
        measured.found[name] = analyse()
    except (TypeError, ValueError) as error:  # it does not apply, and its message says to what it does
        measured.missing[name] = _one_line(error)
    except Exception as error:  # noqa: BLE001 - whatever went wrong in one analysis, the others are of use
        measured.missing[name] = f"it failed with {type(error).__name__}, {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
