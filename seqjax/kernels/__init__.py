"""The C++ kernel for the loops of recurrent networks on a CPU. Without it, XLA runs these loops.

The installation of the package compiles it if there is a C++ compiler (`seqjax.kernels.build`), and a wheel for one
platform contains it. `seqjax.kernels.calls` calls it. It runs the loop of every cell whose equations it implements,
even of a cell of the user (`seqjax.sequence._execution.formulas`), and as instructions that of every other cell that
acts unit by unit (`seqjax.sequence._execution.unit_kernel`).

SEQJAX_KERNEL in the environment chooses: "off" for XLA's loops, or the name of a variant, such as "x86-64-v3", for the
instructions of an older processor. By default it is the fastest variant that the processor can run.

A program of `jax.export.export` contains the custom calls TARGETS, which must be allowed by name. It runs where this
package is installed, after a call of `available()`. With `unroll(..., kernel=False)` it contains none of them.
`seqjax.interop.export` does all of this.
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

from seqjax.kernels._exporting import target
from seqjax.kernels.build import DIGESTS, FOLDER, LIBRARY, SOURCES, digest

CALLS = ("pack", "forward", "backward", "backward_from_gates", "replay", "units")
TARGETS = tuple(f"seqjax_{call}_{dtype}" for call in CALLS for dtype in ("float32", "float64"))
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


def available() -> bool:
    """Whether the kernel runs. The first call loads it."""
    exported = target()
    is_allowed = exported is None or (exported.kernel and exported.platforms == ("cpu",))
    return is_allowed and os.environ.get("SEQJAX_KERNEL") not in OFF and loaded().variant is not None


def variant() -> str | None:
    """The variant that runs; None if XLA runs the loops."""
    return loaded().variant if available() else None


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


def sources() -> str:
    """The digest of the sources of the kernel, which a program that calls it depends on."""
    return digest(*(FOLDER / name for name in SOURCES))


def _damage(folder: Path) -> str:
    """Why the library must not be loaded, because a file that was cut short crashes the process; empty if it may.

    Raises:
        OSError, ValueError: there is no complete library.
    """
    of_sources, of_library = (folder / DIGESTS).read_text().split()
    if digest(folder / LIBRARY) != of_library:
        return f"the kernel in {folder} is damaged"
    if sources() != of_sources:
        return f"the kernel in {folder} was compiled from other sources"
    return ""


def _supported(library: ctypes.CDLL) -> tuple[str, ...]:
    """The variants that this processor can run, the fastest first."""
    library.seqjax_variant.restype = ctypes.c_char_p
    names = itertools.takewhile(lambda name: name is not None, map(library.seqjax_variant, itertools.count()))
    return tuple(name.decode() for name in names)
