"""What a measurement was made on, and how two ways of doing the same are timed beside each other."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np


def machine(*packages: str) -> str:
    """The processor, the Python, the packages and what runs the loops, in one line."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = named[0].split(":")[1].strip() if named else platform.processor()
    versions = ", ".join(f"{name} {version(name)}" for name in packages if is_installed(name))
    from seqjax import kernels

    loops = "seqjax with its kernel" if kernels.available() else "seqjax without its kernel"
    return f"{os.cpu_count()} cores of {processor}, Python {platform.python_version()}, {versions}, {loops}"


def is_installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def alternating(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way, in turns within one run: the minimum and the median. The first call of each is not timed.

    The machine may be shared, so only ratios of times of the same run mean something.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        jax.block_until_ready(way())
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name] += call_times(way, 1)
    return {name: {"min": min(times), "median": float(np.median(times))} for name, times in seconds.items()}


def call_times(way: Callable[[], object], calls: int) -> list[float]:
    """Seconds of each of so many calls of a JAX computation."""
    import jax

    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        jax.block_until_ready(way())
        seconds.append(time.perf_counter() - began)
    return seconds


def in_turns(
    timers: dict[str, Callable[[int], list[float]]], budget: float, rounds: int = 3, turn: float = 0.03
) -> dict[str, dict[str, float]]:
    """Like `alternating`, for some `budget` seconds a way, each timer giving the seconds of as many calls as asked.

    A turn is as many calls as fit into `turn` seconds, so that short calls do not always begin with another's data in
    the cache, and every other round goes through the ways backwards. At least so many `rounds` are run.
    """
    calls = {}
    for name, timer in timers.items():
        timer(1)
        calls[name] = max(1, int(turn / min(timer(1))))
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    began, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - began < budget * len(timers):
        for name in list(timers)[:: -1 if done % 2 else 1]:
            seconds[name] += timers[name](calls[name])
        done += 1
    return {
        name: {"min": min(times), "median": float(np.median(times)), "calls": len(times)}
        for name, times in seconds.items()
    }


class OtherLoad:
    """How many processors the other processes kept busy since this was made; on Linux, and None elsewhere."""

    def __init__(self, *ours: int) -> None:
        self.ours = ours
        self.began, self.before = time.perf_counter(), self._elsewhere()

    def processors(self) -> float | None:
        now = self._elsewhere()
        if now is None or self.before is None:
            return None
        return max(0.0, (now - self.before) / (time.perf_counter() - self.began))

    def _elsewhere(self) -> float | None:
        """Seconds that all processors have worked, or were taken from this machine, less those of our processes."""
        try:
            user, nice, system, _, _, interrupt, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
            own = sum(map(_clock_ticks, self.ours))
        except (OSError, ValueError):
            return None
        return (user + nice + system + interrupt + soft + stolen - own) / os.sysconf("SC_CLK_TCK")


def _clock_ticks(process: int) -> int:
    """That a process has worked, all its threads together."""
    after_its_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(after_its_name[11]) + int(after_its_name[12])
