"""The sections of a report on one cell: figures with captions that explain how to read them, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from seqjax import plots
from seqjax.plots.canvas import finite_mean
from seqjax.plots.states import point_kinds

from .html import factor, figure, figures, folded, pairs, paragraph, section, table
from .svg import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from seqjax.analysis.cell_gradient_path import CellPath
    from seqjax.analysis.gates import GateStatistics
    from seqjax.analysis.gradient_flow import GradientByLag
    from seqjax.analysis.lyapunov import LyapunovExponents
    from seqjax.analysis.spectra import MatrixSpectrum, Spectrum

    from .measure import Measured
else:  # needed only in annotations
    Axes = ArrayLike = CellPath = GateStatistics = GradientByLag = Any
    LyapunovExponents = MatrixSpectrum = Spectrum = Measured = Any

MOST_MATRICES = 8  # in figures, because a deep stack has many; the table has all of them


def drawn(name: str, plot: Callable[..., Any], *results: Any, caption: str, **options: Any) -> str:
    """A figure with its caption, or a sentence with the error if it cannot be drawn."""
    try:
        return figure(draw(plot, *results, name=name, **options), caption)
    except Exception as error:  # noqa: BLE001 - the page is useful without this figure
        return paragraph(f"A figure ({name}) could not be drawn: {type(error).__name__}, {error}", "soft")


def safely(name: str, title: str, build: Callable[..., str], *arguments: Any) -> str:
    """The section that `build` returns, or a section with the error if it cannot be written."""
    try:
        return build(*arguments)
    except Exception as error:  # noqa: BLE001 - the page is useful without this section
        return section(
            name, title, paragraph(f"This part could not be written: {type(error).__name__}, {error}", "soft")
        )


def missing(measured: Measured, *names: str) -> list[str]:
    """A paragraph for each of these analyses that has no result. Analyses with the same reason share one."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        if name in measured.missing:
            reasons.setdefault(measured.missing[name], []).append(name.replace("_", " "))
    return [paragraph(f"Left out, {' and '.join(left)}: {reason}.", "soft") for reason, left in reasons.items()]


def growth_in_words(result: LyapunovExponents) -> str:
    """The largest growth factor per step, with its 95 % interval."""
    mean, low, high = (float(finite_mean(part)[0]) for part in (result.exponents, result.low, result.high))
    interval = f" ({factor(low)} to {factor(high)})" if np.isfinite([low, high]).all() else ""
    return f"{factor(mean)}{interval}"


def lag_figure(result: GradientByLag) -> str:
    """The gradient norm by lag."""
    caption = (
        f"The factor by which the norm of a gradient changes on its way back in time. A gradient counts as lost below "
        f"{result.threshold:g}."
    )
    return drawn("by-lag", plots.gradient_by_lag, result, caption=caption)


def gradient_section(measured: Measured) -> str:
    """Gradient norms by lag and by time, without the figure by lag, which is on the first screen."""
    result, path = (measured.found.get(name) for name in ("gradient_by_lag", "cell_path"))
    parts, tables, gist = [], [], ""
    if result is not None:
        fields = {measured.names.field(name): log for name, log in result.log_gradient_parts.items()}
        result = result._replace(log_gradient_parts=fields)
        gist = f"Memory of a typical gradient: {result.memory}."
        parts += [
            drawn(
                "by-time",
                plots.gradient_heat_map,
                result,
                caption="The gradient norm by lag at single time steps. If the columns differ, the memory depends on "
                "the input.",
            ),
            drawn(
                "loss-gradient",
                plots.loss_gradient,
                result,
                caption="The norm at each time step of a gradient that enters only at the last one. It vanishes if the "
                "line falls towards the left, and explodes if it rises towards the left.",
            ),
        ]
        tables += _gradient_tables(measured, result)
    if path is not None:
        caption = (
            "The gradient of the cell state of an LSTM. If the solid line is above the dashed line, gradients flow not "
            "only along the cell state, but also through the gates."
        )
        parts.append(drawn("cell-path", plots.cell_path, path, caption=caption))
        tables.append(_path_table(path))
    why = missing(measured, "gradient_by_lag", "cell_path")
    return section("gradients", "Gradients through time", figures(parts), *tables, *why, gist=gist, opened=True)


