"""The time of each part of an unroll on a CPU, beside the time of the whole unroll and the machine's peak.

    python -m benchmarks.breakdown        three cells, three sizes, with and without the kernel; a few minutes

Each part is compiled separately, timed on one chunk in turns with the other parts, and multiplied by the number of
chunks. The whole also slices the chunks and computes the loss, which the sum does not include. It can take less time
than the sum, because its data may still be in a cache and because it packs the kernel's weights once for all chunks.
The peak is the fastest square matrix product of XLA in the same minutes.

Needs the kernel (`seqjax info` says whether it is installed). Writes breakdown.json and breakdown.md beside this file.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

import seqjax as sj
from benchmarks.machine import call_times, in_turns, machine
from benchmarks.peers.rows import GATES, Row
from seqjax import kernels
from seqjax.sequence._execution.backward import BackwardLoop, KnownSteps
from seqjax.sequence._execution.chunks import chunk_length
from seqjax.sequence._execution.formulas import kernel_for
from seqjax.sequence._execution.forward import Loop, over_chunk, run_chunk
from seqjax.sequence._masked_step import emit_output
from seqjax.sequence._partition.plan import plan_of
from seqjax.sequence._partition.tracing import traced_one

CELLS = {"vanilla": sj.VanillaRNN, "lstm": sj.LSTM, "gru": sj.GRU}
ROWS = [Row(32, 128, 128, 128), Row(64, 150, 256, 256), Row(16, 128, 512, 512)]
SECONDS = 0.4  # per part


def switch(kernel: bool) -> None:
    """Selects the kernel or XLA for the loops, and clears what was compiled for the other."""
    os.environ["SEQJAX_KERNEL"] = "" if kernel else "off"
    jax.clear_caches()
    if kernels.available() is not kernel:
        sys.exit(f"expected the kernel for these rows: {kernels.status()}")


def peak() -> float:
    """GFLOP/s of the fastest square matrix product."""
    best = 0.0
    for n in (512, 1024, 2048):
        A = jax.random.normal(jax.random.key(0), (n, n))
        product = jax.jit(jnp.matmul)
        seconds = in_turns({"product": partial(call_times, partial(product, A, A))}, 1.0)["product"]["min"]
        best = max(best, 2e-9 * n**3 / seconds)
    return best


def parts(kind: str, row: Row) -> tuple[dict[str, tuple[object, float]], int]:
    """The parts of one chunk by name, each a call with its number of multiplications, and the number of chunks."""
    cell = CELLS[kind](row.features, row.hidden)
    params = cell.init(jax.random.key(0))
    one = (jnp.zeros(row.features), None, None, None)
    plan = plan_of(traced_one(cell, emit_output, params, cell.initial_state(params), one), True)
    loop_parts, leaves = plan.parts[0], [*plan.parts[0].consts, *jax.tree.leaves(params)]
    length, n = chunk_length(row.batch, row.time), row.hidden
    forward_loop = Loop(loop_parts, kernel_for(loop_parts), False, length)
    shape = (length, row.batch)
    keys = jax.random.split(jax.random.key(1), 4)
    x = [jax.random.normal(keys[0], (*shape, row.features))]
    state, before = (
        [jax.random.normal(keys[1], (*lead, *v.aval.shape)) for v in loop_parts.state] for lead in ((row.batch,), shape)
    )
    ct_kept = [jax.random.normal(keys[2], (*shape, n))]
    drives, results = ([jax.random.normal(key, (*shape, GATES[kind] * n))] for key in jax.random.split(keys[3]))
    everything = [True] * (len(leaves) + len(state) + 1)
    active = loop_parts.active(everything)

    def inputs(leaves, x):
        return over_chunk(loop_parts.compute_drives, shape, None, 0)(loop_parts.hoist(leaves), x)

    def loop(leaves, state, drives):
        hoisted = loop_parts.hoist(leaves)
        products = loop_parts.products_in_loop(hoisted, row.batch)
        return run_chunk(forward_loop, hoisted, products, state, drives, length)

    def recurrents(leaves, before, drives):
        return over_chunk(loop_parts.cut_results, shape, None, 0, 0)(loop_parts.hoist(leaves), before, drives)

    def back(leaves):
        return BackwardLoop(forward_loop, loop_parts.hoist(leaves), [True] * len(state), active)

    def replay(leaves, before, drives, results):
        first = [leaf[0] for leaf in before]
        saved = [leaf if is_saved else None for leaf, is_saved in zip(before, forward_loop.is_saved, strict=True)]
        return back(leaves).rematerialized(length, first, KnownSteps(saved, drives, results))

    def chain(leaves, state, before, drives, results, ct_kept):
        return back(leaves).run(length, state, KnownSteps(before, drives, results), ct_kept)

    def of_weights(leaves, x, before, drives, results):
        _, pull = jax.vjp(lambda leaves: (inputs(leaves, x), recurrents(leaves, before, drives)), leaves)
        return pull((drives, results))

    rows = length * row.batch
    of_x, of_h = (rows * GATES[kind] * n * size for size in (row.features, n))
    calls = {
        "forward: inputs' product": (partial(jax.jit(inputs), leaves, x), of_x),
        "forward: loop": (partial(jax.jit(loop), leaves, state, drives), of_h),
        "back: inputs' product again": (partial(jax.jit(inputs), leaves, x), of_x),
        "back: recurrent products again": (partial(jax.jit(recurrents), leaves, before, drives), of_h),
        "back: loop": (partial(jax.jit(chain), leaves, state, before, drives, results, ct_kept), of_h),
        "back: gradients of the weights": (
            partial(jax.jit(of_weights), leaves, x, before, drives, results), of_x + of_h
        ),
    }  # fmt: skip
    if not all(forward_loop.is_saved):
        calls["back: states that were not saved"] = (partial(jax.jit(replay), leaves, before, drives, results), 0)
    return calls, -(-row.time // length)


def whole(kind: str, row: Row) -> dict[str, object]:
    """The unroll, and its gradient with respect to the parameters."""
    cell = CELLS[kind](row.features, row.hidden)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (row.batch, row.time, row.features))
    fixed = jax.random.normal(jax.random.key(2), (row.batch, row.time, row.hidden))

    def value(params):
        return jnp.sum(sj.unroll(cell, params, xs)[1] * lax.stop_gradient(fixed))

    return {
        "forward": partial(jax.jit(lambda params: sj.unroll(cell, params, xs)[1]), params),
        "with backward": partial(jax.jit(jax.value_and_grad(value)), params),
    }


def measure(kind: str, row: Row, kernel: bool) -> dict[str, object]:
    switch(kernel)
    calls, chunks = parts(kind, row)
    ways = {name: call for name, (call, _) in calls.items()} | whole(kind, row)
    times = in_turns({name: partial(call_times, way) for name, way in ways.items()}, SECONDS)
    best = {name: seconds["min"] for name, seconds in times.items()}
    measured = {
        name: {"ms": 1e3 * chunks * best[name], "GFLOP/s": 2e-9 * products / best[name]}
        for name, (_, products) in calls.items()
    }
    return {
        "cell": kind,
        "row": row.name,
        "kernel": kernel,
        "parts": measured,
        "forward ms": 1e3 * best["forward"],
        "with backward ms": 1e3 * best["with backward"],
    }


def table(results: dict) -> str:
    top = results["peak GFLOP/s"]
    out = ["# Where the time of an unroll goes", ""]
    out += [f"- {results['machine']}. The peak: {top:.0f} GFLOP/s on all cores.", "", __doc__.split("\n\n")[2], ""]
    pairs = zip(results["rows"][::2], results["rows"][1::2], strict=True)  # with the kernel and without it
    for both in pairs:
        out += [f"## {both[0]['cell']}, (B, T, D, H) = ({both[0]['row'].replace(',', ', ')})", ""]
        out += ["| part | kernel, ms | GFLOP/s | of the peak | XLA alone, ms | GFLOP/s | of the peak |"]
        out += ["| --- |" + " --- |" * 6]
        out += [
            " | ".join([f"| {name}", *(cells(one["parts"][name], top) for one in both)]) + " |"
            for name in both[0]["parts"]
        ]
        for whole, begin in (("forward", "forward"), ("with backward", "")):
            sums = [sum(part["ms"] for name, part in one["parts"].items() if name.startswith(begin)) for one in both]
            out.append(f"| {whole}: the sum | {sums[0]:.1f} | | | {sums[1]:.1f} | | |")
            out.append(f"| {whole}: the whole | {both[0][whole + ' ms']:.1f} | | | {both[1][whole + ' ms']:.1f} | | |")
        out.append("")
    return "\n".join(out)


def cells(part: dict[str, float], top: float) -> str:
    rate = part["GFLOP/s"]
    return f"{part['ms']:.1f} | {rate:.0f} | {rate / top:.0%}" if rate else f"{part['ms']:.1f} | |"


def main() -> None:
    results = {"machine": machine("seqjax", "jax", "jaxlib"), "peak GFLOP/s": peak(), "rows": []}
    for kind in CELLS:
        for row in ROWS:
            for kernel in (True, False):
                results["rows"].append(measure(kind, row, kernel))
                print(kind, row.name, "kernel" if kernel else "XLA", flush=True)
    here = Path(__file__)
    here.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    here.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
