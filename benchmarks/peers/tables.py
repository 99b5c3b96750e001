"""Writes the measurements as a document: bars, then times, memory and compile time per row, then curves."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.peers.bars import WITH, Line, bars, fastest, jax_peers, linear_in_time
from benchmarks.peers.rows import EXTRAS, KINDS, ROWS, Row

TITLES = {
    "vanilla": "VanillaRNN",
    "lstm": "LSTM",
    "gru": "GRU",
    "relu": "VanillaRNN with ReLU, the variant that haiku has",
    "gru before": "GRU with the reset before the product and z that writes, the variant that haiku has",
}
CURVES = {"T": "Growth with T: LSTM, B = 4, D = 6, H = 32", "H": "Growth with H: LSTM, B = 16, T = 64, D = H"}
TO_FLAX_AND_TORCH = ("seqjax", "flax RNN", "torch")
BUSY = 0.1
NOTES = """
All libraries run with the same weights and inputs in float32. They must agree before they are timed: outputs within
2e-5, the gradient of W_hh within 1e-4 of its norm. Forward is the outputs from parameters and inputs. With backward is
the value of sum(outputs * fixed weights) and its gradient with respect to the parameters, but not to the inputs. All
inputs and outputs have the axes (batch, time, feature). Times are the minimum (median) over calls in turns within one
run. Torch runs in a separate process, with one thread per core, and never at the same time as JAX. A bar is judged by
the minimum. The figure in brackets is by the median. A row with * contains times of several runs. At a row with †,
other processes kept more than 0.1 of a processor busy. This slows torch down most, because its threads wait for each
other at every step.

