"""Where the time of an unroll goes on a CPU: every part of it alone, beside the whole and the machine's peak.

    python -m benchmarks.breakdown        three cells, three sizes, with the kernel and without it; a few minutes

Each part is compiled alone and timed on one chunk, in turns with the others, and multiplied by the number of chunks.
What the whole takes beyond them is the cutting of chunks and the loss. It takes less where it finds in a cache what
they do not, and by packing the kernel's weights once for all chunks. The peak is the fastest square product of matrices
that XLA runs in the same minutes.

Needs the kernel (`python -m seqjax.native`). Writes breakdown.json and breakdown.md beside this file.
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
from seqjax import native
from seqjax.guarded import last_output
from seqjax.split import backward, forward
from seqjax.split.chunks import Recurrence, over_chunk

CELLS = {"vanilla": sj.VanillaRNN, "lstm": sj.LSTM, "gru": sj.GRU}
ROWS = [Row(32, 128, 128, 128), Row(64, 150, 256, 256), Row(16, 128, 512, 512)]
SECONDS = 0.4  # for each part


def switch(kernel: bool) -> None:
    """Lets the kernel run the loops, or XLA."""
    os.environ["SEQJAX_NATIVE"] = "1" if kernel else "0"
    native.available.cache_clear()
    jax.clear_caches()
    if native.available() is not kernel:
        sys.exit("expected the kernel for these rows, found none: build it with python -m seqjax.native")


def peak() -> float:
    """GFLOP/s of the fastest square product."""
    best = 0.0
    for n in (512, 1024, 2048):
        A = jax.random.normal(jax.random.key(0), (n, n))
        product = jax.jit(jnp.matmul)
        seconds = in_turns({"product": partial(call_times, partial(product, A, A))}, 1.0)["product"]["min"]
        best = max(best, 2e-9 * n**3 / seconds)
    return best


def parts(kind: str, row: Row) -> tuple[dict[str, tuple[object, float]], int]:
    """Calls of one chunk by name with the multiplications of their products, and how many chunks there are."""
    cell = CELLS[kind](row.features, row.hidden)
    params = cell.init(jax.random.key(0))
    how = Recurrence(cell, last_output)
    chunks = how.chunks(jnp.zeros((row.batch, row.time, 1)))
    length, n = chunks.length, row.hidden
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (length, row.batch, row.features))
    state, before = (
        jax.tree.map(
            lambda leaf, lead=lead: jax.random.normal(keys[1], (*lead, *leaf.shape)), cell.initial_state(params)
        )
        for lead in ((row.batch,), (length, row.batch))
    )
    of_kept = jax.random.normal(keys[2], (length, row.batch, n))
    made = jax.random.normal(keys[3], (2, length, row.batch, GATES[kind] * n))
    made = made[0], made[1]
    flags = (None, None)

    def inputs(params, x):
        return over_chunk(cell.drive)(params, x)

    def loop(params, state, drives):
        in_loop = forward.turned(params, state)
        return forward.run_chunk(how, params, in_loop, state, state, drives, *flags)

    def recurrents(params, before):
        return over_chunk(cell.recur)(params, before)

    def replay(params, before, made):
        return backward._replay(how, params, None, before, made, None)

    def chain(params, state, before, made, of_kept):
        return backward._chain(how, params, (state, None), before, made, (*flags, of_kept))

    def of_weights(params, x, before, made):
        _, pull = jax.vjp(lambda params: (inputs(params, x), recurrents(params, before)), params)
        return pull(made)

    rows = length * row.batch
    of_x, of_h = (rows * GATES[kind] * n * size for size in (row.features, n))
    calls = {
        "forward: inputs' product": (partial(jax.jit(inputs), params, x), of_x),
        "forward: loop": (partial(jax.jit(loop), params, state, made[0]), of_h),
        "back: inputs' product again": (partial(jax.jit(inputs), params, x), of_x),
        "back: recurrent products again": (partial(jax.jit(recurrents), params, before), of_h),
        "back: loop": (partial(jax.jit(chain), params, state, before, made, of_kept), of_h),
        "back: gradients of the weights": (partial(jax.jit(of_weights), params, x, before, made), of_x + of_h),
    }
    if how.recalls(None):
        calls["back: states that were not saved"] = (partial(jax.jit(replay), params, before, made), 0)
    return calls, -(-row.time // length)


def whole(kind: str, row: Row) -> dict[str, object]:
    """The unroll, and its gradient by the parameters."""
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
