"""The report on one cell."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from seqjax.cell import Cell, Params, State
from seqjax.plots.canvas import need_matplotlib

from . import sections
from . import training_sections as training
from .html import page, pairs, paragraph, section
from .measure import STEPS, Measured, measure
from .sections import safely


def report(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    path: str | os.PathLike[str],
    state: State | None = None,
    mask: Any = None,
    reset: Any = None,
    rows: int | None = None,
    steps: int = STEPS,
    title: str | None = None,
    history: Mapping[str, Any] | None = None,
    clip_norm: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one HTML page on how information and gradients move through a cell on these inputs.

    It holds a verdict in words, figures with a sentence on how to read each, tables of every number, and what was
    read. It needs no network, and reads well on a phone and in the dark. What cannot be had of a cell is left out with
    a sentence that says why.

    Args:
        cell: any cell.
        params: its parameters, after training or before.
        xs: inputs like those that it is for, leaves (batch, time, ...).
        path: the file to write; one that is there is replaced.
        state, mask, reset: as for `unroll`.
        rows: sequences that are read, the first ones of `xs`; by default 8, or 4 of a state of more than 256 numbers.
        steps: of each of these that are read, the first ones; more take longer and narrow the intervals.
        title: of the page; by default the cell's type.
        history: of its training, as `fit` returns it, for how clipping acted.
        clip_norm: the threshold of that training.
        settings: whatever else is to stand on the page, by name.

    Returns:
        The path of the page.

    Raises:
        ValueError: a shape does not fit, or the file cannot be written.
        TypeError: a dtype does not fit.
        ModuleNotFoundError: there is no matplotlib.

    Example:
        >>> import pathlib, tempfile, jax, jax.numpy as jnp, seqjax as sj
        >>> cell, path = sj.GRU(2, 3), pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> xs = jax.random.normal(jax.random.key(1), (2, 30, 2))
        >>> written = sj.report(cell, cell.init(jax.random.key(0)), xs, path=path)
        >>> written == path, written.read_text().count("<h1>")
        (True, 1)
    """
    place = checked_place(path)
    measured = measure(cell, params, xs, state=state, mask=mask, reset=reset, rows=rows, steps=steps)
    parts = cell_sections(cell, measured)
    if history is not None:
        parts.append(training.clipping_section(history, clip_norm))
    parts.append(settings_section(measured, settings or {}))
    name = type(cell).__name__ if title is None else title
    lead = f"How information and gradients move through {type(cell).__name__}, measured on {measured.about['read']}."
    return write(place, page(name, lead, parts, foot()))


def cell_sections(cell: Cell, measured: Measured) -> list[str]:
    """All that is told of a cell by itself."""
    keep = memory_gates(cell, measured.found.get("gate_statistics", {}))
    return [
        safely("verdict", "Verdict", sections.verdict_section, measured),
        safely("gradients", "Gradients through time", sections.gradient_section, measured),
        safely("exponents", "Lyapunov exponents", sections.exponent_section, measured),
        safely("jacobians", "Jacobians", sections.jacobian_section, measured),
        safely("gates", "Gates", sections.gate_section, measured, keep),
        safely("states", "States", sections.state_section, measured),
    ]


def memory_gates(cell: Cell, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The gates that multiply the old state, with their time constants.

    They are called "forget", or "update" in a GRU. Where an update gate writes, 1 - z keeps.
    """
    keep = {}
    for name, gate in statistics.items():
        kind, update = name.rpartition("/")[2], getattr(_owner(cell, name), "update", None)
        if kind == "forget" or (kind == "update" and update == "keeps"):
            keep[name] = gate
        elif kind == "update" and update == "writes":
            with np.errstate(divide="ignore"):
                tau = -1 / np.log1p(-np.asarray(gate.unit_mean, np.float64))
            keep[name] = gate._replace(time_constant=tau)
    return keep


def _owner(cell: Cell, gate: str) -> object:
    """The cell in wrappers and stacks that this gate belongs to; None where it cannot be told."""
    owner: Any = cell
    for layer in [*gate.split("/")[:-1], None]:
        while hasattr(owner, "cell"):
            owner = owner.cell
        if layer is not None:
            cells = getattr(owner, "cells", ())
            owner = cells[int(layer)] if layer.isdigit() and int(layer) < len(cells) else None
    return owner


def settings_section(measured: Measured, settings: Mapping[str, Any]) -> str:
    """What was measured, with what settings and what versions."""
    tables = [pairs("What was measured", measured.about)]
    if settings:
        tables.append(pairs("Settings", settings))
    tables.append(pairs("Versions", versions()))
    said = "Natural logarithms and nats, unless a column says otherwise. A norm is a ratio: 1 at lag 0."
    return section("settings", "Settings and versions", paragraph(said), *tables)


def versions() -> dict[str, str]:
    """Of what this page was made with."""
    names: Sequence[str] = ("seqjax", "jax", "jaxlib", "numpy", "optax", "matplotlib")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def foot() -> str:
    """When and by what."""
    return f"Written by seqjax {importlib.metadata.version('seqjax')} on {datetime.date.today():%d %B %Y}."


def checked_place(path: str | os.PathLike[str]) -> Path:
    """The path of a page, before anything takes time.

    Raises:
        ValueError: nothing can be written there.
        ModuleNotFoundError: there is no matplotlib.
    """
    need_matplotlib()
    place = Path(path)
    if place.is_dir() or not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        what = "a folder" if place.is_dir() else "a folder that is not there or not to be written to"
        raise ValueError(f"expected a file to write the page to, got {place}, {what}: choose another path")
    return place


def write(place: Path, text: str) -> Path:
    """Writes the page whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    beside = place.with_name(place.name + ".new")
    try:
        beside.write_text(text, "utf-8")
        os.replace(beside, place)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ValueError(
            f"expected a file to write the page to, got {place}: {error.strerror}; choose another path"
        ) from None
    return place
