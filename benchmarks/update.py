"""Whole updates of a character model beside flax and torch, and the parts of an update of seqjax.

    python -m benchmarks.update                     every job; about four minutes on two cores
    python -m benchmarks.update --only lstm         one job; the others stay

An update is: embedding, recurrent layers, head and cross entropy, gradient, clipping to norm 1, Adam, and the loss on
the host. The state is carried from window to window. All ways start from the same weights and read the same random
tokens: the losses of the first six updates must agree. seqjax runs `sj.training.updates`, with all its metrics.

Each way runs in its own process, and the processes take turns, so that none computes beside another one. "First" is
the first update, with tracing and compilation, but without imports and the initial weights. Peak memory is the largest
increase of the resident memory of a further process during three updates, after one that is not counted; the median of
three processes.

Needs torch (`pip install --group parity`). Writes update.json and update.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import call_times, in_turns, machine
from benchmarks.peers import torch_process
from benchmarks.peers.resident import peak_above
from benchmarks.peers.rows import Row, weights

VOCABULARY, LEARNING_RATE, CLIP = 96, 2e-3, 1.0
WAYS = ("seqjax", "seqjax without its kernel", "flax", "torch")
SECONDS, CHECKED, WARM = 12.0, 6, 8  # of timing per way; updates whose losses are compared; updates before the timing
HERE = Path(__file__).with_suffix("")


@dataclasses.dataclass(frozen=True)
class Job:
    """A character model and its batches."""

    cell: str
    batch: int
    window: int
    embedding: int
    hidden: int
    layers: int

    @property
    def title(self) -> str:
        layers = "" if self.layers == 1 else f" in {self.layers} layers"
        units = f"{self.cell.upper()} of {self.hidden} units{layers}"
        return f"{units}, embedding {self.embedding}, batch {self.batch}, window {self.window}"

    def rows(self) -> list[Row]:
        """The size of each recurrent layer."""
        inputs = [self.embedding] + [self.hidden] * (self.layers - 1)
        return [Row(self.batch, self.window, size, self.hidden) for size in inputs]

    def numbers(self) -> tuple[np.ndarray, list, np.ndarray, np.ndarray]:
        """The initial embedding, weights of the layers, and weights and bias of the head."""
        rng = np.random.default_rng(0)
        E = rng.standard_normal((VOCABULARY, self.embedding), "float32")
        W = rng.uniform(-1, 1, (VOCABULARY, self.hidden)).astype("float32") / math.sqrt(self.hidden)
        return E, [weights(self.cell, row) for row in self.rows()], W, np.zeros(VOCABULARY, "float32")

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(1)
        while True:
            tokens = rng.integers(0, VOCABULARY, (self.batch, self.window + 1))
            yield tokens[:, :-1], tokens[:, 1:]


JOBS = {
    "lstm": Job("lstm", 32, 128, 64, 256, 1),
    "gru": Job("gru", 32, 128, 64, 256, 1),
    "deep": Job("lstm", 64, 128, 64, 512, 2),
}


def seqjax_model(job: Job) -> tuple[Any, Any]:
    """The model and its parameters."""
    import jax
    import jax.numpy as jnp

    import seqjax as sj
    from seqjax.models.model import ModelParams

    E, layers, W, b = job.numbers()
    cell, params = {"lstm": (sj.LSTM, sj.LSTMParams), "gru": (sj.GRU, sj.GRUParams)}[job.cell]
    cells = [cell(row.features, row.hidden) for row in job.rows()]
    model = sj.Model(
        sj.stack([sj.Embedding(VOCABULARY, job.embedding), *cells]), sj.Categorical(job.hidden, VOCABULARY)
    )
    of_layers = [params(*(w if job.cell == "gru" else w[:3])) for w in layers]
    found = ModelParams((sj.EmbeddingParams(E), *of_layers), sj.ReadoutParams(W, b))
    return model, jax.tree.map(jnp.asarray, found)


def seqjax_updates(job: Job) -> Iterator[float]:
    """The loss of each update."""
    import jax.numpy as jnp
    import optax

    import seqjax as sj

    model, params = seqjax_model(job)
    optimizer = sj.training.clipped(optax.adam(LEARNING_RATE), CLIP)
    state = sj.training.start(model, optimizer, params=params)
    # A training carries a state from the first update, so the update compiles once.
    state = state._replace(carried=initial(model, params, job.batch))
    stream = (sj.Batch(jnp.asarray(x, jnp.int32), jnp.asarray(y, jnp.int32), continues=True) for x, y in job.windows())
    for _, metrics in sj.training.updates(model, stream, state, optimizer=optimizer, clip_norm=CLIP):
        yield metrics.loss


def initial(model: Any, params: Any, batch: int) -> Any:
    import jax
    import jax.numpy as jnp

    one = model.cell.initial_state(params.cell)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), one)


def flax_updates(job: Job) -> Iterator[float]:
    """The loss of each update, which is read while the next one runs."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.peers import jax_peers

    E, layers, W, b = job.numbers()
    peers = [
        jax_peers.linen(job.cell, row, w, optimized=job.cell == "lstm")
        for row, w in zip(job.rows(), layers, strict=True)
    ]
    params = jax.tree.map(jnp.asarray, {"E": E, "layers": [peer.params for peer in peers], "W": W, "b": b})
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE))
    zero = jnp.zeros((job.batch, job.hidden))
    carries = [(zero, zero) if job.cell == "lstm" else zero for _ in peers]

    @jax.jit
    def update(params, state, carries, xs, ys):
        def loss(params):
            h, after = params["E"][xs], []
            for peer, of_layer, carry in zip(peers, params["layers"], carries, strict=True):
                carry, h = peer.unroll(of_layer, h, initial_carry=carry, return_carry=True)
                after.append(carry)
            logits = h @ params["W"].T + params["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ys).mean(), after

        (value, after), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, after, value

    state, before = optimizer.init(params), None
    for xs, ys in job.windows():
        params, state, carries, value = update(params, state, carries, xs, ys)
        if before is not None:
            yield float(before)
        before = value


def torch_updates(job: Job) -> Iterator[float]:
    """The loss of each update."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    E, layers, W, b = job.numbers()
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[job.cell]
    embedding = torch.nn.Embedding(VOCABULARY, job.embedding)
    layer = kind(job.embedding, job.hidden, job.layers, batch_first=True)
    head = torch.nn.Linear(job.hidden, VOCABULARY)
    named = [{f"{name[:-1]}{k}": w for name, w in torch_process.named(of).items()} for k, of in enumerate(layers)]
    parts = [(embedding, {"weight": E}), (layer, {k: v for of in named for k, v in of.items()})]
    for module, arrays in [*parts, (head, {"weight": W, "bias": b})]:
        module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    model = torch.nn.ModuleList([embedding, layer, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    state = None
    for xs, ys in job.windows():
        outputs, state = layer(embedding(torch.from_numpy(xs)), state)
        logits = head(outputs).reshape(-1, VOCABULARY)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ys).reshape(-1))
        state = tuple(part.detach() for part in state) if job.cell == "lstm" else state.detach()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        yield loss.item()


UPDATES = {"seqjax": seqjax_updates, "seqjax without its kernel": seqjax_updates, "flax": flax_updates,
           "torch": torch_updates}  # fmt: skip

JAX = ("optax", "benchmarks.peers.jax_peers", "seqjax.kernels")
MODULES = {"seqjax": JAX, "seqjax without its kernel": JAX, "flax": (*JAX, "flax.linen"), "torch": ("torch",)}


def parts_of_update(job: Job) -> dict[str, float]:
    """The least seconds of programs that each do more of an update than the one before, in turns."""
    import jax
    import jax.numpy as jnp
    import optax

    import seqjax as sj
    from seqjax.training.loop import compiled_update

    model, params = seqjax_model(job)
    optimizer = sj.training.clipped(optax.adam(LEARNING_RATE), CLIP)
    state = sj.training.start(model, optimizer, params=params)
    state = state._replace(carried=initial(model, params, job.batch))
    x, y = next(job.windows())
    batch = sj.Batch(jnp.asarray(x, jnp.int32), jnp.asarray(y, jnp.int32), continues=True)

    def forward(params):
        return sj.unroll(model.cell, params.cell, batch.xs, state=state.carried, save="gates")[1]

    def loss(params):
        return sj.every_step(model.head, params.head, forward(params), batch.targets, None)

    def gradient(params):
        return jax.value_and_grad(loss)(params)

    def applied(params, optimizer_state):
        value, grads = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            change, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return optax.apply_updates(params, change), optimizer_state, value

    update = compiled_update(model, optimizer, sj.every_step, CLIP)
    data = (batch.xs, batch.targets, None, None)
    calls = {
        "embedding and loops": (jax.jit(forward), (params,)),
        "head and loss": (jax.jit(loss), (params,)),
        "gradient": (jax.jit(gradient), (params,)),
        "clipping and Adam": (jax.jit(applied), (params, state.optimizer)),
        "metrics": (update, (state, data, None)),
    }
    timers = {name: lambda n, f=f, a=a: call_times(lambda: f(*a), n) for name, (f, a) in calls.items()}
    return {name: of["min"] for name, of in in_turns(timers, 3.0).items()}


class Child:
    """A process that runs the updates of one way."""

    def __init__(self, way: str, job: Job) -> None:
        command = [sys.executable, "-m", "benchmarks.update", "--serve", way]
        kernel = {"SEQJAX_KERNEL": "off"} if way == "seqjax without its kernel" else {}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env=os.environ | kernel,
        )
        pickle.dump(job, self.process.stdin)

    def ask(self, *request: Any) -> Any:
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def close(self) -> None:
        self.process.communicate()


def serve(way: str) -> None:
    """The child's side: answers requests until the input ends."""
    replies, sys.stdout = sys.stdout.buffer, sys.stderr  # printed text must not reach the pipe
    job = pickle.load(sys.stdin.buffer)
    for module in MODULES[way]:
        importlib.import_module(module)
    updates = UPDATES[way](job)

    def losses(count: int) -> list[float]:
        return [next(updates) for _ in range(count)]

    def first() -> float:
        began = time.perf_counter()
        next(updates)
        return time.perf_counter() - began

    def seconds(count: int) -> list[float]:
        # JAX computes one update ahead, so the first one is already done, and the last one must not run beside the
        # next process.
        next(updates)
        found = []
        for _ in range(count):
            began = time.perf_counter()
            next(updates)
            found.append(time.perf_counter() - began)
        time.sleep(2 * max(found))
        return found

    def resident() -> int:
        next(updates)
        time.sleep(2.0)  # JAX computes one update ahead
        return peak_above(lambda: next(updates))

    answers: dict[str, Callable] = {"losses": losses, "first": first, "seconds": seconds, "resident": resident,
                                    "parts": lambda: parts_of_update(job)}  # fmt: skip
    while True:
        try:
            name, *given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answers[name](*given), replies)
        replies.flush()


