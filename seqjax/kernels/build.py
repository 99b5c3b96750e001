"""Compiles the kernel into one library, with a variant for every level of the processor that it may run on.

Only the standard library is used, because the build of the package runs this file in an environment without JAX.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("loops.h", "vectors.h", "products.h", "units.h", "loops.cpp", "ffi.cpp")
LIBRARY = "loops.library"  # not .so, which Python takes for a module of its own
# Written beside the library: a line with the digest of the sources, and one with the digest of the library.
DIGESTS = "loops.sha256"
# By processor, the options of every variant that ffi.cpp names.
VARIANTS = {
    "x86_64": {
        "x86_64_v2": ["-march=x86-64-v2"],
        "x86_64_v3": ["-march=x86-64-v3"],
        "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    "aarch64": {"neon": []},
}
# Not -ffast-math, because a library with it makes the whole process flush subnormal numbers to zero. Without errno and
# traps, the compiler can vectorize more. -w, because the headers of XLA cause warnings.
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
           "-ffp-contract=fast", "-w")  # fmt: skip


# On Linux the C++ library is linked in, because another machine may have another version of it, or none.
LINKING = {"Linux": ("-static-libstdc++", "-static-libgcc", "-Wl,--gc-sections", "-s"), "Darwin": ()}


def compiler_command() -> list[str] | None:
    """The C++ compiler in $CXX, or one that is installed; None without one."""
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["g++", "clang++", "c++"]
    return next((words for words in map(shlex.split, candidates) if words and shutil.which(words[0])), None)


def processor() -> str:
    """The processor of this machine, under the name that VARIANTS has for it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def digest(*files: Path) -> str:
    """A digest of the contents of files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def build(headers: str | Path, folder: Path = FOLDER, machine: str | None = None, system: str | None = None) -> Path:
    """Compiles the kernel.

    Args:
        headers: the folder with XLA's headers, `jax.ffi.include_dir()`. A library runs under this version of jaxlib and
            later ones.
        folder: where the library and its digests are written.
        machine: the processor that it is for, "x86_64" or "aarch64"; by default that of this machine.
        system: the operating system that it is for, "Linux" or "Darwin"; by default that of this machine.

    Returns:
        The library.

    Raises:
        RuntimeError: there is no compiler, it does not compile the sources, the kernel does not know the processor, or
            the library cannot be written.
    """
    machine, system, command = machine or processor(), system or platform.system(), compiler_command()
    if system not in LINKING:
        raise RuntimeError(f"expected one of the systems {', '.join(LINKING)}, got {system}")
    if machine not in VARIANTS:
        raise RuntimeError(f"expected one of the processors {', '.join(VARIANTS)}, got {machine}")
    if command is None:
        missing = os.environ.get("CXX", "g++, clang++ or c++")
        raise RuntimeError(f"expected a C++17 compiler, found no {missing}: install one, or set CXX")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"expected a folder that can be written, got {error}") from None
    if not os.access(folder, os.W_OK):
        raise RuntimeError(f"expected a folder that can be written, got {folder}")
    with tempfile.TemporaryDirectory() as work:
        objects = {Path(work) / "ffi.o": ["ffi.cpp", f"-I{headers}"]}
        for (name, options), real in itertools.product(VARIANTS[machine].items(), ("float", "double")):
            symbol = f"{name}_{real}"
            defined = [f"-DSEQJAX_VARIANT={symbol}", f"-DSEQJAX_REAL={real}"]
            objects[Path(work) / f"{symbol}.o"] = ["loops.cpp", *defined, "-fno-exceptions", *options]

        def compile_one(item: tuple[Path, list[str]]) -> None:
            target, (source, *options) = item
            _run([*command, *OPTIONS, *options, "-c", str(FOLDER / source), "-o", str(target)])

        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, objects.items()))
        linked = Path(work) / LIBRARY
        _run([*command, *OPTIONS, "-shared", *LINKING[system], *map(str, objects), "-o", str(linked)])
        return _install(linked, folder)


def _install(linked: Path, folder: Path) -> Path:
    """Moves a library and its digests to their folder. Another process sees the old pair or none, never a mixed one."""
    digests = f"{digest(*(FOLDER / name for name in SOURCES))}\n{digest(linked)}\n"
    (folder / DIGESTS).unlink(missing_ok=True)
    for name, content in ((LIBRARY, linked.read_bytes()), (DIGESTS, digests.encode())):
        unfinished = folder / f"{name}.{os.getpid()}"
        unfinished.write_bytes(content)
        unfinished.replace(folder / name)
    return folder / LIBRARY


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {error}") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{command[0]} failed:\n{error.stderr.strip()}") from None
