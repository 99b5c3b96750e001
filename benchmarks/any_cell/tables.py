"""Writes the measurements as a document: a summary of all cells, the verdicts, then times and sizes per cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.any_cell.bars import BARS, MEMORY_ROW, Summary, kernel_calls, summarize, verdicts
from benchmarks.any_cell.measure import KERNEL, OWN, XLA
from benchmarks.any_cell.pairs import CELLS
from benchmarks.peers.bars import WITH
from benchmarks.peers.measure import DIRECTIONS
from benchmarks.peers.rows import ROWS, Row
from benchmarks.peers.tables import BUSY, table

NOTES = f"""
Each cell runs twice with the same parameters and inputs in float32: with `sj.unroll`, and with the unroll of its own
library. Both must agree before they are timed: outputs within 2e-5, every gradient within 1e-4 of its norm. Forward is
the outputs. With backward is the value of sum(outputs * fixed weights) and its gradients with respect to the parameters
and the inputs. Times are the minimum (median) over calls in turns within one run, and every ratio is within one run. A
bar is judged by the minimum, over the nine sizes. The figure in brackets is by the median. At a row with †, other
processes kept more than {BUSY} of a processor busy.

"{XLA}" is seqjax without its C++ kernel. "{KERNEL}" is seqjax as it runs by default if the kernel is
built. If the compiled program does not call the kernel, both are one program, which is timed once: such a time has the
mark =.

