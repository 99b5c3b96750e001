"""The checks of a release's files find what does not fit a wheel's platform."""

from __future__ import annotations

import platform
import runpy
import struct
import zipfile
from pathlib import Path

import pytest

from seqjax import kernels
from seqjax.kernels.build import LIBRARY, processor

release = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "release"))


def elf(*texts: str, machine: int = 62) -> bytes:
    return b"\x7fELF" + bytes(14) + struct.pack("<H", machine) + "\0".join(["", *texts, ""]).encode()


def mach_o(minimum: int, *libraries: str) -> bytes:
    commands = [struct.pack("<6I", 0x32, 24, 1, minimum << 16, 0, 0)]
    for name in libraries:
        commands.append(struct.pack("<6I", 0xC, 64, 24, 0, 0, 0) + name.encode().ljust(40, b"\0"))
    header = struct.pack("<8I", 0xFEEDFACF, 0x100000C, 0, 6, len(commands), 0, 0, 0)
    return header + b"".join(commands) + b"\0_seqjax_forward\0/usr/lib/text_of_a_message.dylib\0"


SYMBOLS = ("seqjax_forward", "libc.so.6", "ld-linux-x86-64.so.2", "GLIBC_2.2.5", "GLIBC_2.17")
MAC_SYSTEM = "/usr/lib/libSystem.B.dylib"


def wheel(folder: Path, tag: str, library: bytes | None, written: str | None = None) -> Path:
    path = folder / f"seqjax-0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        pure = str(library is None).lower()
        archive.writestr("seqjax-0.dist-info/WHEEL", f"Root-Is-Purelib: {pure}\nTag: py3-none-{written or tag}\n")
        if library is not None:
            archive.writestr(f"seqjax/kernels/{LIBRARY}", library)
    return path


@pytest.mark.parametrize(
    ("tag", "library", "said"),
    [
        ("manylinux2014_x86_64", elf(*SYMBOLS), "x86_64, glibc 2.17"),
        ("manylinux2014_aarch64", elf(*SYMBOLS, machine=183), "aarch64, glibc 2.17"),
        ("macosx_11_0_arm64", mach_o(11, MAC_SYSTEM), "arm64, macOS 11.0"),
        ("any", None, "no library"),
    ],
)
def test_a_wheel_that_fits_its_platform_passes(tag, library, said, tmp_path):
    assert release["check"](wheel(tmp_path, tag, library), tag) == said


@pytest.mark.parametrize(
    ("tag", "library", "written"),
    [
        ("manylinux2014_x86_64", elf(*SYMBOLS, "GLIBC_2.34"), None),
        ("manylinux2014_x86_64", elf(*SYMBOLS, "libstdc++.so.6"), None),
        ("manylinux2014_x86_64", elf(*SYMBOLS[1:]), None),
        ("manylinux2014_x86_64", elf(*SYMBOLS), "linux_x86_64"),
        ("manylinux2014_x86_64", None, None),
        ("manylinux2014_aarch64", elf(*SYMBOLS), None),
        ("macosx_11_0_arm64", mach_o(12, MAC_SYSTEM), None),
        ("macosx_11_0_arm64", mach_o(11, MAC_SYSTEM, "/usr/lib/libc++.1.dylib"), None),
        ("any", elf(*SYMBOLS), None),
    ],
)
def test_a_wheel_that_does_not_fit_its_platform_is_refused(tag, library, written, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        release["check"](wheel(tmp_path, tag, library, written), tag)


@pytest.mark.skipif(not (kernels.FOLDER / LIBRARY).exists(), reason="the kernel is not installed")
def test_the_installed_library_needs_only_the_system():
    machine, version, others = release["needs"]((kernels.FOLDER / LIBRARY).read_bytes())
    assert machine.replace("arm64", "aarch64") == processor()
    assert version > (0, 0)
    assert others == set() or platform.system() == "Darwin"
