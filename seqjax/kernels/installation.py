"""What this installation consists of: versions, devices and the kernel."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax

from seqjax.kernels import loaded, status, variant

PACKAGES = ("seqjax", "jax", "jaxlib", "numpy", "optax", "flax")


class Installation(NamedTuple):
    """What `info` returns; printed, one line each.

    Attributes:
        versions: of the packages that seqjax uses, by name.
        python: the version of Python and the platform.
        devices: the devices of JAX, such as "cpu:0".
        kernel: the variant of the compiled kernel that runs, such as "x86-64-v3"; None if XLA runs the loops.
        variants: the variants that this processor can run, the fastest first.
        status: the variant, or why XLA runs the loops, in words.
    """

    versions: dict[str, str]
    python: str
    devices: tuple[str, ...]
    kernel: str | None
    variants: tuple[str, ...]
    status: str

    def __str__(self) -> str:
        others = f" (this processor can run {', '.join(self.variants)})" if len(self.variants) > 1 else ""
        return "\n".join(
            [
                f"packages  {', '.join(f'{name} {number}' for name, number in self.versions.items())}",
                f"python    {self.python}",
                f"devices   {', '.join(self.devices)}",
                f"kernel    {self.status}{others}",
            ]
        )


def info() -> Installation:
    """Versions, devices, and which loops run: the compiled kernel, in which variant, or those of XLA and why.

    Returns:
        `Installation`.

    Example:
        >>> import seqjax as sj
        >>> [line.split()[0] for line in str(sj.info()).splitlines()]
        ['packages', 'python', 'devices', 'kernel']
    """
    return Installation(
        versions={name: _version(name) for name in PACKAGES},
        python=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        devices=tuple(f"{device.platform}:{device.id}" for device in jax.devices()),
        kernel=variant(),
        variants=loaded().supported,
        status=status(),
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a copy of the source that was never installed
        return "unknown"
