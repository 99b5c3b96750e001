"""The sections of a report on one cell: the verdict in words, the figures with captions, and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from seqjax import plots
from seqjax.plots.canvas import finite_mean
from seqjax.plots.states import point_kinds

from .html import card, figure, figures, pairs, paragraph, points, section, table
from .svg import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from seqjax.analysis.cell_gradient_path import CellPath
    from seqjax.analysis.gates import GateStatistics
    from seqjax.analysis.gradient_flow import GradientByLag
    from seqjax.analysis.spectra import MatrixSpectrum, Spectrum

    from .measure import Measured
else:  # needed only in annotations
    Axes = ArrayLike = CellPath = GateStatistics = GradientByLag = MatrixSpectrum = Spectrum = Measured = Any

MOST_MATRICES = 8  # in figures, because a deep stack has many; the table has all of them


def drawn(name: str, plot: Callable[..., Any], *results: Any, caption: str) -> str:
    """A figure with its caption, or a sentence with the error if it cannot be drawn."""
    try:
        return figure(draw(plot, *results, name=name, description=caption), caption)
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


def verdict_section(measured: Measured) -> str:
    """The regime, its evidence, and the advice."""
    verdict = measured.found.get("verdict")
    if verdict is None:
        return section(
            "verdict", "Verdict", card(paragraph("There is no verdict."), paragraph(measured.why("verdict")))
        )
    doubt = "" if verdict.reliable else "Some measurements are not reliable; the evidence says what is wrong."
    first = card(paragraph(verdict.summary), paragraph(f"Regime: {verdict.regime}."), paragraph(doubt))
    numbers = {
        "regime": verdict.regime,
        "contracting": verdict.contracting,
        "lag at which the gradient is lost or has exploded (steps)": float(verdict.lag),
        "field of the state with the strongest effect": verdict.block,
        "reliable": verdict.reliable,
    }
    return section(
        "verdict",
        "Verdict",
        first,
        paragraph("Evidence:"),
        points(verdict.evidence),
        paragraph("Advice:") if verdict.advice else "",
        points(verdict.advice),
        pairs("The verdict in numbers", numbers),
    )


def gradient_section(measured: Measured) -> str:
    """Gradient norms by lag and by time."""
    result = measured.found.get("gradient_by_lag")
    parts = []
    if result is not None:
        parts += [
            drawn(
                "by-lag",
                plots.gradient_by_lag,
                result,
                caption="The norm of a gradient after k steps back in time. The gradient vanishes if the line falls, "
                "and explodes if it rises. Beyond the horizon, the cell learns almost nothing from the past.",
            ),
            drawn(
                "by-time",
                plots.gradient_heat_map,
                result,
                caption="The same norm for single times t. If the columns differ, the memory depends on the input.",
            ),
            drawn(
                "loss-gradient",
                plots.loss_gradient,
                result,
                caption="The norm at each time of a gradient that enters only at the last state. The gradient vanishes "
                "if the line falls towards the left, and explodes if it rises towards the left.",
            ),
        ]
    path = measured.found.get("cell_path")
    if path is not None:
        caption = (
            "The memory of an LSTM. If the solid line is above the dashed line, gradients flow not only along the cell "
            "state, but also through the gates."
        )
        parts.append(drawn("cell-path", plots.cell_path, path, caption=caption))
    tables = [] if result is None else _gradient_tables(result, path)
    why = [paragraph(measured.why(name), "soft") for name in ("gradient_by_lag", "cell_path")]
    return section("gradients", "Gradients through time", *why, figures(parts), *tables)


def _gradient_tables(result: GradientByLag, path: CellPath | None) -> list[str]:
    numbers = {
        "horizon (steps)": float(result.horizon),
        "threshold": float(result.threshold),
        "exact": result.exact,
        "reliable": result.reliable,
        "remark": result.reason or "none",
    }
    # To the base ten, because the exponents of norms are easier to read than their natural logarithms.
    ten = np.log(10)
    rows = [
        (int(k), a / ten, b / ten)
        for k, a, b in zip(result.lags, np.asarray(result.log_expected), np.asarray(result.log_worst), strict=True)
    ]
    head = ("lag (steps)", "log10 of the expected norm", "log10 of the worst case")
    gradients = {"whole state": result.log_gradient, **result.log_gradient_parts}
    means = [finite_mean(log) / ten for log in gradients.values()]
    by_time = [(t, *(float(mean[t]) for mean in means)) for t in range(np.shape(result.log_gradient)[1])]
    names = [f"log10 of |dL/ds_t|, {name}" for name in gradients]
    tables = [
        pairs("Gradient by lag", numbers),
        table("Gradient norm at every lag", head, rows, folded=True),
        table("Gradient of the loss at every time", ("time (steps)", *names), by_time, folded=True),
    ]
    if path is not None:
        true, forget = (finite_mean(log) / ten for log in (path.log_true, path.log_forget))
        head = ("lag (steps)", "log10 of the true norm", "log10 of the forget gates' product")
        rows = zip(map(int, path.lags), true, forget, strict=True)
        tables.append(table("Memory of the cell state at every lag", head, rows, folded=True))
    return tables


def jacobian_section(measured: Measured) -> str:
    """The effect of one step and of many steps on a perturbation."""
    spectrum, products = (measured.found.get(name) for name in ("spectrum", "product_singular_values"))
    parts, tables = [], []
    if spectrum is not None:
        caption = (
            "The effect of one step on a perturbation of the state. It grows in directions above the line at one, and "
            "shrinks in directions below it."
        )
        parts.append(drawn("singular-values", plots.singular_values, spectrum, caption=caption))
        caption = (
            "Eigenvalues of the step Jacobians. Repeated steps forget the directions inside the circle and amplify "
            "those outside. The cell remembers directions near the circle."
        )
        parts.append(drawn("eigenvalues", _plot_step_eigenvalues, spectrum, caption=caption))
        for number, (name, matrix) in enumerate(list(spectrum.recurrent.items())[:MOST_MATRICES]):
            caption = f"Eigenvalues of only the matrix {name}, without the gates and the slope of the activation."
            parts.append(drawn(f"matrix-{number}", _plot_eigenvalues(name), matrix, caption=caption))
        tables += _spectrum_tables(spectrum)
    if products is not None:
        caption = (
            "The effect of T steps together. A straight line is a constant rate of growth or decay in its direction."
        )
        parts.insert(1, drawn("products", plots.product_singular_values, products, caption=caption))
        k = len(finite_mean(next(iter(products.values())).log_values))
        rows = [(T, *(finite_mean(products[T].log_values) / np.log(10))) for T in sorted(products)]
        head = ("steps in the product", *(f"log10 of number {i + 1}" for i in range(k)))
        tables.append(table("Singular values of products of Jacobians", head, rows))
    why = [paragraph(measured.why(name), "soft") for name in ("spectrum", "product_singular_values")]
    return section("jacobians", "Jacobians", *why, figures(parts), *tables)


def _plot_step_eigenvalues(spectrum: Spectrum, *, ax: Axes) -> Axes:
    return plots.eigenvalues(spectrum.steps, ax=ax, title="Eigenvalues of J_t")


def _plot_eigenvalues(name: str) -> Callable[..., Axes]:
    return lambda matrix, *, ax: plots.eigenvalues(matrix, ax=ax, title=f"Eigenvalues of {name}")


def _spectrum_tables(spectrum: Spectrum) -> list[str]:
    fields = ("spectral_radius", "norm", "condition", "departure")
    head = ("spectral radius", "largest singular value", "condition", "departure from normality")

    def numbers(matrix: MatrixSpectrum, index: tuple[int, ...] = ()) -> list[float]:
        return [float(np.asarray(getattr(matrix, field))[index]) for field in fields]

    steps = [(f"J_{t}", *numbers(spectrum.steps, (0, i))) for i, t in enumerate(spectrum.times)]
    recurrent = [(name, *numbers(matrix)) for name, matrix in spectrum.recurrent.items()]
    bound = ""
    if spectrum.bound is not None:
        meaning = "is below one: gradients vanish" if spectrum.bound_holds else "is not below one: it says nothing"
        bound = (
            f"The bound on every step, gamma times the largest singular value of W_hh, {spectrum.bound:.4g}, {meaning}."
        )
    return [table("Matrices in numbers", ("matrix", *head), steps + recurrent), paragraph(bound)]


def exponent_section(measured: Measured) -> str:
    """The Lyapunov exponents, their convergence, and the numbers derived from them."""
    result = measured.found.get("lyapunov_exponents")
    if result is None:
        why = paragraph(measured.why("lyapunov_exponents") or "Left out: they were not measured.", "soft")
        return section("exponents", "Lyapunov exponents", why)
    parts = [
        drawn(
            "exponents",
            plots.lyapunov_spectrum,
            result,
            caption="The long-term rates per step at which perturbations grow or shrink. A positive rate is chaos. A "
            "rate slightly below zero is long memory, and one far below zero is short memory.",
        ),
        drawn(
            "convergence",
            plots.lyapunov_convergence,
            result,
            caption="The estimates against the number of steps. If a line is not flat at the right edge, its estimate "
            "is not reliable yet.",
        ),
    ]
    low, high, half = (finite_mean(part) for part in (result.low, result.high, result.split_half))
    rows = [
        (i + 1, *map(float, row)) for i, row in enumerate(np.stack([result.mean, result.spread, low, high, half]).T)
    ]
    head = (
        "number",
        "mean (nats/step)",
        "spread over sequences",
        "low, 95 %",
        "high, 95 %",
        "second half minus first half",
    )
    numbers = {
        "sum of positive exponents (nats/step)": float(np.mean(result.entropy_rate)),
        "Kaplan-Yorke dimension": float(finite_mean(result.kaplan_yorke)),
        "valid steps": ", ".join(map(str, np.unique(result.steps))),
        "steps between two orthonormalizations": result.qr_every,
        "reliable sequences": f"{int(np.sum(result.reliable))} of {len(result.reliable)}",
        "remark": result.reason or "none",
    }
    return section(
        "exponents",
        "Lyapunov exponents",
        figures(parts),
        table("Exponents, with intervals averaged over sequences", head, rows),
        pairs("Numbers derived from the exponents", numbers),
    )


def gate_section(measured: Measured, memory: dict[str, GateStatistics]) -> str:
    """The distribution of the gate values.

    Args:
        measured: the results.
        memory: the statistics of the gates that multiply the old state, with the time constants of the state.
    """
    results = measured.found.get("gate_statistics")
    if results is None:
        return section("gates", "Gates", paragraph(measured.why("gate_statistics"), "soft"))
    captions = {
        "saturation": "Each mark is one unit. At the right its gate is mostly closed, at the top it is mostly open. "
        "Near the origin the gate is rarely saturated.",
        "histogram": "The distribution of the gate values. Gates with many values at the ends act as switches, and "
        "their own weights get small gradients.",
        "memory": "The time constant of each unit in steps. The right end is the longest memory of the cell.",
    }
    parts = [
        drawn("saturation", plots.gate_saturation, results, caption=captions["saturation"]),
        drawn("histogram", plots.gate_histogram, results, caption=captions["histogram"]),
    ]
    if memory:
        parts.append(drawn("memory", plots.time_constants, memory, caption=captions["memory"]))
    rows = []
    for name, gate in results.items():
        quantiles = _quantiles(memory[name].time_constant) if name in memory else [float("nan")] * 3
        rows.append((name, gate.mean, gate.saturated_low, gate.saturated_high, *quantiles))
    head = ("gate", "mean", "closed (share)", "open (share)", "shortest memory (steps)", "median", "longest")
    return section("gates", "Gates", figures(parts), table("Gates in numbers", head, rows))


def _quantiles(values: ArrayLike) -> list[float]:
    """The smallest, the median and the largest value."""
    # np.quantile interpolates, which gives NaN between two infinite time constants.
    ordered = np.sort(np.ravel(np.asarray(values, np.float64)))
    return [float("nan")] * 3 if not ordered.size else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def state_section(measured: Measured) -> str:
    """The paths of the state, and its fixed points with a constant input."""
    states, fixed_points = (measured.found.get(name) for name in ("trajectory", "fixed_points"))
    why = [paragraph(measured.why(name), "soft") for name in ("trajectory", "fixed_points")]
    if states is None:
        return section("states", "States", *why)
    caption = "The paths of the state in the plane with its largest variance, one line per sequence."
    if fixed_points is not None:
        caption += " With a constant input, the state would end at a stable point, and stay near a slow point for long."
    part = drawn("portrait", plots.state_portrait, states, fixed_points, caption=caption)
    tables = []
    if fixed_points is not None:
        kinds = point_kinds(fixed_points)
        columns = (kinds, fixed_points.residual, fixed_points.spectral_radius, fixed_points.counts)
        rows = [(i + 1, str(kind), *map(float, rest)) for i, (kind, *rest) in enumerate(zip(*columns, strict=True))]
        head = ("point", "kind", "speed", "spectral radius", "starts that ended there")
        tables += [paragraph(fixed_points.reason), table("Fixed and slow points", head, rows, folded=len(rows) > 12)]
    return section("states", "States", *why, figures([part]), *tables)
