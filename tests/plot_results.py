"""Results made by hand for every figure: plain ones, and the same with holes in them."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from seqjax import plots
from seqjax.analysis._memory import Memory
from seqjax.analysis.by_length import ScoreByLength
from seqjax.analysis.cliff import loss_cliff
from seqjax.analysis.clipping import clipping_statistics
from seqjax.analysis.gates import GateStatistics
from seqjax.analysis.gradient_flow import GradientByLag
from seqjax.analysis.lyapunov import LyapunovExponents
from seqjax.analysis.singular_values import ProductSingularValues
from seqjax.analysis.spectra import MatrixSpectrum, Spectrum

NAN, INF, TEN = math.nan, math.inf, math.log(10)


def lag_result(expected, **changes):
    """`GradientByLag` of one sequence with these expected logarithms."""
    log, lags = np.asarray(expected, np.float64), len(expected)
    horizon, threshold = changes.get("horizon", 2.0), 0.01
    result = GradientByLag(
        log_gradient=log[None],
        log_gradient_parts={"h": log[None] - 1, "c": log[None] - 2},
        lags=np.arange(lags),
        times=np.array([[4, 8]]),
        table=np.stack([log, 2 * log])[None],
        log_expected=log,
        log_worst=log + 1,
        log_parts={},
        rows_expected=log[None],
        rows_worst=log[None] + 1,
        rows_parts={},
        horizon=horizon,
        threshold=threshold,
        memory=Memory(horizon, lags - 1, log[-1], -0.1, threshold),
        best_memory=Memory(INF, lags - 1, log[-1] + 1, -0.1, threshold),
        exact=True,
        reliable=True,
        reason="",
    )
    return result._replace(**changes)


def exponents(mean, rows=2):
    """`LyapunovExponents` of a few sequences around this mean."""
    mean = np.asarray(mean, np.float64)
    spectra = np.stack([mean + 0.1 * row for row in range(rows)]) - 0.05 * (rows - 1)
    blank = np.zeros(rows)
    return LyapunovExponents(
        exponents=spectra,
        mean=mean,
        spread=np.zeros_like(mean),
        low=spectra - 0.2,
        high=spectra + 0.2,
        split_half=np.zeros_like(spectra),
        history=np.stack([spectra * 2, spectra], axis=1),
        history_steps=np.array([10, 20]),
        kaplan_yorke=blank,
        entropy_rate=blank,
        singular=spectra > INF,
        qr_every=10,
        steps=np.array([20] * rows),
        reliable=np.array([True] * rows),
        reason="",
    )


def gate(low, high, tau, lowest=0.0):
    """`GateStatistics` of units with these fractions and time constants; `lowest` is -1 for a candidate."""
    low, high, tau = (np.asarray(part, np.float64) for part in (low, high, tau))
    histogram = np.linspace(0, 0.1, 20)
    return GateStatistics(0.5, low, histogram, np.linspace(lowest, 1, 21), low, high, 0.0, 0.0, tau)


def matrix(values):
    """`MatrixSpectrum` of matrices with these eigenvalues, which are also their singular values."""
    values = np.asarray(values, np.complex128)
    sizes = np.abs(values)
    zero = np.zeros(values.shape[:-1])
    return MatrixSpectrum(values, sizes, sizes.max(-1), sizes.max(-1), zero, zero, None)


def spectrum(steps, times):
    """`Spectrum` of these steps."""
    return Spectrum(steps, np.asarray(times), {}, None, None, steps.norm.max(1))


def scores(by_position):
    """`ScoreByLength` with these scores."""
    by, places = np.asarray(by_position, np.float64), np.arange(1, len(by_position) + 1)
    return ScoreByLength(places, by, places, places, 2 * by, places, 3.5, 4.5, 2, "nats")


def product(logs):
    """`ProductSingularValues` of one sequence."""
    logs = np.asarray(logs, np.float64)[None]
    return ProductSingularValues(logs, np.zeros_like(logs), logs < INF, 1, 1)


CLIFF = loss_cliff(resolution=6)
STATES = np.stack([np.linspace(0, 1, 5), 0.2 * np.arange(5) ** 2, np.zeros(5)], axis=-1)[None]
DOWN = lag_result([0.0, -TEN, -2 * TEN, -3 * TEN])
GATES = {"forget": gate([0.1, 0.2], [0.3, 0.4], [1, 100]), "candidate": gate([0.5, 0.6], [0, 1], [10, 1], -1.0)}
CLIPPING = clipping_statistics({"grad_norm": [0.1, 10.0, 1.0]}, 1.0)
# What is drawn, of which result; and the same with holes in it, where it can have some.
EVERY = {
    "gradient_by_lag": (plots.gradient_by_lag, DOWN, lag_result([0, -1, NAN, -INF])),
    "gradients_by_lag": (plots.gradients_by_lag, {"a": DOWN}, {"a": lag_result([0, -INF])}),
    "gradient_heat_map": (plots.gradient_heat_map, DOWN, lag_result([NAN, NAN, NAN])),
    "loss_gradient": (plots.loss_gradient, DOWN, lag_result([0, NAN, INF])),
    "clipping": (plots.clipping, CLIPPING, CLIPPING._replace(grad_norm=np.array([INF, 1, NAN]))),
    "clipping_factor": (plots.clipping_factor, CLIPPING, CLIPPING._replace(factors=np.array([NAN] * 3))),
    "singular_values": (
        plots.singular_values,
        spectrum(matrix(np.full((2, 3, 4), 0.5)), [1, 5, 9]),
        spectrum(matrix(np.zeros((2, 3, 4))), [1, 5, 9]),
    ),
    "product_singular_values": (
        plots.product_singular_values,
        {4: product([-4 * TEN, -8 * TEN]), 1: product([-TEN, -2 * TEN])},
        {4: product([-INF, NAN]), 1: product([-1, -INF])},
    ),
    "eigenvalues": (plots.eigenvalues, matrix([0.5j, -0.5j, 2]), matrix([NAN, 1])),
    "lyapunov_spectrum": (plots.lyapunov_spectrum, exponents([0.1, -0.2]), exponents([-0.5, -INF])),
    "lyapunov_spectra": (plots.lyapunov_spectra, {"a": exponents([0.1])}, {"a": exponents([-INF, -INF])}),
    "lyapunov_convergence": (plots.lyapunov_convergence, exponents([0.1, -0.2]), exponents([NAN, NAN])),
    "gate_saturation": (plots.gate_saturation, GATES, {"g": gate([NAN], [0.5], [1])}),
    "gate_histogram": (plots.gate_histogram, GATES, {"g": GATES["forget"]._replace(histogram=np.full(20, NAN))}),
    "time_constants": (plots.time_constants, GATES, {"g": gate([0, 0], [0, 0], [INF, 3])}),
    "state_portrait": (plots.state_portrait, STATES, np.where(np.arange(5)[:, None] == 2, NAN, STATES)),
    "loss_by_position": (plots.loss_by_position, scores([3, 2, 1]), scores([3, NAN, INF])),
    "loss_by_length": (plots.loss_by_length, scores([3, 2, 1]), scores([NAN])),
    "learning_curves": (plots.learning_curves, {"a": ([1, 2], [3, 2])}, {"a": ([1, 2], [NAN, INF])}),
    "loss_cliff": (plots.loss_cliff, CLIFF, CLIFF._replace(loss=np.full_like(CLIFF.loss, NAN))),
}


def draw(plot, result, *more):
    """The axes, after everything on them has been rendered."""
    ax = Figure(layout="constrained").subplots()
    assert plot(result, *more, ax=ax) is ax
    ax.figure.canvas.draw()
    return ax


def line(ax, name):
    """The numbers of the line of this name."""
    (found,) = [line for line in ax.lines if line.get_label() == name]
    return np.stack(found.get_data())


def remarks(ax):
    """Everything that is written inside the axes."""
    return " ".join(text.get_text() for text in ax.texts)
