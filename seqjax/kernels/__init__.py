"""The C++ kernel for the loops of LSTM, GRU and tanh networks on a CPU. Without it, XLA runs these loops.

The installation of the package compiles it if there is a C++ compiler (`seqjax.kernels.build`), and a wheel for one
platform contains it. It runs the loop of every cell whose equations it implements, even of a cell of the user
(`seqjax.sequence._execution.kernel`).

SEQJAX_KERNEL in the environment chooses: "off" for XLA's loops, or the name of a variant, such as "x86-64-v3", for the
instructions of an older processor. By default it is the fastest variant that the processor can run.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.kernels.build import DIGESTS, FOLDER, LIBRARY, SOURCES, digest

LANES = 16  # the largest number of floats in one vector of the source
TARGETS = ("seqjax_pack", "seqjax_forward", "seqjax_backward", "seqjax_replay")
CELLS = ("lstm", "gru", "vanilla")  # in the order of the source
OFF = ("off", "0")

_loading = threading.Lock()


class Loaded(NamedTuple):
    """What loading the kernel led to.

    Attributes:
        variant: the variant that this process runs; None if it runs none.
        supported: the variants that this processor can run, the fastest first.
        reason: why it runs none.
    """

    variant: str | None
    supported: tuple[str, ...] = ()
    reason: str = ""


class Flags(NamedTuple):
    """The mask and the resets of a chunk.

    Attributes:
        valid, reset: (time, batch); None if all steps are valid, or if there is no reset.
        initial: what a reset sets: h, and c for an LSTM, (n,) each; empty if there is no reset.
    """

    valid: Array | None = None
    reset: Array | None = None
    initial: list[Array] = []  # noqa: RUF012 - never changed


def available() -> bool:
    """Whether the kernel runs. The first call loads it."""
    return os.environ.get("SEQJAX_KERNEL") not in OFF and loaded().variant is not None


def status() -> str:
    """The kernel in words: which variant runs, or why XLA runs the loops."""
    wanted = os.environ.get("SEQJAX_KERNEL")
    if wanted in OFF:
        return f"XLA runs the loops: SEQJAX_KERNEL={wanted} switches the kernel off"
    found = loaded()
    return f"XLA runs the loops: {found.reason}" if found.variant is None else f"{found.variant} of the compiled kernel"


@functools.cache
def loaded() -> Loaded:
    """Loads the kernel, once per process, and chooses its variant. A warning says what a user would not expect."""
    with _loading:
        found, unexpected = _load(FOLDER)
    if unexpected:
        warnings.warn(f"XLA runs the loops: {found.reason}", stacklevel=2)
    return found


def _load(folder: Path) -> tuple[Loaded, bool]:
    """What was loaded, and whether something is wrong that a user should see unasked."""
    if jax.default_backend() != "cpu":
        return Loaded(None, reason=f"the kernel needs a CPU, and JAX runs on a {jax.default_backend()}"), False
    try:
        damage = _damage(folder)
    except (OSError, ValueError):  # there is no library, it may not be read, or its digests are incomplete
        return Loaded(None, reason="the kernel is not installed; python -m seqjax.kernels compiles it"), False
    if damage:
        return Loaded(None, reason=f"{damage}; python -m seqjax.kernels compiles it anew"), True
    try:
        library = ctypes.CDLL(str(folder / LIBRARY))
        supported = _supported(library)
        if not supported:
            return Loaded(None, reason="this processor is older than every variant of the kernel"), False
        wanted = os.environ.get("SEQJAX_KERNEL", "")
        if wanted in ("", *OFF):  # if it is off now, it may be switched on later
            wanted = supported[0]
        if wanted not in supported:
            names = ", ".join(("off", *supported))
            return Loaded(None, supported, f"expected SEQJAX_KERNEL to be one of {names}, got {wanted!r}"), True
        library.seqjax_choose(wanted.encode())
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # noqa: BLE001 - XLA refuses a library for a later version by an error of its own
        reason = f"the kernel does not load ({error}); python -m seqjax.kernels compiles it anew"
        return Loaded(None, reason=reason), True
    return Loaded(wanted, supported), False


def _damage(folder: Path) -> str:
    """Why the library must not be loaded, because a file that was cut short crashes the process; empty if it may.

    Raises:
        OSError, ValueError: there is no complete library.
    """
    of_sources, of_library = (folder / DIGESTS).read_text().split()
    if digest(folder / LIBRARY) != of_library:
        return f"the kernel in {folder} is damaged"
    if digest(*(FOLDER / name for name in SOURCES)) != of_sources:
        return f"the kernel in {folder} was compiled from other sources"
    return ""


def _supported(library: ctypes.CDLL) -> tuple[str, ...]:
    """The variants that this processor can run, the fastest first."""
    library.seqjax_variant.restype = ctypes.c_char_p
    names = itertools.takewhile(lambda name: name is not None, map(library.seqjax_variant, itertools.count()))
    return tuple(name.decode() for name in names)


def run_forward(
    cell: str, W_hh: Array, bias: Array | None, state: list[Array], drives: Array, flags: Flags, reverse: bool
) -> list[Array]:
    """Computes all states of a chunk.

    Args:
        cell: one of CELLS.
        W_hh: the recurrent weights, (gates * n, n), with 4 gates for an LSTM, 3 for a GRU, and 1 for a vanilla network.
        bias: the bias of the recurrent product, (gates * n,), or None.
        state: the state before the chunk: h, and c for an LSTM, (batch, n) each.
        drives: the part of the gates that does not depend on the state, (time, batch, gates * n).
        flags: which steps are valid, and before which ones the state is reset.
        reverse: whether to run from right to left.

    Returns:
        h, and c for an LSTM, (time, batch, n) each.
    """
    rows, n = W_hh.shape
    gates = rows // n
    units = LANES * (2 if gates == 1 else 1)  # per panel, at most
    panels = _packed(cell, W_hh, -(-n // units) * units * gates * n, backward=False)
    h_0, c_0 = _pair(state)
    shape = (drives.shape[0], *h_0.shape)
    kinds = [_like(h_0, *shape), _like(h_0, *(shape if len(state) == 2 else (0,)))]
    bias = jnp.zeros(0, W_hh.dtype) if bias is None else bias
    arrays = (drives, panels, bias, h_0, c_0, *_arrays(flags, W_hh))
    return _call("seqjax_forward", kinds, *arrays, cell=CELLS.index(cell), reverse=reverse)[: len(state)]


def run_backward(
    cell: str,
    W_hh: Array,
    steps: tuple[Array, Array, list[Array]],
    ct_after: list[Array],
    ct_outputs: Array,
    flags: Flags,
    reverse: bool,
) -> tuple[list[Array], list[Array], Array, Array]:
    """Computes the cotangents of the state before a chunk, of the initial state, of the drives and of the products.

    Args:
        cell, W_hh, flags, reverse: as for `run_forward`.
        steps: the drives; the recurrent products with their bias, (time, batch, gates * n); and the states before each
            step and before its reset, (time, batch, n) each.
        ct_after: the cotangents of the state after the chunk, (batch, n) each.
        ct_outputs: the cotangents of h after each step, without those from later steps, (time, batch, n).
    """
    drives, recurrents, before = steps
    rows, n = W_hh.shape
    panels = _packed(cell, W_hh, -(-n // (2 * LANES)) * 2 * LANES * rows, backward=True)
    ct_h, ct_c = _pair(ct_after)
    h, c = _pair(before)
    # The candidate of a GRU multiplies only its recurrent product by the reset gate. So the drive and the recurrent
    # product have different cotangents. In the other cells both are added, so their cotangents are equal.
    separate = cell == "gru"
    ct_initial = [_like(ct, *(ct.shape if flags.reset is not None else (0,))) for ct in (ct_h, ct_c)]
    kinds = [_like(ct_h, *ct_h.shape), _like(ct_c, *ct_c.shape), *ct_initial, _like(drives, *drives.shape)]
    kinds.append(_like(drives, *(drives.shape if separate else (0,))))
    arrays = (drives, recurrents, panels, h, c, ct_outputs, ct_h, ct_c, *_arrays(flags, W_hh))
    found = _call("seqjax_backward", kinds, *arrays, cell=CELLS.index(cell), reverse=reverse)
    count = len(ct_after)
    ct_before, ct_initial, (ct_drives, ct_recurrents) = found[:count], found[2 : 2 + count], found[4:]
    return ct_before, ct_initial, ct_drives, ct_recurrents if separate else ct_drives


def run_replay(drives: Array, recurrents: Array, c_0: Array, flags: Flags, reverse: bool) -> Array:
    """Recomputes c before each step of an LSTM's chunk, (time, batch, n), from the first c and from the gate inputs."""
    shape = (*drives.shape[:2], c_0.shape[-1])
    valid, reset, _, initial_c = _arrays(flags, c_0)
    arrays = (drives, recurrents, c_0, valid, reset, initial_c)
    return _call("seqjax_replay", [_like(c_0, *shape)], *arrays, reverse=reverse)[0]


