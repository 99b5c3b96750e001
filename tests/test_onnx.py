"""A step as an ONNX model, as docs/onnx.md shows it, gives the outputs of `unroll` in a loop of Python."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

pytest.importorskip("jax2onnx")
pytest.importorskip("onnxruntime")
PAGE = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text()
CELLS = {
    "a stack": "sj.stack([sj.LSTM(3, 8), sj.GRU(8, 4)])",
    "reset before": 'sj.GRU(3, 8, "before")',
    "learned": "sj.LearnedState(sj.LSTM(3, 8))",
    "vanilla": 'sj.VanillaRNN(3, 8, "relu")',
}


@pytest.mark.parametrize("name", CELLS)
def test_a_loop_over_the_model_gives_the_outputs_of_unroll(name):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert CELLS["a stack"] in block
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block.replace(CELLS["a stack"], CELLS[name]), "onnx.md", "exec"), {})
    assert printed.getvalue().splitlines()[-1] == "True"
