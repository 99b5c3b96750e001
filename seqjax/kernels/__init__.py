"""An optional kernel in C++ for the loops of LSTM, GRU and tanh networks on a CPU; otherwise XLA runs the loops.

    python -m seqjax.kernels        compiles it with the C++ compiler that is there, once for each machine

It runs every cell whose formulas it has, whoever wrote it (`seqjax.sequence._execution.kernel`).
It is found by itself from then on. `SEQJAX_NATIVE=0` in the environment leaves it alone, which `jax.export` needs: a
program with the kernel runs on this machine only.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

SOURCE = Path(__file__).with_name("loops.cpp")
TARGETS = ("seqjax_pack_forward", "seqjax_pack_backward", "seqjax_forward", "seqjax_backward", "seqjax_replay")
LANES = 8  # floats of one vector in the source
# Neither -ffast-math, which would make the whole process flush small numbers to zero, nor errno and traps.
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")

_loaded: list[ctypes.CDLL] = []  # JAX takes a name once in a process, also where the library was built anew
_loading = threading.Lock()


def library() -> Path:
    """Where the kernel of this source, this jaxlib and this processor lies, or would lie."""
    about = SOURCE.read_bytes() + " ".join([version("jaxlib"), *OPTIONS, _processor()]).encode()
    # Not Path.home(), which raises where a user has none.
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "seqjax"
    return folder / f"loops-{hashlib.sha256(about).hexdigest()[:16]}.so"


def _processor() -> str:
    """What the compiler may use of this processor: the same cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build(compiler: str | None = None) -> Path:
    """Compiles the kernel for this machine.

    Args:
        compiler: the C++17 compiler, g++ or clang++, with options of its own where it needs some; by default $CXX, or
            g++.

    Returns:
        The library, where `available` finds it.

    Raises:
        RuntimeError: there is no such compiler, it does not take the source, or there is no place for the library.
    """
    compiler = compiler or os.environ.get("CXX") or "g++"
    target = library()
    half = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        half.touch()
    except OSError as error:
        raise RuntimeError(
            f"expected a folder to keep the kernel in, got {error}: name one that can be written in XDG_CACHE_HOME"
        ) from None
    where = ["-w", "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(half)]
    try:
        subprocess.run([*shlex.split(compiler), *OPTIONS, *where], check=True, capture_output=True, text=True)
        half.replace(target)
    except OSError:
        raise RuntimeError(
            f"expected a C++17 compiler, found no {compiler!r}: install g++, or name one in CXX; "
            f"without it XLA runs the same loops"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} did not take {SOURCE.name}:\n{error.stderr}") from None
    finally:
        half.unlink(missing_ok=True)
    available.cache_clear()
    return target


@functools.cache
def available() -> bool:
    """Whether the kernel is there and wanted; registers it with JAX when first asked."""
    # Not Path.exists(), which raises where a folder on the way may not be read.
    if os.environ.get("SEQJAX_NATIVE") == "0" or jax.default_backend() != "cpu" or not os.path.exists(library()):
        return False
    with _loading:
        return bool(_loaded) or _load(library())


def _load(path: Path) -> bool:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(
            f"the kernel does not load, so XLA runs the loops: {error}; python -m seqjax.kernels builds it anew",
            stacklevel=2,
        )
        return False
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    _loaded.append(loaded)
    return True


def run_forward(
    gates: int, W_hh: Array, bias: Array | None, state: list[Array], drives: Array, reverse: bool
) -> list[Array]:
    """Every state of a chunk.

    Args:
        gates: 4 for the LSTM, 3 for the GRU, 1 for the vanilla network.
        W_hh: (gates * n, n).
        bias: (gates * n,), what is added to the recurrent product, or None.
        state: h, and c if there is one, (batch, n) each.
        drives: (time, batch, gates * n).
        reverse: right to left.

    Returns:
        h, and c if there is one, (time, batch, n) each.
    """
    n = W_hh.shape[1]
    units = LANES * (2 if gates == 1 else 1)  # of one panel
    panels = _call("seqjax_pack_forward", [_like(W_hh, -(-n // units), n, gates * units)], W_hh, gates=gates)[0]
    h_0, c_0 = _pair(state)
    shape = (drives.shape[0], *h_0.shape)
    kinds = [_like(h_0, *shape), _like(h_0, *(shape if len(state) == 2 else (0,)))]
    bias = jnp.zeros(0, W_hh.dtype) if bias is None else bias
    states = _call("seqjax_forward", kinds, drives, panels, bias, h_0, c_0, gates=gates, reverse=reverse)
    return states[: len(state)]


def run_backward(
    gates: int,
    W_hh: Array,
    drives: Array,
    recurrents: Array,
    before: list[Array],
    ct_after: list[Array],
    ct_kept: Array,
    reverse: bool,
) -> tuple[list[Array], Array, Array]:
    """The cotangents of the state before a chunk, of its drives and of its recurrent products.

    Args:
        gates, W_hh, drives, reverse: as for `run_forward`.
        recurrents: the recurrent products with their bias, (time, batch, gates * n).
        before: the states before each step, (time, batch, n) each.
        ct_after: the cotangents of the state after the chunk, (batch, n) each.
        ct_kept: the cotangents of h that each step has beside those of later steps, (time, batch, n).
    """
    rows, n = W_hh.shape
    panels = _call("seqjax_pack_backward", [_like(W_hh, -(-n // (2 * LANES)), rows, 2 * LANES)], W_hh)[0]
    ct_h, ct_c = _pair(ct_after)
    h, c = _pair(before)
    apart = gates == 3  # the GRU's candidate reads its drive and its recurrent product apart
    kinds = [_like(ct_h, *ct_h.shape), _like(ct_c, *ct_c.shape), _like(drives, *drives.shape)]
    kinds.append(_like(drives, *(drives.shape if apart else (0,))))
    *ct_before, ct_drives, ct_recurrents = _call(
        "seqjax_backward", kinds, drives, recurrents, panels, h, c, ct_kept, ct_h, ct_c, gates=gates, reverse=reverse
    )
    return ct_before[: len(ct_after)], ct_drives, ct_recurrents if apart else ct_drives


def run_replay(drives: Array, recurrents: Array, c_0: Array, reverse: bool) -> Array:
    """c before each step of an LSTM's chunk, (time, batch, n), from the first one and from what the gates read."""
    shape = (*drives.shape[:2], c_0.shape[-1])
    return _call("seqjax_replay", [_like(c_0, *shape)], drives, recurrents, c_0, reverse=reverse)[0]


def _pair(leaves: list[Array]) -> tuple[Array, Array]:
    """h and c; a state without c gets an empty one."""
    return leaves[0], leaves[1] if len(leaves) == 2 else jnp.zeros(0, leaves[0].dtype)


def _like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _call(name: str, kinds: list[jax.ShapeDtypeStruct], *arrays: Array, **attributes: Any) -> list[Array]:
    numbers = {key: value if isinstance(value, bool) else np.int64(value) for key, value in attributes.items()}
    return list(jax.ffi.ffi_call(name, kinds, vmap_method="sequential")(*arrays, **numbers))
