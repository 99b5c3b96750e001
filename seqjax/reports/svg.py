"""Figures as SVG inside a page: the colours are the page's, the identifiers are their own, and text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

from seqjax.plots.canvas import BLUE, GREEN, GREY, PURPLE, VERMILLION

# Written by matplotlib in place of black and white, so that the page can put its own colours there.
INK, PAPER = "#010203", "#fdfcfb"
VARIABLES = {INK: "ink", PAPER: "paper", BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", PURPLE: "purple"}
VARIABLES |= {GREY: "grey"}
BLACK = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
LOOK: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "seqjax",
    "font.family": "DejaVu Sans",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": PAPER,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def draw(plot: Callable[..., Any], *results: Any, name: str, described: str) -> str:
    """One figure as an `<svg>` element.

    Args:
        plot: a function of `seqjax.plots`.
        *results: what it draws.
        name: begins every identifier in it, so it is to be unique on the page.
        described: what the figure shows, for those who cannot see it.

    Returns:
        The element, without a fixed size and without anything outside itself.

    Example:
        >>> import seqjax as sj
        >>> from seqjax.reports.svg import draw
        >>> element = draw(sj.plots.learning_curves, {"a": ([1, 2], [3, 2])}, name="f1", described="A curve.")
        >>> element.startswith("<svg"), "http" in element
        (True, False)
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(LOOK):
        figure = Figure(figsize=(5.0, 3.5), layout="constrained")
        plot(*results, ax=figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", dpi=160, metadata={"Date": None})
    return embedded(written.getvalue(), name, described)


def embedded(document: str, name: str, described: str) -> str:
    """An SVG document of matplotlib as an element of a page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"|\sversion=\"[^\"]*\"", "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r"\bid=\"", f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"href=\"#", f'href="#{name}-', svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    head, rest = svg.split(">", 1)
    head = re.sub(r"\s(width|height)=\"[^\"]*\"", "", head)
    return f'{head} role="img" aria-label="{escape(described)}">{rest}'.strip()