def _gradient_tables(measured: Measured, result: GradientByLag) -> list[str]:
    numbers = {
        "threshold of a lost gradient": float(result.threshold),
        "memory of the most favourable gradient": str(result.best_memory),
        "all directions were measured": result.exact,
        "reliable": result.reliable,
        "remark": _remark(measured, result.reason),
    }
    logs = np.asarray(result.log_expected), np.asarray(result.log_worst)
    rows = [(int(k), factor(float(a)), factor(float(b))) for k, a, b in zip(result.lags, *logs, strict=True)]
    head = ("lag (steps)", "expected factor", "factor in the worst case")
    gradients = {"whole state": result.log_gradient, **result.log_gradient_parts}
    means = [finite_mean(log) for log in gradients.values()]
    by_time = [(t, *(factor(float(mean[t])) for mean in means)) for t in range(np.shape(result.log_gradient)[1])]
    return [
        table("Gradient by lag", ("name", "value"), numbers.items(), folded=True),
        table("Gradient norm at every lag", head, rows, folded=True),
        table("Gradient norm at every time step", ("time step", *gradients), by_time, folded=True),
    ]


def _remark(measured: Measured, reason: str) -> str:
    """The reason why a measurement is not reliable, unless the evidence of the verdict already contains it."""
    verdict = measured.found.get("verdict")
    return "in the evidence of the verdict" if reason and verdict and reason in verdict.evidence else reason or "none"


def _path_table(path: CellPath) -> str:
    true, forget = (finite_mean(log) for log in (path.log_true, path.log_forget))
    rows = [(int(k), factor(float(a)), factor(float(b))) for k, a, b in zip(path.lags, true, forget, strict=True)]
    head = ("lag (steps)", "factor over all paths", "factor through the forget gates only")
    return table("Gradient norm of the cell state at every lag", head, rows, folded=True)


def jacobian_section(measured: Measured) -> str:
    """The effect of one step and of many steps on a perturbation. Eigenvalues are folded."""
    spectrum, products = (measured.found.get(name) for name in ("spectrum", "product_singular_values"))
    parts, plane, tables = [], [], []
    if spectrum is not None:
        caption = "A perturbation of the state grows in directions above the line at one, and shrinks in those below."
        parts.append(drawn("singular-values", plots.singular_values, spectrum, caption=caption))
        caption = (
            "Repeated steps forget the directions inside the circle and amplify those outside. The cell remembers "
            "directions near the circle."
        )
        title = "Eigenvalues of the step Jacobians"
        plane.append(drawn("eigenvalues", plots.eigenvalues, spectrum.steps, caption=caption, title=title))
        for number, (path, matrix) in enumerate(list(spectrum.recurrent.items())[:MOST_MATRICES]):
            name = measured.names.value(path)
            caption = f"Only the matrix {name}, without the gates and the slope of the activation."
            title = f"Eigenvalues of {name}"
            plane.append(drawn(f"matrix-{number}", plots.eigenvalues, matrix, caption=caption, title=title))
        tables += _spectrum_tables(measured, spectrum)
    if products is not None:
        caption = "A straight line is a constant rate of growth or decay in its direction."
        parts.append(drawn("products", plots.product_singular_values, products, caption=caption))
        k = len(finite_mean(next(iter(products.values())).log_values))
        rows = [(T, *(factor(float(log)) for log in finite_mean(products[T].log_values))) for T in sorted(products)]
        head = ("steps in the product", *(f"rank {i + 1}" for i in range(k)))
        tables.append(table("Singular values of products of Jacobians (factors)", head, rows, folded=True))
    why = missing(measured, "spectrum", "product_singular_values")
    gist = "The effect of one step and of many steps on a perturbation." if parts else "Not measured."
    eigenvalues = folded("Eigenvalues in the complex plane", figures(plane)) if plane else ""
    return section("jacobians", "Jacobians", *why, figures(parts), eigenvalues, *tables, gist=gist)


