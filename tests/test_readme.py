"""The README runs as it stands: every block of Python in order, each printing what its comment says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_every_block_prints_what_its_comment_says():
    names: dict = {}
    for block in BLOCKS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "README.md", "exec"), names)
        printed = out.getvalue().strip()
        said = re.search(r"print\(.*\)  # (.*)", block)
        assert said, block
        if bound := re.match(r"below ([\d.]+); always answering 1 gives ([\d.]+)", said[1]):
            assert float(printed) < float(bound[1])
            assert float(bound[2]) == round(1 / 6, 4)
        else:
            assert printed == said[1]
    assert len(BLOCKS) == 10


def test_the_first_example_is_short_and_early():
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("```python"))
    last = next(i for i, line in enumerate(lines) if i > first and line == "```")
    assert last - first - 1 <= 15
    assert last < 26
