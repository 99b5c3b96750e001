"""Peak resident memory of forward with backward, above what the process held before its first call.

    python -m benchmarks.peers.resident seqjax lstm 32,128,128,128

Before that call the library is imported, weights and inputs are built, and JAX's call is compiled; then free pages are
given back to the system and the kernel's high-water mark is set back. So the bytes printed are those that three calls
needed at their highest, results included, and nothing that only importing or compiling needs. Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.rows import Row, inputs, weights


def prepared(way: str, kind: str, row: Row) -> Callable[[], object]:
    """The call, ready to run for the first time."""
    if way == "torch":
        from benchmarks.peers.torch_process import TorchLayer

        return TorchLayer(kind, row).backward
    import jax

    from benchmarks.peers import jax_peers

    peer = jax_peers.build(way, kind, row, weights(kind, row))
    arguments = (peer.params, *jax.device_put(inputs(row)))
    compiled = jax.jit(jax_peers.call(peer, "backward")).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def kernel_says(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_above(call: Callable[[], object], calls: int = 3) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kernel_says("VmRSS")
    for _ in range(calls):
        call()
    return kernel_says("VmHWM") - before


if __name__ == "__main__":
    print(peak_above(prepared(sys.argv[1], sys.argv[2], Row.parse(sys.argv[3]))))
