"""The report on one cell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, PyTree

from seqjax.cell import Cell, Params, State, optional

from . import sections
from . import training_sections as training
from . import verdict_sections as verdicts
from .files import checked_place, foot, versions, write
from .html import columns, page, pairs, paragraph, section
from .measure import Inputs, Measured, measure
from .sections import safely

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from seqjax.analysis.gates import GateStatistics
else:  # needed only in annotations
    ArrayLike = GateStatistics = Any


def report(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    path: str | os.PathLike[str],
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
    full: bool = False,
    title: str | None = None,
    history: Mapping[str, ArrayLike] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an HTML page on the gradients, the states and the gates of a cell, measured on the inputs `xs`.

    The first screen has the verdict with its evidence and one figure. The sections below have more figures with
    captions that explain how to read them, tables with all numbers, and the settings of the measurement. The page needs
    no network, and it is readable on a phone, in dark mode and on paper. If an analysis does not apply to the cell, a
    sentence gives the reason instead.

    Args:
        cell: any cell.
        params: its parameters, trained or not.
        xs: typical inputs of the cell, leaves (batch, time, ...).
        path: the file to write. An existing file is replaced.
        state, mask, reset: as for `unroll`.
        full: whether to measure all of `xs` with all analyses. By default at most 8 sequences of 384 steps
            are measured. If the state has more than 128 numbers, 4 sequences are measured, and the costly analyses are
            left out. More steps take longer and give narrower confidence intervals.
        title: the title of the page; by default the type of the cell.
        history: the training history, as `fit` returns it. If it is given, the page has a section on clipping.
        settings: settings to show on the page, by name. The clipping threshold of the training is "clip_norm".

    Returns:
        The path of the page.

    Raises:
        ValueError: a shape does not match, or the file cannot be written.
        TypeError: a dtype does not match.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import pathlib, tempfile, jax, jax.numpy as jnp, seqjax as sj
        >>> cell, path = sj.GRU(2, 3), pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> xs = jax.random.normal(jax.random.key(1), (2, 30, 2))
        >>> written = sj.report(cell, cell.init(jax.random.key(0)), xs, path=path)
        >>> written == path, written.read_text().count("<h1>")
        (True, 1)
    """
    place = checked_place(path)
    depth = "full" if full else "usual"
    measured = measure(cell, params, Inputs(xs, mask, reset), state, depth=depth)
    settings = settings or {}
    parts = cell_sections(cell, measured)
    if history is not None:
        parts.append(training.clipping_section(history, settings.get("clip_norm")))
    parts.append(settings_section(measured, settings))
    name = type(cell).__name__ if title is None else title
    lead = f"The gradients, states and gates of {type(cell).__name__}, measured on {measured.about['read']}."
    first = columns(verdicts.verdict_card(measured), verdicts.first_figure(measured))
    return write(place, page(name, lead, first, parts, foot()))


def cell_sections(cell: Cell, measured: Measured) -> list[str]:
    """The sections on the cell, without those on its training."""
    memory = memory_gates(cell, measured.found.get("gate_statistics", {}))
    return [
        safely("gradients", "Gradients through time", sections.gradient_section, measured),
        safely("exponents", "Lyapunov exponents", sections.exponent_section, measured),
        safely("jacobians", "Jacobians", sections.jacobian_section, measured),
        safely("gates", "Gates", sections.gate_section, measured, memory),
        safely("states", "States", sections.state_section, measured),
        safely("verdict", "Verdict in detail", verdicts.verdict_section, measured),
    ]


def memory_gates(cell: Cell, statistics: Mapping[str, GateStatistics]) -> dict[str, GateStatistics]:
    """The statistics of the gates that multiply the old state, with the time constants of the state.

    These gates have the role "keeps" or "replaces" in the cell's `gate_roles`. A gate z that replaces the state
    multiplies it by 1 - z, so its time constant is -1 / ln(1 - E[z]).
    """
    roles, memory = optional(cell, "gate_roles") or {}, {}
    for name, gate in statistics.items():
        if roles.get(name) == "keeps":
            memory[name] = gate
        elif roles.get(name) == "replaces":
            with np.errstate(divide="ignore"):  # a gate that is always 0 keeps the state forever
                tau = -1 / np.log1p(-np.asarray(gate.unit_mean, np.float64))
            memory[name] = gate._replace(time_constant=tau)
    return memory


def settings_section(measured: Measured, settings: Mapping[str, Any]) -> str:
    """The measurement, its settings, and the versions of the packages."""
    tables = [pairs("Measurement", measured.about)]
    if settings:
        tables.append(pairs("Settings", settings))
    tables.append(pairs("Versions", versions()))
    units = (
        "Growth is given as a factor: that of one step for a Lyapunov exponent, and that of k steps for a gradient at "
        "a lag of k steps."
    )
    return section("settings", "Settings and versions", paragraph(units), *tables)
