"""The description of the machine, and timers that alternate between several ways to compute the same result."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np


def machine(*packages: str) -> str:
    """One line with the processor, the Python, the package versions, and the loops that run."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = named[0].split(":")[1].strip() if named else platform.processor()
    versions = ", ".join(f"{name} {version(name)}" for name in packages if is_installed(name))
    from seqjax import kernels

    variant = kernels.variant()
    loops = "seqjax without its kernel" if variant is None else f"seqjax with its kernel ({variant})"
    return f"{os.cpu_count()} cores of {processor}, Python {platform.python_version()}, {versions}, {loops}"


def is_installed(package: str) -> bool:
    """Whether a package is installed."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def alternating(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """The minimum and median seconds of each way, in alternating calls. The first call of each way is not timed.

    Other processes may use the machine, so only ratios within one run are meaningful.
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
    """The seconds of each of `calls` calls of a JAX computation."""
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
    """Like `alternating`, with several calls per turn and a time budget.

    Args:
        timers: for each way, a function from a number of calls to the seconds of each call.
        budget: seconds per way.
        rounds: the least number of rounds.
        turn: seconds per turn. A turn has several short calls, because otherwise every call would start with the
            data of another way in the cache. Every second round runs the ways in reverse order for the same reason.

    Returns:
        For each way, the minimum and median seconds and the number of calls.
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
    """The mean number of processors that other processes used since construction. On Linux only, otherwise None."""

    def __init__(self, *ours: int) -> None:
        self.ours = ours
        self.began, self.before = time.perf_counter(), self._elsewhere()

    def processors(self) -> float | None:
        now = self._elsewhere()
        if now is None or self.before is None:
            return None
        return max(0.0, (now - self.before) / (time.perf_counter() - self.began))

    def _elsewhere(self) -> float | None:
        """Busy and stolen seconds of all processors, minus those of our processes."""
        try:
            user, nice, system, _, _, interrupt, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
            own = sum(map(_clock_ticks, self.ours))
        except (OSError, ValueError):
            return None
        return (user + nice + system + interrupt + soft + stolen - own) / os.sysconf("SC_CLK_TCK")


def _clock_ticks(process: int) -> int:
    """The processor time of all threads of a process, in clock ticks."""
    # The name of the process is in parentheses and may contain spaces, so the fields are counted after it.
    after_its_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(after_its_name[11]) + int(after_its_name[12])
