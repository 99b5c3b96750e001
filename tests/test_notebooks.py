"""Each notebook runs from top to bottom and prints the numbers that it states, and its executed twin shows the same.

A notebook is notebooks/NAME.py, percent text that begins with jupytext's header, and NAME.ipynb, its executed twin. Its
last two cells are a table of name, value and tolerance, and the code that prints a line "name value" for each. It runs
here on its fast setting, SEQJAX_FAST=1, and in one process with the other tests: what it switches on, such as float64,
it switches on by a `with`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import types
from pathlib import Path

import jax
import matplotlib
import pytest
from matplotlib import pyplot

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [path for path in sorted(FOLDER.glob("*.py")) if path.read_text().startswith("# ---\n# jupyter:")]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def text_cells(path):
    """(kind, source) of every cell of the text."""
    _, *parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [("markdown" if "markdown" in kind else "code", source.strip()) for kind, source in pairs]


def twin_cells(path):
    """The cells of the executed twin."""
    return json.loads(path.with_suffix(".ipynb").read_text())["cells"]


def stated(path):
    """{name: (value, tolerance)} from the table in the last cell but one."""
    *_, (kind, table), (last, _) = text_cells(path)
    assert (kind, last) == ("markdown", "code")
    rows = re.findall(r"^# \| (.+?) \| ([-+.\dinfe]+) \| ([.\de-]+) \|$", table, flags=re.MULTILINE)
    assert len(rows) == table.count("\n# |") - 2 + table.startswith("# |"), "every row is | name | value | within |"
    return {name: (float(value), float(within)) for name, value, within in rows}


def printed(lines):
    """{name: value} from lines "name value"."""
    return {name: float(value) for name, value in (line.rsplit(None, 1) for line in lines)}


def compare(path, lines):
    """Holds what the last cell printed to what the notebook states."""
    numbers, found = stated(path), printed(lines)
    assert numbers
    assert list(found) == list(numbers)
    wrong = {name: found[name] for name, (value, within) in numbers.items() if not _within(found[name], value, within)}
    assert not wrong, f"stated { ({name: numbers[name] for name in wrong}) }"


def _within(found, value, within):
    return found == value or abs(found - value) <= within


@pytest.fixture
def fast(monkeypatch):
    """The fast setting, compiled quickly, with figures that nobody sees."""
    monkeypatch.setenv("SEQJAX_FAST", "1")
    jax.config.update("jax_disable_most_optimizations", True)
    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")
    pyplot.switch_backend(before)


@pytest.mark.slow
@every_notebook
def test_it_prints_the_numbers_that_it_states(path, fast, monkeypatch):
    module = types.ModuleType(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, module)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    compare(path, out.getvalue().splitlines()[-len(stated(path)) :])


@every_notebook
def test_its_executed_twin_holds_the_same_text_its_numbers_and_figures(path):
    cells = twin_cells(path)
    code = [source for kind, source in text_cells(path) if kind == "code"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == code
    prose = [source for kind, source in text_cells(path) if kind == "markdown"]
    found = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert found == [re.sub(r"^# ?", "", source, flags=re.MULTILINE) for source in prose]

    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    compare(path, "".join(cells[-1]["outputs"][0]["text"]).splitlines())


@every_notebook
def test_its_executed_twin_says_nothing_of_the_machine(path):
    twin = json.loads(path.with_suffix(".ipynb").read_text())
    assert set(twin["metadata"]) == {"jupytext", "kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in twin["cells"])
    texts = [json.dumps(output.get("text", "")) for cell in twin["cells"] for output in cell.get("outputs", [])]
    assert not re.findall(r"/(?:home|root|tmp|usr|Users|work)/", "".join(texts))


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in NOTEBOOKS}