def measure(job: Job) -> dict:
    """The numbers of every way.

    Raises:
        SystemExit: the losses of two ways differ.
    """
    found: dict[str, dict] = {way: {} for way in WAYS}
    children = {way: Child(way, job) for way in WAYS}
    for way, child in children.items():
        found[way]["first"] = child.ask("first")
        found[way]["losses"] = child.ask("losses", CHECKED)
        child.ask("losses", WARM)
        print(f"{way}: first update {found[way]['first']:.1f} s", flush=True)
    expected = found["seqjax"]["losses"]
    for way in WAYS[1:]:
        # torch trains two biases of each gate, so its losses move a little faster.
        if not np.allclose(found[way]["losses"], expected, rtol=2e-3 if way == "torch" else 1e-5):
            sys.exit(f"the losses of {way} are {found[way]['losses']}, those of seqjax {expected}")
    times = in_turns(
        {way: lambda n, c=child: c.ask("seconds", n) for way, child in children.items()}, SECONDS, turn=0.5
    )
    for way, child in children.items():
        found[way] |= times[way]
        child.close()
    for way in WAYS:
        found[way]["resident"] = resident(way, job)
    child = Child("seqjax", job)
    found["seqjax"]["parts"] = child.ask("parts")
    child.close()
    return found


def resident(way: str, job: Job) -> int:
    """The peak of the memory of three updates, in bytes; the median of three processes."""
    peaks = []
    for _ in range(3):
        child = Child(way, job)
        peaks.append(child.ask("resident"))
        child.close()
    return sorted(peaks)[1]


