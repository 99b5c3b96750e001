"""One comparison: builds every library with the same weights, compiles it, checks that all agree, and times them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

from benchmarks.machine import OtherLoad, call_times, in_turns
from benchmarks.peers import jax_peers, torch_process
from benchmarks.peers.rows import Row, inputs, weights

DIRECTIONS = ("forward", "backward")
ALL = [*jax_peers.WAYS, "torch"]
MODULES = {"dm-haiku": "haiku"}
OUTPUTS_WITHIN, GRADIENT_WITHIN = 2e-5, 1e-4


class Disagreement(Exception):
    """Two libraries return different numbers for the same weights and inputs."""


def installed(ways: list[str]) -> list[str]:
    """Returns the ways whose package is installed, and prints the others."""
    found = []
    for way in ways:
        package = "torch" if way == "torch" else jax_peers.WAYS[way].package
        if find_spec(MODULES.get(package, package)):
            found.append(way)
        else:
            print(f"{way} is left out: {package} is not installed", flush=True)
    return found


class Bench:
    """The measurements, with one torch process for all of them."""

    def __init__(self, ways: list[str], directions: list[str], budget: float) -> None:
        self.ways, self.directions, self.budget = ways, directions, budget
        jax.jit(lambda x: x + 1).lower(1.0).compile()  # the first compilation of a process takes longer than others
        self.torch = torch_process.TorchProcess() if "torch" in ways else None

    def close(self) -> None:
        if self.torch:
            self.torch.close()

    def compare(self, kind: str, row: Row) -> dict:
        """Returns {direction: {way: numbers}}, the differences from seqjax, and the load of other processes.

        Raises:
            Disagreement: a library's outputs, or its gradient of W_hh, are not those of seqjax.
        """
        w, (xs, of_outputs) = weights(kind, row), jax.device_put(inputs(row))
        ways = [way for way in self.ways if way != "torch" and kind in jax_peers.WAYS[way].kinds]
        peers = {way: jax_peers.build(way, kind, row, w) for way in ways}
        compiled, numbers = {}, {}
        for direction in DIRECTIONS:
            for way, peer in peers.items():
                compiled[direction, way], numbers[direction, way] = compile_call(peer, direction, xs, of_outputs)
        arguments = {way: (peer.params, xs, of_outputs) for way, peer in peers.items()}
        with_torch = self.torch is not None and kind in torch_process.KINDS
        differences = self._differences(kind, row, peers, compiled, arguments, with_torch)
        found = {"difference": differences, "other load": {}}
        for direction in self.directions:
            timers = {way: partial(call_times, partial(compiled[direction, way], *arguments[way])) for way in ways}
            if with_torch:
                timers["torch"] = partial(self.torch.seconds, direction)
            load = OtherLoad(os.getpid(), *([self.torch.child.pid] if self.torch else []))
            times = in_turns(timers, self.budget)
            found["other load"][direction] = load.processors()
            found[direction] = {way: times[way] | numbers.get((direction, way), {}) for way in timers}
        return found

    def _differences(self, kind, row, peers, compiled, arguments, with_torch: bool) -> dict:
        results = {}
        for way, peer in peers.items():
            outputs = np.asarray(compiled["forward", way](*arguments[way]))
            _, gradient = compiled["backward", way](*arguments[way])
            results[way] = outputs, np.asarray(peer.recurrent(jax.tree.map(np.asarray, gradient)))
        if with_torch:
            results["torch"] = self.torch.build(kind, row)
        reference = results.pop("seqjax")
        return {way: agree(f"{kind} {row.name}, {way}", reference, result) for way, result in results.items()}


def agree(what: str, ours: tuple, theirs: tuple) -> dict[str, float]:
    """The largest difference of an output, and the difference of the W_hh gradients relative to the norm."""
    outputs = float(np.abs(ours[0] - theirs[0]).max())
    gradient = float(np.linalg.norm(ours[1] - theirs[1]) / np.linalg.norm(ours[1]))
    if not (outputs <= OUTPUTS_WITHIN and gradient <= GRADIENT_WITHIN):
        raise Disagreement(
            f"{what}: outputs differ from seqjax's by {outputs:.1e} (at most {OUTPUTS_WITHIN:.0e}), "
            f"the gradient of W_hh by {gradient:.1e} of its norm (at most {GRADIENT_WITHIN:.0e})"
        )
    return {"outputs": outputs, "W_hh": gradient}


def compile_call(peer: jax_peers.Peer, direction: str, xs, of_outputs):
    """The compiled call, with the seconds of tracing and compiling and the bytes of temporaries."""
    jax.clear_caches()  # otherwise a library would reuse what another one has traced
    began = time.perf_counter()
    compiled = jax.jit(jax_peers.call(peer, direction)).lower(peer.params, xs, of_outputs).compile()
    seconds = time.perf_counter() - began
    return compiled, {"compile": seconds, "temporaries": compiled.memory_analysis().temp_size_in_bytes}


def resident(way: str, kind: str, row: Row) -> int | None:
    """Runs `benchmarks.peers.resident` in a new process. Returns None if it cannot measure."""
    command = [sys.executable, "-m", "benchmarks.peers.resident", way, kind, row.name]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        print(f"no resident memory of {way}, {kind} {row.name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return json.loads(done.stdout)
