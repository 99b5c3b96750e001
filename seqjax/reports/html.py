"""The HTML of a page. Only this module and `svg` write markup, and every text argument is escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: str, first: str, sections: Iterable[str], foot: str) -> str:
    """A complete document. Its security policy forbids scripts and all network access.

    Args:
        title, lead: the heading and the line below it.
        first: what the first screen shows below them.
        sections: from `section`, in the order of the table of contents.
        foot: the last line.
    """
    sections = list(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>\n</header>\n<main>\n'
        f"{first}\n{_contents(sections)}\n"
        + "\n".join(sections)
        + f"\n</main>\n<footer>\n<p>{escape(foot)}</p>\n</footer>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *parts: str, gist: str = "", opened: bool = False) -> str:
    """A section that shows its heading and the line `gist` until it is opened; `name` is its anchor.

    A link to `name-inside` opens it, because browsers open a `<details>` for a target inside it.
    """
    line = f'<span class="gist">{escape(gist)}</span>' if gist else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<details{" open" if opened else ""}>'
        f'<summary><h2 id="{name}-title">{escape(title)}</h2>{line}</summary>\n'
        f'<div class="inside" id="{name}-inside">\n'
        + "\n".join(part for part in parts if part)
        + "\n</div></details>\n</section>"
    )


def _contents(sections: Iterable[str]) -> str:
    """The table of contents."""
    titles = [found for text in sections if (found := re.search(r'<h2 id="(.*?)-title">(.*?)</h2>', text))]
    items = "".join(f'<li><a href="#{name}-inside">{title}</a></li>' for name, title in (t.groups() for t in titles))
    return f'<nav aria-label="Contents"><ul class="contents">{items}</ul></nav>' if items else ""


def columns(*parts: str) -> str:
    """Parts side by side, or below each other if the screen is narrow."""
    shown = [f"<div>\n{part}\n</div>" for part in parts if part]
    return f'<div class="columns">{"".join(shown)}</div>' if shown else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of the CSS class `kind`; empty if the text is empty."""
    # chr(34) is a double quote, which Python 3.11 does not allow inside the expression of an f-string.
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>" if text else ""


def points(texts: Iterable[str]) -> str:
    """A list with one item per text; empty if there is none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def card(*parts: str) -> str:
    """A highlighted box, for the most important result."""
    return '<div class="card">' + "\n".join(part for part in parts if part) + "</div>"


def heading(text: str) -> str:
    """A heading inside a part of the page."""
    return f"<h3>{escape(text)}</h3>"


def sample(prompt: str, text: str) -> str:
    """Generated text after its prompt."""
    return f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>"


def bars(caption: str, rows: Iterable[tuple[str, str, float]]) -> str:
    """A table of names and values with a bar for each value; the first row is highlighted.

    Args:
        caption: what the values are.
        rows: the name, the value as text, and the length of the bar.
    """
    rows = [(name, shown, length if math.isfinite(length) else 0.0) for name, shown, length in rows]
    longest = max((length for *_, length in rows), default=0.0)
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(shown)}</td>'
        f'<td><i style="width:{100 * length / longest if longest > 0 else 0:.1f}%"></i></td></tr>'
        for name, shown, length in rows
    )
    return f'<table class="bars"><caption>{escape(caption)}</caption><tbody>{lines}</tbody></table>'


def figure(svg: str, caption: str) -> str:
    """A figure with a caption that explains how to read it."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def figures(parts: Sequence[str]) -> str:
    """Figures in a grid with as many columns as fit on the screen."""
    return f'<div class="figures">\n{chr(10).join(parts)}\n</div>' if parts else ""


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]], *, folded: bool = False) -> str:
    """A table whose first row and first column are headers.

    It scrolls horizontally if it is wider than the page. A folded table shows only its caption until it is opened.
    """
    rows, lines = list(rows), []
    wordy = [any(_is_words(row[i]) for row in rows if i < len(row)) and i > 0 for i in range(len(head))]
    columns = "".join(f'<th scope="col"{_kind(w)}>{escape(name)}</th>' for name, w in zip(head, wordy, strict=True))
    for first, *rest in rows:
        cells = "".join(_cell(value) for value in rest)
        lines.append(f'<tr><th scope="row">{escape(text(first))}</th>{cells}</tr>')
    name = escape(caption)
    kind = ' class="hidden"' if folded else ""  # the summary already shows the caption
    element = (
        f'<div class="wide" role="region" tabindex="0" aria-label="{name}"><table><caption{kind}>{name}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    return f'<details class="table"><summary>{name}</summary>{element}</details>' if folded else element


def folded(title: str, *parts: str) -> str:
    """Parts that are shown when the reader opens them."""
    return f"<details><summary>{escape(title)}</summary>\n{chr(10).join(parts)}\n</details>" if any(parts) else ""


def pairs(caption: str, values: Mapping[str, Any]) -> str:
    """A table with two columns, names and values."""
    return table(caption, ("name", "value"), values.items())


def factor(log: float) -> str:
    """exp(log) with three significant digits, also if it is outside the range of floats.

    Example:
        >>> from seqjax.reports.html import factor
        >>> factor(0.0), factor(-0.0421), factor(-9210.34), factor(float("-inf")), factor(float("nan"))
        ('1', '0.959', '1e-4000', '0', 'none')
    """
    if not math.isfinite(log):
        return "0" if log < 0 else text(log)
    ten = log / math.log(10)
    if abs(ten) < 300:
        return f"{10**ten:.3g}"
    return f"{10 ** (ten - math.floor(ten)):.3g}e{math.floor(ten):+d}"


def text(value: object) -> str:
    """A value as text, with four significant digits for a float, and "none" for NaN and None.

    Example:
        >>> from seqjax.reports.html import text
        >>> text(0.123456), text(float("inf")), text(float("nan")), text(True), text(12345)
        ('0.1235', 'no limit', 'none', 'yes', '12345')
    """
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if math.isinf(value):
            return "no limit" if value > 0 else "none"
        return "none" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _cell(value: object) -> str:
    return f"<td{_kind(_is_words(value))}>{escape(text(value))}</td>"


def _is_words(value: object) -> bool:
    """Whether a cell has long text, which is wrapped and aligned to the left."""
    return isinstance(value, str) and len(value) > 24 and not value[0].isdigit()


def _kind(words: bool) -> str:
    return ' class="words"' if words else ""
