"""Reports on small cells, each written once, and a reader of pages that is as strict as a page is to be."""

from __future__ import annotations

import contextlib
import re
from html.parser import HTMLParser
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import numpy as np
import pytest
from cells import D, Leaky, N
from plot_results import DOWN, GATES, STATES, exponents, lag_result, matrix, product, spectrum

import seqjax as sj
from seqjax.analysis.cell_gradient_path import CellPath
from seqjax.analysis.fixed_point_search import FixedPoints
from seqjax.reports.cell_page import report
from seqjax.reports.measure import Measured
from seqjax.reports.names import Names

VOID = {"meta", "br", "hr", "img", "input", "link", "col"}
SECTIONS = ("gradients", "exponents", "jacobians", "gates", "states", "verdict", "settings")
VECTORS, TOKENS = (3, 40, D), (3, 40)
CELLS = {
    "lstm": sj.LSTM(D, N),
    "tokens": sj.stack([sj.Embedding(5, D), sj.GRU(D, N), sj.LSTM(N, N)]),
    "user": Leaky(),
    "equinox": sj.from_equinox(eqx.nn.GRUCell, D, N),
}
HISTORY = {"grad_norm": [0.5, 2.0, 4.0], "loss": [3.0, 2.0, 1.0]}


def given(name):
    """A cell, its parameters and inputs."""
    cell = CELLS[name]
    key = jax.random.key(1)
    xs = jax.random.randint(key, TOKENS, 0, 5) if name == "tokens" else jax.random.normal(key, VECTORS)
    return cell, cell.init(jax.random.key(0)), xs


class Row(NamedTuple):
    """The verdict on one sequence, with what a page reads of it."""

    regime: str = "chaotic"
    reliable: bool = True
    reason: str = ""
    contracting: bool | None = None
    forgets: bool | None = False
    lag: float = np.inf
    steps: int = 59
    alternatives: Any = {"chaotic": 0.9, "stable": 0.1}  # noqa: RUF012 - never changed


class Made(NamedTuple):
    """A verdict, with what a page reads of it."""

    exponents: Any
    by_lag: Any
    regime: str = "chaotic"
    contracting: bool | None = None
    lag: float = 37.5
    block: str = "1.c"
    summary: str = "It is said to be so, most in 1.c."
    evidence: tuple[str, ...] = (
        "the largest factor is 0.959 & <falling>",
        "over 59 steps a gradient changes by 0.000688",
    )
    advice: tuple[str, ...] = ("clip it at 1.0",)
    reliable: bool = False
    forgets: bool | None = False
    rows: tuple[Row, ...] = (Row(), Row(regime="stable", forgets=None, lag=12.0))


def made_by_hand(**changes):
    """A verdict and results for every figure, none of which takes a second."""
    by_lag = lag_result(-0.123456 * np.arange(60), horizon=37.5)
    rates = exponents(np.linspace(-0.0421, -0.5, 8))
    steps = spectrum(matrix(np.linspace(0.1, 1.2, 12)[None, None] * np.exp(1j * np.arange(12))), [7])
    steps = steps._replace(recurrent={"W_hh": matrix(np.linspace(-1, 1, 9))}, bound=1.0345, bound_holds=False)
    kinds, two = np.array(["fixed", "slow"]), np.array([0.5, 1.5])
    points = kinds, two, np.array([1, 2]), np.zeros((2, 3, 3)), np.zeros((2, 3)), two, two < 1, np.array([0, 1])
    found = {
        "verdict": Made(rates, by_lag),
        "gradient_by_lag": by_lag,
        "lyapunov_exponents": rates,
        "gate_statistics": GATES,
        "cell_path": CellPath(DOWN.lags, DOWN.log_gradient, DOWN.log_gradient / 2, *np.zeros((2, 1, 3)), True, ""),
        "spectrum": steps,
        "product_singular_values": {4: product([-4, -8]), 9: product([-9, -18])},
        "trajectory": STATES,
        "fixed_points": FixedPoints(STATES[0, :2], None, *points, None, "2 starts: 1 fixed, 1 slow", "2 states"),
    }
    return Measured(found | changes, {}, {"read": "1 of 2 sequences", "parameters": 7}, Names(("1.h", "1.c")))


PAGES = {}  # shared by the files that import the fixture, each of which has a session of it


@pytest.fixture(scope="session")
def page_of(tmp_path_factory):
    """The path of the report on a cell, by the cell's name; of "made", on results that were made by hand."""

    def written(name):
        if name not in PAGES:
            path = tmp_path_factory.mktemp("reports") / f"{name}.html"
            cell, options = given("lstm" if name == "made" else name), {"history": HISTORY}
            made = mock.patch("seqjax.reports.cell_page.measure", return_value=made_by_hand())
            with made if name == "made" else contextlib.nullcontext():
                PAGES[name] = report(*cell, path=path, settings={"seed": 7, "clip_norm": 1.0}, **options)
        return PAGES[name]

    return written


class Page(HTMLParser):
    """A page read strictly: every element is closed in its order, and no identifier stands twice."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.words, self.texts = [], [], [], []
        self.source = source
        self.feed(source)
        self.close()
        assert not self.open, self.open
        names = [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]
        assert len(names) == len(set(names))
        self.names = set(names)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            self.texts.append((tuple(self.open), data))

    @property
    def text(self):
        """All words, with single spaces."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        """The attributes of every element of this kind."""
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def count(self, tag, inside):
        """How many elements of a kind stand in one of another."""
        return sum(name == tag and inside in around for name, _, around in self.elements)


def assert_self_contained(page):
    """Nothing on the page asks for anything outside it, and everything that it refers to is there."""
    words = re.sub(r'"data:image/png;base64,[^"]*"', "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", words, re.IGNORECASE)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & {e[0] for e in page.elements}
    for _, attributes, _ in page.elements:
        assert not {"src", "srcset", "action", "onload", "onclick", "onerror"} & set(attributes)
        target = attributes.get("href", "#")
        assert target.startswith("data:image/png;base64,") or target == "#" or target[1:] in page.names, target[:80]
        for name in re.findall(r"url\((.*?)\)", " ".join(map(str, attributes.values()))):
            assert name[0] == "#" and name[1:] in page.names  # noqa: PT018
        for name in attributes.get("aria-labelledby", "").split():
            assert name in page.names


def sentences(page):
    """The sentences of running text, of at least four words, which is all text but tables and settings."""
    texts, words = [], ("p", "li", "figcaption", "summary")
    for inside, text in page.texts:
        if any(tag in inside for tag in words) and not {"svg", "table", "nav"} & set(inside):
            texts += re.split(r"(?<=\.)\s+", re.sub(r"\s+", " ", text).strip())
    return [text for text in texts if len(text.split()) >= 4]


def assert_accessible(page):
    """Language, title, headings, names of figures and headers of tables are where a reader's tools look for them."""
    assert [html["lang"] for html in page.all("html")] == ["en"]
    assert (len(page.all("title")), len(page.all("h1"))) == (1, 1)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    figures = len(page.all("figure"))
    assert page.count("svg", "figure") == page.count("figcaption", "figure") == figures > 0
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(header["scope"] in ("col", "row") for header in page.all("th"))
    assert all(section["aria-labelledby"] == f"{section['id']}-title" for section in page.all("section"))
