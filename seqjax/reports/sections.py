"""The parts of a report on one cell: the verdict in words, the figures with how to read them, the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from seqjax import plots
from seqjax.plots.canvas import mean_of_finite
from seqjax.plots.states import kinds_of

from .html import card, figure, figures, pairs, paragraph, points, section, table
from .measure import Measured
from .svg import draw

MOST_MATRICES = 8  # of a deep stack's; the table holds all of them


def drawn(name: str, plot: Callable[..., Any], *results: Any, caption: str) -> str:
    """A figure with its caption, or a sentence where it cannot be drawn."""
    try:
        return figure(draw(plot, *results, name=name, described=caption), caption)
    except Exception as error:  # noqa: BLE001 - a figure that fails is no reason to lose the page
        return paragraph(f"A figure ({name}) could not be drawn: {type(error).__name__}, {error}", "soft")


def safely(name: str, title: str, build: Callable[..., str], *given: Any) -> str:
    """A section, or a sentence in its place where it cannot be written."""
    try:
        return build(*given)
    except Exception as error:  # noqa: BLE001 - one section that fails is no reason to lose the page
        return section(
            name, title, paragraph(f"This part could not be written: {type(error).__name__}, {error}", "soft")
        )


def verdict_section(measured: Measured) -> str:
    """The regime, what it rests on, and what to try."""
    verdict = measured.found.get("verdict")
    if verdict is None:
        return section(
            "verdict", "Verdict", card(paragraph("There is no verdict."), paragraph(measured.why("verdict")))
        )
    doubt = "" if verdict.reliable else "Some of this could not be measured reliably; the evidence says what."
    first = card(paragraph(verdict.summary), paragraph(f"Regime: {verdict.regime}."), paragraph(doubt))
    numbers = {
        "regime": verdict.regime,
        "contracting": verdict.contracting,
        "lag at which the gradient is lost (steps)": float(verdict.lag),
        "field of the state in which it shows most": verdict.block,
        "reliable": verdict.reliable,
    }
    return section(
        "verdict",
        "Verdict",
        first,
        paragraph("What it rests on:"),
        points(verdict.evidence),
        paragraph("What to try:") if verdict.advice else "",
        points(verdict.advice),
        pairs("The verdict in numbers", numbers),
    )


def gradient_section(measured: Measured) -> str:
    """How far back gradients reach."""
    result = measured.found.get("gradient_by_lag")
    parts = []
    if result is not None:
        parts += [
            drawn(
                "by-lag",
                plots.gradient_by_lag,
                result,
                caption="How much of a gradient is left after k steps back: a falling line loses it, a rising one "
                "blows it up; what happened before the horizon teaches the cell next to nothing.",
            ),
            drawn(
                "by-time",
                plots.gradient_heat_map,
                result,
                caption="The same for single times t: columns that differ say that memory depends on the input.",
            ),
            drawn(
                "loss-gradient",
                plots.loss_gradient,
                result,
                caption="What is left at each time of a gradient that arrives at the last state alone: a fall to the "
                "left is a gradient that vanishes, a rise to the left one that explodes.",
            ),
        ]
    path = measured.found.get("cell_path")
    if path is not None:
        caption = (
            "An LSTM's memory: where the solid line lies above the dashed one, memory also flows through the gates "
            "and not only along the cell state."
        )
        parts.append(drawn("cell-path", plots.cell_path, path, caption=caption))
    tables = [] if result is None else _gradient_tables(result, path)
    why = [paragraph(measured.why(name), "soft") for name in ("gradient_by_lag", "cell_path")]
    return section("gradients", "Gradients through time", *why, figures(parts), *tables)


def _gradient_tables(result: Any, path: Any) -> list[str]:
    numbers = {
        "horizon (steps)": float(result.horizon),
        "threshold": float(result.threshold),
        "exact": result.exact,
        "reliable": result.reliable,
        "remark": result.reason or "none",
    }
    ten = np.log(10)
    rows = [
        (int(k), a / ten, b / ten)
        for k, a, b in zip(result.lags, np.asarray(result.log_expected), np.asarray(result.log_worst), strict=True)
    ]
    head = ("lag (steps)", "log10 of the expected norm", "log10 of the worst case")
    by_time = [
        (t, *(float(part[t]) / ten for part in map(mean_of_finite, _gradients(result).values())))
        for t in range(np.shape(result.log_gradient)[1])
    ]
    names = [f"log10 of |dL/ds_t|, {name}" for name in _gradients(result)]
    tables = [
        pairs("Gradient by lag", numbers),
        table("Gradient norm at every lag", head, rows, folded=True),
        table("Gradient of the loss at every time", ("time (steps)", *names), by_time, folded=True),
    ]
    if path is not None:
        true, forget = (mean_of_finite(log) / ten for log in (path.log_true, path.log_forget))
        head = ("lag (steps)", "log10 of the true norm", "log10 of the forget gates' product")
        rows = zip(map(int, path.lags), true, forget, strict=True)
        tables.append(table("Memory of the cell state at every lag", head, rows, folded=True))
    return tables


def _gradients(result: Any) -> dict[str, Any]:
    return {"whole state": result.log_gradient, **result.log_gradient_parts}


def jacobian_section(measured: Measured) -> str:
    """What one step does to a perturbation, and what many do."""
    spectrum, products = (measured.found.get(name) for name in ("spectrum", "product_singular_values"))
    parts, tables = [], []
    if spectrum is not None:
        caption = "What one step does: directions above the line at one grow, those below it shrink."
        parts.append(drawn("singular-values", plots.singular_values, spectrum, caption=caption))
        caption = (
            "Eigenvalues of the steps' Jacobians: inside the circle repeated steps forget, outside they blow up; "
            "those near it are what the cell remembers."
        )
        parts.append(drawn("eigenvalues", _step_eigenvalues, spectrum, caption=caption))
        for place, (name, matrix) in enumerate(list(spectrum.recurrent.items())[:MOST_MATRICES]):
            caption = f"Eigenvalues of the matrix {name} alone, without the slope of the activation and the gates."
            parts.append(drawn(f"matrix-{place}", _titled(name), matrix, caption=caption))
        tables += _spectrum_tables(spectrum)
    if products is not None:
        caption = "What T steps do together: a straight line is a constant rate of growth or loss for each direction."
        parts.insert(1, drawn("products", plots.product_singular_values, products, caption=caption))
        k = len(mean_of_finite(next(iter(products.values())).log_values))
        rows = [(T, *(mean_of_finite(products[T].log_values) / np.log(10))) for T in sorted(products)]
        head = ("steps in the product", *(f"log10 of number {i + 1}" for i in range(k)))
        tables.append(table("Singular values of products of Jacobians", head, rows))
    why = [paragraph(measured.why(name), "soft") for name in ("spectrum", "product_singular_values")]
    return section("jacobians", "Jacobians", *why, figures(parts), *tables)


def _step_eigenvalues(spectrum: Any, *, ax: Any) -> Any:
    return plots.eigenvalues(spectrum.steps, ax=ax, title="Eigenvalues of J_t")


def _titled(name: str) -> Callable[..., Any]:
    return lambda matrix, *, ax: plots.eigenvalues(matrix, ax=ax, title=f"Eigenvalues of {name}")


def _spectrum_tables(spectrum: Any) -> list[str]:
    fields = ("spectral_radius", "norm", "condition", "departure")
    head = ("spectral radius", "largest singular value", "condition", "departure from normal")

    def numbers(matrix: Any, at: Any = ()) -> list[float]:
        return [float(np.asarray(getattr(matrix, field))[at]) for field in fields]

    steps = [(f"J_{t}", *numbers(spectrum.steps, (0, i))) for i, t in enumerate(spectrum.times)]
    recurrent = [(name, *numbers(matrix)) for name, matrix in spectrum.recurrent.items()]
    bound = ""
    if spectrum.bound is not None:
        says = "is below one: gradients vanish" if spectrum.bound_holds else "is not below one: it says nothing"
        bound = (
            f"The bound on every step, gamma times the largest singular value of W_hh, {spectrum.bound:.4g}, {says}."
        )
    return [table("Matrices in numbers", ("matrix", *head), steps + recurrent), paragraph(bound)]


def exponent_section(measured: Measured) -> str:
    """Growth rates in the long run."""
    result = measured.found.get("lyapunov_exponents")
    if result is None:
        why = paragraph(
            measured.why("lyapunov_exponents") or "Left out: there is no verdict to take them from.", "soft"
        )
        return section("exponents", "Lyapunov exponents", why)
    parts = [
        drawn(
            "exponents",
            plots.lyapunov_spectrum,
            result,
            caption="Rates per step at which perturbations grow or fade in the long run: above zero is chaos, "
            "well below zero is short memory, near zero is long memory.",
        ),
        drawn(
            "convergence",
            plots.lyapunov_convergence,
            result,
            caption="The estimates as more steps are counted: lines that still move at the right edge are not yet "
            "to be trusted.",
        ),
    ]
    low, high, half = (mean_of_finite(part) for part in (result.low, result.high, result.split_half))
    rows = [
        (i + 1, *map(float, row)) for i, row in enumerate(np.stack([result.mean, result.spread, low, high, half]).T)
    ]
    head = ("number", "mean (nats/step)", "spread over sequences", "low, 95 %", "high, 95 %", "second half less first")
    numbers = {
        "sum of positive exponents (nats/step)": float(np.mean(result.entropy_rate)),
        "Kaplan-Yorke dimension": float(mean_of_finite(result.kaplan_yorke)),
        "steps counted": ", ".join(map(str, np.unique(result.steps))),
        "steps between two orthonormalisations": result.qr_every,
        "sequences that are reliable": f"{int(np.sum(result.reliable))} of {len(result.reliable)}",
        "remark": result.reason or "none",
    }
    return section(
        "exponents",
        "Lyapunov exponents",
        figures(parts),
        table("Exponents, with intervals averaged over sequences", head, rows),
        pairs("Exponents in sum", numbers),
    )


def gate_section(measured: Measured, keep: dict[str, Any]) -> str:
    """How gates stand; `keep` holds those that multiply the old state."""
    results = measured.found.get("gate_statistics")
    if results is None:
        return section("gates", "Gates", paragraph(measured.why("gate_statistics"), "soft"))
    captions = {
        "saturation": "Each mark is a unit: right, its gate is mostly shut; up, mostly open; near the origin it is a "
        "dimmer and not a switch.",
        "histogram": "How often gates take each value: heaps at the ends are switches, which pass little gradient "
        "to their own weights.",
        "memory": "How many steps each unit remembers: the right end is the longest memory that the cell has.",
    }
    parts = [
        drawn("saturation", plots.gate_saturation, results, caption=captions["saturation"]),
        drawn("histogram", plots.gate_histogram, results, caption=captions["histogram"]),
    ]
    if keep:
        parts.append(drawn("memory", plots.time_constants, keep, caption=captions["memory"]))
    rows = [
        (name, r.mean, r.saturated_low, r.saturated_high, *_quantiles(keep[name].time_constant if name in keep else []))
        for name, r in results.items()
    ]
    head = ("gate", "mean", "shut (share)", "open (share)", "shortest memory (steps)", "median", "longest")
    return section("gates", "Gates", figures(parts), table("Gates in numbers", head, rows))


def _quantiles(values: Any) -> list[float]:
    ordered = np.sort(np.ravel(np.asarray(values, np.float64)))
    return [float("nan")] * 3 if not ordered.size else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def state_section(measured: Measured) -> str:
    """Where the state goes, and where it would stand still."""
    states, found = (measured.found.get(name) for name in ("trajectory", "fixed_points"))
    why = [paragraph(measured.why(name), "soft") for name in ("trajectory", "fixed_points")]
    if states is None:
        return section("states", "States", *why)
    caption = "The state's paths in the plane in which it varies most, one line a sequence."
    if found is not None:
        caption += " Under a constant input it would end at a stable point, and linger at a slow one."
    part = drawn("portrait", plots.state_portrait, states, found, caption=caption)
    tables = []
    if found is not None:
        columns = (kinds_of(found), found.residual, found.spectral_radius, found.counts)
        rows = [(i + 1, str(kind), *map(float, rest)) for i, (kind, *rest) in enumerate(zip(*columns, strict=True))]
        head = ("point", "kind", "speed", "spectral radius", "starts that ended there")
        tables += [paragraph(found.reason), table("Fixed and slow points", head, rows, folded=len(rows) > 12)]
    return section("states", "States", *why, figures([part]), *tables)
