"""Executes the notebooks: reads NAME.py, the text, and writes NAME.ipynb, the text with its outputs.

    pip install -e ".[plots]" jupytext nbclient ipykernel
    python notebooks/execute.py            # all notebooks
    python notebooks/execute.py lesson     # one notebook

The result does not depend on the machine: cells have numbers as identifiers, and times, versions and paths are
removed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> None:
    """Executes one notebook at full size and writes the .ipynb file."""
    os.environ.pop("SEQJAX_FAST", None)
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    # nbformat draws random cell identifiers, which would change the file at every execution.
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
    path.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    texts = [path for path in sorted(HERE.glob("*.py")) if path.read_text().startswith("# ---\n# jupyter:")]
    for path in texts:
        if path.stem in (sys.argv[1:] or [path.stem]):
            print(path.stem, flush=True)
            execute(path)
