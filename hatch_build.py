"""Adds the compiled kernel to a wheel or an editable install, if there is a C++ compiler."""

from __future__ import annotations

import os
import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SYSTEMS = {"manylinux2014": "Linux", "macosx": "Darwin"}
kernel = runpy.run_path(str(Path(__file__).parent / "seqjax" / "kernels" / "build.py"))


class CustomBuildHook(BuildHookInterface):
    """Compiles the kernel before a wheel is put together.

    SEQJAX_BUILD_KERNEL=0 leaves it out, and =1 makes a failure an error. SEQJAX_WHEEL_PLATFORM, such as
    manylinux2014_aarch64, names another platform that the compiler in $CXX compiles for.
    """

    @property
    def wanted(self) -> bool:
        return self.target_name == "wheel" and os.environ.get("SEQJAX_BUILD_KERNEL") != "0"

    def dependencies(self) -> list[str]:
        # For XLA's headers. A kernel runs under the jaxlib that it was compiled with and later ones.
        if not self.wanted or kernel["compiler_command"]() is None:
            return []
        return ["jaxlib>=0.10,<0.11; python_version < '3.15'", "jaxlib>=0.10; python_version >= '3.15'"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not self.wanted:
            return
        platform = os.environ.get("SEQJAX_WHEEL_PLATFORM") or sysconfig.get_platform()
        machine = next((name for name in kernel["VARIANTS"] if platform.replace("arm64", "aarch64").endswith(name)), "")
        try:
            import jaxlib

            headers = Path(jaxlib.__file__).parent / "include"
            library = kernel["build"](headers, machine=machine or None, system=SYSTEMS.get(platform.split("_")[0]))
        except (ImportError, RuntimeError) as error:
            if os.environ.get("SEQJAX_BUILD_KERNEL") == "1":
                raise
            self.app.display_warning(f"without the compiled kernel, XLA runs the loops: {error}")
            return
        build_data["artifacts"] += [f"seqjax/kernels/{name}" for name in (library.name, kernel["DIGESTS"])]
        build_data["pure_python"] = False
        # The library has no symbol of Python, so one wheel serves every version.
        build_data["tag"] = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