Temporaries are `memory_analysis().temp_size_in_bytes` of the compiled call. Peak resident is the increase of the
resident memory of a separate process during three calls, measured from the end of imports, inputs and compilation.
Compile time is tracing, lowering and compiling, after JAX's caches are cleared.
"""


def document(found: dict) -> str:
    runs = sorted(runs_used(found))
    lines = ["# seqjax beside its peers", "", *(f"- {run}: {found['runs'][run]}." for run in runs)]
    lines += ["", *NOTES.strip().splitlines(), "", "## The bars", "", *bar_tables(found)]
    for kind in (*KINDS, *EXTRAS):
        rows = _measured_rows(found, kind)
        if rows:
            lines += [f"## {TITLES[kind]}", "", *time_tables(rows), *memory_table(rows), *compile_table(rows)]
    failed = [of["disagreement"] for of in found["rows"].values() if "disagreement" in of]
    lines += ["## Left out because two libraries disagree", "", *(f"- {line}" for line in failed), ""] if failed else []
    return "\n".join(lines + curve_tables(found)).rstrip() + "\n"


def runs_used(found: dict) -> set[str]:
    """The runs that appear in the tables."""
    curves = [of for axis in found["growth"].values() for of in axis.values()]
    every = [times for of in [*found["rows"].values(), *curves] for times in _directions(of)]
    return {time["run"] for times in every for time in times.values() if "run" in time}


def bar_tables(found: dict) -> list[str]:
    parts = [(TITLES[kind], bars(found, kind)) for kind in KINDS]
    parts.append(("Time linear in T, LSTM", linear_in_time(found)))
    loads = [load for of in found["rows"].values() for load in of.get("other load", {}).values() if load is not None]
    beside = sum(load > BUSY for load in loads)
    warning = [f"{beside} of {len(loads)} rows and calls were measured beside other load (†).", ""] if beside else []
    return [line for title, of in parts if of for line in _bar_table(title, of)] + warning


def _bar_table(title: str, lines: list[Line]) -> list[str]:
    return [f"### {title}", "", *table(["", "bar", "measured", ""], lines), ""]


def time_tables(rows: list[tuple[Row, dict]]) -> list[str]:
    lines = []
    for direction, title in WITH.items():
        there = [(row, of[direction]) for row, of in rows if direction in of]
        ways = _ways(of for _, of in there)
        head = ["(B, T, D, H)", *ways, "fastest JAX peer / seqjax", "torch / seqjax"]
        loads = [of.get("other load", {}).get(direction) for _, of in rows if direction in of]
        body = [_time_line(row, of, ways, load) for (row, of), load in zip(there, loads, strict=True)]
        lines += [f"### {title.capitalize()}, ms", "", *table(head, body), ""] if body else []
    return lines


def _time_line(row: Row, times: dict, ways: list[str], load: float | None) -> list[str]:
    marks = " *" * (len({time["run"] for time in times.values()}) > 1) + " †" * ((load or 0) > BUSY)
    cells = [
        f"{1e3 * times[way]['min']:.2f} ({1e3 * times[way]['median']:.2f})" if way in times else "" for way in ways
    ]
    ours = times["seqjax"]["min"]
    cells.append(f"{fastest(times, 'min') / ours:.2f}" if jax_peers(times) else "")
    cells.append(f"{times['torch']['min'] / ours:.2f}" if "torch" in times else "")
    return [f"{tuple(row)}{marks}", *cells]


def memory_table(rows: list[tuple[Row, dict]]) -> list[str]:
    rows = [(row, of) for row, of in rows if "backward" in of]
    ways = [way for way in _ways(of["backward"] for _, of in rows) if way != "torch"]
    resident = _ways(of.get("resident", {}) for _, of in rows)
    body = []
    for row, of in rows:
        temporaries = [of["backward"].get(way, {}).get("temporaries") for way in ways]
        body.append(
            [str(tuple(row)), *map(_mb, [*temporaries, *(of.get("resident", {}).get(way) for way in resident)])]
        )
    head = ["(B, T, D, H)", *ways, *(f"{way}, resident" for way in resident)]
    title = "### Memory of forward with backward, MB: temporaries, then peak resident"
    return [title, "", *table(head, body), ""] if body else []


def compile_table(rows: list[tuple[Row, dict]]) -> list[str]:
    ways = [way for way in _ways(times for _, of in rows for times in _directions(of)) if way != "torch"]
    body = []
    for row, of in rows:
        seconds = [[times[way]["compile"] for times in _directions(of) if way in times] for way in ways]
        body.append([str(tuple(row)), *(" / ".join(f"{1e3 * part:.0f}" for part in parts) for parts in seconds)])
    title = "### Tracing and compiling, ms: forward / with backward"
    return [title, "", *table(["(B, T, D, H)", *ways], body), ""]


def curve_tables(found: dict) -> list[str]:
    lines = []
    for axis, title in CURVES.items():
        points = sorted((Row.parse(name), of) for name, of in found.get("growth", {}).get(axis, {}).items())
        points = [(row, of) for row, of in points if _directions(of)]
        head = [axis, *(f"{way}, {direction}" for direction in WITH.values() for way in TO_FLAX_AND_TORCH)]
        head += ["seqjax, MB", "flax RNN, MB"]
        body = [[str(row.time if axis == "T" else row.hidden), *_curve_line(row, of)] for row, of in points]
        note = "Microseconds per step (minimum), and temporaries of forward with backward."
        lines += [f"## {title}", "", note, "", *table(head, body), ""] if body else []
    return lines


def _curve_line(row: Row, of: dict) -> list[str]:
    times = [of.get(direction, {}).get(way) for direction in WITH for way in TO_FLAX_AND_TORCH]
    cells = [f"{1e6 * time['min'] / row.time:.2f}" if time else "" for time in times]
    return cells + [_mb(of.get("backward", {}).get(way, {}).get("temporaries")) for way in ("seqjax", "flax RNN")]


def table(head: list[str], body: Iterable[Iterable[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _measured_rows(found: dict, kind: str) -> list[tuple[Row, dict]]:
    """The measured rows: those of the comparison in their order, then others."""
    names = [name.rsplit(" ", 1) for name, of in found["rows"].items() if _directions(of)]
    there = [Row.parse(size) for of_kind, size in names if of_kind == kind]
    there.sort(key=lambda row: ROWS.index(row) if row in ROWS else len(ROWS))
    return [(row, found["rows"][f"{kind} {row.name}"]) for row in there]


def _directions(of: dict) -> list[dict]:
    return [of[direction] for direction in WITH if direction in of]


def _ways(of: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(way for times in of for way in times))


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.2f}"
