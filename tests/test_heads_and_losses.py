"""Log-probabilities, losses and pooling against closed forms, loops in numpy, and the axioms of probability."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import raises
from hypothesis import given
from hypothesis import strategies as st

import seqjax as sj

MASKS = (
    st.sampled_from([0, 1, 4])
    .flatmap(  # any pattern over these times, rows without a valid step included
        lambda time: st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=3, max_size=3)
    )
    .map(lambda rows: np.array(rows, bool))
)


def random_like(tree, seed=0, scale=1.0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(scale * rng.normal(size=a.shape), a.dtype) for a in leaves])


def random_params(part, seed=0, scale=1.0):
    return random_like(jax.eval_shape(part.init, jax.random.key(0)), seed, scale)


def close(got, expected, rtol=1e-12):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=rtol, atol=rtol)


def language_model(vocabulary, scale=1.0):
    layers = [sj.Embedding(vocabulary, 2, dtype="float64"), sj.LSTM(2, 4, dtype="float64")]
    model = sj.Model(sj.stack(layers), sj.Categorical(4, vocabulary, dtype="float64"))
    return model, random_params(model, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 1e3])  # at 1e3 a softmax whose logarithm is taken afterwards has underflowed
def test_categorical_log_probability_is_the_logit_minus_the_log_of_the_sum_of_exponentials(scale, x64):
    head = sj.Categorical(3, 5, dtype="float64")
    params, h = random_params(head, scale=scale), np.random.default_rng(1).normal(size=(7, 3))
    logits = h @ np.asarray(params.W_hy).T + np.asarray(params.b_y)
    largest = logits.max(axis=1, keepdims=True)
    expected = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    for y in range(5):
        got = jax.vmap(lambda h: head.log_prob(params, h, jnp.asarray(y)))(jnp.asarray(h))  # noqa: B023
        close(got, expected[:, y])


@pytest.mark.parametrize("y", [-1, 5])
def test_a_class_that_does_not_exist_has_no_log_probability(y):
    head = sj.Categorical(3, 5)
    assert math.isnan(head.log_prob(random_params(head), jnp.ones(3), jnp.array(y)))


def test_the_loss_of_a_categorical_readout_and_its_gradient_equal_torch_cross_entropy(x64):
    torch = pytest.importorskip("torch", reason="torch is not installed: its parity is measured where it is")
    head, rng = sj.Categorical(3, 5, dtype="float64"), np.random.default_rng(0)
    params, h, y = random_params(head), rng.normal(size=(2, 4, 3)), rng.integers(0, 5, size=(2, 4))
    mask = np.array([[True, True, True, True], [True, False, True, False]])

    def loss(h):
        log_p = sj.head_log_probs(head, params, h, jnp.asarray(y), jnp.asarray(mask))
        return sj.sequence_loss(-log_p, jnp.asarray(mask))

    W, b, theirs_h = torch.tensor(np.array(params.W_hy)), torch.tensor(np.array(params.b_y)), torch.tensor(h)
    theirs_h.requires_grad_()
    target = torch.tensor(np.where(mask, y, -100))  # the class that cross_entropy ignores
    theirs = torch.nn.functional.cross_entropy((theirs_h @ W.T + b).flatten(0, 1), target.flatten())
    theirs.backward()
    close(loss(jnp.asarray(h)), theirs.item())
    close(jax.grad(loss)(jnp.asarray(h)), theirs_h.grad.numpy())


@pytest.mark.parametrize("std", [None, 0.3])
def test_gaussian_log_probability_is_its_closed_form(std, x64):
    head = sj.Gaussian(3, 2, std=std, dtype="float64")
    params, rng = random_params(head), np.random.default_rng(1)
    h, y = rng.normal(size=3), rng.normal(size=2)
    o = np.asarray(params.W_hy) @ h + np.asarray(params.b_y)
    mean, sigma = (o[:2], np.exp(o[2:])) if std is None else (o, np.full(2, std))
    density = np.exp(-(((y - mean) / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
    close(head.log_prob(params, jnp.asarray(h), jnp.asarray(y)), np.log(density.prod()))
    moments = head.moments(params, jnp.asarray(h))
    close(moments.mean, mean)
    close(moments.std, sigma)


@pytest.mark.parametrize("unit", ["nats", "bits"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@given(mask=MASKS)
def test_a_sequence_loss_is_the_sum_or_mean_over_valid_steps_whatever_stands_elsewhere(reduce, unit, mask):
    losses = np.random.default_rng(mask.sum()).normal(size=mask.shape) + 2
    valid = [losses[b, t] for b, t in np.ndindex(*mask.shape) if mask[b, t]]
    scale = (1 / max(len(valid), 1) if reduce == "mean" else 1) / (math.log(2) if unit == "bits" else 1)
    with jax.enable_x64(True):
        holes = jnp.asarray(np.where(mask, losses, np.nan))
        value, grad = jax.value_and_grad(sj.sequence_loss)(holes, jnp.asarray(mask), reduce=reduce, unit=unit)
        close(value, math.fsum(valid) * scale)
        close(grad, np.where(mask, scale, 0))


@pytest.mark.parametrize("std", [None, 0.5])
def test_nan_in_padded_outputs_and_targets_reaches_neither_values_nor_gradients(std, x64):
    head, rng = sj.Gaussian(3, 1, std=std, dtype="float64"), np.random.default_rng(0)
    params, mask = random_params(head), np.array([[True, True, False], [False, True, False], [False, False, False]])
    outputs, targets = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3, 1))

    def run(hole):
        h, y = (jnp.asarray(np.where(mask[..., None], a, hole)) for a in (outputs, targets))

        def loss(params, h, y):
            return sj.sequence_loss(-sj.head_log_probs(head, params, h, y, jnp.asarray(mask)), jnp.asarray(mask))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, h, y)

    for a, b in zip(jax.tree.leaves(run(np.nan)), jax.tree.leaves(run(0.0)), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_a_sequence_s_log_probability_is_the_sum_of_its_steps_taken_by_hand(x64):
    model, params = language_model(5)
    tokens = np.random.default_rng(0).integers(0, 5, size=(3, 6))
    mask = np.array([[True] * 5, [True, True, False, True, False], [False] * 5])
    xs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    got = sj.sequence_log_prob(model, params, xs, targets, mask=jnp.asarray(mask))
    step = jax.jit(model.cell.step)
    for b in range(3):
        state, total = model.cell.initial_state(params.cell), 0.0
        for t in range(5):
            if mask[b, t]:
                state, h = step(params.cell, state, jnp.asarray(tokens[b, t]))
                logits = np.asarray(params.head.W_hy) @ np.asarray(h) + np.asarray(params.head.b_y)
                total += logits[tokens[b, t + 1]] - np.log(np.exp(logits).sum())
        close(got[b], total)


def test_the_probabilities_of_all_sequences_sum_to_one(x64):
    model, params = language_model(3, scale=2.0)
    tokens = jnp.array([(1, *rest) for rest in itertools.product(range(3), repeat=4)])
    log_p = sj.sequence_log_prob(model, params, tokens[:, :-1], tokens[:, 1:])
    assert log_p.shape == (81,)
    assert float(np.exp(log_p).max()) > 0.05  # far from uniform, which would sum to one by itself
    close(np.exp(log_p).sum(), 1.0)


@given(mask=MASKS)
def test_perplexity_is_two_to_the_bits_per_character(mask):
    log_p = -np.random.default_rng(mask.sum()).exponential(size=mask.shape)
    valid = [log_p[b, t] for b, t in np.ndindex(*mask.shape) if mask[b, t]]
    with jax.enable_x64(True):
        holes = jnp.asarray(np.where(mask, log_p, np.nan))
        bits = float(sj.bits_per_character(holes, jnp.asarray(mask)))
        close(sj.perplexity(holes, jnp.asarray(mask)), 2**bits)
        close(bits, -np.mean(valid) / np.log(2) if valid else 0)


POOLS = {  # name: (ours, of one row's valid steps, the derivative of its sum by them)
    "last_valid": (sj.last_valid, lambda v: v[-1], lambda v: np.arange(len(v))[:, None] == len(v) - 1),
    "masked_mean": (sj.masked_mean, lambda v: v.mean(0), lambda v: np.ones((len(v), 1)) / len(v)),
    "masked_max": (sj.masked_max, lambda v: v.max(0), lambda v: v == v.max(0)),
}


@pytest.mark.parametrize("name", POOLS)
@given(mask=MASKS)
def test_pooling_reads_the_valid_steps_alone_and_gives_zero_where_there_is_none(name, mask):
    ours, by_hand, derivative = POOLS[name]
    outputs = np.random.default_rng(mask.sum()).normal(size=(*mask.shape, 2)) - 3  # below the zeros of padding
    expected, slopes = np.zeros((len(mask), 2)), np.zeros_like(outputs)
    for b, valid in enumerate(mask):
        if valid.any():
            expected[b] = by_hand(outputs[b, valid])
            slopes[b, valid] = derivative(outputs[b, valid])
    with jax.enable_x64(True):
        holes = jnp.asarray(np.where(mask[..., None], outputs, np.nan))
        value, pull = jax.vjp(lambda outputs: ours(outputs, jnp.asarray(mask)), holes)
        close(value, expected)
        close(pull(jnp.ones_like(value))[0], slopes)
        if mask.all():
            close(ours(holes), expected)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_in_chunks_is_the_loss_of_all_steps_in_every_derivative(kind, masked, x64, monkeypatch):
    batch, time, n = 3, 47, 4  # chunks of five steps, and a shorter one
    monkeypatch.setattr("seqjax.models._chunked_loss.ROWS", 15)
    head = sj.Categorical(n, 9, dtype="float64") if kind == "categorical" else sj.Gaussian(n, 2, dtype="float64")
    rng = np.random.default_rng(0)
    h, mask = jnp.asarray(rng.normal(size=(batch, time, n))), rng.random((batch, time)) < 0.7 if masked else None
    y = rng.integers(0, 9, (batch, time)) if kind == "categorical" else rng.normal(size=(batch, time, 2))
    moving = (random_params(head), h) + (() if kind == "categorical" else (jnp.asarray(y),))
    direction = random_like(moving, seed=1)

    def everything(at_once):
        monkeypatch.setattr("seqjax.models._chunked_loss.AT_ONCE", at_once)

        def loss(moving):
            targets = moving[2] if kind == "gaussian" else y
            return sj.every_step(head, moving[0], moving[1], targets, mask)

        (value, gradient), (along, curvature) = jax.jvp(jax.value_and_grad(loss), (moving,), (direction,))
        many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), moving)
        return value, gradient, along, curvature, jax.vmap(jax.grad(loss))(many), loss(moving)

    for got, expected in zip(*map(jax.tree.leaves, (everything(1), everything(2**40))), strict=True):
        close(got, expected, rtol=1e-11)


def test_the_logits_of_a_large_vocabulary_never_exist_all_together():
    batch, time, vocabulary = 4, 512, 1000
    head = sj.Categorical(8, vocabulary)
    arguments = head.init(jax.random.key(0)), jnp.ones((batch, time, 8)), jnp.zeros((batch, time), int)
    program = jax.jit(jax.grad(lambda p, h, y: sj.every_step(head, p, h, y, None), (0, 1))).lower(*arguments)
    assert program.compile().memory_analysis().temp_size_in_bytes < 4 * batch * time * vocabulary
    y = arguments[2].at[1, 300].set(vocabulary)
    assert np.isnan(sj.every_step(head, *arguments[:2], y, None)), "a class that does not exist"


def tied_and_untied():
    """A tied model, the same model with a matrix of its own, and their parameters with the same values."""
    layers = [sj.Embedding(7, 4, dtype="float64"), sj.GRU(4, 4, dtype="float64")]
    tied, own = (sj.Model(sj.stack(layers), sj.Categorical(4, 7, dtype="float64", tied=tie)) for tie in (True, False))
    params = random_params(tied)
    of_own = sj.ModelParams(params.cell, params.head._replace(W_hy=params.cell[0].E))
    return tied, own, params, of_own


def test_a_tied_head_reads_the_embedding_and_its_gradient_adds_to_it(x64):
    tied, own, params, of_own = tied_and_untied()
    tokens = np.random.default_rng(0).integers(0, 7, (2, 9))

    def loss(params, model):
        return -sj.log_probs(model, params, tokens[:, :-1], tokens[:, 1:])[1].sum()

    value, gradient = jax.value_and_grad(loss)(params, tied)
    expected, apart = jax.value_and_grad(loss)(of_own, own)
    close(value, float(expected))
    close(gradient.cell[0].E, np.asarray(apart.cell[0].E + apart.head.W_hy))
    close(gradient.head.b_y, np.asarray(apart.head.b_y))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(leaf.size for leaf in jax.tree.leaves(of_own)) - 28


def test_a_tied_model_is_trained_scored_sampled_and_saved_as_any_other(x64, tmp_path):
    tied, own, params, of_own = tied_and_untied()
    tokens = np.random.default_rng(0).integers(0, 7, (2, 9))
    data = [sj.Batch(tokens[:, :-1], tokens[:, 1:])]
    both = ((tied, params), (own, of_own))
    one, other = (sj.fit(model, data, optimizer=optax.sgd(0.1), params=theta) for model, theta in both)
    close(one.history["loss"], other.history["loss"])
    assert one.params.head.W_hy is None
    close(*(sj.evaluate(model, theta, data) for model, theta in both))
    drawn = [sj.generate(model, theta, tokens[:, :3], 6, jax.random.key(1)).tokens for model, theta in both]
    np.testing.assert_array_equal(*drawn)
    path = tmp_path / "tied.safetensors"
    sj.save(path, tied, params)
    again, loaded = sj.load(path)
    assert again == tied
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        (sj.GRU(4, 4), ["expected one embedding (7, 4)", "got []"]),
        (sj.stack([sj.Embedding(7, 3), sj.GRU(3, 4)]), ["(7, 4)", "[(7, 3)]", "tied=False"]),
    ],
)
def test_a_tied_head_without_its_embedding_is_refused(cell, parts):
    model = sj.Model(cell, sj.Categorical(4, 7, tied=True))
    with raises(ValueError, *parts):
        model.head_params(model.init(jax.random.key(0)))
