"""Scores by position and by length against loops in numpy, and against a model whose loss at each step is known."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import D, N
from errors import raises

import seqjax as sj
from seqjax.analysis.by_length import score_by_length

READER = sj.Model(sj.stack([sj.Embedding(5, D), sj.GRU(D, N)]), sj.Categorical(N, 5))
PARAMS = jax.tree.map(lambda leaf: 2 * leaf, READER.init(jax.random.key(3)))


def counter():
    """A model that predicts the number of steps so far, with a standard deviation of one."""
    model = sj.Model(sj.VanillaRNN(1, 1, activation="identity"), sj.Gaussian(1, 1, std=1.0))
    one, zero = jnp.ones((1, 1)), jnp.zeros(1)
    return model, sj.ModelParams(sj.VanillaParams(one, one, zero), sj.ReadoutParams(one, zero))


def ones(mask, **flags):
    """A batch of ones at the valid steps, NaN elsewhere, whose targets are zero."""
    xs = np.where(mask, 1, np.nan).astype(np.float32)[..., None]
    return sj.Batch(xs, 0 * xs, mask, **flags)


def lost(t):
    """-log N(0; t, 1)."""
    return np.asarray(t, float) ** 2 / 2 + np.log(2 * np.pi) / 2


def test_the_loss_of_a_counter_is_known_at_every_position_and_length():
    lengths = np.array([2, 5, 3, 0, 5])
    got = score_by_length(*counter(), [ones(np.asarray(sj.length_mask(lengths, 6)))])
    assert (got.position.tolist(), got.position_count.tolist()) == ([1, 2, 3, 4, 5], [4, 4, 3, 2, 2])
    np.testing.assert_allclose(got.by_position, lost(got.position), rtol=1e-6)
    assert (got.length.tolist(), got.length_count.tolist()) == ([2, 3, 5], [1, 1, 2])
    np.testing.assert_allclose(got.by_length, [lost(np.arange(1, n + 1)).mean() for n in (2, 3, 5)], rtol=1e-6)
    assert (got.split, got.unit) == (3, "nats")  # no sequence is longer than the median, 4
    assert got.short == pytest.approx(lost([1, 2, 1, 2, 3]).mean(), rel=1e-6)
    assert got.long == pytest.approx(lost([1, 2, 3, 4, 5] * 2).mean(), rel=1e-6)


def test_padding_on_the_left_or_inside_does_not_change_positions():
    mask = np.array([[False, True, True, True, False], [True, False, True, False, True]])
    got = score_by_length(*counter(), [ones(mask)])
    np.testing.assert_allclose(got.by_position, lost([1, 2, 3]), rtol=1e-6)
    assert got.length.tolist() == [3]


def test_a_sequence_ends_at_a_reset_and_continues_over_windows():
    valid, reset = np.ones((2, 3), bool), np.zeros((2, 3), bool)
    reset[1, 1] = True
    windows = [ones(valid), ones(valid, reset=reset, continues=True), ones(valid)]
    got = score_by_length(*counter(), windows)
    assert (got.length.tolist(), got.length_count.tolist()) == ([2, 3, 4, 6], [1, 2, 1, 1])
    assert got.position_count.tolist() == [5, 5, 4, 2, 1, 1]
    np.testing.assert_allclose(got.by_position, lost(got.position), rtol=1e-6)


def test_windows_of_a_text_have_the_scores_of_the_whole_text():
    tokens = np.random.default_rng(0).integers(0, 5, 25)
    whole = score_by_length(READER, PARAMS, [sj.Batch(tokens[None, :-1], tokens[None, 1:])])
    windows = score_by_length(READER, PARAMS, sj.data.windows(tokens, 1, 6, passes=1))
    for a, b in zip(windows, whole, strict=True):
        assert a == b if isinstance(a, str) else np.allclose(a, b, rtol=1e-5, equal_nan=True)


def readers_batches(one_each):
    """Three batches of sequences of different lengths, with one target per step or per sequence."""
    random = np.random.default_rng(1)
    for n, lengths in enumerate(([4, 1, 3], [2, 4, 4], [4, 4, 4])):
        xs, mask = random.integers(0, 5, (3, 4)), np.asarray(sj.length_mask(lengths, 4))
        targets = random.integers(0, 5, 3 if one_each else (3, 4))
        yield sj.Batch(np.where(mask, xs, 99), targets, None if n == 2 else mask)


def logits_by_hand(batch):
    """The outputs and logits of each row at valid steps."""
    step = jax.jit(READER.cell.step)
    for b, xs in enumerate(batch.xs):
        s, hs = READER.cell.initial_state(PARAMS.cell), []
        for t, x in enumerate(xs):
            if batch.mask is None or batch.mask[b, t]:
                s, h = step(PARAMS.cell, s, jnp.asarray(x))
                hs.append(np.asarray(h, float))
        yield b, np.array(hs)


def score_by_hand(h, y, score):
    logits = np.asarray(PARAMS.head.W_hy, float) @ h + np.asarray(PARAMS.head.b_y, float)
    return np.log(np.exp(logits).sum()) - logits[y] if score == "loss" else float(logits.argmax() == y)


@pytest.mark.parametrize("score", ["loss", "accuracy"])
@pytest.mark.parametrize("pool", [None, "last", "mean"])
def test_scores_are_those_of_a_loop_over_the_sequences(pool, score):
    loss = {None: sj.every_step, "last": sj.ManyToOne(), "mean": sj.ManyToOne(sj.masked_mean)}[pool]
    batches, result = list(readers_batches(pool is not None)), []
    for batch in batches:
        for b, hs in logits_by_hand(batch):
            if pool is None:
                scores = [score_by_hand(h, batch.targets[b, t], score) for t, h in enumerate(hs)]
            else:
                scores = [score_by_hand(hs[-1] if pool == "last" else hs.mean(0), batch.targets[b], score)]
            result.append((len(hs), scores))
    got = score_by_length(READER, PARAMS, batches, score=score, loss=loss, split=3)
    of = {n: [scores for length, scores in result if length == n] for n in (1, 2, 3, 4)}
    assert (got.length.tolist(), got.length_count.tolist()) == (list(of), [len(scores) for scores in of.values()])
    np.testing.assert_allclose(got.by_length, [np.mean(scores) for scores in of.values()], rtol=1e-5)
    assert got.short == pytest.approx(np.mean(np.concatenate(of[1] + of[2] + of[3])), rel=1e-5)
    assert got.long == pytest.approx(np.mean(of[4]), rel=1e-5)
    places = list(itertools.zip_longest(*[scores for _, scores in result])) if pool is None else []
    means = [np.mean([score for score in place if score is not None]) for place in places]
    np.testing.assert_allclose(got.by_position, means, rtol=1e-5)
    assert got.unit == {"loss": "nats", "accuracy": "correct"}[score]
    if score == "loss":
        weights = got.length_count * (got.length if pool is None else 1)
        expected = sj.evaluate(READER, PARAMS, batches, loss=loss)
        assert np.average(got.by_length, weights=weights) == pytest.approx(expected, rel=1e-5)


def test_a_users_objective_is_computed_for_each_sequence():
    def largest(head, params, outputs, targets, mask):
        return jnp.max(-sj.head_log_probs(head, params, outputs, targets, mask))

    mask = np.asarray(sj.length_mask([2, 4], 4))
    got = score_by_length(*counter(), [ones(mask)], loss=largest)
    assert (got.length.tolist(), got.position.tolist()) == ([2, 4], [])
    np.testing.assert_allclose(got.by_length, lost([2, 4]), rtol=1e-6)


def test_without_longer_sequences_the_long_score_is_nan():
    got = score_by_length(*counter(), [ones(np.ones((2, 3), bool))])
    assert (got.split, got.short) == (3, pytest.approx(lost([1, 2, 3]).mean()))
    assert np.isnan(got.long)


def test_bad_arguments_raise():
    model, params = counter()
    batch = ones(np.ones((2, 3), bool))
    with raises(ValueError, "at least one valid step", "got none"):
        score_by_length(model, params, [ones(np.zeros((2, 3), bool))])
    with raises(ValueError, 'score to be one of "loss", "accuracy"', "got 'f1'"):
        score_by_length(model, params, [batch], score="f1")
    with raises(TypeError, "whole-number targets", "got float32", 'score="loss"'):
        score_by_length(model, params, [batch], score="accuracy")
    with raises(TypeError, "every_step or ManyToOne", "got <function"):
        score_by_length(model, params, [batch], score="accuracy", loss=lambda *_: 0.0)
    with raises(ValueError, "expected targets (batch, time, ...)", "got (2,)"):
        score_by_length(READER, PARAMS, [sj.Batch(np.zeros((2, 3), int), np.zeros(2, int))], score="accuracy")
