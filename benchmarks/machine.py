"""What a measurement was made on, and how two ways of doing the same are timed beside each other."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np


def machine(*packages: str) -> str:
    """The processor, the Python and the packages, in one line."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = named[0].split(":")[1].strip() if named else platform.processor()
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores of {processor}, Python {platform.python_version()}, {versions}"


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
            began = time.perf_counter()
            jax.block_until_ready(way())
            seconds[name].append(time.perf_counter() - began)
    return {name: {"min": min(times), "median": float(np.median(times))} for name, times in seconds.items()}
