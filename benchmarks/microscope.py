"""Speed and memory of `seqjax.analysis`, compared with a direct implementation and with lyapax.

    python -m benchmarks.microscope              everything, about five minutes on two cores
    python -m benchmarks.microscope --only lyapunov

- lyapunov: LSTM H = 128, T = 1000, k = 8, against `jacfwd` and a QR at every step. The exponents agree.
- lyapax: the Lorenz system by RK4 and a random tanh network in float64, which both libraries can run. lyapax is
  compiled once by `jax.jit`, with a QR at every step (its default) and with the interval that seqjax chose.
- memory: peak resident memory of a separate process, beside that of a process that only builds the inputs.
- jacobians: all step Jacobians at H = 128, from the parts of the step, against `vmap(jacfwd)`.

The lyapax rows need `pip install lyapax`. Writes microscope.json and microscope.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.machine import alternating, machine

ALONE = "seqjax, the exponents alone"
WHY = (
    "Beside the exponents, `lyapunov_exponents` computes their intervals: it pulls the final frame back to the "
    "beginning, which takes about as long as the push (0.4 of the time each). It computes in float64, also for a "
    "float32 cell, and chooses the number of steps between two QRs. The exponents alone are those of `frame_growth` in "
    "the dtype of the cell, with that number given, as the other implementations compute them."
)


def driven_lstm(hidden: int, time: int, features: int = 32):
    import jax

    import seqjax as sj

    cell = sj.LSTM(features, hidden)
    xs = jax.random.normal(jax.random.key(1), (1, time, features))
    return cell, cell.init(jax.random.key(0)), xs


def lyapunov() -> dict:
    """Compares with jacfwd and QR at every step, with the same burn-in and first frame.

    The direct implementation runs in two ways. One is a single compiled scan. XLA moves W_hh times the basis of jacfwd
    out of this scan, because it is the same at every step. The other calls one compiled step in a Python loop.
    """
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    import seqjax as sj
    from seqjax.analysis._flow import random_frame

    cell, params, xs = driven_lstm(128, 1000)
    k, burn_in = 8, 100
    start = np.asarray(random_frame(jax.random.key(0), k, 256, np.float32)).T  # the frame that seqjax starts from

    @jax.jit
    def plainly(params, xs):
        s, unravel = ravel_pytree(cell.initial_state(params))
        frame = jnp.asarray(start)

        def step(v, x):
            return ravel_pytree(cell.step(params, unravel(v), x)[0])[0]

        def advance(carry, x):
            v, frame = carry
            J = jax.jacfwd(step)(v, x)
            frame, R = jnp.linalg.qr(J @ frame)
            return (step(v, x), frame), jnp.log(jnp.abs(jnp.diagonal(R)))

        _, logs = jax.lax.scan(advance, (s, frame), xs[0])
        return logs[2 * burn_in :].mean(axis=0)

    @jax.jit
    def one_step(v, frame, x):
        _, unravel = ravel_pytree(cell.initial_state(params))

        def step(v):
            return ravel_pytree(cell.step(params, unravel(v), x)[0])[0]

        frame, R = jnp.linalg.qr(jax.jacfwd(step)(v) @ frame)
        return step(v), frame, jnp.log(jnp.abs(jnp.diagonal(R)))

    def step_by_step():
        v, _ = ravel_pytree(cell.initial_state(params))
        frame, logs = jnp.asarray(start), []
        for x in xs[0]:
            v, frame, log = one_step(v, frame, x)
            logs.append(log)
        return jnp.stack(logs[2 * burn_in :]).mean(axis=0)

    @jax.jit
    def product_alone(W_hh):
        def advance(columns, _):
            i, f, g, o = jnp.split(W_hh @ columns, 4)
            return jnp.tanh(i + f - g + o), None

        return jax.lax.scan(advance, jnp.ones((W_hh.shape[1], k)), None, length=len(xs[0]) - burn_in)[0]

    def ours():
        return sj.lyapunov_exponents(cell, params, xs, k=k, burn_in=burn_in, frame_burn_in=burn_in).exponents[0]

    every = sj.lyapunov_exponents(cell, params, xs, k=k, burn_in=burn_in, frame_burn_in=burn_in).qr_every

    @jax.jit
    def alone(params, xs):
        aligned = sj.analysis.frame_growth(cell, params, xs[:, : 2 * burn_in], frame=start.T[None])
        after = sj.analysis.frame_growth(
            cell, params, xs[:, 2 * burn_in :], every=every, state=aligned.state, frame=aligned.frame
        )
        return after.exponents[0]

    values = [np.sort(np.asarray(run)) for run in (plainly(params, xs), ours(), alone(params, xs))]
    difference = float(max(np.abs(values[0] - other).max() for other in values[1:]))
    ways = {"seqjax": ours, ALONE: lambda: alone(params, xs), "jacfwd and QR, one scan": lambda: plainly(params, xs)}
    ways |= {"jacfwd and QR, step by step": step_by_step}
    times = alternating(ways | {"W_hh times k columns alone, as often": lambda: product_alone(params.W_hh)}, 7)
    return {"times": times, "difference": difference}


def lyapax() -> dict:
    """Compares two systems without inputs, in float64."""
    import jax
    import jax.numpy as jnp
    from lyapax import lyapunov_spectrum

    import seqjax as sj

    jax.config.update("jax_enable_x64", True)
    W = 3.0 * jax.random.normal(jax.random.key(0), (256, 256)) / 16.0

    def lorenz(v, dt=0.01):
        def rate(v):
            return jnp.stack([10 * (v[1] - v[0]), v[0] * (28 - v[2]) - v[1], v[0] * v[1] - 8 / 3 * v[2]])

        a = rate(v)
        b = rate(v + dt / 2 * a)
        c = rate(v + dt / 2 * b)
        return v + dt / 6 * (a + 2 * b + 2 * c + rate(v + dt * c))

    systems = {
        "Lorenz by RK4, n = 3, k = 3, 20 000 steps": (lorenz, jnp.array([1.0, 1.0, 20.0]), 3, 20_000),
        "x' = W tanh(x), n = 256, k = 8, 2 000 steps": (
            lambda v: W @ jnp.tanh(v),
            jnp.cos(jnp.arange(256.0)),
            8,
            2_000,
        ),
    }
    found = {}
    for name, (step, first, k, steps) in systems.items():
        cell = _Map(step, first)
        xs = jnp.zeros((1, steps + 200, 0))

        def ours(cell=cell, xs=xs, k=k):
            return sj.lyapunov_exponents(cell, {}, xs, k=k, burn_in=100, frame_burn_in=100)

        every = math.gcd(ours().qr_every, steps)

        @jax.jit
        def alone(xs, cell=cell, k=k, every=every):
            settled, _ = sj.unroll(cell, {}, xs[:, :100])
            return sj.analysis.frame_growth(cell, {}, xs[:, 100:], k=k, every=every, state=settled).exponents

        def theirs(step=step, first=first, k=k, steps=steps, every=1):
            return jax.jit(
                lambda s: (
                    lyapunov_spectrum(
                        step, s, dt=1.0, n_steps=steps + 100 - 100 % every, k=k, renorm_every=every, t_transient=100.0
                    ).exponents
                )
            )

        each, same = theirs(), theirs(every=every)
        ways = {
            "seqjax": lambda ours=ours: ours().exponents,
            ALONE: lambda alone=alone, xs=xs: alone(xs),
            "lyapax, QR at every step": lambda each=each, first=first: each(first),
            f"lyapax, QR every {every}": lambda same=same, first=first: same(first),
        }
        difference = float(np.abs(ours().exponents[0] - np.asarray(each(first))).max())
        found[name] = {"times": alternating(ways, 7), "difference": difference, "qr_every": ours().qr_every}
    return found


class _Map:
    """A map without inputs or parameters, as a cell. It compares by identity, because its function may be a closure."""

    def __init__(self, step: Callable, first) -> None:
        self.f, self.first = step, first

    def init(self, key):
        return {}

    def initial_state(self, params):
        return self.first

    def step(self, params, state, x):
        state = self.f(state)
        return state, state

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


def peak(what: str | None, hidden: int, time_steps: int, k: int) -> dict:
    """Peak resident memory of this process in MB, after one call of `what`, or without a call if it is None."""
    import jax

    cell, params, xs = driven_lstm(hidden, time_steps)
    jax.block_until_ready((params, xs))
    seconds = 0.0
    if what is not None:
        import seqjax as sj

        began = time.perf_counter()
        getattr(sj, what)(cell, params, xs, k=k)
        seconds = time.perf_counter() - began
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": most, "seconds": seconds, "inputs": xs.nbytes / 2**20}


def jacobians(hidden: int = 128, steps: int = 300) -> dict:
    """Times all J_t (n, n), from given states and inputs."""
    import jax
    import jax.numpy as jnp
    from equinox.nn import GRUCell
    from flax.linen import LSTMCell
    from jax.flatten_util import ravel_pytree

    import seqjax as sj
    from benchmarks.any_cell.cells import Peephole
    from seqjax.sequence._execution.jacobian import step_jacobian
    from seqjax.sequence._masked_step import emit_nothing
    from seqjax.sequence._partition.tracing import traced_one

    cells = {
        "VanillaRNN": sj.VanillaRNN(32, hidden),
        "GRU": sj.GRU(32, hidden),
        "GRU, reset before": sj.GRU(32, hidden, reset="before"),
        "LSTM": sj.LSTM(32, hidden),
        "flax LSTMCell": sj.from_linen(LSTMCell(hidden), 32),
        "equinox GRUCell": sj.from_equinox(GRUCell, 32, hidden),
        "peephole LSTM": Peephole(32, hidden),
    }
    found = {}
    for name, cell in cells.items():
        params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (steps, 32))
        states = sj.trajectory(cell, params, xs[None])
        before = jax.tree.map(lambda leaf: leaf[0, :-1], states)

        def plainly(params, state, x, cell=cell):
            v, unravel = ravel_pytree(state)
            return jax.jacfwd(lambda v: ravel_pytree(cell.step(params, unravel(v), x)[0])[0])(v)

        def by_parts(params, states, xs, cell=cell):
            at = (jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype), None, None, None)
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), states)
            jacobian = step_jacobian(traced_one(cell, emit_nothing, params, one, at), params)
            return jax.vmap(lambda state, x: jacobian(state, (x, None, None, None)))(states, xs)

        def written(params, state, x):
            v, _ = ravel_pytree(state)
            return jnp.broadcast_to(v[:, None] + x[0], (v.size, v.size))

        ways = {
            "by parts": jax.jit(by_parts),
            "vmap(jacfwd)": jax.jit(jax.vmap(plainly, in_axes=(None, 0, 0))),
            "writing an array of that size": jax.jit(jax.vmap(written, in_axes=(None, 0, 0))),
        }
        results = [np.asarray(way(params, before, xs)) for way in ways.values()]
        times = alternating({name: partial(way, params, before, xs) for name, way in ways.items()}, 15)
        found[name] = {"times": times, "difference": float(np.abs(results[0] - results[1]).max())}
    return found


def memory(run: Callable) -> dict:
    found = {}
    for hidden, T in ((1024, 2_000), (64, 1_000), (64, 10_000), (64, 100_000)):
        inputs = run(peak, None, hidden, T, 8)["peak"]
        for what in ("lyapunov_exponents", "product_singular_values"):
            found[f"{what}, H = {hidden}, T = {T}"] = run(peak, what, hidden, T, 8) | {"inputs alone": inputs}
    return found


def table(found: dict, versions: str) -> str:
    lines = ["# The microscope's speed and memory", ""]
    lines += [f"- {', '.join(parts)}: {on}." for on, parts in _machines(found, versions).items()]
    lines += [
        "",
        "Times are the minimum (median) of alternating calls in one run. Compare only their ratios.",
        "",
    ]
    if "lyapunov" in found:
        lines += ["## Lyapunov exponents, LSTM H = 128, T = 1000, k = 8, float32", ""]
        lines += _times(found["lyapunov"]["times"], "seqjax")
        lines += ["", f"Largest difference of an exponent: {found['lyapunov']['difference']:.1e}.", "", WHY, ""]
    for name, row in found.get("lyapax", {}).items():
        lines += [f"## {name}, float64", "", *_times(row["times"], "seqjax"), ""]
        lines += [f"seqjax chose a QR every {row['qr_every']} steps; exponents differ by {row['difference']:.1e}.", ""]
    for name, row in found.get("jacobians", {}).items():
        lines += [f"## All step Jacobians, {name}, H = 128, 300 steps, float32", ""]
        lines += [*_times(row["times"], "by parts"), "", f"Largest difference: {row['difference']:.1e}.", ""]
    if "memory" in found:
        lines += ["## Peak resident memory in MB, LSTM, 32 inputs, k = 8", ""]
        lines += [
            "| | whole process | process that only builds the inputs | inputs | seconds |",
            "|---|---|---|---|---|",
        ]
        for name, row in found["memory"].items():
            numbers = f"{row['peak']:.0f} | {row['inputs alone']:.0f} | {row['inputs']:.1f} | {row['seconds']:.1f}"
            lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines).rstrip() + "\n"


def _machines(found: dict, versions: str) -> dict[str, list[str]]:
    """The measured parts by machine."""
    machines: dict[str, list[str]] = {}
    for part in found:
        if part != "machines":
            machines.setdefault(found.get("machines", {}).get(part, versions), []).append(part)
    return machines


def _times(times: dict, reference: str) -> list[str]:
    lines = ["| | ms | ratio to the first |", "|---|---|---|"]
    first = times[reference]
    for name, row in times.items():
        ratio = f"{row['min'] / first['min']:.2f} ({row['median'] / first['median']:.2f})"
        lines.append(f"| {name} | {1e3 * row['min']:.2f} ({1e3 * row['median']:.2f}) | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["lyapunov", "lyapax", "jacobians", "memory"])
    arguments = parser.parse_args()

    def run(function: Callable, *given):
        # A new process per row, because precision, memory and compiled code would otherwise affect the next row.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, given)

    here = Path(__file__).with_suffix("")
    json_file = here.with_suffix(".json")
    old = json.loads(json_file.read_text()) if json_file.exists() and arguments.only else {"found": {}}
    found = old["found"]
    machines = found.setdefault("machines", {part: old["machine"] for part in found})
    versions = machine("jax", "jaxlib", "lyapax")
    for part in arguments.only or ["lyapunov", "lyapax", "jacobians", "memory"]:
        found[part] = memory(run) if part == "memory" else run(globals()[part])
        machines[part] = versions
        print(part, json.dumps(found[part], indent=1), flush=True)
    text = table(found, versions)
    print("\n" + text)
    json_file.write_text(json.dumps({"machine": versions, "found": found}, indent=1) + "\n")
    here.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
