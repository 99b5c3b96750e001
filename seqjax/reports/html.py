"""The HTML of a page. Only this module and `svg` write markup, and every text argument is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

STYLE = """
:root{color-scheme:light dark;--ink:#1a1d21;--soft:#565d66;--paper:#ffffff;--card:#f4f5f7;--line:#d5d9de;
--blue:#0072b2;--vermillion:#d55e00;--green:#008060;--purple:#b0588a;--grey:#767676}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a3abb5;--paper:#15181c;--card:#1f242a;--line:#3a414a;
--blue:#56b4e9;--vermillion:#f0803c;--green:#2fc29a;--purple:#e39cc4;--grey:#9a9a9a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:75rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.6rem;line-height:1.25;margin:1.5rem 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
p,li{max-width:70ch;overflow-wrap:anywhere}
p{margin:.5rem 0}
a{color:var(--blue)}
.soft,figcaption,caption,footer{color:var(--soft);font-size:.9rem}
.verdict{background:var(--card);border-left:.4rem solid var(--blue);border-radius:.3rem;margin:1rem 0}
.verdict{padding:.75rem 1rem}
.verdict p:first-child{font-size:1.2rem;font-weight:600;margin-top:0}
.figures{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));margin:1rem 0}
figure{margin:0;min-width:0;max-width:40rem}
figure svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
.wide{overflow-x:auto;max-width:100%;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.25rem 0}
th,td{padding:.2rem .75rem .2rem 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
tbody th{white-space:normal;min-width:6rem}
td.words{text-align:left;white-space:normal;min-width:11rem;max-width:60ch;overflow-wrap:anywhere}
summary{cursor:pointer;padding:.4rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: str, sections: Iterable[str], foot: str) -> str:
    """A complete document. Its security policy forbids scripts and all network access."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>\n</header>\n<main>\n'
        + "\n".join(sections)
        + f"\n</main>\n<footer>\n<p>{escape(foot)}</p>\n</footer>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A section with a heading; `name` is its anchor."""
    return f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escape(title)}</h2>\n' + (
        "\n".join(part for part in parts if part) + "\n</section>"
    )


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
    return '<div class="verdict">' + "\n".join(part for part in parts if part) + "</div>"


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
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(_cell(value) for value in rest)
        lines.append(f'<tr><th scope="row">{escape(text(first))}</th>{cells}</tr>')
    name = escape(caption)
    element = (
        f'<div class="wide" role="region" tabindex="0" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    return f"<details><summary>{name}</summary>{element}</details>" if folded else element


def pairs(caption: str, values: Mapping[str, Any]) -> str:
    """A table with two columns, names and values."""
    return table(caption, ("name", "value"), values.items())


def text(value: object) -> str:
    """A value as text, with four significant digits for a float, and "none" for NaN and None.

    Example:
        >>> from seqjax.reports.html import text
        >>> text(0.123456), text(float("inf")), text(float("nan")), text(True), text(12345)
        ('0.1235', '∞', 'none', 'yes', '12345')
    """
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        return "none" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _cell(value: object) -> str:
    words = isinstance(value, str) and len(value) > 24  # long text is wrapped, and numbers are not
    return f"<td{' class=' + chr(34) + 'words' + chr(34) if words else ''}>{escape(text(value))}</td>"
