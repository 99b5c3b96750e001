"""The figures of each cell over all sizes, and the bars that they must meet. A bar is judged by the minimum time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.any_cell.measure import KERNEL, OWN
from benchmarks.peers.bars import WITH, by_both, mean_ratio
from benchmarks.peers.measure import DIRECTIONS
from benchmarks.peers.rows import ROWS, Row

SLOWEST = 1.03  # seqjax / own library, every row
LEAST_GAIN = 1.3  # own library / seqjax with backward, geometric mean of the rows
MOST_TEMPORARIES = 0.4  # seqjax / own library with backward, at MEMORY_ROW
MEMORY_ROW = Row(32, 128, 128, 128)
MOST_PRODUCTS = 1  # per step, forward and with backward

BARS = {
    **{
        f"slowest {direction}": f"{name}: seqjax / own, worst row, at most {SLOWEST}"
        for direction, name in WITH.items()
    },
    "gain backward": f"{WITH['backward']}: own / seqjax, geometric mean, at least {LEAST_GAIN}",
    "temporaries": f"temporaries: seqjax / own at most {MOST_TEMPORARIES}",
    "products": f"at most {MOST_PRODUCTS} product per step",
}


class Summary(NamedTuple):
    """The figures of one cell with one way of seqjax. A figure is None if nothing was measured for it.

    A pair is the figure by the minimum and by the median.
    """

    rows: dict[str, int]  # by direction: the number of rows with times
    slowest: dict[str, tuple[float, float] | None]  # by direction: max over rows of seqjax / own library
    gain: dict[str, tuple[float, float] | None]  # by direction: geometric mean over rows of own library / seqjax
    temporaries: float | None  # seqjax / own library
    products: dict[str, int | None]  # by direction: the most per step, over the rows and the innermost loops
    own_products: dict[str, int | None]


def summarize(results: dict, cell: str, way: str) -> Summary:
    """The figures of one cell over the nine rows."""
    times = {direction: rows_with_both(results, cell, direction, way) for direction in DIRECTIONS}
    memory = rows_with_both(results, cell, "backward", way, [MEMORY_ROW])
    return Summary(
        rows={direction: len(rows) for direction, rows in times.items()},
        slowest={direction: by_row(rows, way, lambda gains: 1 / min(gains)) for direction, rows in times.items()},
        gain={direction: by_row(rows, way, mean_ratio) for direction, rows in times.items()},
        temporaries=memory[0][way]["temporaries"] / memory[0][OWN]["temporaries"] if memory else None,
        products={direction: most_products(rows, way) for direction, rows in times.items()},
        own_products={direction: most_products(rows, OWN) for direction, rows in times.items()},
    )


def kernel_calls(results: dict, cell: str) -> tuple[int, int]:
    """The number of calls that ran the kernel, and the number of calls measured while the kernel was built."""
    ran = [
        times[KERNEL]["kernel"]
        for direction in DIRECTIONS
        for times in rows_with_both(results, cell, direction, KERNEL)
    ]
    return sum(ran), len(ran)


def verdicts(summary: Summary) -> dict[str, str]:
    """For each bar, "met" or "not met", on how many rows if some are missing, or "" if nothing was measured."""
    slowest = {
        f"slowest {direction}": judge(pair and pair[0] <= SLOWEST, summary.rows[direction])
        for direction, pair in summary.slowest.items()
    }
    gain, temporaries = summary.gain["backward"], summary.temporaries
    products = [count for count in summary.products.values() if count is not None]
    return slowest | {
        "gain backward": judge(gain and gain[0] >= LEAST_GAIN, summary.rows["backward"]),
        "temporaries": judge(temporaries and temporaries <= MOST_TEMPORARIES),
        "products": judge(max(products) <= MOST_PRODUCTS if products else None, min(summary.rows.values())),
    }


def judge(met: bool | None, rows: int = len(ROWS)) -> str:
    if met is None:
        return ""
    verdict = "met" if met else "not met"
    return verdict if rows == len(ROWS) else f"{verdict} on {rows} of {len(ROWS)} rows"


def rows_with_both(results: dict, cell: str, direction: str, way: str, rows: list[Row] = ROWS) -> list[dict]:
    """{way: numbers} of each row that has this way of seqjax."""
    measured = [results["rows"].get(f"{cell} {row.name}", {}).get(direction, {}) for row in rows]
    return [times for times in measured if way in times]


def by_row(rows: list[dict], way: str, reduce: Callable[[list[float]], float]) -> tuple[float, float] | None:
    """One figure of own library / seqjax over the rows, by the minimum and by the median."""
    if not rows:
        return None
    by_minimum, by_median = by_both(rows, lambda times, which: times[OWN][which] / times[way][which])
    return reduce(by_minimum), reduce(by_median)


def most_products(rows: list[dict], way: str) -> int | None:
    """None if a program called the kernel, inside which no product can be seen."""
    counts = [times[way].get("products") for times in rows]
    return None if not counts or None in counts else max(max(loops, default=0) for loops in counts)
