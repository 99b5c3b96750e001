"""Results print as a few lines of text without arrays."""

from __future__ import annotations

import numpy as np
from cells import D, N
from oracles import drawn

import seqjax as sj
from seqjax.analysis import cell_path, gate_statistics, parameter_sensitivity
from seqjax.analysis.gates import GateStatistics

LSTM = sj.LSTM(D, N)


def test_results_print_a_few_lines_without_arrays(x64):
    params, xs = drawn(LSTM, "float64", batch=3)
    results = [
        cell_path(LSTM, params, xs, mask=sj.length_mask([6, 3, 0], 6)),
        parameter_sensitivity(LSTM, params, xs),
        sj.analysis.spectrum(LSTM, params, xs),
        sj.analysis.matrix_spectrum(np.eye(3)),
        sj.analysis.step_jacobians(LSTM, params, xs, inputs=True),
        *gate_statistics(LSTM, params, xs).values(),
    ]
    for result in results:
        assert len(str(result).splitlines()) < 12
        assert not any(word in str(result) for word in ("array", "dtype", "[", type(result).__name__))
    assert "spectral radius, the growth per step in the long run: 1\n" in str(results[3])
    assert "reliable" in str(results[0]).splitlines()[-1]
    unreliable = results[1]._replace(reliable=False, reason="a reason")
    assert str(unreliable).splitlines()[-1] == "not reliable: a reason"
    two = np.ones(2)
    forget = GateStatistics(0.5, two / 2, np.ones(20), np.linspace(0, 1, 21), two, two, 0.0, 0.25, two)
    assert str(forget).startswith("mean 0.500, below 0.1 at 0.0% and above 0.9 at 25.0% of the steps")