def _spectrum_tables(measured: Measured, spectrum: Spectrum) -> list[str]:
    fields = ("spectral_radius", "norm", "condition", "departure")
    head = ("spectral radius", "largest singular value", "condition", "departure from normality")

    def numbers(matrix: MatrixSpectrum, index: tuple[int, ...] = ()) -> list[float]:
        return [float(np.asarray(getattr(matrix, field))[index]) for field in fields]

    times = np.ravel(spectrum.times)
    steps = [(f"step Jacobian, time step {t}", *numbers(spectrum.steps, (0, i))) for i, t in enumerate(times)]
    recurrent = [(measured.names.value(path), *numbers(matrix)) for path, matrix in spectrum.recurrent.items()]
    bound = ""
    if spectrum.bound is not None:
        meaning = "is below one: gradients vanish" if spectrum.bound_holds else "is not below one: it says nothing"
        bound = (
            f"The bound on every step, gamma times the largest singular value of W_hh, {spectrum.bound:.4g}, {meaning}."
        )
    return [table("Matrices in numbers", ("matrix", *head), steps + recurrent, folded=True), paragraph(bound)]


def exponent_section(measured: Measured) -> str:
    """The Lyapunov exponents as growth factors per step, their convergence, and the numbers derived from them."""
    result = measured.found.get("lyapunov_exponents")
    if result is None:
        why = missing(measured, "lyapunov_exponents") or [paragraph("Left out: they were not measured.", "soft")]
        return section("exponents", "Lyapunov exponents", *why, gist="Not measured.")
    parts = [
        drawn(
            "exponents",
            plots.lyapunov_spectrum,
            result,
            unit="factor",
            caption="The long-term factors per step by which perturbations grow or shrink. A factor above one is "
            "chaos. One slightly below one is long memory, and one far below it is short memory.",
        ),
        drawn(
            "convergence",
            plots.lyapunov_convergence,
            result,
            unit="factor",
            caption="The estimates against the number of steps. If a line is not flat at the right edge, its estimate "
            "is not reliable yet.",
        ),
    ]
    rows = result.exponents
    smallest, largest = np.min(rows, axis=0), np.max(rows, axis=0)
    means = (finite_mean(part) for part in (result.low, result.high, result.split_half))
    columns = np.stack([result.mean, *means, smallest, largest]).T
    head = (
        "rank",
        "factor per step",
        "low, 95 %",
        "high, 95 %",
        "second half over first half",
        "smallest sequence",
        "largest sequence",
    )
    numbers = {
        "product of the factors above one": factor(float(np.mean(result.entropy_rate))),
        "Kaplan-Yorke dimension": float(finite_mean(result.kaplan_yorke)),
        "valid steps": ", ".join(map(str, np.unique(result.steps))),
        "steps between two orthonormalizations": result.qr_every,
        "reliable sequences": f"{int(np.sum(result.reliable))} of {len(result.reliable)}",
        "remark": _remark(measured, result.reason),
    }
    return section(
        "exponents",
        "Lyapunov exponents",
        figures(parts),
        table(
            "Growth factors per step, with intervals averaged over sequences",
            head,
            [(i + 1, *(factor(float(log)) for log in row)) for i, row in enumerate(columns)],
        ),
        pairs("Numbers derived from the exponents", numbers),
        gist=f"Largest growth factor: {growth_in_words(result)} per step.",
    )


