"""Time, memory and compile time of seqjax, flax (linen and nnx), haiku, equinox, Keras on JAX, and torch.

    python -m benchmarks.peers                       everything, about 12 to 25 minutes on two cores
    python -m benchmarks.peers --cells lstm --rows 32,128,128,128 --only backward
    python -m benchmarks.peers --ways seqjax torch   the times of the other libraries stay
    python -m benchmarks.peers --growth              only the curves over T and H
    python -m benchmarks.peers --quick               two rows in about two minutes, printed and not written

Needs `pip install dm-haiku equinox keras torch==2.13.0`. A library that is not installed is left out, with a message.
Writes peers.json and peers.md beside this package. A partial run replaces only what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.peers import tables
from benchmarks.peers.measure import ALL, DIRECTIONS, Bench, Disagreement, installed, resident
from benchmarks.peers.rows import EXTRAS, GROWTH, KINDS, ROWS, Row, default_pairs

PACKAGES = ("seqjax", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch")
CURVES = ("seqjax", "flax RNN", "torch")
QUICK = [Row(1, 672, 32, 32), Row(32, 50, 128, 128)]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=Row.parse, metavar="B,T,D,H", help="sizes; by default all nine")
    parser.add_argument(
        "--cells", nargs="+", choices=[*KINDS, *EXTRAS], metavar="CELL", help=", ".join([*KINDS, *EXTRAS])
    )
    parser.add_argument("--ways", nargs="+", choices=ALL, metavar="WAY", help=f"seqjax and these: {'; '.join(ALL)}")
    parser.add_argument("--only", choices=DIRECTIONS, help="one of the two calls")
    parser.add_argument("--growth", action="store_true", help="only the growth curves")
    parser.add_argument("--quick", action="store_true", help="two rows, little time for each, printed and not written")
    parser.add_argument("--budget", type=float, help="seconds for each row, call and way; by default 1.2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "peers", help="where, without a suffix")
    return parser.parse_args()


def pairs(arguments: argparse.Namespace) -> list[tuple[str, Row]]:
    """The cells and sizes to compare."""
    if arguments.growth:
        return []
    chosen = (arguments.cells, arguments.rows or (QUICK if arguments.quick else None))
    if chosen == (None, None):
        return default_pairs()
    return [(kind, row) for kind in chosen[0] or KINDS for row in chosen[1] or ROWS]


class Results:
    """All measurements, merged key by key. They are written after every row, so an interrupted run loses nothing."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        before = out and out.with_suffix(".json").exists()
        self.found = (
            json.loads(out.with_suffix(".json").read_text()) if before else {"runs": {}, "rows": {}, "growth": {}}
        )
        self.run = time.strftime("%Y-%m-%d %H:%M")
        self.found["runs"][self.run] = f"{machine(*PACKAGES)}; load before {os.getloadavg()[0]:.1f}"

    def merge(self, into: dict, name: str, measured: dict) -> None:
        old = into.setdefault(name, {})
        old.pop("disagreement", None)
        for part, values in measured.items():
            if part in DIRECTIONS:
                values = {way: value | {"run": self.run} for way, value in values.items()}
            old[part] = {**old.get(part, {}), **values} if isinstance(values, dict) else values
        self.write()

    def write(self) -> None:
        used = tables.runs_used(self.found) | {self.run}
        self.found["runs"] = {run: text for run, text in self.found["runs"].items() if run in used}
        if self.out:
            self.out.with_suffix(".json").write_text(json.dumps(self.found, indent=1) + "\n")
            self.out.with_suffix(".md").write_text(tables.document(self.found))


def compare(bench: Bench, kind: str, row: Row, results: Results, into: dict, name: str) -> bool:
    """Measures one row and merges it. Returns False if the libraries disagree."""
    try:
        measured = bench.compare(kind, row)
    except Disagreement as error:
        print(f"\n{name} is given up: {error}", flush=True)
        into[name] = {"disagreement": str(error)}
        return False
    results.merge(into, name, measured)
    show(f"{kind} {row.name}", measured)
    return True


def measure_resident(chosen: list[tuple[str, Row]], ways: list[str], results: Results) -> None:
    asked = [(way, *pair) for pair in chosen for way in CURVES if way in ways and pair[0] in KINDS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # bytes, not seconds, so they may run in parallel
        for (way, kind, row), size in zip(asked, pool.map(lambda one: resident(*one), asked), strict=True):
            if size is not None:
                print(f"{kind} {row.name}: peak resident memory of {way} {size / 2**20:.2f} MB", flush=True)
                results.merge(results.found["rows"], f"{kind} {row.name}", {"resident": {way: size}})


def measure_growth(bench: Bench, results: Results) -> list[bool]:
    found = results.found["growth"]
    todo = [(row, found.setdefault(axis, {})) for axis, rows in GROWTH.items() for row in rows]
    return [compare(bench, "lstm", row, results, into, row.name) for row, into in todo]


def show(name: str, measured: dict) -> None:
    for direction in DIRECTIONS:
        for way, of in measured.get(direction, {}).items():
            text = f"{1e3 * of['min']:9.3f} ({1e3 * of['median']:.3f}) ms of {of['calls']} calls"
            if "compile" in of:
                text += f", compile {1e3 * of['compile']:.0f} ms, {of['temporaries'] / 2**20:.2f} MB"
            print(f"{name:24} {direction:8} {way:26} {text}", flush=True)
        load = measured.get("other load", {}).get(direction)
        if load is not None and load > tables.BUSY:
            print(f"{name:24} {direction:8} other processes kept {load:.1f} processors busy", flush=True)


def main() -> int:
    arguments = read_arguments()
    ways = installed(["seqjax", *(way for way in arguments.ways or ALL if way != "seqjax")])
    directions = [arguments.only] if arguments.only else list(DIRECTIONS)
    budget = arguments.budget or (0.2 if arguments.quick else 1.2)
    chosen, results = pairs(arguments), Results(None if arguments.quick else arguments.out)
    everything = not (arguments.rows or arguments.cells or arguments.quick)
    bench, rows = Bench(ways, directions, budget), results.found["rows"]
    try:
        agreed = [compare(bench, kind, row, results, rows, f"{kind} {row.name}") for kind, row in chosen]
        if arguments.growth or everything:
            bench.ways = [way for way in ways if way in CURVES]
            agreed += measure_growth(bench, results)
    finally:
        bench.close()
    if "backward" in directions:
        measure_resident(chosen, ways, results)
    results.write()
    print("\n" + "\n".join(tables.bar_tables(results.found)))
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
