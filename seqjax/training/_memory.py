"""A warning before the first update if it needs more memory than there is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from seqjax.sequence.memory import readable


class MemoryWarning(UserWarning):
    """An update needs more memory than the device has."""


def warn_of_memory(update: Callable[..., Any], *arguments: Any) -> None:
    """Compares the memory of a compiled function with that of the device. The call that follows compiles nothing anew.

    Nothing is said if the compiler or the device does not report its memory.
    """
    lower = getattr(update, "lower", None)
    if lower is None or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
        return
    used, have = lower(*arguments).compile().memory_analysis(), device_memory(jax.local_devices()[0])
    if used is None or have is None:
        return
    need = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    if need > have:
        warnings.warn(
            f"an update needs {readable(need)}, and the device has {readable(have)}: use accumulate, checkpoint_every, "
            f"a smaller batch, or a shorter window",
            MemoryWarning,
            stacklevel=2,
        )


def device_memory(device: Any) -> int | None:
    """The bytes that a device, a `jax.Device`, has: the memory of the machine for a CPU. None if unknown."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None:
        return stats.get("bytes_limit")
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.platform == "cpu" else None
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