def _packed(cell: str, W_hh: Array, size: int, backward: bool) -> Array:
    """The weights in the order in which a loop reads them."""
    return _call("seqjax_pack", [_like(W_hh, size)], W_hh, backward=backward, cell=CELLS.index(cell))[0]


def _pair(leaves: list[Array]) -> tuple[Array, Array]:
    """h and c, which is empty if the state has no c."""
    return leaves[0], leaves[1] if len(leaves) == 2 else jnp.zeros(0, leaves[0].dtype)


def _arrays(flags: Flags, like: Array) -> tuple[Array, Array, Array, Array]:
    """The flags as the kernel reads them, where an empty array stands for none."""
    valid, reset = (jnp.zeros(0, bool) if flag is None else flag for flag in (flags.valid, flags.reset))
    h, c = _pair(flags.initial or [jnp.zeros(0, like.dtype)])
    return valid, reset, h, c


def _like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _call(name: str, kinds: list[jax.ShapeDtypeStruct], *arrays: Array, **attributes: bool | int) -> list[Array]:
    # XLA's interface has typed attributes: the source declares int64 and bool.
    numbers = {key: value if isinstance(value, bool) else np.int64(value) for key, value in attributes.items()}
    return list(jax.ffi.ffi_call(name, kinds, vmap_method="sequential")(*arrays, **numbers))
