"""Training against a loop by hand: rows, steps and windows one after another, and Adam from its own equations."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cells import D, Leaky, N
from errors import raises
from jax.flatten_util import ravel_pytree

import seqjax as sj
from seqjax.training._validated import validated

TOKENS = np.random.default_rng(0).integers(0, 5, 23)
READER = sj.Model(sj.stack([sj.Embedding(5, D), sj.VanillaRNN(D, N)]), sj.Categorical(N, 5))


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def regression(cell, count=4, batch=2, time=3, dtype="float32"):
    """A model that predicts two numbers a step, and batches for it."""
    model = sj.Model(cell, sj.Gaussian(N, 2, dtype=dtype))
    return model, [sj.Batch(numbers(n, batch, time, D), numbers(100 + n, batch, time, 2)) for n in range(count)]


def loss_by_hand(model, params, states, xs, targets):
    """The mean of -log p over all steps, and the last state of each row: row by row, step by step."""
    total, last = 0.0, []
    for b in range(len(xs)):
        s = model.cell.initial_state(params.cell) if states is None else states[b]
        for t in range(len(xs[b])):
            s, h = model.cell.step(params.cell, s, xs[b, t])
            total -= model.head.log_prob(params.head, h, targets[b, t])
        last.append(s)
    return total / xs.shape[0] / xs.shape[1], last


def descend_by_hand(model, params, stream, rate):
    """Gradient descent; the states go from window to window, but no gradient goes back through them."""
    objective = jax.jit(jax.value_and_grad(partial(loss_by_hand, model), has_aux=True))
    losses, states = [], None
    for batch in stream:
        states = jax.lax.stop_gradient(states) if batch.continues else None
        (loss, states), gradient = objective(params, states, batch.xs, batch.targets)
        params = jax.tree.map(lambda p, g: p - np.asarray(rate, p.dtype) * g, params, gradient)
        losses.append(float(loss))
    return params, losses


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_update_is_adam_on_the_clipped_gradient(x64, key):
    model, batches = regression(sj.LSTM(D, N, dtype="float64"), dtype="float64")
    params, rate, clip = model.init(key), 0.01, 0.5
    fitted = sj.fit(model, batches, optimizer=optax.adam(rate), clip_norm=clip, params=params)
    theta, unravel = ravel_pytree(params)
    m, v, norms = 0.0, 0.0, []
    gradient = jax.jit(jax.grad(partial(loss_by_hand, model), has_aux=True))
    for t, batch in enumerate(batches, 1):
        g = ravel_pytree(gradient(unravel(theta), None, batch.xs, batch.targets)[0])[0]
        norms.append(float(np.sqrt(np.sum(g**2))))
        g = g * min(1, clip / norms[-1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert_close(ravel_pytree(fitted.params)[0], theta, 1e-8)
    np.testing.assert_allclose(fitted.history["grad_norm"], norms, rtol=1e-8)
    np.testing.assert_allclose(fitted.history["param_norm"][-1], np.linalg.norm(theta), rtol=1e-8)
    assert (np.array(norms) > clip).any()


@pytest.mark.parametrize("cell", [Leaky(), sj.from_linen(nn.GRUCell(N), D)], ids=["user", "linen"])
def test_any_cell_trains_as_by_hand(cell, key):
    model, batches = regression(cell, count=2)
    params = model.init(key)
    fitted = sj.fit(model, batches, optimizer=optax.sgd(0.1), clip_norm=None, params=params)
    expected, losses = descend_by_hand(model, params, batches, 0.1)
    assert_close((fitted.params, fitted.history["loss"]), (expected, np.array(losses)))


def test_any_head_trains_as_by_hand(key):
    class Laplace:
        """-log p = |y - w h| + ln 2: a user's own head of one number."""

        def init(self, key):
            return jax.random.normal(key, (N,))

        def log_prob(self, w, h, y):
            return -jnp.abs(y - w @ h) - np.float32(np.log(2))

        def sample(self, w, h, key, *, temperature=1.0, top_k=None, top_p=None):
            return w @ h + temperature * jax.random.laplace(key)

    model, batch = sj.Model(sj.VanillaRNN(D, N), Laplace()), sj.Batch(numbers(0, 2, 3, D), numbers(1, 2, 3))
    params = model.init(key)
    fitted = sj.fit(model, [batch] * 2, optimizer=optax.sgd(0.1), clip_norm=None, params=params)
    expected, losses = descend_by_hand(model, params, [batch] * 2, 0.1)
    assert_close((fitted.params, fitted.history["loss"]), (expected, np.array(losses)))


