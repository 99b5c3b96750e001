"""The bars that the measurements must meet. The minimum decides, and the median is printed beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.peers.rows import ROWS, Row

WITH = {"forward": "forward", "backward": "forward with backward"}
LEAST_GAIN = {"forward": 1.5, "backward": 1.4}  # fastest JAX peer / seqjax, geometric mean of the rows
TEMPORARIES = {128: (1 / 3, "1/3"), 4096: (1 / 8, "1/8")}  # seqjax / flax, by T
STEEPEST = 1.05

Line = tuple[str, str, str, str]


def bars(found: dict, kind: str) -> list[Line]:
    """One line per bar for one kind of cell: the quantity, the bar, the figure and the verdict."""
    return [
        *_against_jax(found, kind),
        *_against_torch(found, kind),
        *_temporaries(found, kind),
        *_compile(found, kind),
    ]


def _against_jax(found: dict, kind: str) -> Iterable[Line]:
    for direction, name in WITH.items():
        there = [times for times in _times(found, kind, direction, "seqjax") if jax_peers(times)]
        if not there:
            continue
        gains = by_both(there, lambda times, which: fastest(times, which) / times["seqjax"][which])
        rows, least = (len(there), len(ROWS)), LEAST_GAIN[direction]
        yield _line(f"{name}: seqjax / fastest JAX peer, worst row", [1 / min(g) for g in gains], rows, most=1.05)
        yield _line(f"{name}: fastest JAX peer / seqjax, geometric mean", map(mean_ratio, gains), rows, least=least)


def _against_torch(found: dict, kind: str) -> Iterable[Line]:
    for direction, name in WITH.items():
        there = _times(found, kind, direction, "seqjax", "torch")
        if not there:
            continue
        gains = by_both(there, lambda times, which: times["torch"][which] / times["seqjax"][which])
        rows, share = (len(there), len(ROWS)), [float(np.mean(np.array(g) > 1)) for g in gains]
        barred = direction == "backward"
        yield _line(
            f"{name}: torch / seqjax, geometric mean", map(mean_ratio, gains), rows, least=1 if barred else None
        )
        yield _line(f"{name}: share of rows faster than torch", share, rows, least=0.5 if barred else None)
        yield _line(
            f"{name}: seqjax / torch, worst row", [1 / min(g) for g in gains], rows, most=1.5 if barred else None
        )


def _temporaries(found: dict, kind: str) -> Iterable[Line]:
    for time, (most, name) in TEMPORARIES.items():
        rows = [row for row in ROWS if row.time == time]
        there = _times(found, kind, "backward", "seqjax", "flax RNN", rows=rows)
        if there:
            worst = max(_to_flax(times, "temporaries") for times in there)
            what = f"{WITH['backward']}: temporaries seqjax / flax RNN, T = {time}, worst row"
            yield _line(what, [worst], (len(there), len(rows)), most=most, bar=f"at most {name}")


def _compile(found: dict, kind: str) -> Iterable[Line]:
    for direction, name in WITH.items():
        there = _times(found, kind, direction, "seqjax", "flax RNN")
        if there:
            ratios = [_to_flax(times, "compile") for times in there]
            what = f"{name}: compile time seqjax / flax RNN, geometric mean"
            yield _line(what, [mean_ratio(ratios)], (len(there), len(ROWS)), most=1)


def linear_in_time(found: dict) -> list[Line]:
    """The slope of log(time) over log(T), from T = 1024, because shorter calls have a large constant part."""
    points = [(Row.parse(name), of) for name, of in found.get("growth", {}).get("T", {}).items()]
    points = sorted((row.time, of) for row, of in points if row.time >= 1024)
    lines = []
    for direction, name in WITH.items():
        for way in ("seqjax", "flax RNN", "torch"):
            there = [(time, of[direction][way]["min"]) for time, of in points if way in of.get(direction, {})]
            if len(there) >= 3:
                what = f"{name}: {way}, T = {there[0][0]} to {there[-1][0]}, slope of log(time) over log(T)"
                most = STEEPEST if way == "seqjax" else None
                lines.append(_line(what, [slope(there)], (1, 1), most=most))
    return lines


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of the line through (log x, log y)."""
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def jax_peers(times: dict) -> list[str]:
    return [way for way in times if way not in ("seqjax", "torch")]


def fastest(times: dict, which: str) -> float:
    """The time of the fastest JAX peer."""
    return min(times[way][which] for way in jax_peers(times))


def mean_ratio(ratios: Iterable[float]) -> float:
    """The geometric mean, the right mean for ratios."""
    return math.exp(np.mean(np.log(list(ratios))))


def by_both(there: list[dict], ratio: Callable[[dict, str], float]) -> list[list[float]]:
    """The ratios of all rows, by the minimum and by the median."""
    return [[ratio(times, which) for times in there] for which in ("min", "median")]


def _times(found: dict, kind: str, direction: str, *ways: str, rows: list[Row] = ROWS) -> list[dict]:
    """The times of the rows that have all these ways."""
    measured = [found["rows"].get(f"{kind} {row.name}", {}).get(direction, {}) for row in rows]
    return [times for times in measured if times and all(way in times for way in ways)]


def _to_flax(times: dict, field: str) -> float:
    return times["seqjax"][field] / times["flax RNN"][field]


def _line(what: str, figures: Iterable[float], rows: tuple[int, int], *, most=None, least=None, bar: str = "") -> Line:
    by_minimum, *by_median = figures
    text = f"{by_minimum:.3f}" + "".join(f" ({figure:.3f})" for figure in by_median)
    if most is None and least is None:
        return what, "", text, ""
    met = by_minimum <= most if least is None else by_minimum >= least
    bar = bar or (f"at most {most}" if least is None else f"at least {least}")
    verdict = "met" if met else "not met"
    return what, bar, text, verdict if rows[0] == rows[1] else f"{verdict} on {rows[0]} of {rows[1]} rows"
