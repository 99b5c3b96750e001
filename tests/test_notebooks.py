"""Each notebook's text runs from top to bottom, and its executed twin shows the same code and what it printed."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_steps_prints_the_numbers_that_it_predicts(path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "notebook"})
    *exact, last = out.getvalue().splitlines()
    assert exact == ["0.000000", "0.0", "0.0115", "4.9424 4.9424", "1.0000 3.3616 4.9424"]
    error, nothing = map(float, last.split())
    assert error < 0.01 < nothing == 0.1667


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_executed_twin_holds_the_same_code_and_its_output(path):
    cells = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = re.split(r"^# %%.*$", path.read_text(), flags=re.MULTILINE)[1:]
    kinds = re.findall(r"^# %%(.*)$", path.read_text(), flags=re.MULTILINE)
    assert [part.strip() for part, kind in zip(text, kinds, strict=True) if "markdown" not in kind] == code
    printed = [output for cell in cells for output in cell.get("outputs", [])]
    assert printed
    assert not any(output["output_type"] == "error" for output in printed)
