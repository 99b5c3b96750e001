"""Learning: what a recurrent network is for, each task beside the score of a model that remembers nothing."""

from __future__ import annotations

import itertools
import math

import jax
import numpy as np
import optax
import pytest

import seqjax as sj

pytestmark = pytest.mark.slow


def predictions(model, params, xs):
    """What the head says of the last output of each sequence."""
    _, outputs = sj.unroll(model.cell, params.cell, xs)
    return np.asarray(jax.vmap(lambda h: sj.readout(params.head, h))(outputs[:, -1]))


def test_an_lstm_solves_the_adding_problem_at_a_hundred_steps(key):
    model = sj.Model(sj.LSTM(2, 32, chrono=100), sj.Gaussian(32, 1, std=1.0))
    stream = sj.data.adding_problem(key, batch=64, time=100)
    fitted = sj.fit(model, stream, steps=1000, optimizer=optax.adam(1e-2), loss=sj.ManyToOne(), key=key)
    test = next(sj.data.adding_problem(jax.random.key(1), batch=2000, time=100))
    error = np.mean((predictions(model, fitted.params, test.xs) - test.targets) ** 2)
    nothing = np.mean((1 - np.asarray(test.targets)) ** 2)
    print(f"mean squared error {error:.5f}, always answering one {nothing:.5f}")
    assert nothing == pytest.approx(1 / 6, abs=0.02)
    assert error < 0.01


def test_a_gru_reads_handwritten_digits_pixel_by_pixel(key):
    train, test = sj.data.digits()
    model = sj.Model(sj.GRU(1, 64), sj.Categorical(64, 10))
    stream = sj.data.batches(train.xs, train.labels, batch=32, seed=0, passes=50)
    optimizer = optax.adam(optax.cosine_onecycle_schedule(50 * 45, 8e-3))
    fitted = sj.fit(model, stream, optimizer=optimizer, loss=sj.ManyToOne(), key=key)
    accuracy = np.mean(predictions(model, fitted.params, test.xs).argmax(1) == test.labels)
    nothing = np.bincount(test.labels).max() / len(test.labels)
    print(f"accuracy {accuracy:.4f}, always answering the commonest {nothing:.4f}")
    assert nothing < 0.2
    assert accuracy > 0.95


def test_a_gru_copies_over_a_short_delay(key):
    model = sj.Model(sj.stack([sj.Embedding(4, 8), sj.GRU(8, 64)]), sj.Categorical(64, 4))
    stream = sj.data.copy_memory(key, batch=64, delay=5, symbols=2)
    fitted = sj.fit(model, stream, steps=1000, optimizer=optax.adam(1e-2), key=key)
    test = sj.data.copy_memory(jax.random.key(1), batch=500, delay=5, symbols=2)
    loss = sj.evaluate(model, fitted.params, itertools.islice(test, 1))
    print(f"loss {loss:.5f}, remembering nothing {sj.data.copy_baseline(5, 2):.5f}")
    assert loss < 0.25 * sj.data.copy_baseline(5, 2)


def test_an_lstm_needs_fewer_bits_than_a_model_without_memory(key):
    corpus = sj.data.manual_topics()
    training, _, test = sj.data.split(corpus.tokens)
    size = len(corpus.vocabulary)
    model = sj.Model(sj.stack([sj.Embedding(size, 32), sj.LSTM(32, 64)]), sj.Categorical(64, size))
    stream = sj.data.windows(training, batch=32, window=64)
    fitted = sj.fit(model, stream, steps=200, optimizer=optax.adam(1e-2), key=key)
    bits = sj.evaluate(model, fitted.params, sj.data.windows(test, 32, 64, passes=1)) / math.log(2)
    entropy = sj.data.unigram_entropy(corpus.tokens)
    print(f"{bits:.3f} bits per character, unigram entropy {entropy:.3f}")
    assert bits < entropy - 1
