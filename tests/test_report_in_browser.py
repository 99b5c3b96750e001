"""The page in a real browser: on a phone and on a desk, by day and by night, all is there and nothing sticks out."""

from __future__ import annotations

import pytest
from browser import MISSING, browser
from report_pages import page_of as page_of

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)} here")

SIZES = {"phone": (390, 844), "desk": (1280, 800)}
LOOK = """
const luminance = colour => {
  const part = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
};
const paper = luminance(getComputedStyle(document.body).backgroundColor);
const contrast = colour => {
  const other = luminance(colour);
  return (Math.max(other, paper) + 0.05) / (Math.min(other, paper) + 0.05);
};
const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const shown = element => element.checkVisibility() && element.getBoundingClientRect().height > 0;
document.querySelectorAll('details').forEach(element => { element.open = true; });
return {
  title: document.title,
  wide: document.documentElement.scrollWidth,
  body: document.body.scrollWidth,
  window: window.innerWidth,
  paper: paper,
  figures: [...document.querySelectorAll('figure')].map(figure => {
    const svg = figure.querySelector('svg');
    return {
      shown: shown(svg) && shown(figure.querySelector('figcaption')),
      box: box(svg),
      texts: [...svg.querySelectorAll('text')].map(t => [t.textContent, ...box(t)]),
      smallest: Math.min(...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)),
      contrast: Math.min(...[...svg.querySelectorAll('text')].map(t => contrast(getComputedStyle(t).fill))),
    };
  }),
  words: Math.min(...[...document.querySelectorAll('h1,h2,p,li,th,td,figcaption,caption,summary')]
    .map(element => contrast(getComputedStyle(element).color))),
  tables: [...document.querySelectorAll('.wide')].map(element => box(element)),
};
"""


@pytest.fixture(scope="module")
def chromium():
    """One Chromium for all of these tests."""
    with browser() as running:
        yield running


def look(chromium, path, size, scheme):
    """What can be seen of a page, after the console has been found silent."""
    chromium.complaints()
    chromium.open(path, *SIZES[size], scheme)
    seen = chromium.run(LOOK)
    assert chromium.complaints() == []
    return seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_figure_can_be_seen_and_read_and_nothing_sticks_out(size, scheme, page_of, chromium):
    seen = look(chromium, page_of("made"), size, scheme)
    width = SIZES[size][0]
    assert seen["title"] == "LSTM"
    assert seen["window"] == width
    assert max(seen["wide"], seen["body"]) <= width
    assert (seen["paper"] < 0.1) == (scheme == "dark")
    assert seen["words"] >= 4.5  # the contrast that accessible text has
    assert len(seen["figures"]) >= 12
    for figure in seen["figures"]:
        left, top, right, bottom = figure["box"]
        assert figure["shown"]
        assert 0 <= left < right <= width
        assert right - left >= 250
        assert bottom - top >= 150
        assert figure["contrast"] >= 4.5
        assert figure["smallest"] >= 9  # pixels
        for text, x, y, end, below in figure["texts"]:
            inside = x >= left - 2 and y >= top - 2 and end <= right + 2 and below <= bottom + 2
            assert inside, text
    for left, _, right, _ in seen["tables"]:
        assert 0 <= left < right <= width


def test_the_page_is_short_until_the_reader_opens_it_and_the_verdict_is_on_the_first_screen(page_of, chromium):
    chromium.open(page_of("made"), *SIZES["desk"], "light")
    height, card, figure = chromium.run("""
        const bottom = name => document.querySelector(name).getBoundingClientRect().bottom;
        return [document.documentElement.scrollHeight, bottom('.card'), bottom('figure')];
    """)
    assert height <= 6 * SIZES["desk"][1]
    assert max(card, figure) <= SIZES["desk"][1]


def test_the_contents_open_the_section_that_they_lead_to(page_of, chromium):
    chromium.open(page_of("made"), *SIZES["desk"], "light")
    before, after = chromium.run("""
        const section = document.querySelector('#gates details');
        const before = section.open;
        document.querySelector('nav a[href="#gates-inside"]').click();
        return [before, section.open];
    """)
    assert (before, after) == (False, True)


def test_on_paper_all_sections_are_open_and_the_colours_are_light(page_of, chromium):
    chromium.open(page_of("made"), *SIZES["desk"], "dark")
    count = "return [...document.querySelectorAll('.inside')].filter(part => !part.checkVisibility()).length"
    assert chromium.run(count) > 3
    chromium.print_media()
    assert chromium.run(count) == 0
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not chromium.run("return document.querySelector('nav').checkVisibility()")
