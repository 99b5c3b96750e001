"""Many small networks at once: one program under `jax.vmap`, with the kernel and by XLA, and one network after another.

    python -m benchmarks.ensembles                 about three minutes on two cores
    python -m benchmarks.ensembles --training      only the training; a minute

Each network has its own weights and reads the same batch. "One after another" calls the compiled program of one network
in a Python loop. Both directions are as in `benchmarks.peers`, in float32, with `save="gates"` as in training. The
gradients of all ways must agree. The training is `sj.fit_many` beside `sj.fit` for each network, on the adding problem;
their losses must agree. Writes ensembles.json and ensembles.md beside this file.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.machine import call_times, in_turns, machine

SIZES = [(64, 4, 64, 64), (64, 32, 32, 32), (16, 32, 128, 128), (8, 16, 100, 256), (3, 16, 100, 256)]
KINDS = ("lstm", "gru", "vanilla")
DIRECTIONS = ("forward", "backward")
SECONDS = 1.0  # per way
UPDATES = 10
HERE = Path(__file__).with_suffix("")


def measure(kind: str, size: tuple[int, int, int, int]) -> dict:
    """Seconds of each way, by direction."""
    import jax
    import jax.numpy as jnp

    import seqjax as sj

    networks, batch, time, hidden = size
    cell = {"lstm": sj.LSTM, "gru": sj.GRU, "vanilla": sj.VanillaRNN}[kind](hidden, hidden)
    params = jax.vmap(cell.init)(jax.random.split(jax.random.key(0), networks))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(networks)]
    xs = jax.random.normal(jax.random.key(1), (batch, time, hidden))

    def forward(params, xs, kernel):
        return sj.unroll(cell, params, xs, kernel=kernel, save="gates")[1]

    def backward(params, xs, kernel):
        return jax.grad(lambda params: jnp.sum(forward(params, xs, kernel) ** 2))(params)

    found = {}
    for name, function in zip(DIRECTIONS, (forward, backward), strict=True):
        at_once = {
            "seqjax": jax.jit(jax.vmap(partial(function, kernel=True), (0, None))),
            "without its kernel": jax.jit(jax.vmap(partial(function, kernel=False), (0, None))),
        }
        of_one = jax.jit(partial(function, kernel=True))
        ways = {way: partial(run, params, xs) for way, run in at_once.items()}
        ways["one after another"] = lambda of_one=of_one: [of_one(one, xs) for one in each]
        results = [jax.tree.leaves(ways[way]()) for way in at_once]
        for got, expected in zip(*results, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))
        found[name] = in_turns({way: partial(call_times, call) for way, call in ways.items()}, SECONDS)
    return found


def measure_training(kind: str, networks: int = 64, hidden: int = 64, batch: int = 32, time: int = 32) -> dict:
    """Seconds of ten updates of every network, compiled before."""
    import itertools

    import jax
    import optax

    import seqjax as sj

    cell = {"lstm": sj.LSTM, "gru": sj.GRU, "vanilla": sj.VanillaRNN}[kind](2, hidden)
    model, loss = sj.Model(cell, sj.Gaussian(hidden, 1, std=1.0)), sj.ManyToOne()
    stream = list(itertools.islice(sj.data.adding_problem(jax.random.key(0), batch=batch, time=time), UPDATES))
    keys, optimizer = jax.random.split(jax.random.key(1), networks), optax.adam(1e-3)
    ways = {
        "fit_many": lambda: sj.fit_many(model, stream, keys=keys, loss=loss).history["loss"],
        "one after another": lambda: np.stack(
            [sj.fit(model, stream, key=key, optimizer=optimizer, loss=loss).history["loss"] for key in keys]
        ),
    }
    results = [way() for way in ways.values()]
    np.testing.assert_allclose(*results, rtol=1e-2)
    return in_turns({name: partial(call_times, way) for name, way in ways.items()}, 10 * SECONDS)


def training_table(found: dict) -> str:
    head = ["cell", "networks, units", "fit_many, s", "fit for each, s", "faster"]
    lines = ["## Training", "", f"{UPDATES} updates of every network, with their metrics; batch 32, 32 steps.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, of in found.items():
        kind, size = name.split(" ", 1)
        at_once, one_by_one = (of[way]["min"] for way in ("fit_many", "one after another"))
        lines.append(f"| {kind} | {size} | {at_once:.3f} | {one_by_one:.3f} | {one_by_one / at_once:.1f} |")
    return "\n".join(lines) + "\n"


def table(found: dict, title: str) -> str:
    head = ["cell", "networks, B, T, H", "seqjax, ms", "without its kernel", "one after another"]
    lines = ["# Many small networks at once", "", f"{title}. Minimum of calls in turns.", ""]
    lines += ["The last two columns are times relative to seqjax under `jax.vmap` with its kernel.", ""]
    for direction, words in zip(DIRECTIONS, ("Forward", "Forward with backward"), strict=True):
        lines += [f"## {words}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name, of in found.items():
            kind, size = name.split(" ", 1)
            ours, *others = (of[direction][way]["min"] for way in of[direction])
            lines.append(
                f"| {kind} | {size} | {1e3 * ours:.2f} | " + " | ".join(f"{t / ours:.2f}" for t in others) + " |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--training", action="store_true")
    file = HERE.with_suffix(".json")
    content = json.loads(file.read_text()) if file.exists() else {"found": {}}
    if not parser.parse_args().training:
        content["machine"], content["found"] = machine("jax", "jaxlib"), {}
        for kind in KINDS:
            for size in SIZES:
                content["found"][f"{kind} {', '.join(map(str, size))}"] = measure(kind, size)
                print(table(content["found"], "").splitlines()[-1], flush=True)
    content["training"] = {f"{kind} 64, 64": measure_training(kind) for kind in KINDS}
    print(training_table(content["training"]))
    file.write_text(json.dumps(content, indent=1) + "\n")
    text = table(content["found"], content.get("machine", "")) + "\n" + training_table(content["training"])
    HERE.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