def test_windows_carry_the_state_and_stop_the_gradient(key):
    params = READER.init(key)
    stream = list(sj.data.windows(TOKENS, 2, 3, passes=2))  # three windows a pass
    fitted = sj.fit(READER, stream, optimizer=optax.sgd(1.0), clip_norm=None, params=params)
    expected, losses = descend_by_hand(READER, params, stream, 1.0)
    assert_close((fitted.params, fitted.history["loss"]), (expected, np.array(losses)))
    afresh = [sj.Batch(b.xs, b.targets) for b in stream]
    forgetful = sj.fit(READER, afresh, optimizer=optax.sgd(1.0), clip_norm=None, params=params)
    assert abs(forgetful.history["loss"] - losses)[[1, 2, 4, 5]].min() > 1e-3


def test_a_learned_state_learns_only_where_a_batch_or_a_reset_starts_afresh(key):
    model, (first, second) = regression(sj.LearnedState(sj.VanillaRNN(D, N)), count=2)
    reset = np.array([[False] * 3, [False, True, False]])
    continued = sj.Batch(second.xs, second.targets, continues=True)
    stream = [first, continued, sj.Batch(second.xs, second.targets, reset=reset, continues=True)]
    params = model.init(key)
    optimizer = optax.sgd(0.1)
    run = sj.training.updates(model, stream, sj.training.start(model, optimizer, params=params), optimizer=optimizer)
    learned = [params.cell.state, *(state.params.cell.state for state, _ in run)]
    moved = [[bool((a != b).all()) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(learned)]
    assert moved == [[True], [False], [True]]
    assert_same(learned[1], learned[2])


@pytest.mark.parametrize("clip", [0.5, 2.0, None])
def test_clipped_tells_whether_the_gradient_was_cut(clip, key):
    model, batches = regression(sj.VanillaRNN(D, N), count=6)
    optimizer = sj.training.clipped(optax.sgd(1.0), clip)
    before = sj.training.start(model, optimizer, key)
    seen = set()
    for after, metrics in sj.training.updates(model, batches, before, optimizer=optimizer, clip_norm=clip):
        length = float(optax.tree.norm(jax.tree.map(jnp.subtract, after.params, before.params)))
        limit = np.inf if clip is None else clip
        assert length == pytest.approx(min(metrics.grad_norm, limit), rel=1e-4)
        assert metrics.clipped == (metrics.grad_norm > limit)
        before = after
        seen.add(metrics.clipped)
    assert seen == {0.5: {1.0}, 2.0: {0.0, 1.0}, None: {0.0}}[clip]


def test_the_history_is_what_was_seen_before_each_update_and_the_validation_after(key):
    model, batches = regression(sj.VanillaRNN(D, N), count=5)
    states, told = [], []
    optimizer = sj.training.clipped(optax.adam(0.01), 1.0)
    run = sj.training.updates(model, batches, sj.training.start(model, optimizer, key), optimizer=optimizer)
    states = [sj.training.start(model, optimizer, key).params, *(state.params for state, _ in run)]
    fitted = sj.fit(
        model, batches, steps=5, optimizer=optax.adam(0.01), key=key, validation=lambda: batches[:2],
        validate_every=2, progress=lambda step, metrics: told.append((step, metrics.loss)),
    )  # fmt: skip
    losses = [sj.evaluate(model, p, [b]) for p, b in zip(states, batches, strict=False)]
    history = fitted.history
    leaves = {f"grad_norm/{name}" for name in ("cell.W_xh", "cell.W_hh", "cell.b_h", "head.W_hy", "head.b_y")}
    scalars = {"step", "loss", "grad_norm", "clipped", "param_norm", "validation_step", "validation"}
    assert set(history) == scalars | leaves
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(history["param_norm"], [optax.tree.norm(p) for p in states[1:]], rtol=1e-5)
    assert history["step"].tolist() == [1, 2, 3, 4, 5] == [step for step, _ in told]
    assert history["loss"].tolist() == [loss for _, loss in told]
    assert history["validation_step"].tolist() == [2, 4, 5]
    expected = [sj.evaluate(model, states[n], batches[:2]) for n in (2, 4, 5)]
    np.testing.assert_allclose(history["validation"], expected, rtol=1e-5)
    assert fitted.reason == "steps"


def test_a_loop_validates_when_it_is_due_and_reads_no_update_after_the_last(monkeypatch):
    clock = itertools.count(100.0, 10.0)  # each update takes ten seconds
    monkeypatch.setattr("seqjax.training._validated.time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = ((sj.training.TrainState(n, f"params {n}", None, None), f"metrics {n}") for n in range(4, 20))
    options = dict(validate=lambda params: f"loss of {params}", validate_every=3, done=3, seconds=30.0)
    seen = list(validated(run, is_last=lambda number, seconds: seconds >= 80, **options))
    assert [(u.number, u.state.step, u.metrics) for u in seen] == [(n, n, f"metrics {n}") for n in range(4, 9)]
    assert [u.seconds for u in seen] == [40.0, 50.0, 60.0, 70.0, 80.0]
    assert [u.last for u in seen] == [False, False, False, False, True]
    assert [u.validation for u in seen] == [None, None, "loss of params 6", None, "loss of params 8"]
    assert next(run)[0].step == 9


def test_training_in_two_parts_is_training_in_one_bit_for_bit(key):
    whole = sj.fit(READER, sj.data.windows(TOKENS, 2, 3), steps=7, key=key)
    half = sj.fit(READER, sj.data.windows(TOKENS, 2, 3), steps=4, key=key)
    rest = sj.fit(READER, sj.data.windows(TOKENS, 2, 3, skip=4), steps=3, state=half.state)
    assert_same(rest.state, whole.state)
    for name in ("step", "loss", "grad_norm"):
        np.testing.assert_array_equal(np.append(half.history[name], rest.history[name]), whole.history[name])


def test_what_is_no_stream_of_batches_is_refused(key):
    model, (batch, *_) = regression(sj.VanillaRNN(D, N))
    late = sj.Batch(batch.xs, batch.targets, continues=True)
    with raises(TypeError, "expected a stream of sj.Batch", "got tuple", "sj.Batch(xs, targets)"):
        sj.fit(model, [(batch.xs, batch.targets)], key=key)
    with raises(ValueError, "starts afresh first", "got one that continues"):
        sj.fit(model, [late], key=key)
    with raises(ValueError, "starts afresh first", "got one that continues"):
        sj.evaluate(model, model.init(key), [late])
    with raises(TypeError, "expected a stream of sj.Batch", "got tuple"):
        sj.evaluate(model, model.init(key), [(batch.xs, batch.targets)])
    with raises(ValueError, "expected targets (batch, time, ...) = (2, 3, ...)", "got (2, 2, 2)"):
        sj.fit(model, [sj.Batch(batch.xs, batch.targets[:, :2])], key=key)
    with raises(ValueError, "expected xs (batch, time, 3)", "got (3, 3)", "xs[None]"):
        sj.fit(model, [sj.Batch(batch.xs[0], batch.targets)], key=key)
    with raises(ValueError, "a key to draw parameters with, or params, got neither"):
        sj.fit(model, [batch])
    with raises(ValueError, "expected steps", "at least 0", "got -1"):
        sj.fit(model, [batch], steps=-1, key=key)
    with raises(ValueError, "clip_norm to be positive", "got 0.0"):
        sj.fit(model, [batch], clip_norm=0.0, key=key)
