"""Generation against hand-written loops, exact distributions, and the log-probabilities of what was generated."""

from __future__ import annotations

import itertools
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from hypothesis import given, settings
from hypothesis import strategies as st

import seqjax as sj


def language_model(seed=0, vocabulary=5, scale=1.5):
    """A character model with weights large enough for its choices to depend on what it has read."""
    model = sj.Model(sj.stack([sj.Embedding(vocabulary, 3), sj.GRU(3, 6)]), sj.Categorical(6, vocabulary))
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return model, jax.tree.unflatten(structure, leaves)


MODEL, PARAMS = language_model()
PROMPT = jnp.array([[0, 1, 2], [3, 3, 4], [2, 0, 1], [4, 4, 4]])


def test_greedy_tokens_state_and_log_probabilities_are_those_of_a_loop_by_hand(key):
    got, step = sj.generate(MODEL, PARAMS, PROMPT, 6, key, temperature=0.0), jax.jit(MODEL.cell.step)
    assert len(np.unique(got.tokens)) > 2
    for b, prompt in enumerate(np.asarray(PROMPT)):
        state = MODEL.cell.initial_state(PARAMS.cell)
        for token in prompt:
            state, h = step(PARAMS.cell, state, jnp.asarray(token))
        for t in range(6):
            logits = np.asarray(PARAMS.head.W_hy, float) @ np.asarray(h, float) + np.asarray(PARAMS.head.b_y, float)
            token, before = int(np.argmax(logits)), state
            assert got.tokens[b, t] == token
            np.testing.assert_allclose(got.log_probs[b, t], logits[token] - np.log(np.exp(logits).sum()), atol=1e-5)
            state, h = step(PARAMS.cell, before, jnp.asarray(token))
        np.testing.assert_allclose(got.state[1].h[b], before[1].h, atol=1e-5)
    assert np.asarray(got.mask).all()


@pytest.mark.parametrize("options", [{"temperature": 1e-5}, {"top_k": 1, "temperature": 9.0}, {"top_p": 1e-6}])
def test_sampling_cut_down_to_one_token_is_greedy(options, key):
    greedy = sj.generate(MODEL, PARAMS, PROMPT, 6, jax.random.key(7), temperature=0.0)
    got = sj.generate(MODEL, PARAMS, PROMPT, 6, key, **options)
    np.testing.assert_array_equal(got.tokens, greedy.tokens)
    np.testing.assert_allclose(got.log_probs, greedy.log_probs, atol=1e-5)


@pytest.mark.parametrize("one_each", [False, True])
def test_a_row_says_the_same_in_a_batch_of_any_size(one_each, key):
    prompt, keys = jnp.tile(PROMPT, (2, 1)), jax.random.split(key, 8)
    whole = np.asarray(sj.generate(MODEL, PARAMS, prompt, 8, keys if one_each else key).tokens)
    assert (whole[:4] != whole[4:]).any()  # the same prompts with other keys
    for size in (1, 3):
        part = sj.generate(MODEL, PARAMS, prompt[:size], 8, keys[:size] if one_each else key)
        np.testing.assert_array_equal(part.tokens, whole[:size])
    if one_each:
        backwards = sj.generate(MODEL, PARAMS, prompt[::-1], 8, keys[::-1])
        np.testing.assert_array_equal(backwards.tokens, whole[::-1])


@partial(jax.jit, static_argnums=(0, 3))
def draw(head, params, keys, options):
    return jax.vmap(lambda key: head.sample(params, jnp.zeros(1), key, **dict(options)))(keys)


