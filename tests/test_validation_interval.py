"""The loss on the validation text: the mean of the training's own validation, and an interval that holds."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from seqjax.command import character_model, validation
from seqjax.command.character_model import Settings
from seqjax.command.validation import batch_means_interval, validation_bits

SETTINGS = Settings(hidden=4, embedding=2, batch=4, window=8)
VOCABULARY = "abcd"


@pytest.fixture(scope="module")
def model():
    built = character_model.build(SETTINGS, VOCABULARY)
    return built, built.init(jax.random.key(0))


def text(length):
    return np.random.default_rng(0).integers(0, 4, length).astype(np.int32)


@pytest.mark.parametrize(("length", "read"), [(200, 192), (20, 16), (5, 4)])
def test_the_mean_over_the_whole_text_is_the_validation_loss_of_the_training(model, length, read):
    found = validation_bits(SETTINGS, *model, text(length), width=0.0)
    nats = character_model.mean_loss(SETTINGS, *model, text(length))
    assert found.mean == pytest.approx(nats / math.log(2), rel=1e-5)
    assert (found.read, found.length) == (read, length)
    assert not found.low > found.mean
    assert not found.high < found.mean


def test_reading_ends_when_the_interval_is_narrow(model):
    few, all_of_it = (validation_bits(SETTINGS, *model, text(4001), width=w) for w in (0.2, 0.0))
    assert few.read < all_of_it.read == 4000
    assert few.high - few.low < 0.2
    assert few.read % 32 == 0  # whole windows of every row


def test_reading_ends_when_the_time_is_over(model):
    assert validation_bits(SETTINGS, *model, text(4001), width=0.0, seconds=0.0).read == 4 * 32


def test_the_interval_covers_the_mean_of_correlated_values():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        noise, values = rng.normal(size=(32, 300)), np.zeros((32, 300))
        for t in range(1, 300):  # an autocorrelation time of about 10 steps
            values[:, t] = 0.9 * values[:, t - 1] + noise[:, t]
        _, low, high, _ = batch_means_interval(values)
        covered += low < 0 < high
    assert 0.92 < covered / 400 < 0.98


def test_the_interval_is_that_of_students_t():
    values = np.arange(16.0)[:, None] * np.ones(10)
    mean, low, high, _ = batch_means_interval(values)
    assert mean == 7.5
    # t_{0.975} with 15 degrees of freedom is 2.13145, and the standard deviation of 0..15 is sqrt(68 / 3)
    np.testing.assert_allclose([low, high], 7.5 + np.array([-1, 1]) * 2.13145 * math.sqrt(68 / 3) / 4, rtol=1e-5)


def test_a_short_text_has_a_mean_and_no_interval():
    mean, low, high, pieces = batch_means_interval(np.ones((1, 15)))
    assert mean == 1
    assert np.isnan([low, high]).all()
    assert str(validation.Estimate(mean, low, high, 15, 16, pieces)) == "1.000"


def test_one_character_is_refused(model):
    with pytest.raises(ValueError, match="expected a validation text of at least 2 characters, got 1"):
        validation_bits(SETTINGS, *model, text(1))


def test_the_difference_of_two_models_on_one_text_is_known_better_than_their_means():
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.normal(2, 1, (16, 1)), 50, axis=1)  # parts of the text are harder than others
    a, b = (hard + shift + 0.01 * rng.normal(size=hard.shape) for shift in (0.1, 0.0))
    first, second = (
        validation.Estimate(*batch_means_interval(v)[:3], v.size, v.size, batch_means_interval(v)[3]) for v in (a, b)
    )
    mean, low, high = first.minus(second)
    assert first.low < second.high
    assert mean == pytest.approx(a.mean() - b.mean())
    assert low < mean < high
    assert high - low < 0.01 < first.high - first.low
    assert first.minus(second._replace(read=1)) is None
