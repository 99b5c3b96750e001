"""An optional C++ kernel for the loops of LSTM, GRU and tanh networks on a CPU. Without it, XLA runs these loops.

    python -m seqjax.kernels        compiles it with the installed C++ compiler, once per machine

From then on seqjax uses it automatically, for every cell whose equations it implements, even for a cell of the user
(`seqjax.sequence._execution.kernel`). `SEQJAX_NATIVE=0` in the environment disables it. This is necessary for
`jax.export`, because a program with the kernel runs only on this machine.
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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

SOURCE = Path(__file__).with_name("loops.cpp")
TARGETS = ("seqjax_pack_forward", "seqjax_pack_backward", "seqjax_forward", "seqjax_backward", "seqjax_replay")
LANES = 8  # the number of floats in one vector of the source
# Not -ffast-math, because a library with it makes the whole process flush subnormal numbers to zero. Without errno and
# traps, the compiler can vectorize more.
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")

_loaded: list[ctypes.CDLL] = []  # at most one, because JAX registers a name only once per process, even after a rebuild
_loading = threading.Lock()


def library() -> Path:
    """The path of the compiled kernel for this source, jaxlib and processor. The file may not exist."""
    key = SOURCE.read_bytes() + " ".join([version("jaxlib"), *OPTIONS, _processor()]).encode()
    # Not Path.home(), which raises an error for a user without a home directory.
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "seqjax"
    return folder / f"loops-{hashlib.sha256(key).hexdigest()[:16]}.so"


def _processor() -> str:
    """The instruction sets of this processor, which -march=native may use; empty if they are unknown."""
    # Part of the file name, because different machines may share one cache directory.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build(compiler: str | None = None) -> Path:
    """Compiles the kernel for this machine.

    Args:
        compiler: the C++17 compiler, g++ or clang++, optionally followed by options; by default $CXX, or g++.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: the compiler is missing, it does not compile the source, or the library cannot be written.
    """
    compiler = compiler or os.environ.get("CXX") or "g++"
    target = library()
    # A file per process and an atomic rename, so that no other process ever loads an incomplete library.
    unfinished = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise RuntimeError(
            f"expected a folder to keep the kernel in, got {error}: set XDG_CACHE_HOME to a writable folder"
        ) from None
    # -w, because the headers of XLA cause warnings.
    files = ["-w", "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(unfinished)]
    try:
        subprocess.run([*shlex.split(compiler), *OPTIONS, *files], check=True, capture_output=True, text=True)
        unfinished.replace(target)
    except OSError:
        raise RuntimeError(
            f"expected a C++17 compiler, found no {compiler!r}: install g++, or set CXX to another one; "
            f"without it XLA runs the same loops"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} did not compile {SOURCE.name}:\n{error.stderr}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    available.cache_clear()
    return target


@functools.cache
def available() -> bool:
    """Whether the kernel is compiled and enabled. The first call registers it with JAX."""
    # Not Path.exists(), which raises an error if a parent folder is not readable.
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


def run_forward(W_hh: Array, bias: Array | None, state: list[Array], drives: Array, reverse: bool) -> list[Array]:
    """Computes all states of a chunk.

    Args:
        W_hh: the recurrent weights, (gates * n, n), with 4 gates for an LSTM, 3 for a GRU, and 1 for a vanilla network.
        bias: the bias of the recurrent product, (gates * n,), or None.
        state: the state before the chunk: h, and c for an LSTM, (batch, n) each.
        drives: the part of the gates that does not depend on the state, (time, batch, gates * n).
        reverse: whether to run from right to left.

    Returns:
        h, and c for an LSTM, (time, batch, n) each.
    """
    n = W_hh.shape[1]
    gates = W_hh.shape[0] // n
    units = LANES * (2 if gates == 1 else 1)  # per panel, as in the source
    panels = _call("seqjax_pack_forward", [_like(W_hh, -(-n // units), n, gates * units)], W_hh, gates=gates)[0]
    h_0, c_0 = _pair(state)
    shape = (drives.shape[0], *h_0.shape)
    kinds = [_like(h_0, *shape), _like(h_0, *(shape if len(state) == 2 else (0,)))]
    bias = jnp.zeros(0, W_hh.dtype) if bias is None else bias
    states = _call("seqjax_forward", kinds, drives, panels, bias, h_0, c_0, gates=gates, reverse=reverse)
    return states[: len(state)]


def run_backward(
    W_hh: Array,
    drives: Array,
    recurrents: Array,
    before: list[Array],
    ct_after: list[Array],
    ct_outputs: Array,
    reverse: bool,
) -> tuple[list[Array], Array, Array]:
    """Computes the cotangents of the state before a chunk, of its drives and of its recurrent products.

    Args:
        W_hh, drives, reverse: as for `run_forward`.
        recurrents: the recurrent products with their bias, (time, batch, gates * n).
        before: the states before each step, (time, batch, n) each.
        ct_after: the cotangents of the state after the chunk, (batch, n) each.
        ct_outputs: the cotangents of h from the outputs of each step, without those from later steps,
            (time, batch, n).
    """
    rows, n = W_hh.shape
    gates = rows // n
    panels = _call("seqjax_pack_backward", [_like(W_hh, -(-n // (2 * LANES)), rows, 2 * LANES)], W_hh)[0]
    ct_h, ct_c = _pair(ct_after)
    h, c = _pair(before)
    # The candidate of a GRU multiplies only its recurrent product by the reset gate. So the drive and the recurrent
    # product have different cotangents. In the other cells both are added, so their cotangents are equal.
    separate = gates == 3
    kinds = [_like(ct_h, *ct_h.shape), _like(ct_c, *ct_c.shape), _like(drives, *drives.shape)]
    kinds.append(_like(drives, *(drives.shape if separate else (0,))))
    *ct_before, ct_drives, ct_recurrents = _call(
        "seqjax_backward", kinds, drives, recurrents, panels, h, c, ct_outputs, ct_h, ct_c, gates=gates, reverse=reverse
    )
    return ct_before[: len(ct_after)], ct_drives, ct_recurrents if separate else ct_drives


def run_replay(drives: Array, recurrents: Array, c_0: Array, reverse: bool) -> Array:
    """Recomputes c before each step of an LSTM's chunk, (time, batch, n), from the first c and from the gate inputs."""
    shape = (*drives.shape[:2], c_0.shape[-1])
    return _call("seqjax_replay", [_like(c_0, *shape)], drives, recurrents, c_0, reverse=reverse)[0]


def _pair(leaves: list[Array]) -> tuple[Array, Array]:
    """h and c, which is empty if the state has no c."""
    return leaves[0], leaves[1] if len(leaves) == 2 else jnp.zeros(0, leaves[0].dtype)


def _like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _call(name: str, kinds: list[jax.ShapeDtypeStruct], *arrays: Array, **attributes: bool | int) -> list[Array]:
    # XLA's interface has typed attributes: the source declares int64 and bool.
    numbers = {key: value if isinstance(value, bool) else np.int64(value) for key, value in attributes.items()}
    return list(jax.ffi.ffi_call(name, kinds, vmap_method="sequential")(*arrays, **numbers))
