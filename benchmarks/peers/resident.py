"""Peak resident memory of forward with backward, minus the resident memory before the first call.

    python -m benchmarks.peers.resident seqjax lstm 32,128,128,128

Before the first call, the process imports the library, builds weights and inputs, and compiles the call. Then it
returns free pages to the system and resets the peak that Linux records. So the printed bytes are the peak of three
calls with their results, without the memory of importing and compiling. Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.rows import Row, inputs, weights


def prepared(way: str, kind: str, row: Row) -> Callable[[], object]:
    """Builds and compiles the call."""
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
