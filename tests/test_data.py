"""The data: every task's targets and baseline by a second route, and text and sequences that come back unchanged."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys

import jax
import numpy as np
import pytest
from errors import raises
from hypothesis import given
from hypothesis import strategies as st

import seqjax as sj


def first(stream):
    return next(iter(stream))


@pytest.mark.parametrize("time", [2, 7])
def test_the_adding_problem_asks_for_the_two_marked_numbers_one_in_each_half(time, key):
    batch = first(sj.data.adding_problem(key, batch=200, time=time))
    numbers, marks = np.asarray(batch.xs[..., 0]), np.asarray(batch.xs[..., 1])
    assert np.isin(marks, (0, 1)).all()
    assert (marks[:, : time // 2].sum(1) == 1).all()
    assert (marks[:, time // 2 :].sum(1) == 1).all()
    by_hand = [[sum(n for n, m in zip(row, mark, strict=True) if m)] for row, mark in zip(numbers, marks, strict=True)]
    np.testing.assert_allclose(batch.targets, by_hand, rtol=1e-6)
    assert 0 <= numbers.min() < numbers.max() <= 1


def test_always_answering_one_costs_a_sixth_and_not_the_figure_often_copied(key):
    targets = np.asarray(first(sj.data.adding_problem(key, batch=200_000, time=2)).targets, float)
    error = np.mean((targets - 1) ** 2)
    # The standard error of the mean is 0.0004: the variance of (a + b - 1)^2 is 1/15 - 1/36.
    assert abs(error - 1 / 6) < 5 * math.sqrt((1 / 15 - 1 / 36) / 200_000)
    assert abs(error - 0.1767) > 0.008
    assert sj.data.ADDING_BASELINE == 1 / 6


def test_copy_memory_is_symbols_blanks_cue_blanks_and_asks_for_the_symbols_at_the_end(key):
    batch = first(sj.data.copy_memory(key, batch=50, delay=7, symbols=8))
    for xs, targets in zip(np.asarray(batch.xs).tolist(), np.asarray(batch.targets).tolist(), strict=True):
        said = xs[:10]
        assert set(said) <= set(range(1, 9))
        assert xs == said + [0] * 6 + [9] + [0] * 10
        assert targets == [0] * 17 + said
    assert set(np.unique(batch.xs[:, :10])) == set(range(1, 9))


@pytest.mark.parametrize(("delay", "published"), [(100, 0.17329), (200, 0.09452), (1, 10 * math.log(8) / 21)])
def test_the_copy_baseline_is_the_loss_of_remembering_nothing(delay, published, key):
    batch = first(sj.data.copy_memory(key, batch=4, delay=delay))
    p = np.zeros((delay + 20, 10))
    p[:-10, 0] = 1  # certainly blank until the cue
    p[-10:, 1:9] = 1 / 8  # any symbol after it
    loss = -np.mean(np.log(p[np.arange(delay + 20), np.asarray(batch.targets)]))
    assert sj.data.copy_baseline(delay) == pytest.approx(loss, rel=1e-12)
    assert sj.data.copy_baseline(delay) == pytest.approx(published, abs=5e-6)
    assert sj.data.copy_baseline(delay, symbols=2) == pytest.approx(10 * math.log(2) / (delay + 20))


@pytest.mark.parametrize("task", [sj.data.adding_problem, sj.data.copy_memory])
def test_synthetic_streams_depend_on_the_key_and_never_repeat_a_batch(task, key):
    def drawn(key):
        return [np.asarray(batch.xs) for batch in itertools.islice(task(key, 3, 20), 3)]

    once, again, other = drawn(key), drawn(key), drawn(jax.random.key(1))
    np.testing.assert_array_equal(once, again)
    assert all((a != b).any() for a, b in itertools.combinations([*once, *other], 2))


def test_synthetic_sizes_that_make_no_sense_are_refused(key):
    with raises(ValueError, "time of at least 2", "got 1"):
        sj.data.adding_problem(key, 3, 1)
    with raises(ValueError, "delay", "at least 1", "got 0"):
        sj.data.copy_memory(key, 3, 0)


def test_digits_are_all_1797_images_once_each_between_zero_and_one():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    train, test = sj.data.digits(test_share=0.2, seed=3)
    assert (len(train.xs), len(test.xs)) == (1438, 359)
    xs, ys = np.concatenate([train.xs, test.xs]), np.concatenate([train.labels, test.labels])
    assert (xs.min(), xs.max()) == (0, 1)
    images = sorted(zip((xs[..., 0] * 16).tolist(), ys.tolist(), strict=True))
    assert images == sorted(zip(pixels.tolist(), labels.tolist(), strict=True))


def test_digits_are_divided_by_the_seed_alone():
    splits = [sj.data.digits(seed=seed)[1].xs for seed in (0, 0, 1)]
    np.testing.assert_array_equal(splits[0], splits[1])
    assert (splits[0] != splits[2]).any()


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with raises(ModuleNotFoundError, "expected scikit-learn", 'pip install "seqjax[digits]"'):
        sj.data.digits()
    with raises(ValueError, "test_share between 0 and 1", "got 1"):
        sj.data.digits(test_share=1)


@given(st.text(min_size=1))
def test_a_text_is_its_tokens_whatever_the_script(text):
    corpus = sj.data.Corpus.of("text", text)
    assert corpus.vocabulary == "".join(sorted(set(text)))
    assert [corpus.vocabulary[token] for token in corpus.tokens] == list(text)
    assert sj.data.decode(corpus.tokens, corpus.vocabulary) == text


@given(st.permutations("aé☃𝄞😀"), st.text("aé☃𝄞😀"))
def test_a_vocabulary_may_stand_in_any_order(vocabulary, text):
    vocabulary = "".join(vocabulary)
    tokens = sj.data.encode(text, vocabulary)
    assert tokens.tolist() == [vocabulary.index(character) for character in text]
    assert sj.data.decode(tokens, vocabulary) == text


@pytest.mark.parametrize(
    ("text", "vocabulary", "parts"),
    [
        ("abca", "ab", ["'c'", "got 1 other", "position 2"]),
        ("😀b𝄞a😀", "ab", ["'𝄞😀'", "got 3 others", "position 0"]),
        ("a", "", ["'a'", "0 characters", "position 0"]),
    ],
)
def test_an_unknown_character_is_named_with_its_place(text, vocabulary, parts):
    with raises(sj.data.UnknownCharacter, "expected", "toy", *parts):
        sj.data.encode(text, vocabulary, "toy")


def test_unigram_entropy_is_shannons():
    p = 0.9
    closed = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert sj.data.unigram_entropy([1] * 90 + [7] * 10) == pytest.approx(closed, rel=1e-12)
    assert sj.data.unigram_entropy(np.arange(64)) == 6
    assert sj.data.unigram_entropy([3, 3, 3]) == 0
    with raises(ValueError, "at least one token", "got none"):
        sj.data.unigram_entropy([])


def test_the_manual_is_the_same_english_each_time():
    corpus, again = sj.data.manual_topics(), sj.data.manual_topics()
    assert corpus.sha256 == again.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert len(corpus.text) > 400_000
    assert corpus.text.count(" the ") > 3_000
    assert 4 < sj.data.unigram_entropy(corpus.tokens) < 5.5
    assert ".".join(map(str, sys.version_info[:3])) in corpus.name


@given(st.integers(0, 3_000))
def test_the_parts_of_a_text_are_nine_tenths_and_two_twentieths_in_order(length):
    tokens = np.arange(length)
    parts = sj.data.split(tokens)
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    for part, share in zip(parts, (0.9, 0.05, 0.05), strict=True):
        assert abs(len(part) - share * length) <= 1
