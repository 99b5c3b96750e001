"""How often the interval of the largest exponent contains the true one, among the rows that are reliable.

    python -m tests.microscope_bank.coverage [name ...] [--rows 40] [--steps 20000]

The truth is the growth of one perturbation in float64 over a long run with fresh inputs of the same distribution. It is
pooled over the rows if they agree within their errors, otherwise the run of each row is its truth.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

import seqjax as sj

from .double import flat, long_run_exponents

CHRONO = 100
INPUTS = 8


class Setting(NamedTuple):
    """A network, the lengths at which its intervals are measured, and the standard deviation of its inputs."""

    cell: Any
    lengths: tuple[int, ...]
    seed: int = 0
    scale: float = 1.0


def _tanh(g):
    return sj.VanillaRNN(INPUTS, 64, recurrent_init=Gaussian(g))


class Gaussian:
    """Draws entries from N(0, g^2 / n), for which a large network without inputs is chaotic above g = 1."""

    def __init__(self, g):
        self.g = g

    def __eq__(self, other):
        return isinstance(other, Gaussian) and self.g == other.g

    def __hash__(self):
        return hash(("Gaussian", self.g))

    def __call__(self, key, shape, dtype):
        return (self.g / math.sqrt(shape[1]) * jax.random.normal(key, shape)).astype(dtype)


SETTINGS = {
    "lstm-chrono-100": Setting(sj.LSTM(INPUTS, 64, chrono=CHRONO), (128, 256, 512, 1024, 2048)),
    "lstm-chrono-100-b": Setting(sj.LSTM(INPUTS, 64, chrono=CHRONO), (128, 512, 2048), seed=1),
    "lstm-forget-4": Setting(sj.LSTM(INPUTS, 64, forget_bias=4.0), (100,)),
    "lstm-forget-5.5": Setting(sj.LSTM(INPUTS, 64, forget_bias=5.5), (100,)),
    "lstm": Setting(sj.LSTM(INPUTS, 64), (100, 400)),
    "gru": Setting(sj.GRU(INPUTS, 64), (100, 400)),
    "tanh-0.9": Setting(_tanh(0.9), (100, 400), scale=0.3),
    "tanh-1.5": Setting(_tanh(1.5), (100, 400, 1600), scale=0.3),
    "tanh-2": Setting(_tanh(2.0), (100, 400, 1600), scale=0.3),
    "tanh-3": Setting(_tanh(3.0), (100, 400, 1600), scale=0.3),
}


class Coverage(NamedTuple):
    """The result of one network at one length.

    Attributes:
        name, time: the network and the number of steps T.
        truth, error: the long-run exponent in nats per step, the mean over rows, and its standard error.
        estimate: the mean over rows of the measured exponent.
        reliable: the share of rows that are reliable.
        without: the share of the reliable rows that have no interval.
        covered: the share of the reliable rows with an interval whose interval contains the truth; NaN if none has.
        below, above: the share of these whose whole interval is below, or above, the truth.
        width: the median width of these intervals.
    """

    name: str
    time: int
    truth: float
    error: float
    estimate: float
    reliable: float
    without: float
    covered: float
    below: float
    above: float
    width: float


def measure(name: str, rows: int = 40, steps: int = 20_000) -> list[Coverage]:
    """Measures one network of `SETTINGS` at each of its lengths."""
    cell, lengths, seed, scale = SETTINGS[name]
    params = cell.init(jax.random.key(seed))
    truth, error = long_run_exponents(cell, params, rows, steps, scale, first=_starts(cell, params, rows, seed))
    pooled = truth.std(ddof=1) < 3 * np.sqrt(np.mean(error**2))
    if pooled:
        truth, error = np.full(rows, truth.mean()), np.full(rows, truth.std(ddof=1) / math.sqrt(rows))
    xs = scale * jax.random.normal(jax.random.key(1000 + seed), (rows, max(lengths), INPUTS))
    return [
        _compare(name, sj.analysis.lyapunov_exponents(cell, params, xs[:, :T], k=1), T, truth, error) for T in lengths
    ]


def _starts(cell, params, rows, seed):
    """The initial state of the cell in each row, slightly perturbed."""
    _, first, _ = flat(cell, params)
    return np.asarray(first) + 1e-3 * np.random.default_rng(seed).normal(size=(rows, first.size))


def _compare(name, result, T, truth, error):
    low, high = result.low[:, 0], result.high[:, 0]
    reliable = np.asarray(result.reliable)
    has = reliable & ~np.isnan(low) & ~np.isnan(high)
    # The interval is widened by twice the error of the truth itself.
    below, above = (high + 2 * error < truth)[has], (low - 2 * error > truth)[has]
    return Coverage(
        name=name,
        time=T,
        truth=float(truth.mean()),
        error=float(error.mean()),
        estimate=float(result.exponents[:, 0].mean()),
        reliable=float(reliable.mean()),
        without=float((reliable & ~has).sum() / max(reliable.sum(), 1)),
        covered=float(1 - below.mean() - above.mean()) if has.any() else math.nan,
        below=float(below.mean()) if has.any() else math.nan,
        above=float(above.mean()) if has.any() else math.nan,
        width=float(np.median((high - low)[has])) if has.any() else math.nan,
    )


HEADER = (
    f"{'network':18} {'T':>5} {'truth':>9} {'error':>8} {'estimate':>9} {'reliable':>8} {'without':>8} {'covered':>8}"
    f" {'below':>6} {'above':>6} {'width':>8}"
)


def line(c: Coverage) -> str:
    """One line of the table."""
    return (
        f"{c.name:18} {c.time:5d} {c.truth:9.5f} {c.error:8.1e} {c.estimate:9.5f} {c.reliable:8.0%} {c.without:8.0%} "
        f"{c.covered:8.0%} {c.below:6.0%} {c.above:6.0%} {c.width:8.1e}"
    )


def main() -> None:
    """Prints the table, and the coverage over all rows that are reliable and have an interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(SETTINGS)}; all by default")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20_000)
    options = parser.parse_args()
    print(HEADER)
    results, began = [], time.perf_counter()
    for name in options.names or SETTINGS:
        for result in measure(name, options.rows, options.steps):
            results.append(result)
            print(line(result), flush=True)
    weights = np.array([c.reliable * (1 - c.without) for c in results])
    covered = np.array([c.covered for c in results])
    if weights.any():
        total = (np.where(weights > 0, covered, 0) * weights).sum() / weights.sum()
        reliable, seconds = np.mean([c.reliable for c in results]), time.perf_counter() - began
        print(f"covered {total:.1%} of the reliable rows with an interval; reliable {reliable:.1%}; {seconds:.0f} s")


if __name__ == "__main__":
    main()