def document(found: dict) -> str:
    lines = ["# Whole updates of a character model", ""]
    lines += [*__doc__.split("\n\n")[2].splitlines(), "", *__doc__.split("\n\n")[3].splitlines(), ""]
    lines += ["Milliseconds are the minimum (median).", ""]
    for name, of in found.items():
        ways, job = of["ways"], JOBS[name]
        lines += [f"## {job.title}", "", f"{of['machine']}.", ""]
        lines += ["| | ms per update | first update, s | peak memory, MB |", "|---|---|---|---|"]
        for way in WAYS:
            w = ways[way]
            ms = f"{1e3 * w['min']:.1f} ({1e3 * w['median']:.1f})"
            lines.append(f"| {way} | {ms} | {w['first']:.1f} | {w['resident'] / 1e6:.0f} |")
        lines += ["", "| | bar | measured | |", "|---|---|---|---|"]
        for what, bar, value, is_met in bars(name, ways):
            lines.append(f"| {what} | {bar} | {value:.2f} | {'met' if is_met else 'not met'} |")
        lines += ["", "The parts of an update of seqjax, each as the difference of two programs:", ""]
        lines += ["| part | ms |", "|---|---|"]
        before = 0.0
        for part, seconds in ways["seqjax"]["parts"].items():
            lines.append(f"| {part} | {1e3 * (seconds - before):.1f} |")
            before = seconds
        lines += [f"| host, beyond the compiled update | {1e3 * (ways['seqjax']['min'] - before):.1f} |", ""]
    return "\n".join(lines)


