"""The n-gram baseline: the entropy of independent tokens, nothing for a periodic text, and its definition."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest

from seqjax.data.ngram import ngram_bits
from seqjax.data.text import unigram_entropy

HALVES = np.array([0.5, 0.25, 0.125, 0.125])  # 1.75 bits


def independent(length, seed=0):
    return np.random.default_rng(seed).choice(4, length, p=HALVES)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_independent_tokens_cost_their_entropy(order):
    assert ngram_bits(independent(200_000), independent(50_000, 1), order) == pytest.approx(1.75, abs=0.02)


def test_a_markov_chain_costs_its_conditional_entropy():
    change = np.random.default_rng(0).random(100_000) < 0.11  # H(0.11) = 0.49992 bits
    chain = np.cumsum(change) % 2
    assert ngram_bits(chain[:80_000], chain[80_000:], 1) == pytest.approx(1, abs=0.01)
    assert ngram_bits(chain[:80_000], chain[80_000:], 5) == pytest.approx(0.49992, abs=0.02)


def test_a_periodic_text_costs_nothing():
    text = np.tile(np.arange(7), 2000)
    assert ngram_bits(text, text, 5) < 0.002
    assert ngram_bits(text, text, 1) == pytest.approx(np.log2(7), abs=1e-3)


def test_nothing_is_known_without_training_text():
    assert ngram_bits([], [0, 1, 2], 3, vocabulary=8) == 3.0


def test_the_unigram_model_of_its_own_text_costs_its_entropy():
    text = independent(100_000)
    assert ngram_bits(text, text, 1) == pytest.approx(unigram_entropy(text), abs=1e-3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_bits_are_those_of_the_definition(order):
    rng = np.random.default_rng(order)
    training, tokens = rng.integers(0, 3, 60).tolist(), rng.integers(0, 4, 20).tolist()

    def probability(history, x, n):
        if not n:
            return Fraction(1, 4)
        u = tuple(history[len(history) - n + 1 :])
        follow = [training[i] for i in range(n - 1, len(training)) if tuple(training[i - n + 1 : i]) == u]
        lower, total = probability(history, x, n - 1), len(follow) + len(set(follow))
        return (follow.count(x) + len(set(follow)) * lower) / total if total else lower

    text = training + tokens
    bits = [-np.log2(float(probability(text[:t], text[t], order))) for t in range(len(training), len(text))]
    assert ngram_bits(training, tokens, order, 4) == pytest.approx(np.mean(bits), rel=1e-12)


def test_a_million_characters_take_less_than_three_seconds():
    text = np.random.default_rng(0).integers(0, 100, 1_000_000)
    start = time.process_time()
    ngram_bits(text[:950_000], text[950_000:], 5)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(("tokens", "order"), [([], 2), ([1], 0)])
def test_bad_input_is_refused(tokens, order):
    with pytest.raises(ValueError, match="expected an order of at least 1 and a token to predict, got"):
        ngram_bits([1, 2], tokens, order)
