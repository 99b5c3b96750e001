"""Time, memory and compile time of `sj.unroll` for any cell, compared with the unroll of the cell's own library.

    python -m benchmarks.any_cell                        everything, 20 to 40 minutes on two cores
    python -m benchmarks.any_cell --cells linen-lstm peephole --rows 32,128,128,128 --only backward
    python -m benchmarks.any_cell --quick                two rows in two minutes, printed and not written

The cells are LSTM and GRU of flax linen, flax nnx and equinox, the LSTM of haiku, four cells as a user writes them, and
the cells that seqjax exports. Without haiku (`pip install dm-haiku`) its cell is left out. Each call of seqjax is
measured with XLA's loops only, and with the C++ kernel if it is installed and the compiled
program calls it.

Writes any_cell.json and any_cell.md beside this package. A partial run replaces the rows that it measures and keeps the
others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax

from benchmarks.any_cell import tables
from benchmarks.any_cell.measure import KERNEL, compare, seqjax_ways
from benchmarks.any_cell.pairs import CELLS, installed_cells
from benchmarks.machine import machine
from benchmarks.peers.measure import DIRECTIONS, Disagreement
from benchmarks.peers.rows import ROWS, Row

PACKAGES = ("seqjax", "jax", "jaxlib", "flax", "dm-haiku", "equinox")
QUICK = [Row(1, 672, 32, 32), Row(32, 50, 128, 128)]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=Row.parse, metavar="B,T,D,H", help="sizes; by default all nine")
    parser.add_argument("--cells", nargs="+", choices=CELLS, metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--only", choices=DIRECTIONS, help="one of the two calls")
    parser.add_argument("--quick", action="store_true", help="two rows, little time for each, printed and not written")
    parser.add_argument("--budget", type=float, help="seconds for each row, call and way; by default 1.2")
    default = Path(__file__).parents[1] / "any_cell"
    parser.add_argument("--out", type=Path, default=default, help="the files to write, without a suffix")
    return parser.parse_args()


class Results:
    """All measurements. They are written after every row, so an interrupted run loses nothing."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.all = {"runs": {}, "rows": {}}
        if out and out.with_suffix(".json").exists():
            self.all = json.loads(out.with_suffix(".json").read_text())
        self.run = time.strftime("%Y-%m-%d %H:%M")
        kernel = "kernel installed" if KERNEL in seqjax_ways() else "no kernel"
        self.all["runs"][self.run] = f"{machine(*PACKAGES)}; {kernel}; load before {os.getloadavg()[0]:.1f}"

    def merge(self, name: str, measured: dict) -> None:
        """Replaces the measured calls of a row; a call that was not measured stays."""
        row = self.all["rows"].setdefault(name, {})
        row.pop("disagreement", None)
        directions = [direction for direction in DIRECTIONS if direction in measured]
        row.update({part: measured[part] for part in (*directions, "difference")})
        row["other load"] = row.get("other load", {}) | measured["other load"]
        row["run"] = row.get("run", {}) | dict.fromkeys(directions, self.run)
        self.write()

    def disagree(self, name: str, error: Disagreement) -> None:
        self.all["rows"][name] = {"disagreement": str(error)}
        self.write()

    def write(self) -> None:
        used = tables.used_runs(self.all) | {self.run}
        self.all["runs"] = {run: text for run, text in self.all["runs"].items() if run in used}
        if self.out:
            self.out.with_suffix(".json").write_text(json.dumps(self.all, indent=1) + "\n")
            self.out.with_suffix(".md").write_text(tables.document(self.all))


def print_row(name: str, measured: dict) -> None:
    for direction in DIRECTIONS:
        for way, numbers in measured.get(direction, {}).items():
            products = ", ".join(map(str, numbers["products"])) if "products" in numbers else "not seen"
            same = " (the program of XLA's loops)" if numbers.get("kernel") is False else ""
            print(
                f"{name:34} {direction:8} {way:20} {1e3 * numbers['min']:9.3f} ({1e3 * numbers['median']:.3f}) ms "
                f"of {numbers['calls']} calls, compile {1e3 * numbers['compile']:.0f} ms, "
                f"{numbers['temporaries'] / 2**20:.2f} MB, products {products}{same}",
                flush=True,
            )
        load = measured["other load"].get(direction)
        if load is not None and load > tables.BUSY:
            print(f"{name:34} {direction:8} other processes kept {load:.1f} processors busy", flush=True)


def main() -> int:
    arguments = read_arguments()
    directions = [arguments.only] if arguments.only else list(DIRECTIONS)
    budget = arguments.budget or (0.2 if arguments.quick else 1.2)
    results, agreed = Results(None if arguments.quick else arguments.out), True
    jax.jit(lambda x: x + 1).lower(1.0).compile()  # the first compilation of a process takes longer than others
    for cell in installed_cells(arguments.cells or list(CELLS)):
        for row in arguments.rows or (QUICK if arguments.quick else ROWS):
            name = f"{cell} {row.name}"
            try:
                measured = compare(cell, row, directions, budget)
            except Disagreement as error:
                agreed = False
                print(f"{name} is left out: {error}", flush=True)
                results.disagree(name, error)
                continue
            results.merge(name, measured)
            print_row(name, measured)
    print("\n" + "\n".join(tables.summary_tables(results.all)))
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
