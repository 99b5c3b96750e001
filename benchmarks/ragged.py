"""Padded batches, resets, and single steps: what recurrent reinforcement learning and inference run on a CPU.

    python -m benchmarks.ragged        about five minutes on two cores

- Padding: sequences of 10 % to 100 % of T steps, 55 % on average, as a mask (seqjax), `seq_lengths` (flax), a mask of
  Keras, and torch's packed sequences. The outputs of valid steps must agree.
- Resets: 3 % of the steps start anew. flax, equinox and torch have no resets, so their users write a scan over the cell
  that selects the initial state; here that is flax's cell. Keras and torch's layers have no way to reset.
- One step: one row from a carried state, as an agent or a sampler runs it, by `jax.jit` of the cell's step. Each call
  waits for its result. `sj.stream` also keeps the state and checks its input.
- A chunk: 16 steps of one row from a carried state, by `push` of `sj.stream`, flax's RNN and torch's layer.

Both directions are as in `benchmarks.peers`. All ways have the same weights, float32. Needs keras and torch. Writes
ragged.json and ragged.md beside this file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.machine import call_times, in_turns, machine
from benchmarks.peers import torch_process
from benchmarks.peers.rows import Row, inputs, weights

ROWS = [Row(128, 128, 256, 256), Row(32, 128, 128, 128), Row(8, 64, 64, 64)]
UNITS = (256, 1024)
CHUNK = 16
KINDS = ("lstm", "gru")
SECONDS = 2.0  # per way
REASONS = """A packed sequence has no padding in any product. seqjax leaves masked rows out of the recurrent products,
but computes the products of the input for all steps. One step of a small network is mostly the launch of a call."""
HERE = Path(__file__).with_suffix("")


def lengths(row: Row) -> np.ndarray:
    drawn = np.random.default_rng(0).uniform(0.1, 1.0, row.batch) * row.time
    return np.sort(np.maximum(drawn.astype(int), 1))[::-1].copy()


def resets(row: Row) -> np.ndarray:
    return np.random.default_rng(1).random((row.batch, row.time)) < 0.03


def jax_ways(kind: str, row: Row) -> dict[str, dict[str, tuple[Callable, object]]]:
    """For each task, the ways by name: a function from parameters and inputs to outputs, and its parameters."""
    import jax
    import jax.numpy as jnp

    import seqjax as sj
    from benchmarks.peers import jax_peers

    w = weights(kind, row)
    cell = {"lstm": sj.LSTM, "gru": sj.GRU}[kind](row.features, row.hidden)
    mask = jnp.arange(row.time) < jnp.asarray(lengths(row))[:, None]
    reset = jnp.asarray(resets(row))
    ours, flax, keras = (jax_peers.build(way, kind, row, w) for way in ("seqjax", "flax RNN", "keras"))

    def seqjax(params, xs, **options):
        return sj.unroll(cell, params, xs, **options)[1]

    def flax_padded(params, xs):
        outputs = flax.unroll(params, xs, seq_lengths=jnp.asarray(lengths(row)))
        return jnp.where(mask[..., None], outputs, 0)

    def keras_padded(params, xs):
        outputs = keras.unroll(params, xs, mask=mask)
        return jnp.where(mask[..., None], outputs, 0)

    def scan_with_resets(params, xs):
        import flax.linen as nn

        module = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[kind](row.hidden)
        of_cell = {"params": params["params"]["cell"]}
        zero = jnp.zeros((row.batch, row.hidden))
        first = (zero, zero) if kind == "lstm" else zero

        def step(carry, at):
            x, anew = at
            carry = jax.tree.map(lambda a, b: jnp.where(anew[:, None], a, b), first, carry)
            return module.apply(of_cell, carry, x)

        return jax.lax.scan(step, first, (xs.swapaxes(0, 1), reset.T))[1].swapaxes(0, 1)

    return {
        "whole": {"seqjax": (seqjax, ours.params)},
        "padded": {
            "seqjax": (partial(seqjax, mask=mask), ours.params),
            "seqjax without its kernel": (partial(seqjax, mask=mask, kernel=False), ours.params),
            "flax RNN": (flax_padded, flax.params),
            "keras": (keras_padded, keras.params),
        },
        "resets": {
            "seqjax": (partial(seqjax, reset=reset), ours.params),
            "seqjax without its kernel": (partial(seqjax, reset=reset, kernel=False), ours.params),
            "scan over flax's cell": (scan_with_resets, flax.params),
        },
    }


def torch_seconds(kind: str, row: Row, direction: str, calls: int) -> tuple[list[float], np.ndarray]:
    """The seconds of calls with a packed sequence, and the outputs; in a process of its own."""
    import torch

    layer = torch_process.TorchLayer(kind, row)
    of = torch.from_numpy(lengths(row))
    pack = partial(torch.nn.utils.rnn.pack_padded_sequence, lengths=of, batch_first=True)
    weighted = pack(layer.of_outputs).data

    def forward():
        with torch.inference_mode():
            return layer.module(pack(layer.xs))[0]

    def backward():
        layer.module.zero_grad(set_to_none=True)
        loss = (layer.module(pack(layer.xs))[0].data * weighted).sum()
        loss.backward()

    call = forward if direction == "forward" else backward
    seconds = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    outputs = torch.nn.utils.rnn.pad_packed_sequence(forward(), batch_first=True, total_length=row.time)[0]
    return seconds[1:], outputs.numpy()


def compare(kind: str, row: Row, pool) -> dict:
    """The times of all ways of one size, by task and direction."""
    import jax
    import jax.numpy as jnp

    xs, of_outputs = map(jnp.asarray, inputs(row))
    found, expected = {}, {}
    for direction in ("forward", "backward"):
        timers = {}
        for task, ways in jax_ways(kind, row).items():
            for way, (unroll, params) in ways.items():

                def call(params, xs, unroll=unroll, direction=direction):
                    if direction == "forward":
                        return unroll(params, xs)
                    return jax.value_and_grad(lambda p: jnp.sum(unroll(p, xs) * of_outputs))(params)

                compiled = jax.jit(call)
                if direction == "forward":
                    outputs = np.asarray(compiled(params, xs))
                    np.testing.assert_allclose(outputs, expected.setdefault(task, outputs), atol=3e-5, err_msg=way)
                timers[f"{task}/{way}"] = partial(call_times, partial(compiled, params, xs))
        _, outputs = pool.apply(torch_seconds, (kind, row, "forward", 1))
        np.testing.assert_allclose(outputs, expected["padded"], atol=3e-5, err_msg="torch")
        timers["padded/torch, packed"] = lambda n, d=direction: pool.apply(torch_seconds, (kind, row, d, max(n, 3)))[0]
        found[direction] = in_turns(timers, SECONDS)
    return found


def one_step(kind: str, hidden: int, pool) -> dict:
    """The times of one step of one row, and of a chunk of steps."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    import seqjax as sj
    from benchmarks.peers import jax_peers

    row = Row(1, 1, hidden, hidden)
    w, x = weights(kind, row), jnp.ones(hidden)
    cell = {"lstm": sj.LSTM, "gru": sj.GRU}[kind](hidden, hidden)
    params = jax_peers.build("seqjax", kind, row, w).params
    module = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[kind](hidden)
    of_flax = {"params": jax_peers.build("flax RNN", kind, row, w).params["params"]["cell"]}
    zero = jnp.zeros(hidden)
    carry = (zero, zero) if kind == "lstm" else zero
    ours, theirs = jax.jit(cell.step), jax.jit(module.apply)
    state = cell.initial_state(params)
    np.testing.assert_allclose(ours(params, state, x)[1], theirs(of_flax, carry, x)[1], atol=1e-5)
    stream = sj.stream(cell, params)
    step = {
        "seqjax": partial(call_times, partial(ours, params, state, x)),
        "sj.stream": partial(call_times, partial(stream.step, x)),
        "flax": partial(call_times, partial(theirs, of_flax, carry, x)),
        "torch": lambda n: pool.apply(torch_steps, (kind, hidden, 1, max(n, 30))),
    }
    xs, layer = jnp.ones((CHUNK, hidden)), nn.RNN(module, return_carry=True)
    of_layer = {"params": {"cell": of_flax["params"]}}
    chunk_of_flax = jax.jit(lambda carry, xs: layer.apply(of_layer, xs, initial_carry=carry))
    np.testing.assert_allclose(sj.stream(cell, params).push(xs), chunk_of_flax(carry, xs)[1], atol=1e-5)
    chunk = {
        "sj.stream": partial(call_times, partial(stream.push, xs)),
        "flax": partial(call_times, partial(chunk_of_flax, carry, xs)),
        "torch": lambda n: pool.apply(torch_steps, (kind, hidden, CHUNK, max(n, 30))),
    }
    return {"step": in_turns(step, SECONDS), "chunk": in_turns(chunk, SECONDS)}


