"""Compares the ways to run an LSTM over time on a GPU.

    python -m benchmarks.gpu               all sizes, under ten minutes on one GPU; writes gpu.json and gpu.md,
                                           or with --precision tf32 gpu_tf32.json and gpu_tf32.md
    python -m benchmarks.gpu --dry-run     tiny sizes on any device, also a CPU; writes nothing

- scan: `lax.scan` over `jax.vmap(cell.step)`, as a user would write it.
- flax: `nn.RNN(nn.LSTMCell)`, and with `nn.OptimizedLSTMCell`.
- seqjax: `sj.unroll`.
- jax.experimental.rnn: cuDNN, called from JAX; on a GPU only.
- torch: cuDNN, called from torch in a separate process, if torch sees the GPU.
- DEER: `sj.unroll_parallel`, Newton over all steps at once, if all Jacobians fit into --jacobians gigabytes.

Each way runs forward, and forward with backward (the gradient of sum(outputs * fixed weights) with respect to the
parameters). The share of the roofline is the least possible time over the measured time. The least possible time is the
larger of arithmetic and memory traffic. The arithmetic is the matrix products at the device's float32 rate, without
tensor cores unless --precision is tf32. The traffic reads inputs and weights and writes outputs once; with backward it
is three times as much. The model ignores that each step waits for the step before, so no way can come near 1 at small
sizes. Kernels per iteration are the launches in the innermost compiled loops.

Needs `jax[cuda]` and seqjax; torch is optional.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.hlo import loops, weight_shapes
from benchmarks.machine import call_times, in_turns, machine
from benchmarks.peers.rows import Row, Weights, inputs, weights
from benchmarks.peers.torch_process import TorchProcess

SIZES = [
    Row(16, 1024, 768, 768),
    Row(64, 512, 256, 256),
    Row(32, 375, 512, 512),
    Row(16, 10_000, 1, 2),
    Row(16, 100_000, 1, 8),
]
TINY = [Row(2, 12, 3, 5), Row(3, 40, 1, 2)]
DIRECTIONS = ("forward", "backward")
DEVICES = {  # dense float32 and TF32 operations per second, and bytes per second, from the data sheets
    "H200": (67e12, 494e12, 4.8e12),
    "H100": (67e12, 494e12, 3.35e12),
    "A100": (19.5e12, 156e12, 1.555e12),
    "V100": (15.7e12, 15.7e12, 0.9e12),
    "L4": (30.3e12, 60e12, 0.3e12),
    "T4": (8.1e12, 8.1e12, 0.32e12),
}


class Left(Exception):
    """The reason why a way is left out."""


class Way(NamedTuple):
    """One way to run the LSTM: its parameters, and a function from (params, xs) to the outputs."""

    params: Any
    unroll: Callable


def our_cell(row: Row, w: Weights):
    import jax
    import jax.numpy as jnp

    import seqjax as sj

    return sj.LSTM(row.features, row.hidden), jax.tree.map(jnp.asarray, sj.LSTMParams(*w[:3]))


def scan(row: Row, w: Weights, arguments: argparse.Namespace) -> Way:
    import jax

    cell, params = our_cell(row, w)

    def unroll(params, xs):
        first = jax.vmap(lambda _: cell.initial_state(params))(xs)
        step = jax.vmap(lambda state, x: cell.step(params, state, x))
        return jax.lax.scan(step, first, xs.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Way(params, unroll)


def flax(row: Row, w: Weights, arguments: argparse.Namespace, way: str = "flax RNN") -> Way:
    from benchmarks.peers import jax_peers

    peer = jax_peers.build(way, "lstm", row, w)
    return Way(peer.params, peer.unroll)


def fast(row: Row, w: Weights, arguments: argparse.Namespace) -> Way:
    import seqjax as sj

    cell, params = our_cell(row, w)
    return Way(params, lambda params, xs: sj.unroll(cell, params, xs)[1])


def cudnn(row: Row, w: Weights, arguments: argparse.Namespace) -> Way:
    import jax
    import jax.numpy as jnp
    from jax.experimental import rnn

    if jax.default_backend() != "gpu":
        raise Left("it runs on a GPU only")
    flat = jnp.concatenate([jnp.ravel(part) for part in (w.W_xh, w.W_hh, w.b_h, np.zeros_like(w.b_h))])
    zero = jnp.zeros((1, row.batch, row.hidden))
    lengths = jnp.full(row.batch, row.time, jnp.int32)
    sizes = {"input_size": row.features, "hidden_size": row.hidden, "num_layers": 1, "dropout": 0.0}
    precision = {"float32": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.HIGH}[arguments.precision]

    def unroll(flat, xs):
        return rnn.lstm(xs, zero, zero, flat, lengths, *sizes.values(), False, precision)[0]

    return Way(flat, unroll)


def deer(row: Row, w: Weights, arguments: argparse.Namespace) -> Way:
    import seqjax as sj

    if not hasattr(sj, "unroll_parallel"):
        raise Left("this seqjax has no unroll_parallel")
    size = 4 * row.batch * row.time * (2 * row.hidden) ** 2
    if size > arguments.jacobians * 1e9:
        raise Left(f"its Jacobians take {size / 1e9:.1f} GB")
    cell, params = our_cell(row, w)

    def unroll(params, xs):
        (_, outputs), _ = sj.unroll_parallel(cell, params, xs, method=sj.DEER())
        return outputs

    return Way(params, unroll)


WAYS = {
    "scan": scan,
    "flax": flax,
    "flax, optimized cell": partial(flax, way="flax RNN, optimized cell"),
    "seqjax": fast,
    "jax.experimental.rnn": cudnn,
    "DEER": deer,
}


def measure(row: Row, arguments: argparse.Namespace, torch: TorchProcess | None) -> dict:
    """Returns {way: {direction: numbers}}, or {way: {"left out": reason}}."""
    import jax

    w, arrays = weights("lstm", row), jax.device_put(inputs(row))
    found, timers, outputs = {}, {direction: {} for direction in DIRECTIONS}, {}
    for name, build in WAYS.items():
        try:
            way = build(row, w, arguments)
            compiled = {direction: compile_way(way, direction, arrays) for direction in DIRECTIONS}
            results = jax.block_until_ready([of["call"]() for of in compiled.values()])
            found[name], outputs[name] = compiled, np.asarray(results[0])
        except (Left, ImportError, RuntimeError) as why:  # the last: out of memory, or a size that cuDNN refuses
            found[name] = {"left out": str(why).splitlines()[0]}
            continue
        for direction, of in found[name].items():
            timers[direction][name] = partial(call_times, of.pop("call"))
    if torch:
        outputs["torch"], _ = torch.build("lstm", row)
        found["torch"] = {direction: {} for direction in DIRECTIONS}
        for direction in DIRECTIONS:
            timers[direction]["torch"] = partial(torch.seconds, direction)
    for direction in DIRECTIONS:
        for name, times in in_turns(timers[direction], arguments.seconds, rounds=2).items():
            found[name][direction] |= times | {"share": least_seconds(row, direction, arguments) / times["min"]}
    for name, of in outputs.items():
        found[name]["difference"] = float(np.abs(of - outputs["scan"]).max())
    return found


def compile_way(way: Way, direction: str, arrays: tuple) -> dict:
    """The compiled call, with its compile time, temporaries and kernels per iteration."""
    import jax
    import jax.numpy as jnp

    def forward(params, xs, of_outputs):
        return way.unroll(params, xs)

    def loss(params, xs, of_outputs):
        return jnp.sum(way.unroll(params, xs) * of_outputs)

    began = time.perf_counter()
    function = jax.jit(forward if direction == "forward" else jax.value_and_grad(loss))
    compiled = function.lower(way.params, *arrays).compile()
    seconds, found = time.perf_counter() - began, loops(compiled.as_text())
    shapes = weight_shapes(jax.tree.leaves(way.params))
    return {
        "call": partial(compiled, way.params, *arrays),
        "compile": seconds,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": [loop.kernels.total() for loop in found if loop.innermost],
        "weights summed in a loop": any(loop.makes(shapes) for loop in found if loop.innermost),
    }


def least_seconds(row: Row, direction: str, arguments: argparse.Namespace) -> float:
    """The larger of the seconds of arithmetic and the seconds of memory traffic."""
    B, T, D, H = row
    by_input, by_state = 2 * B * T * 4 * H * D, 2 * B * T * 4 * H * H
    traffic = 4 * (B * T * (D + H) + 4 * H * (D + H))
    if direction == "backward":  # the state's product again, and the gradients of both weights
        by_input, by_state, traffic = 2 * by_input, 3 * by_state, 3 * traffic
    return max((by_input + by_state) / arguments.flops, traffic / arguments.bandwidth)


def table(found: dict, title: str, arguments: argparse.Namespace) -> str:
    lines = ["# An LSTM over time on a GPU", "", f"{title}. Products in {arguments.precision}; roofline of "
             f"{arguments.flops / 1e12:.4g} TFLOP/s and {arguments.bandwidth / 1e12:.4g} TB/s.", ""]  # fmt: skip
    lines += ["Times are the minimum (median) of calls in turns. Kernels are those of one iteration of each innermost "
              "loop; an iteration of seqjax is up to eight steps.", ""]  # fmt: skip
    for name, ways in found.items():
        lines += [f"## (B, T, D, H) = {tuple(Row.parse(name))}", ""]
        for direction, title in zip(DIRECTIONS, ("Forward", "Forward with backward"), strict=True):
            head = [title, "us per step", "share of roofline", "kernels per iteration", "temporaries, MB", "compile, s"]
            lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            lines += [_line(way, Row.parse(name), of[direction]) for way, of in ways.items() if direction in of]
            lines.append("")
        lines += [f"- {way} is left out: {of['left out']}" for way, of in ways.items() if "left out" in of]
        differences = [f"{way} {of['difference']:.1e}" for way, of in ways.items() if "difference" in of]
        lines += _faster(ways)
        lines += [f"- largest difference of an output from the scan's: {', '.join(differences)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _faster(ways: dict) -> list[str]:
    """The ways that take less time than `sj.unroll`, with the ratio of the times."""
    lines = []
    for direction in DIRECTIONS:
        ours = ways.get("seqjax", {}).get(direction)
        ratios = {way: of[direction]["min"] / ours["min"] for way, of in ways.items() if ours and direction in of}
        faster = ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items() if ratio < 1)
        lines.append(f"- {direction}, faster than seqjax (its time is 1): {faster or 'none'}")
    return lines


def _line(way: str, row: Row, of: dict) -> str:
    steps = f"{1e6 * of['min'] / row.time:.3f} ({1e6 * of['median'] / row.time:.3f})"
    kernels = " + ".join(map(str, of.get("kernels", [])))
    memory = f"{of['temporaries'] / 2**20:.1f}" if "temporaries" in of else ""
    compiling = f"{of['compile']:.1f}" if "compile" in of else ""
    return f"| {way} | {steps} | {of['share']:.4f} | {kernels} | {memory} | {compiling} |"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--rows", nargs="+", type=Row.parse, metavar="B,T,D,H")
    parser.add_argument("--precision", choices=["float32", "tf32"], default="float32", help="of the matrix products")
    parser.add_argument("--flops", type=float, help="operations a second, for a device that is not in the table")
    parser.add_argument("--bandwidth", type=float, help="bytes a second, likewise")
    parser.add_argument("--jacobians", type=float, default=16, help="gigabytes that DEER's Jacobians may take")
    parser.add_argument("--seconds", type=float, help="for each size, call and way; by default 1")
    parser.add_argument("--minutes", type=float, default=9, help="no further size is begun after these")
    parser.add_argument("--no-torch", action="store_true", help="even if it is installed")
    return parser.parse_args()


def set_roofline(arguments: argparse.Namespace, device: str) -> None:
    """Sets the rates of the device that the options leave open.

    Raises:
        SystemExit: the device is not in the table.
    """
    known = [figures for name, figures in DEVICES.items() if name in device.replace("-", " ").split()]
    if not known and not arguments.dry_run and not (arguments.flops and arguments.bandwidth):
        raise SystemExit(f"{device} is not in the table of devices: give --flops and --bandwidth of its data sheet")
    float32, tf32, bandwidth = known[0] if known else (1e12, 1e12, 1e11)
    arguments.flops = arguments.flops or (tf32 if arguments.precision == "tf32" else float32)
    arguments.bandwidth = arguments.bandwidth or bandwidth


def torch_process(arguments: argparse.Namespace, on_gpu: bool) -> TorchProcess | None:
    if arguments.no_torch or not find_spec("torch"):
        return None
    process = TorchProcess("cuda" if on_gpu else "cpu", tf32=arguments.precision == "tf32")
    if process.ready():
        return process
    print("torch is left out: it sees no GPU", flush=True)
    process.close()
    return None


def write(found: dict, title: str, arguments: argparse.Namespace) -> None:
    """Writes the sizes measured so far, because a lent machine can be gone before the last one."""
    here = Path(__file__).with_name("gpu_tf32" if arguments.precision == "tf32" else "gpu")
    here.with_suffix(".json").write_text(json.dumps({"machine": title, "found": found}, indent=1) + "\n")
    here.with_suffix(".md").write_text(table(found, title, arguments))


def main() -> int:
    arguments = read_arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU and needs memory
    import jax

    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not arguments.dry_run:
        print(f"no GPU here, only {jax.default_backend()}: --dry-run runs tiny sizes on it", file=sys.stderr)
        return 2
    jax.config.update(
        "jax_default_matmul_precision", {"float32": "float32", "tf32": "tensorfloat32"}[arguments.precision]
    )
    device = jax.devices()[0].device_kind
    set_roofline(arguments, device)
    arguments.seconds = arguments.seconds or (0.01 if arguments.dry_run else 1.0)
    torch, found, began = torch_process(arguments, on_gpu), {}, time.monotonic()
    title = f"{device}; {machine('jax', 'jaxlib', *(['torch'] if torch else []))}"
    try:
        for row in arguments.rows or (TINY if arguments.dry_run else SIZES):
            if time.monotonic() - began > 60 * arguments.minutes:
                print(f"{row.name} is left out: {arguments.minutes} minutes are over", flush=True)
                continue
            found[row.name] = measure(row, arguments, torch)
            print(table({row.name: found[row.name]}, title, arguments), flush=True)
            if not arguments.dry_run:
                write(found, title, arguments)
    finally:
        if torch:
            torch.close()
    summing = [
        name for name, ways in found.items() if ways["seqjax"].get("backward", {}).get("weights summed in a loop")
    ]
    print(f"the backward loop of sj.unroll sums up a weight's gradient at {', '.join(summing) or 'no size'}")
    return 1 if summing and not arguments.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
