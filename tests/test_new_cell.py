"""A new cell is one file and one line of export: then it is fast, analysed, reported, in the command and measured."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FILE = '''"""The minimal gated unit (Zhou et al. 2016): h_t = (1 - f) h_{t-1} + f tanh(W (f h_{t-1}) + U x_t + b)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class MGUParams(NamedTuple):
    W_xh: Array
    W_hh: Array
    b_h: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MGU:
    input_size: int
    hidden_size: int

    @property
    def input_shape(self):
        return (self.input_size,)

    def init(self, key):
        d, n = self.input_size, self.hidden_size
        key_x, key_h = jax.random.split(key)
        W_xh, W_hh = jax.random.normal(key_x, (2 * n, d)) / d, jax.random.normal(key_h, (2 * n, n)) / n**0.5
        return MGUParams(W_xh, W_hh, jnp.zeros(2 * n))

    def initial_state(self, params):
        return jnp.zeros_like(params.b_h[: self.hidden_size])

    def gates(self, params, h, x):
        n = self.hidden_size
        W_f, U_f, b_f = params.W_hh[:n], params.W_xh[:n], params.b_h[:n]
        return {"forget": jax.nn.sigmoid(W_f @ h + U_f @ x.astype(h.dtype) + b_f)}

    def step(self, params, h, x):
        n = self.hidden_size
        f = self.gates(params, h, x)["forget"]
        candidate = jnp.tanh(params.W_hh[n:] @ (f * h) + params.W_xh[n:] @ x.astype(h.dtype) + params.b_h[n:])
        h = (1 - f) * h + f * candidate
        return h, h
'''

CHECKS = """
import jax, jax.numpy as jnp, numpy as np, seqjax as sj
from pathlib import Path
from benchmarks.any_cell.pairs import CELLS
from seqjax.command.character_model import Settings, build
from seqjax.command.cli import run

cell = sj.MGU(3, 4)
params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 6, 3))
assert sj.testing.check_cell(cell)
print(sj.explain(cell, params, xs[0, 0]))
state, outputs = sj.unroll(cell, params, xs)
one = jax.lax.scan(lambda h, x: cell.step(params, h, x), cell.initial_state(params), xs[0])[1]
np.testing.assert_allclose(outputs[0], one, rtol=1e-5, atol=1e-6)
assert sj.gates(cell, params, xs)["forget"].shape == (2, 6, 4)
jacobians = sj.step_jacobians(cell, params, xs).by_state
expected = jax.jacfwd(lambda h: cell.step(params, h, xs[0, 0])[0])(cell.initial_state(params))
np.testing.assert_allclose(jacobians[0, 0], expected, rtol=1e-4, atol=1e-6)
sj.report(cell, params, xs, path="page.html")
assert 'id="gates"' in Path("page.html").read_text()
assert "mgu" in CELLS
Path("text.txt").write_text("to be or not to be, that is the question. " * 60)
options = "--batch 2 --window 8 --hidden 8 --embedding 4 --steps 2 --no-report --out run".split()
assert run(["train", "--text", "text.txt", "--cell", "mgu", *options]) == 0
"""


@pytest.mark.slow
def test_a_new_cell_is_one_file_and_one_line_of_export(tmp_path):
    for folder in ("seqjax", "benchmarks"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.json", "*.md")
        )
    (tmp_path / "seqjax/cells/mgu.py").write_text(FILE)
    with (tmp_path / "seqjax/__init__.py").open("a") as file:
        file.write("from .cells.mgu import MGU as MGU\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", CHECKS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "once per step" in result.stdout
    assert "once per chunk" in result.stdout
