"""Results print as a few lines of text without arrays."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from cells import D, N
from oracles import drawn

import seqjax as sj
from seqjax.analysis import cell_path, gate_statistics, parameter_sensitivity
from seqjax.analysis.gates import GateStatistics

LSTM = sj.LSTM(D, N)


def test_every_result_of_the_package_has_words_of_its_own():
    data = {sj.analysis.AblationRow}  # one row of the table that `Ablation` prints
    results = {sj.Convergence, sj.Fitted} | {
        value for value in vars(sj.analysis).values() if isinstance(value, type) and hasattr(value, "_fields")
    }
    assert {result for result in results if result.__str__ in (object.__str__, tuple.__str__)} == data


def test_a_few_numbers_print_as_words():
    history = {"clipped": np.array([False, True, True]), "grad_norm": np.array([0.5, 2.0, 4.0])}
    words = str(sj.analysis.clipping_statistics(history, 1.0))
    assert words.startswith(
        "66.7% of 3 updates clipped at a gradient norm of 1: mean factor 0.583, 0.375 where clipped"
    )
    scores = sj.analysis.ScoreByLength(*[np.array([3, 9])] * 6, short=0.25, long=np.nan, split=9, unit="nats")
    assert "up to 9 steps: 0.25 nats" in str(scores)
    assert "no sequence is longer" in str(scores)
    product = sj.analysis.JacobianProduct(np.eye(2)[None], np.array([3.0]))
    assert str(product).endswith("ln of the growth of a random perturbation 3 to 3")
    model = sj.Model(sj.GRU(2, 3), sj.Gaussian(3, 1, std=1.0))
    fitted = sj.fit(model, [], key=jax.random.key(0))
    assert str(fitted) == "0 updates, stopped by: stream"
    history = {"loss": np.array([2.0, 1.0]), "validation": np.array([1.5, 1.75])}
    assert str(dataclasses.replace(fitted, history=history)).splitlines()[1:] == [
        "  loss 2 at the first update, 1 at the last",
        "  validation 1.75 at the end, 1.5 at best",
    ]
    growth = sj.analysis.FrameGrowth(jnp.full((1, 4, 2), 0.5), jnp.full((1, 4), 5), None, jnp.ones((1, 2, 2)))
    assert "the largest is 0.1 to 0.1 nats per step" in str(growth)
    two = np.array([True, False])
    found = sj.Convergence(two, np.array([3, 9]), np.array([1e-7, 0.5]), np.array([-0.1, 0.2]), ~two)
    assert str(found).startswith("1 of 2 rows converged, in 3 to 9 iterations; 1 rows come from the sequential scan")


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
