"""The cliff in the loss of one unit, against a loop in plain Python, with and without clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plot_results import CLIFF, NAN, draw, line, remarks

from seqjax import plots
from seqjax.analysis.cliff import loss_cliff


def loss_by_loop(w, b, time=50):
    """(h_T - 0.7)^2 of the one-unit network, by a loop."""
    h = 1 / (1 + math.exp(-0.5))
    for _ in range(time):
        h = 1 / (1 + math.exp(-(w * h + b)))
    return (h - 0.7) ** 2


def test_the_loss_equals_a_loop_and_clipping_stays_near_the_cliff():
    for i, j in ((0, 0), (2, 5), (5, 1)):
        assert CLIFF.loss[i, j] == pytest.approx(loss_by_loop(CLIFF.w[j], CLIFF.b[i]), abs=1e-5)
    eps = 1e-6
    w, b = 5.2, -2.3
    slope = [
        (loss_by_loop(w + eps, b) - loss_by_loop(w - eps, b)) / (2 * eps),
        (loss_by_loop(w, b + eps) - loss_by_loop(w, b - eps)) / (2 * eps),
    ]
    np.testing.assert_allclose(CLIFF.plain[1], np.array([w, b]) - 0.1 * np.array(slope), rtol=1e-5)
    assert CLIFF.norms[0, 0] == pytest.approx(np.hypot(*slope), rel=1e-3)
    steps = np.hypot(*np.diff(CLIFF.clipped, axis=0).T)
    assert steps.max() <= 0.1 * CLIFF.clip_norm * 1.001 < np.hypot(*np.diff(CLIFF.plain, axis=0).T).max() / 100
    ax = draw(plots.loss_cliff, CLIFF)
    np.testing.assert_allclose(line(ax, "clipped at 0.2").T, CLIFF.clipped)
    assert "without clipping, the end is at" in remarks(ax)


@pytest.mark.parametrize(
    ("option", "value"), [("time", 0), ("steps", 0), ("resolution", 0), ("clip_norm", 0.0), ("clip_norm", NAN)]
)
def test_bad_options_raise(option, value):
    with pytest.raises(ValueError, match=f"expected {option}"):
        loss_cliff(**{option: value})
