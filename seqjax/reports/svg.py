"""Figures as SVG elements of a page, with the colours of the page, unique identifiers, and searchable text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

from seqjax.plots.canvas import BLUE, GREEN, GREY, PURPLE, VERMILLION

# Placeholders for black and white, which no figure uses otherwise. They become CSS variables, whose values depend on
# whether the page is in light or dark mode.
INK, PAPER = "#010203", "#fdfcfb"
VARIABLES = {INK: "ink", PAPER: "paper", BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", PURPLE: "purple"}
VARIABLES |= {GREY: "grey"}
INK_PARAMETERS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
RC_PARAMETERS: Any = {
    "svg.fonttype": "none",  # text elements instead of outlines
    "svg.hashsalt": "seqjax",  # equal figures have equal identifiers in every process
    "font.family": "DejaVu Sans",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": PAPER,
    **dict.fromkeys(INK_PARAMETERS, INK),
}


def draw(plot: Callable[..., Any], *results: Any, name: str, **options: Any) -> str:
    """Draws a figure as an `<svg>` element. Its text for screen readers is the title and the labels of the axes.

    Args:
        plot: a function of `seqjax.plots`.
        *results: the results that it draws.
        name: the prefix of all identifiers in the figure, unique on the page.
        **options: of the plot.

    Returns:
        The element. It has no fixed size and refers to nothing outside itself.

    Example:
        >>> import seqjax as sj
        >>> from seqjax.reports.svg import draw
        >>> element = draw(sj.plots.learning_curves, {"a": ([1, 2], [3, 2])}, name="f1")
        >>> element.startswith("<svg"), "http" in element
        (True, False)
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC_PARAMETERS):
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        ax = plot(*results, ax=figure.subplots(), **options)
        document = io.StringIO()
        figure.savefig(document, format="svg", dpi=160, metadata={"Date": None})
    description = f"{ax.get_title(loc='left')}: {ax.get_ylabel()} against {ax.get_xlabel()}"
    return to_element(document.getvalue(), name, description)


def to_element(document: str, name: str, description: str) -> str:
    """Converts an SVG document written by matplotlib to an element of a page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Namespaces are not needed inside HTML, and they look like addresses on the network.
    svg = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"|\sversion=\"[^\"]*\"", "", svg)
    svg = svg.replace("xlink:href=", "href=")
    # All figures of a page share one namespace of identifiers.
    svg = re.sub(r"\bid=\"", f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"href=\"#", f'href="#{name}-', svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    head, rest = svg.split(">", 1)
    # Without a size, the element scales with the page.
    head = re.sub(r"\s(width|height)=\"[^\"]*\"", "", head)
    return f'{head} role="img" aria-label="{escape(description)}">{rest}'.strip()