def allowed_probabilities(logits, temperature, top_k, top_p):
    """The definition: softmax, the k likeliest, of these the smallest set whose probability reaches p; renormalised."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    order = sorted(range(len(p)), key=lambda j: -p[j])[:top_k]
    p = np.array([p[j] if j in order else 0.0 for j in range(len(p))])
    p /= p.sum()
    if top_p is not None:
        size = next(m for m in range(1, len(order) + 1) if m == len(order) or p[order[:m]].sum() >= top_p)
        p[order[size:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, None, None), (1.0, 3, None), (1.0, None, 0.7), (2.0, 4, 0.8)],
)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_samples_have_the_probabilities_of_the_cut_and_sharpened_softmax(temperature, top_k, top_p, seed):
    logits, samples = np.random.default_rng(seed).normal(size=6), 3000
    head = sj.Categorical(1, 6)
    params = sj.ReadoutParams(jnp.zeros((6, 1)), jnp.asarray(logits, "float32"))
    options = (("temperature", temperature), ("top_k", top_k), ("top_p", top_p))
    drawn = np.asarray(draw(head, params, jax.random.split(jax.random.key(seed), samples), options))
    counts, p = np.bincount(drawn, minlength=6), allowed_probabilities(logits, temperature, top_k, top_p)
    assert (counts[p == 0] == 0).all()
    expected = samples * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 35  # chi-squared, 5 degrees: once in a million


def test_whole_sequences_come_as_often_as_their_probability_says(key):
    model, params = language_model(vocabulary=3, scale=0.8)
    batch = 6000
    got = np.asarray(sj.generate(model, params, jnp.ones((batch, 1), int), 2, key).tokens)
    every = jnp.array([(1, *rest) for rest in itertools.product(range(3), repeat=2)])
    expected = batch * np.exp(sj.sequence_log_prob(model, params, every[:, :-1], every[:, 1:]))
    counts = np.bincount(3 * got[:, 0] + got[:, 1], minlength=9)
    assert ((counts - expected) ** 2 / expected).sum() < 43  # chi-squared, 8 degrees: once in a million


def test_an_ended_sequence_repeats_the_end_token_at_no_cost_and_was_no_other_before(key):
    end, prompt = 2, jnp.tile(PROMPT, (2, 1))
    free, got = sj.generate(MODEL, PARAMS, prompt, 8, key), sj.generate(MODEL, PARAMS, prompt, 8, key, end=end)
    ended_rows = 0
    for b, tokens in enumerate(np.asarray(free.tokens)):
        ends = np.flatnonzero(tokens == end)
        length = ends[0] + 1 if len(ends) else 8
        ended_rows += length < 8
        np.testing.assert_array_equal(got.mask[b], np.arange(8) < length)
        np.testing.assert_array_equal(got.tokens[b], np.where(np.arange(8) < length, tokens, end))
        np.testing.assert_allclose(got.log_probs[b, :length], free.log_probs[b, :length], atol=1e-5)
        np.testing.assert_array_equal(got.log_probs[b, length:], 0)
    assert 0 < ended_rows < 8


def test_going_on_from_the_returned_state_with_the_last_token_continues_the_sequence(key):
    whole = sj.generate(MODEL, PARAMS, PROMPT, 6, key, temperature=0.0)
    first = sj.generate(MODEL, PARAMS, PROMPT, 3, key, temperature=0.0)
    rest = sj.generate(MODEL, PARAMS, first.tokens[:, -1:], 3, key, temperature=0.0, state=first.state)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], axis=1), whole.tokens)
    np.testing.assert_allclose(rest.log_probs, whole.log_probs[:, 3:], atol=1e-5)
    read, _ = sj.unroll(MODEL.cell, PARAMS.cell, jnp.concatenate([PROMPT, first.tokens[:, :-1]], axis=1))
    np.testing.assert_allclose(first.state[1].h, read[1].h, atol=1e-5)


def test_padded_prompts_of_different_lengths_say_what_the_unpadded_ones_say(key):
    mask = jnp.array([[True, True, True], [True, True, False], [False, True, True], [True, False, True]])
    keys, padded = jax.random.split(key, 4), jnp.where(mask, PROMPT, 99)  # a token that no vocabulary has: it gives NaN
    together = sj.generate(MODEL, PARAMS, padded, 6, keys, mask=mask)
    for b in range(4):
        alone = sj.generate(MODEL, PARAMS, PROMPT[b, mask[b]][None], 6, keys[b : b + 1])
        np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
        np.testing.assert_allclose(together.log_probs[b], alone.log_probs[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}])
def test_log_probabilities_are_the_model_s_own_however_the_tokens_were_chosen(options, key):
    got = sj.generate(MODEL, PARAMS, PROMPT, 6, key, **options)
    text = jnp.concatenate([PROMPT, got.tokens], axis=1)
    _, log_p = sj.log_probs(MODEL, PARAMS, text[:, :-1], text[:, 1:])
    np.testing.assert_allclose(got.log_probs, log_p[:, -6:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 0.0])
def test_a_gaussian_readout_of_the_last_value_is_an_autoregression_with_its_moments(temperature, x64, key):
    a, std, first, batch, steps = 0.8, 0.5, 2.0, 4000, 4
    cell = sj.VanillaRNN(1, 1, activation="identity", dtype="float64")
    model = sj.Model(cell, sj.Gaussian(1, 1, std=std, dtype="float64"))
    one, zero = jnp.ones((1, 1)), jnp.zeros(1)
    params = sj.ModelParams(sj.VanillaParams(one, 0 * one, zero), sj.ReadoutParams(a * one, zero))
    got = sj.generate(model, params, jnp.full((batch, 1, 1), first), steps, key, temperature=temperature)
    y, t = np.asarray(got.tokens[..., 0]), np.arange(1, steps + 1)
    variance = (temperature * std) ** 2 * (1 - a ** (2 * t)) / (1 - a**2)
    assert (abs(y.mean(0) - first * a**t) <= 5 * np.sqrt(variance / batch) + 1e-12).all()
    assert (abs(y.var(0) - variance) <= 5 * variance * np.sqrt(2 / batch) + 1e-12).all()
    mean = a * np.concatenate([np.full((batch, 1), first), y[:, :-1]], axis=1)
    density = np.exp(-(((y - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(got.log_probs, np.log(density), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"prompt": jnp.zeros((2, 0), int)}, ["at least one step", "(2, 0)", "start token"]),
        ({"prompt": jnp.zeros(3, int)}, ["(batch, time, ...)", "(3,)", "tokens[None]"]),
        ({"steps": 0}, ["expected steps", "at least 1", "got 0"]),
        ({"temperature": -0.1}, ["temperature", "-0.1"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"top_p": 0.0}, ["top_p", "(0, 1]"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"key": jax.random.split(jax.random.key(0), 3)}, ["one for each of the 4 prompts", "(3,)"]),
        ({"mask": jnp.ones((4, 3), bool).at[1].set(False)}, ["at least one valid step", "False"]),
        ({"mask": jnp.ones((4, 2), bool)}, ["mask", "(4, 3)", "(4, 2)"]),
        ({"mask": jnp.ones(4, bool)}, ["mask", "(4, 3)", "(4,)"]),
    ],
)
def test_options_out_of_range_are_refused_with_what_was_expected(change, parts, key):
    with raises(ValueError, *parts):
        sj.generate(MODEL, PARAMS, **({"prompt": PROMPT, "steps": 2, "key": key} | change))


def test_a_gaussian_readout_refuses_the_cuts_of_a_categorical_one(key):
    head = sj.Gaussian(2, 1)
    for option in ({"top_k": 2}, {"top_p": 0.5}):
        with raises(ValueError, "top_k", "Gaussian", "temperature"):
            head.sample(head.init(key), jnp.zeros(2), key, **option)


class Counted(sj.Categorical):
    """A readout that counts how often its sampling is traced."""

    traces: ClassVar[list[str]] = []

    def sample(self, params, h, key, **options):
        self.traces.append("sample")
        return super().sample(params, h, key, **options)


def test_a_rebuilt_model_is_not_compiled_again(key):
    counts = []
    for top_k in (2, 2, 3):
        model = sj.Model(sj.stack([sj.Embedding(5, 3), sj.GRU(3, 6)]), Counted(6, 5))
        sj.generate(model, PARAMS, PROMPT, 2, key, top_k=top_k)
        counts.append(len(Counted.traces))
    assert counts[0] == counts[1] < counts[2]
