"""All measurements of a report on a cell. If one analysis fails, the others still run.

A report should take at most twenty seconds. So it measures only a few short sequences, without the costly analyses if
the state is large, and the page says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from seqjax.analysis._flow import state_parts
from seqjax.analysis.cell_gradient_path import cell_path
from seqjax.analysis.fixed_point_search import fixed_points
from seqjax.analysis.gates import gate_statistics
from seqjax.analysis.gradient_flow import gradient_by_lag
from seqjax.analysis.lyapunov import lyapunov_exponents
from seqjax.analysis.singular_values import product_singular_values
from seqjax.analysis.spectra import spectrum
from seqjax.analysis.verdicts import verdict
from seqjax.cell import Cell, Params, State, optional
from seqjax.sequence._checks import batch_of_states, check_sequences
from seqjax.sequence._masked_step import Inputs
from seqjax.sequence.unroll import length_mask, trajectory

from .names import Names

if TYPE_CHECKING:
    from seqjax.analysis.fixed_point_search import FixedPoints
    from seqjax.analysis.singular_values import ProductSingularValues
    from seqjax.analysis.spectra import Spectrum
else:  # needed only in annotations
    FixedPoints = ProductSingularValues = Spectrum = Any

ROWS, STEPS, LAGS = 8, 384, 100
SMALL = 128  # the largest state, in numbers, for which the costly analyses take only a few seconds
Depth = Literal["verdict", "usual", "full"]
Tell = Callable[[str], None]


def silent(_: str) -> None:
    """Tells nobody what is measured."""


class Measured(NamedTuple):
    """The results of all analyses of a cell, and the reasons for missing ones.

    Attributes:
        found: the results by the name of the analysis.
        missing: the reason for each analysis without a result, without a full stop.
        about: a description of the cell and of the measured sequences, by name.
        names: the readable names of what belongs to the cell.
    """

    found: dict[str, Any]
    missing: dict[str, str]
    about: dict[str, Any]
    names: Names = Names()

    def why(self, name: str) -> str:
        """A sentence with the reason why this analysis has no result; empty if it has one."""
        return f"Left out: {self.missing[name]}." if name in self.missing else ""


def measure(
    cell: Cell,
    params: Params,
    inputs: Inputs,
    state: State | None = None,
    *,
    depth: Depth = "usual",
    tell: Tell = silent,
) -> Measured:
    """Runs the analyses of a cell.

    Args:
        cell, params, state: as for `unroll`.
        inputs: the inputs with their mask and reset.
        depth: "verdict" for only the verdict with its exponents and its gradient by lag; "usual" for what takes a few
            seconds, on at most 8 sequences of 384 steps; "full" for all analyses on all inputs.
        tell: called with the name of each analysis before it begins.

    Returns:
        The results, and the reasons for missing ones.

    Raises:
        ValueError, TypeError: a shape or a dtype does not match.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from seqjax.reports.measure import Inputs, measure
        >>> cell = sj.VanillaRNN(2, 3)
        >>> measured = measure(cell, cell.init(jax.random.key(0)), Inputs(jnp.ones((9, 40, 2))))
        >>> measured.about["read"], "gate_statistics" in measured.missing
        ('8 of 9 sequences, 40 of 40 steps each', True)
    """
    start_time = time.monotonic()
    xs, mask, reset, _ = check_sequences(cell, inputs)
    batch, length = jax.tree.leaves(xs)[0].shape[:2]
    if not batch or not length:
        raise ValueError(f"expected at least one sequence of one step, got xs ({batch}, {length}, ...)")
    state = batch_of_states(cell, params, state, batch)
    n = sum(leaf[0].size for leaf in jax.tree.leaves(state))
    rows, steps = (batch, length) if depth == "full" else (ROWS if n <= SMALL else ROWS // 2, STEPS)
    xs, mask, reset = jax.tree.map(lambda leaf: leaf[:rows, :steps], (xs, mask, reset))
    options = {"state": jax.tree.map(lambda leaf: leaf[:rows], state), "mask": mask, "reset": reset}
    about = {
        "cell": repr(cell),
        "numbers in the state": n,
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
        "read": f"{min(rows, batch)} of {batch} sequences, {min(steps, length)} of {length} steps each",
    }
    measured = Measured({}, {}, about, Names(tuple(state_parts(cell, params))))
    run = _Run(measured, tell)
    cheaper = {} if depth == "full" or n <= SMALL else _cheaper(mask, min(steps, length))
    run("verdict", lambda: verdict(cell, params, xs, **cheaper, **options))
    if result := measured.found.get("verdict"):
        measured.found.update({"lyapunov_exponents": result.exponents, "gradient_by_lag": result.by_lag})
    else:  # one of the two may still work
        run("lyapunov_exponents", lambda: lyapunov_exponents(cell, params, xs, **options))
        run("gradient_by_lag", lambda: gradient_by_lag(cell, params, xs, **cheaper, **options))
    if depth != "verdict":
        _measure_rest(run, n if depth == "usual" else 0, cell, params, xs, options)
    about["seconds of measurement"] = round(time.monotonic() - start_time, 1)
    return measured


def _cheaper(mask: Bool[Array, "batch time"] | None, length: int) -> dict[str, Any]:
    """Options of the gradient by lag for a large state: random columns, so an estimate, and no lags beyond `LAGS`."""
    valid = length if mask is None else int(mask.sum(axis=1).max())
    return {"exact": False, "horizon": max(1, min(LAGS, valid))}


def _measure_rest(run: _Run, n: int, cell: Cell, params: Params, xs: PyTree, options: dict[str, Any]) -> None:
    """Runs the analyses beside the verdict, without the costly ones if the state has too many numbers, n."""
    # The costly analyses read only one sequence.
    one_xs, one = jax.tree.map(lambda leaf: leaf[:1], (xs, options))
    missing, found = run.measured.missing, run.measured.found
    if optional(cell, "gates") is not None:
        run("gate_statistics", lambda: gate_statistics(cell, params, xs, **options))
    else:
        missing["gate_statistics"] = f"{type(cell).__name__} does not name its gates with a method gates"
    run("trajectory", lambda: trajectory(cell, params, xs, **options))
    costly: dict[str, Callable[[], Any]] = {
        "cell_path": lambda: cell_path(cell, params, one_xs, **one),
        "spectrum": lambda: _spectrum(cell, params, one_xs, one),
        "product_singular_values": lambda: _products(cell, params, one_xs, one),
        "fixed_points": lambda: _fixed_points(run.measured, cell, params, xs),
    }
    for name, analyse in costly.items():
        if name == "fixed_points" and "trajectory" not in found:
            continue  # its starts are states of the trajectory
        if n <= SMALL:
            run(name, analyse)
        else:
            missing[name] = f"it takes long for a state of {n} numbers; it is measured with full=True, or --full"


class _Run:
    """Runs one analysis after the other, and saves its result or the reason why it has none."""

    def __init__(self, measured: Measured, tell: Tell) -> None:
        self.measured, self.tell = measured, tell

    def __call__(self, name: str, analyse: Callable[[], Any]) -> None:
        self.tell(name.replace("_", " "))
        try:
            self.measured.found[name] = analyse()
        except (TypeError, ValueError) as error:  # it does not apply to this cell, and its message says why
            self.measured.missing[name] = _one_line(error)
        except Exception as error:  # noqa: BLE001 - the page is useful without this analysis
            self.measured.missing[name] = f"it failed with {type(error).__name__}, {_one_line(error)}"


def _spectrum(cell: Cell, params: Params, xs: PyTree, options: dict[str, Any]) -> Spectrum:
    """The spectrum of five steps of one sequence."""
    length = jax.tree.leaves(xs)[0].shape[1]
    times = np.unique(np.linspace(1, length, 6).astype(int)[1:])
    return spectrum(cell, params, xs, times=times, numerical_radius=False, **options)


def _products(cell: Cell, params: Params, xs: PyTree, options: dict[str, Any]) -> dict[int, ProductSingularValues]:
    """The four largest singular values of products of several lengths in one call.

    The Jacobian of a masked step is the identity, so each row of the batch has a mask that ends after its length.
    """
    length = jax.tree.leaves(xs)[0].shape[1]
    lengths = sorted({max(1, length // part) for part in (1, 2, 8)})
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(lengths), axis=0), (xs, options))
    ends = length_mask(lengths, length)
    masked = rows[1] | {"mask": ends if rows[1]["mask"] is None else ends & rows[1]["mask"]}
    k = min(4, sum(leaf[0].size for leaf in jax.tree.leaves(options["state"])))
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


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