def torch_steps(kind: str, hidden: int, steps: int, calls: int) -> list[float]:
    """The seconds of calls of a cell, or of a layer for several steps; in a process of its own."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cells, layers = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}, {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
    module = (cells if steps == 1 else layers)[kind](hidden, hidden)
    # A layer without a batch reads (time, features), and its state has one entry per layer.
    x, zero, seconds = torch.ones(steps, hidden), torch.zeros(1, hidden), []
    state = (zero, zero) if kind == "lstm" else zero
    with torch.inference_mode():
        for _ in range(calls + 5):
            began = time.perf_counter()
            module(x, state)
            seconds.append(time.perf_counter() - began)
    return seconds[5:]


def document(found: dict) -> str:
    lines = ["# Padded batches, resets and single steps", "", f"{found['machine']}.", ""]
    lines += [*__doc__.split("\n\n")[2].splitlines(), "", "Milliseconds are the minimum (median).", ""]
    for key, of in found["rows"].items():
        kind, name = key.split(" ")
        lines += [f"## {kind.upper()}, (B, T, D, H) = ({name.replace(',', ', ')})", ""]
        lines += ["| | forward | with backward |", "|---|---|---|"]
        for way in of["forward"]:
            times = [of[direction][way] for direction in ("forward", "backward")]
            row = " | ".join(f"{1e3 * t['min']:.2f} ({1e3 * t['median']:.2f})" for t in times)
            lines.append(f"| {way.replace('/', ': ')} | {row} |")
        ratios = [of[d]["resets/seqjax"]["min"] / of[d]["whole/seqjax"]["min"] for d in ("forward", "backward")]
        lines += ["", f"With resets / without: {ratios[0]:.2f} forward, {ratios[1]:.2f} with backward.", ""]
    for task, title in (("step", "One step"), ("chunk", f"A chunk of {CHUNK} steps")):
        tables = {key: of[task] for key, of in found["steps"].items()}
        names = list(next(iter(tables.values())))
        lines += [
            f"## {title} of one row, microseconds",
            "",
            f"| | {' | '.join(names)} |",
            "|---" * (1 + len(names)) + "|",
        ]
        for key, of in tables.items():
            row = " | ".join(f"{1e6 * of[way]['min']:.0f} ({1e6 * of[way]['median']:.0f})" for way in names)
            lines.append(f"| {key.upper()} | {row} |")
        lines.append("")
    lines += ["## Where a peer is faster", "", *slower(found)]
    return "\n".join(lines) + "\n"


def slower(found: dict) -> list[str]:
    """A line for each measurement in which a peer takes less time than seqjax."""
    lines = []
    for key, of in found["rows"].items():
        for direction, ways in of.items():
            for way, times in ways.items():
                task, name = way.split("/")
                ratio = ways[f"{task}/seqjax"]["min"] / times["min"]
                if ratio > 1 and "seqjax" not in name:
                    lines.append(f"- {key}, {direction}, {task}: {ratio:.2f} times the time of {name}.")
    for key, of in found["steps"].items():
        for task, ours in (("step", "seqjax"), ("step", "sj.stream"), ("chunk", "sj.stream")):
            times = {way: of[task][ours]["min"] / of[task][way]["min"] for way in ("flax", "torch")}
            lines += [f"- A {task}, {key}: {ours} takes {x:.2f} times the time of {way}." for way, x in times.items()
                      if x > 1]  # fmt: skip
    return [*lines, "", REASONS]


def main() -> None:
    found: dict = {"machine": machine("jax", "flax", "keras", "torch"), "rows": {}, "steps": {}}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for kind in KINDS:
            for row in ROWS:
                found["rows"][f"{kind} {row.name}"] = compare(kind, row, pool)
                print(kind, row.name, flush=True)
            for hidden in UNITS:
                found["steps"][f"{kind} {hidden}"] = one_step(kind, hidden, pool)
    HERE.with_suffix(".json").write_text(json.dumps(found, indent=1))
    text = document(found)
    HERE.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