def gate_section(measured: Measured, memory: Mapping[str, GateStatistics]) -> str:
    """The distribution of the gate values.

    Args:
        measured: the results.
        memory: the statistics of the gates that multiply the old state, with the time constants of the state.
    """
    results = measured.found.get("gate_statistics")
    if results is None:
        return section("gates", "Gates", *missing(measured, "gate_statistics"), gist="Not measured.")
    # A candidate is a new value between -1 and 1, so "open" and "closed" do not apply to it.
    signed = {measured.names.value(path): gate for path, gate in results.items() if gate.edges[0] < 0}
    gates = {measured.names.gate(path): gate for path, gate in results.items() if gate.edges[0] >= 0}
    memory = {measured.names.gate(path): gate for path, gate in memory.items()}
    captions = {
        "saturation": "At the right the gate of a unit is mostly closed, at the top it is mostly open. Near the origin "
        "it is rarely saturated.",
        "histogram": "Gates with many values at the ends act as switches, and their own weights get small gradients.",
        "memory": "The time constant of each unit in steps. The right end is the longest memory of the cell.",
    }
    parts = [drawn("saturation", plots.gate_saturation, gates, caption=captions["saturation"])] if gates else []
    parts.append(drawn("histogram", plots.gate_histogram, gates | signed, caption=captions["histogram"]))
    if memory:
        parts.append(drawn("memory", plots.time_constants, memory, caption=captions["memory"]))
    rows = []
    for name, gate in gates.items():
        quantiles = _quantiles(memory[name].time_constant) if name in memory else ["", "", ""]
        rows.append((name, gate.mean, gate.saturated_low, gate.saturated_high, *quantiles))
    head = ("gate", "mean", "closed (share)", "open (share)", "shortest memory (steps)", "median", "longest")
    values = [(name, gate.mean, gate.saturated_low, gate.saturated_high) for name, gate in signed.items()]
    tables = [table("Gates in numbers", head, rows)] if rows else []
    if values:
        head = ("value", "mean", "below -0.9 (share)", "above 0.9 (share)")
        tables.append(table("New values, which the gates let into the state", head, values))
    gist = "; ".join(f"{name} {gate.mean:.2f}" for name, gate in list(gates.items())[:4])
    return section("gates", "Gates", figures(parts), *tables, gist=f"Mean values: {gist}." if gist else "")


def _quantiles(values: ArrayLike) -> list[float]:
    """The smallest, the median and the largest value."""
    # np.quantile interpolates, which gives NaN between two infinite time constants.
    ordered = np.sort(np.ravel(np.asarray(values, np.float64)))
    return [float("nan")] * 3 if not ordered.size else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def state_section(measured: Measured) -> str:
    """The paths of the state, and its fixed points with a constant input."""
    states, fixed_points = (measured.found.get(name) for name in ("trajectory", "fixed_points"))
    why = missing(measured, "trajectory", "fixed_points")
    if states is None:
        return section("states", "States", *why, gist="Not measured.")
    caption = "One line per sequence, in the plane in which the states vary most."
    if fixed_points is not None:
        caption += " With a constant input, the state would end at a stable point, and stay near a slow point for long."
    part = drawn("portrait", plots.state_portrait, states, fixed_points, caption=caption)
    tables, gist = [], "The paths of the state."
    if fixed_points is not None:
        gist = "The paths of the state, and its fixed points."
        kinds = point_kinds(fixed_points)
        columns = (kinds, fixed_points.residual, fixed_points.spectral_radius, fixed_points.counts)
        rows = [(i + 1, str(kind), *map(float, rest)) for i, (kind, *rest) in enumerate(zip(*columns, strict=True))]
        head = ("point", "kind", "change in one step", "spectral radius", "starts that ended there")
        tables += [
            paragraph(fixed_points.reason),
            paragraph(fixed_points.covered),
            table("Fixed and slow points", head, rows, folded=len(rows) > 12),
        ]
    return section("states", "States", figures([part]), *tables, *why, gist=gist)
