"""Clipping statistics against a sequence computed by hand, the optimizer, and the table of a run."""

from __future__ import annotations

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
from cells import D, N
from errors import raises

import seqjax as sj
from seqjax.analysis.clipping import clipping_statistics

NORMS = [0.5, 2.0, 8.0, 1.0, 4.0, 1.6]  # at 1.6: 1, 0.8, 0.2, 1, 0.4, 1, and the last one is not clipped
TABLE = "step,loss,validation,grad_norm,clipped,param_norm,characters,seconds\n" + "".join(
    f"{step},3.1,,{norm},{float(norm > 1.6)},2.0,{64 * step},0.{step}\n" for step, norm in enumerate(NORMS, 1)
)


@pytest.mark.parametrize("form", ["dict", "frame", "text"])
def test_statistics_equal_those_computed_by_hand(form):
    frame = pandas.read_csv(io.StringIO(TABLE))
    columns = {"dict": {"grad_norm": np.array(NORMS)}, "frame": frame, "text": frame.astype(str).to_dict("list")}
    acted = clipping_statistics(columns[form], 1.6)
    np.testing.assert_allclose(acted.factors, [1, 0.8, 0.2, 1, 0.4, 1], rtol=1e-15)
    assert acted.clipped.tolist() == [False, True, True, False, True, False]
    assert (acted.fraction, acted.longest_run, acted.clip_norm) == (0.5, 2, 1.6)
    assert acted.mean_factor == pytest.approx(4.4 / 6)
    assert acted.mean_cut == pytest.approx(1.4 / 3)
    assert acted.smallest_factor == pytest.approx(0.2)
    assert (acted.grad_norm.tolist(), acted.by_leaf) == (NORMS, {})


@pytest.mark.parametrize("limit", [None, 8.0, float("inf")])
def test_a_threshold_above_all_norms_clips_nothing(limit):
    acted = clipping_statistics({"grad_norm": NORMS}, limit)
    assert (acted.fraction, acted.longest_run, acted.mean_factor, acted.mean_cut) == (0, 0, 1, 1)
    assert acted.factors.tolist() == [1] * 6


def test_a_zero_gradient_is_not_clipped():
    assert clipping_statistics({"grad_norm": [0.0, 2.0]}, 1.0).factors.tolist() == [1, 0.5]


@pytest.fixture(scope="module")
def run():
    """Gradient descent with learning rate 1, so that each update is the clipped gradient, with its history."""
    model, limit, random = sj.Model(sj.stack([sj.GRU(D, 3), sj.LSTM(3, N)]), sj.Gaussian(N, 2)), 1.2, np.random
    draw = [random.default_rng(n).normal(size=(2, 4, 3)).astype(np.float32) for n in range(6)]
    stream = [sj.Batch(x, x[..., :2]) for x in draw]
    optimizer = sj.training.clipped(optax.sgd(1.0), limit)
    states = [sj.training.start(model, optimizer, jax.random.key(0))]
    updates = sj.training.updates(model, stream, states[0], optimizer=optimizer, clip_norm=limit)
    states += [state for state, _ in updates]
    fitted = sj.fit(model, stream, optimizer=optax.sgd(1.0), clip_norm=limit, key=jax.random.key(0))
    return model, limit, stream, states, fitted.history


def test_the_factors_are_those_of_the_optimizer(run):
    _, limit, _, states, history = run
    acted = clipping_statistics(history, limit)
    moved = [
        float(optax.tree.norm(jax.tree.map(jnp.subtract, after.params, before.params)))
        for before, after in itertools.pairwise(states)
    ]
    np.testing.assert_allclose(acted.factors * acted.grad_norm, moved, rtol=1e-5)
    np.testing.assert_array_equal(acted.clipped, history["clipped"])
    assert 0 < acted.fraction < 1


def test_the_squares_of_the_leaf_norms_sum_to_that_of_the_whole_norm(run):
    _, limit, _, states, history = run
    by_leaf = clipping_statistics(history, limit).by_leaf
    assert len(by_leaf) == len(jax.tree.leaves(states[0].params))
    assert {"cell.0.W_hh", "cell.0.b_hn", "cell.1.W_xh", "head.b_y"} < set(by_leaf)
    np.testing.assert_allclose(sum(norm**2 for norm in by_leaf.values()), history["grad_norm"] ** 2, rtol=1e-5)


def test_a_leaf_s_norm_is_that_of_its_own_gradient(run):
    model, limit, stream, states, history = run

    def loss(params, batch):
        return -sj.log_probs(model, params, batch.xs, batch.targets)[1].mean()

    by_leaf = clipping_statistics(history, limit).by_leaf
    for n in (0, 5):
        gradient = jax.grad(loss)(states[n].params, stream[n])
        for name, leaf in {"cell.1.W_hh": gradient.cell[1].W_hh, "head.b_y": gradient.head.b_y}.items():
            assert by_leaf[name][n] == pytest.approx(np.linalg.norm(leaf), rel=1e-4)


def test_leaves_with_equal_simple_paths_get_different_names():
    assert sj.training.leaf_names({"a": {"b": 1}, "c": 2}) == ["a.b", "c"]
    assert len(set(sj.training.leaf_names({"a": {"b": 1}, "a.b": 2}))) == 2


def test_a_history_without_norms_raises():
    with raises(ValueError, "a column 'grad_norm'", "got 'step', 'loss'", "Fitted.history"):
        clipping_statistics({"step": [1], "loss": [0.1]}, 1.0)
    with raises(ValueError, "one grad_norm an update", "was there no update?"):
        clipping_statistics({"grad_norm": []}, 1.0)
    with raises(ValueError, "finite norms in grad_norm", "got nan in row 1"):
        clipping_statistics({"grad_norm": [1.0, np.nan]}, 1.0)
    with raises(ValueError, "clip_norm to be positive", "got 0.0"):
        clipping_statistics({"grad_norm": NORMS}, 0.0)
