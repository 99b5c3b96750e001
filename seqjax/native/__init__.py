"""An optional kernel in C++ for the two loops of the built-in cells on a CPU; without it, XLA runs the same loops.

    python -m seqjax.native        compiles it with the C++ compiler that is there, once for each machine

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
from jaxtyping import Array, PyTree

from seqjax.cell import native_loop

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
            f"the kernel does not load, so XLA runs the loops: {error}; python -m seqjax.native builds it anew",
            stacklevel=2,
        )
        return False
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    _loaded.append(loaded)
    return True


def takes(cell: Any, params: PyTree, states: PyTree, products: PyTree, flags: Any) -> bool:
    """Whether the kernel can run this cell: one of ours, all that it reads in float32, without mask and reset.

    Args:
        cell, params: the cell.
        states: what is read of its states' shape, (..., n).
        products: its drives and recurrent products, (..., gates n). What is shorter, and broadcast, is left to XLA.
        flags: the mask and the reset.
    """
    loop = native_loop(cell)
    if loop is None or any(flag is not None for flag in flags):
        return False
    gates, W_hh, bias = loop(params)
    n = W_hh.shape[1]

    def fits(tree: PyTree, size: int) -> bool:
        return all(leaf.dtype == jnp.float32 and leaf.shape[-1] == size for leaf in jax.tree.leaves(tree))

    return fits(states, n) and fits((products, bias, W_hh.T), gates * n) and available()


def run_forward(cell: Any, params: PyTree, state: PyTree, drives: Array, reverse: bool) -> PyTree:
    """Every state of a chunk, (time, batch, n) each."""
    gates, W_hh, bias = cell.native_loop(params)
    n = W_hh.shape[1]
    units = LANES * (2 if gates == 1 else 1)  # of one panel
    panels = _call("seqjax_pack_forward", [_like(W_hh, -(-n // units), n, gates * units)], W_hh, gates=gates)[0]
    leaves, tree = jax.tree.flatten(state)
    h_0, c_0 = _pair(leaves)
    shape = (drives.shape[0], *h_0.shape)
    kinds = [_like(h_0, *shape), _like(h_0, *(shape if len(leaves) == 2 else (0,)))]
    bias = jnp.zeros(0, W_hh.dtype) if bias is None else bias
    states = _call("seqjax_forward", kinds, drives, panels, bias, h_0, c_0, gates=gates, reverse=reverse)
    return jax.tree.unflatten(tree, states[: len(leaves)])


def run_backward(
    cell: Any, params: PyTree, of_state: PyTree, before: PyTree, made: Any, of_kept: Array, reverse: bool
) -> tuple[PyTree, tuple[Array, Array]]:
    """lambda before the chunk, and the cotangents of `made`, its drives and recurrent products."""
    drives, recurrents = made
    gates, W_hh, _ = cell.native_loop(params)
    rows, n = W_hh.shape
    panels = _call("seqjax_pack_backward", [_like(W_hh, -(-n // (2 * LANES)), rows, 2 * LANES)], W_hh)[0]
    leaves, tree = jax.tree.flatten(of_state)
    of_h, of_c = _pair(leaves)
    h, c = _pair(jax.tree.leaves(before))
    apart = gates == 3  # the GRU's candidate reads its drive and its recurrent product apart
    kinds = [_like(of_h, *of_h.shape), _like(of_c, *of_c.shape), _like(drives, *drives.shape)]
    kinds.append(_like(drives, *(drives.shape if apart else (0,))))
    *of_state, of_drives, of_recurrents = _call(
        "seqjax_backward", kinds, drives, recurrents, panels, h, c, of_kept, of_h, of_c, gates=gates, reverse=reverse
    )
    return jax.tree.unflatten(tree, of_state[: len(leaves)]), (of_drives, of_recurrents if apart else of_drives)


def run_replay(first: PyTree, seen: PyTree, made: Any, reverse: bool) -> PyTree:
    """s_{t-1} for every t of an LSTM's chunk, where `seen` knows h alone and `first` is the first of them."""
    (h, _), tree = jax.tree.flatten(seen)
    c = _call("seqjax_replay", [_like(h, *h.shape)], *made, jax.tree.leaves(first)[1], reverse=reverse)[0]
    return jax.tree.unflatten(tree, [h, c])


def _pair(leaves: list[Array]) -> tuple[Array, Array]:
    """h and c; a state without c gets an empty one."""
    return leaves[0], leaves[1] if len(leaves) == 2 else jnp.zeros(0, leaves[0].dtype)


def _like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _call(name: str, kinds: list[jax.ShapeDtypeStruct], *arrays: Array, **attributes: Any) -> list[Array]:
    numbers = {key: value if isinstance(value, bool) else np.int64(value) for key, value in attributes.items()}
    return list(jax.ffi.ffi_call(name, kinds, vmap_method="sequential")(*arrays, **numbers))