def bars(name: str, ways: dict) -> list[tuple[str, str, float, bool]]:
    """Each bar with its limit, the measurement, and whether it is met."""
    ours, plain, flax, torch = (ways[way]["min"] for way in WAYS)
    memory = ways["seqjax"]["resident"] / ways["torch"]["resident"]
    least = 1.0 if name == "deep" else 1.25
    found = [("torch / seqjax", f"at least {least}", torch / ours, torch / ours >= least)]
    if name != "deep":
        found.append(("flax / seqjax", "at least 1.6", flax / ours, flax / ours >= 1.6))
    found.append(("flax / seqjax without its kernel", "at least 1", flax / plain, flax / plain >= 1))
    found.append(("peak memory of seqjax / torch", "at most 0.6", memory, memory <= 0.6))
    first = ways["seqjax"]["first"]
    return [*found, ("first update of seqjax, s", "at most 2.5", first, first <= 2.5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=JOBS)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    stored = HERE.with_suffix(".json")
    found = json.loads(stored.read_text()) if stored.exists() else {}
    for name in [arguments.only] if arguments.only else JOBS:
        print(JOBS[name].title, flush=True)
        found[name] = {"ways": measure(JOBS[name]), "machine": machine("jax", "flax", "torch")}
    stored.write_text(json.dumps(found, indent=1))
    text = document({name: found[name] for name in JOBS if name in found})
    HERE.with_suffix(".md").write_text(text)
    print(text)
    return None


if __name__ == "__main__":
    main()
