"""The safetensors format: arrays by name, and texts as metadata. The package is imported only when a file is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file by name, and its metadata.

    Raises:
        ValueError: the file is missing, or it is no safetensors file.
        ModuleNotFoundError: safetensors is not installed.
    """
    _, safetensors = import_safetensors()
    if not path.is_file():
        raise ValueError(f"expected a safetensors file, got {path}, which is not there: check the path")
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected a safetensors file, got {path}, which is none or damaged ({error}): write it again"
        ) from None


def import_safetensors() -> tuple[Any, Any]:
    """The module `safetensors.numpy`, and the package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'expected the package safetensors to read or write this file, got none: pip install "seqjax[files]"'
        ) from None
    return safetensors.numpy, safetensors