Temporaries are `memory_analysis().temp_size_in_bytes` of the compiled call. Compile time is tracing, lowering and
compiling, after JAX's caches are cleared. Products per step are the matrix products in each innermost loop of the
compiled program: one number for each loop in the tables of the cells, the largest over all sizes in the summary. The
products inside the kernel are not counted.
"""


def document(results: dict) -> str:
    runs = sorted(used_runs(results))
    lines = ["# Any cell: sj.unroll beside the unroll of the cell's own library", ""]
    lines += [*(f"- {run}: {results['runs'][run]}." for run in runs), "", *NOTES.strip().splitlines(), ""]
    lines += summary_tables(results)
    for cell, entry in CELLS.items():
        rows = measured_rows(results, cell)
        if rows:
            lines += [f"## {entry.title}, beside {entry.own}", "", *time_tables(rows), *size_table(rows)]
    failed = [row["disagreement"] for row in results["rows"].values() if "disagreement" in row]
    lines += ["## Left out because the two unrolls disagree", "", *(f"- {line}" for line in failed)] if failed else []
    return "\n".join(lines).rstrip() + "\n"


def used_runs(results: dict) -> set[str]:
    """The runs that appear in the tables."""
    return {row["run"][direction] for row in results["rows"].values() for direction in row.get("run", {})}


def summary_tables(results: dict) -> list[str]:
    """The summary and the verdicts, one line per cell and way of seqjax."""
    lines = [
        (f"{entry.title}{label}", summarize(results, cell, way))
        for cell, entry in CELLS.items()
        for way, label in way_labels(results, cell).items()
    ]
    lines = [(name, summary) for name, summary in lines if any(summary.rows.values())]
    if not lines:
        return []
    head = ["cell"]
    head += [f"{name}: seqjax / own, worst row" for name in WITH.values()]
    head += [f"{name}: own / seqjax, geometric mean" for name in WITH.values()]
    head += [
        f"temporaries at {tuple(MEMORY_ROW)}: seqjax / own",
        "products per step, forward; with backward: seqjax (own)",
    ]
    body = [[name, *summary_figures(summary)] for name, summary in lines]
    judged = [[name, *(verdicts(summary)[bar] for bar in BARS)] for name, summary in lines]
    return [
        "## Summary",
        "",
        *table(head, body),
        "",
        *load_warning(results),
        "## The bars",
        "",
        *table(["cell", *BARS.values()], judged),
        "",
    ]


def way_labels(results: dict, cell: str) -> dict[str, str]:
    """The label after the name of a cell, for each way of seqjax that is a separate program."""
    ran, measured = kernel_calls(results, cell)
    if not measured:
        return {XLA: ", XLA's loops"}
    if not ran:
        return {XLA: ", XLA's loops (the kernel does not run it)"}
    return {XLA: ", XLA's loops", KERNEL: f", kernel in {ran} of {measured} calls"}


def summary_figures(summary: Summary) -> Iterator[str]:
    for pairs in (summary.slowest, summary.gain):
        for direction in DIRECTIONS:
            pair = pairs[direction]
            yield f"{pair[0]:.3f} ({pair[1]:.3f})" if pair else ""
    yield "" if summary.temporaries is None else f"{summary.temporaries:.3f}"
    yield "; ".join(
        f"{summary.products[direction]} ({summary.own_products[direction]})"
        for direction in DIRECTIONS
        if summary.products[direction] is not None
    )


def load_warning(results: dict) -> list[str]:
    loads = [
        load for row in results["rows"].values() for load in row.get("other load", {}).values() if load is not None
    ]
    busy = sum(load > BUSY for load in loads)
    return [f"{busy} of {len(loads)} rows and calls were measured beside other load (†).", ""] if busy else []


def time_tables(rows: list[tuple[Row, dict]]) -> list[str]:
    lines = []
    for direction, title in WITH.items():
        measured = [(row, result) for row, result in rows if direction in result]
        ways = ways_in(measured, direction)
        head = ["(B, T, D, H)", *ways, *(f"own library / {way}" for way in ways if way != OWN)]
        body = [time_line(row, result, direction, ways) for row, result in measured]
        lines += [f"### {title.capitalize()}, ms", "", *table(head, body), ""] if body else []
    return lines


def time_line(row: Row, result: dict, direction: str, ways: list[str]) -> list[str]:
    times = result[direction]
    mark = " †" if (result.get("other load", {}).get(direction) or 0) > BUSY else ""

    def show(way: str) -> str:
        if way not in times:
            return ""
        same = " =" if times[way].get("kernel") is False else ""
        return f"{1e3 * times[way]['min']:.2f} ({1e3 * times[way]['median']:.2f}){same}"

    ratios = [f"{times[OWN]['min'] / times[way]['min']:.2f}" if way in times else "" for way in ways if way != OWN]
    return [f"{tuple(row)}{mark}", *map(show, ways), *ratios]


def size_table(rows: list[tuple[Row, dict]]) -> list[str]:
    """Temporaries, compile time and products per step."""
    ways = ways_in(rows, *DIRECTIONS)
    head = ["(B, T, D, H)", *(f"{way}, MB" for way in ways), *(f"{way}, ms" for way in ways)]
    head += [f"{way}, products" for way in ways if way != KERNEL]
    body = []
    for row, result in rows:
        backward = result.get("backward", {})
        line = [f"{backward[way]['temporaries'] / 2**20:.2f}" if way in backward else "" for way in ways]
        line += [both(result, way, lambda numbers: f"{1e3 * numbers['compile']:.0f}") for way in ways]
        line += [
            both(result, way, lambda numbers: ", ".join(map(str, numbers["products"]))) for way in ways if way != KERNEL
        ]
        body.append([str(tuple(row)), *line])
    title = "### Temporaries of forward with backward; compile time and products per step, forward / with backward"
    return [title, "", *table(head, body), ""]


def both(result: dict, way: str, show: Callable[[dict], str]) -> str:
    """`show` of the numbers of forward and of backward, separated by a slash."""
    return " / ".join(show(result[direction][way]) for direction in DIRECTIONS if way in result.get(direction, {}))


def ways_in(rows: list[tuple[Row, dict]], *directions: str) -> list[str]:
    """The ways that were measured: seqjax first, its own library last."""
    measured = {way for _, result in rows for direction in directions for way in result.get(direction, {})}
    return [way for way in (XLA, KERNEL, OWN) if way in measured]


def measured_rows(results: dict, cell: str) -> list[tuple[Row, dict]]:
    """The rows of one cell that have times: the nine standard rows in their order, then others."""
    names = [
        name.split(" ") for name, row in results["rows"].items() if any(direction in row for direction in DIRECTIONS)
    ]
    rows = [Row.parse(size) for name, size in names if name == cell]
    rows.sort(key=lambda row: ROWS.index(row) if row in ROWS else len(ROWS))
    return [(row, results["rows"][f"{cell} {row.name}"]) for row in rows]
