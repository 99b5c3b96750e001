"""Parallel-in-time evaluation: iterations, work and time, compared with the sequential scan.

    python -m benchmarks.parallel_in_time              everything, about seven minutes on one core
    python -m benchmarks.parallel_in_time --only chaos one part again; the other rows stay

The cells are tanh networks of H units in float32, on one sequence of T steps. W_hh is random with a gain of 0.7
(contracting) or 3. With a gain of 3, networks with tens of units are chaotic, and networks of one or two units only
oscillate. A row has at most 100 iterations.

- Iterations, converged, residual and exponent come from the returned record and do not depend on the machine.
- Work is modelled, in floating-point operations per iteration. DEER: T (2 H^2 + 4 H^3), two matrix products per step in
  an associative scan. QuasiDEER: T (2 H^2 + 6 H). ELK: T (2 H^2 + 52 H^3), two joins of eight products and an inverse,
  and the backward sweep. The sequential scan: T * 2 H^2.
- Time is the minimum of two calls after a first call, in turns with `sj.unroll` in the same run.
- The break-even on a GPU is a prediction from a model, not a measurement.

Rows that need too much memory or time are left out, with the number that is too large. Writes parallel_in_time.json and
parallel_in_time.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

from benchmarks.machine import machine

TIMES, UNITS, GAINS = (1_000, 10_000, 100_000), (1, 2, 8, 32, 64), {"contracting": 0.7, "chaotic": 3.0}
METHODS = ("DEER", "QuasiDEER", "ELK")
MOST = 100  # iterations
MEMORY = 6e9  # bytes of matrices per row, at most
SPEED = 4e9  # operations per second of small products on a two-core CPU, to predict which rows take too long
ROW = 6.0  # expected seconds of one call, at most

# The GPU of the prediction: the data sheet of an H100, and a scan step that the host launches, as XLA does it.
BLOCK, STEP, LAUNCH, BANDWIDTH, FLOPS = 16, 8e-6, 4e-6, 3.0e12, 2.5e13
TURN = {"DEER": 0, "QuasiDEER": 0, "ELK": 10}  # additional launches per turn of the associative scan's loops
OTHERS = 20  # launches per iteration outside the associative scan


def matrices(method: str, T: int, H: int) -> float:
    """Bytes of Jacobians, scan levels and results that are live together. ELK has three matrices per step."""
    return {"DEER": 16.0 * T * H * H, "QuasiDEER": 16.0 * T * H, "ELK": 48.0 * T * H * H}[method]


def work(method: str, T: int, H: int) -> float:
    """Modelled floating-point operations of one iteration."""
    return T * {"DEER": 2.0 * H**2 + 4 * H**3, "QuasiDEER": 2.0 * H**2 + 6 * H, "ELK": 52.0 * H**3 + 2 * H**2}[method]


def problem(kind: str, T: int, H: int):
    import jax
    import jax.numpy as jnp

    import seqjax as sj

    W = GAINS[kind] * jax.random.normal(jax.random.key(H), (H, H)) / math.sqrt(H)
    U = 0.5 * jax.random.normal(jax.random.key(1), (H, 1))
    return sj.VanillaRNN(1, H), sj.VanillaParams(U, W, jnp.zeros(H)), jax.random.normal(jax.random.key(2), (1, T, 1))


def called(function, *given) -> tuple[object, float]:
    import jax

    began = time.perf_counter()
    result = jax.block_until_ready(function(*given))
    return result, time.perf_counter() - began


def row(kind: str, name: str, T: int, H: int, per_iteration: dict) -> dict:
    """One line of the table."""
    import numpy as np

    import seqjax as sj

    found = {"kind": kind, "method": name, "T": T, "H": H, "work": work(name, T, H), "bytes": matrices(name, T, H)}
    if found["bytes"] > MEMORY:
        return found | {"left out": f"{found['bytes'] / 1e9:.1f} GB of matrices"}
    known = per_iteration.get((name, H))  # (T, seconds per iteration) of the last length; seconds grow with T
    expected = known[1] * T / known[0] if known else found["work"] / SPEED
    most = int(min(MOST, ROW / expected))
    if most < 10:
        return found | {"left out": f"{expected:.1f} s an iteration"}
    cell, params, xs = problem(kind, T, H)
    method = getattr(sj, name)()

    def parallel(params, xs):  # no jit here, so that the contracting and the chaotic row share compiled code
        return sj.unroll_parallel(cell, params, xs, method=method, max_iterations=most)

    def scan(params, xs):
        return sj.unroll(cell, params, xs)

    (result, record), _ = called(parallel, params, xs)
    expected, _ = called(scan, params, xs)
    seconds = {"parallel": math.inf, "scan": math.inf}
    for _ in range(2):
        for way, function in (("parallel", parallel), ("scan", scan)):
            seconds[way] = min(seconds[way], called(function, params, xs)[1])
        if seconds["parallel"] > ROW / 4:
            break
    iterations = int(record.iterations[0])
    per_iteration[name, H] = T, seconds["parallel"] / max(iterations, 1)
    return found | {
        "most": most,
        "iterations": iterations,
        "converged": bool(record.converged[0]),
        "residual": float(record.residual[0]),
        "exponent": float(record.exponent[0]),
        "difference": float(np.abs(np.asarray(result[1]) - np.asarray(expected[1])).max()),
        "seconds": seconds,
        "work of all over the scan's": found["work"] * iterations / (2.0 * T * H * H),
    }


def predicted(method: str, T: int, H: int, iterations: float) -> float:
    """Predicted seconds on a GPU: turns and launches, plus the larger of memory traffic and matrix products."""
    turns = BLOCK + math.log2(max(2.0, T / BLOCK))
    launches = turns * (STEP + TURN[method] * LAUNCH) + OTHERS * LAUNCH
    traffic = 2.5 * matrices(method, T, H) / BANDWIDTH
    return iterations * (launches + max(traffic, work(method, T, H) / FLOPS))


def chaos() -> list[dict]:
    """Iterations until convergence for several T, for a chaotic cell and without a small limit."""
    import seqjax as sj

    found = []
    for T in (125, 250, 500, 1000):
        cell, params, xs = problem("chaotic", T, 32)
        for name in ("DEER", "QuasiDEER"):
            _, record = sj.unroll_parallel(cell, params, xs, method=getattr(sj, name)(), max_iterations=T)
            numbers = {"iterations": int(record.iterations[0]), "exponent": float(record.exponent[0])}
            found.append({"T": T, "method": name, "converged": bool(record.converged[0])} | numbers)
    return found


def break_even(rows: list[dict]) -> list[dict]:
    """For each method and H: the iterations of the contracting rows, and the T from which the model predicts a gain."""
    found = []
    for method in METHODS:
        for H in UNITS:
            some = [
                r for r in rows if (r["method"], r["H"], r["kind"]) == (method, H, "contracting") and r.get("converged")
            ]
            if not some:
                continue
            k = max(r["iterations"] for r in some)
            lengths = [int(10 ** (e / 20)) for e in range(20, 121)]
            pays = [T for T in lengths if predicted(method, T, H, k) < T * STEP]
            gains = {str(T): T * STEP / predicted(method, T, H, k) for T in TIMES}
            found.append({"method": method, "H": H, "iterations": k, "from": pays[0] if pays else None, "gains": gains})
    return found


def table(found: dict, versions: str) -> str:
    lines = ["# Parallel in time against the scan", "", f"{versions}, float32, one sequence.", ""]
    lines += [
        "The cells are tanh networks of H units with W_hh of gain 0.7 (contracting) or 3 (chaotic if the exponent is "
        f"positive). `of` is the limit on the iterations: {MOST}, or fewer if a row would take more than {ROW:.0f} s. "
        "Residuals are relative to the states. `work` is the work of all iterations divided by the work of the scan, "
        "by the model in the script. Times are minima of calls in turns on a CPU, on which the scan should be faster. "
        "The last column is the time of the parallel method divided by the time of the scan. The error is the "
        "difference from the scan. In converged chaotic rows it is as large as between any two programs with different "
        "rounding errors.",
        "",
        "| cell | method | T | H | iterations of | converged | residual | exponent | error | work | ms | scan | x |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        head = f"| {r['kind']} | {r['method']} | {r['T']} | {r['H']} | "
        if "left out" in r:
            lines.append(head + f"left out: {r['left out']} |  |  |  |  |  |  |  |  |")
            continue
        ms, scan = 1e3 * r["seconds"]["parallel"], 1e3 * r["seconds"]["scan"]
        lines.append(
            head + f"{r['iterations']} of {r['most']} | {'yes' if r['converged'] else 'no'} | {r['residual']:.1e} | "
            f"{r['exponent']:+.2f} | {r['difference']:.1e} | {r['work of all over the scan' + chr(39) + 's']:.0f} | "
            f"{ms:.1f} | {scan:.1f} | {ms / scan:.1f} |"
        )
    lines += [
        "",
        "## Break-even on a GPU: a prediction, not a measurement",
        "",
        f"The scan takes {1e6 * STEP:.0f} us per step, one turn of a loop that the host controls, for any H up to 64. "
        f"An iteration takes {BLOCK} + log2(T / {BLOCK}) such turns and {OTHERS} launches of {1e6 * LAUNCH:.0f} us. "
        f"ELK has {TURN['ELK']} more launches per turn. To this, add the longer of two times: 2.5 passes over the "
        f"matrices at {BANDWIDTH / 1e12:.0f} TB/s, or their products at {FLOPS / 1e12:.0f} Tflop/s. The number of "
        "iterations is the largest of all contracting rows. A sequential kernel that keeps its weights in registers "
        "takes 2 us per step. Compared with it, every gain is a quarter of the number in the table. One row was "
        "measured: in [gpu.md](gpu.md) DEER evaluates an LSTM of two units over 10 000 steps in 1.2 ms, where the scan "
        "takes 43 times and `sj.unroll` 18 times as long.",
        "",
        "| method | H | iterations | faster from T | gain at 1 000 | at 10 000 | at 100 000 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["break-even"]:
        gains = " | ".join(f"{r['gains'][str(T)]:.1f}" for T in TIMES)
        lines.append(f"| {r['method']} | {r['H']} | {r['iterations']} | {r['from'] or 'never'} | {gains} |")
    lines += [
        "",
        "## Where perturbations grow: iterations until convergence",
        "",
        "H = 32, gain 3, without a limit on the iterations. Their number grows with T, so no length is faster.",
        "",
        "| method | T | iterations | converged | exponent |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(found["chaos"], key=lambda r: r["method"]):
        converged = "yes" if r["converged"] else "no"
        lines.append(f"| {r['method']} | {r['T']} | {r['iterations']} | {converged} | {r['exponent']:+.2f} |")
    return "\n".join(lines) + "\n"


def rows(seconds: float) -> list[dict]:
    """Measures the rows of the table, until `seconds` have passed."""
    began, found, per_iteration = time.perf_counter(), [], {}
    for T, H, kind, name in itertools.product(TIMES, UNITS, GAINS, METHODS):
        if time.perf_counter() - began > seconds:
            found.append({"kind": kind, "method": name, "T": T, "H": H, "left out": "the time of the script was over"})
        else:
            found.append(row(kind, name, T, H, per_iteration))
        print(f"{time.perf_counter() - began:.0f} s", json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400.0, help="start no new row of the table after so long")
    parser.add_argument("--only", choices=["rows", "chaos"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    here = Path(__file__).with_suffix("")
    found = json.loads(here.with_suffix(".json").read_text())["found"] if arguments.only else {}
    if arguments.only != "rows":
        found["chaos"] = chaos()
    if arguments.only != "chaos":
        found["rows"] = rows(arguments.seconds)
    found["break-even"] = break_even(found["rows"])
    versions = f"One process on {len(os.sched_getaffinity(0))} of {machine('jax', 'jaxlib')}"
    here.with_suffix(".json").write_text(json.dumps({"machine": versions, "found": found}, indent=1) + "\n")
    here.with_suffix(".md").write_text(table(found, versions))
    print("\n" + table(found, versions))


if __name__ == "__main__":
    sys.exit(main())
