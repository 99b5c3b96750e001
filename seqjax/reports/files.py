"""The file of a page: its path, its footer, and the versions that it was written with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from seqjax.plots.canvas import require_matplotlib


def checked_place(path: str | os.PathLike[str]) -> Path:
    """Checks that a page can be written, before any time is spent on measurements. Returns its path.

    Raises:
        ValueError: the path is a folder, or its folder does not exist or is not writable.
        ModuleNotFoundError: matplotlib is not installed.
    """
    require_matplotlib()
    place = Path(path)
    if place.is_dir() or not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        reason = "a folder" if place.is_dir() else "a file in a folder that is not there or not writable"
        raise ValueError(f"expected a file to write the page to, got {place}, {reason}: choose another path")
    return place


def write(place: Path, text: str) -> Path:
    """Writes the page completely or not at all. Returns its path.

    Raises:
        ValueError: the file cannot be written.
    """
    # A rename within one folder is atomic, so an error leaves the former page in place.
    temporary = place.with_name(place.name + ".new")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, place)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"expected a file to write the page to, got {place}: {error.strerror}; choose another path"
        ) from None
    return place


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine the numbers and figures of a page."""
    names = ("seqjax", "jax", "jaxlib", "numpy", "optax", "matplotlib")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def foot() -> str:
    """The footer of a page: the version of seqjax and the date."""
    return f"Written by seqjax {importlib.metadata.version('seqjax')} on {datetime.date.today():%d %B %Y}."
