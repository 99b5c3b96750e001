"""What training guards: NaN stops it where it was good, padding counts for nothing, and it is compiled once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cells import D, N
from errors import raises
from test_training import READER, TOKENS, assert_close, assert_same, numbers, regression

import seqjax as sj

MASK = np.array([[True, True, False, False], [True, True, True, True], [False, True, False, True]])
BAD = np.full((2, 3, D), np.nan, np.float32)


def poisoned(name):
    """Six batches, of which the fifth holds NaN in its inputs or its targets."""
    model, batches = regression(sj.VanillaRNN(D, N), count=6)
    xs, targets = batches[4].xs, batches[4].targets.copy()
    targets[1, 2, 0] = np.nan
    batches[4] = sj.Batch(BAD, targets * 0) if name == "xs" else sj.Batch(xs, targets)
    return model, batches


@pytest.mark.parametrize("name", ["xs", "targets"])
def test_nan_in_the_fifth_batch_stops_with_the_parameters_of_the_fourth(name, key):
    model, batches = poisoned(name)
    with pytest.warns(UserWarning, match="training stopped: not finite at step 5"):
        fitted = sj.fit(model, batches, key=key)
    good = sj.fit(model, batches[:4], key=key)
    assert fitted.reason.startswith("not finite at step 5 (loss nan")
    assert_same((fitted.params, fitted.state), (good.params, good.state))
    assert len(fitted.history["loss"]) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fitted.state))


def test_updates_raise_at_the_step_that_failed(key):
    model, batches = poisoned("xs")
    optimizer, steps = optax.adam(0.01), []
    run = sj.training.updates(model, batches, sj.training.start(model, optimizer, key), optimizer=optimizer)
    with pytest.raises(sj.training.NotFinite, match="not finite at step 5") as caught:
        steps.extend(int(state.step) for state, _ in run)
    assert (steps, caught.value.step) == ([1, 2, 3, 4], 5)


@pytest.mark.parametrize("rate", [float("inf"), 1e38])
def test_a_learning_rate_that_explodes_is_caught_before_it_reaches_the_parameters(rate, key):
    model, batches = regression(sj.VanillaRNN(D, N))
    params = model.init(key)
    with pytest.warns(UserWarning, match="not finite at step"):
        fitted = sj.fit(model, batches, optimizer=optax.sgd(rate), params=params)
    assert fitted.reason.startswith("not finite at step 1")
    assert_same(fitted.params, params)


def test_nan_in_the_padding_changes_nothing(key):
    model = sj.Model(sj.VanillaRNN(D, N), sj.Gaussian(N, 2))
    xs, targets = numbers(0, 3, 4, D), numbers(1, 3, 4, 2)
    nan = [np.where(MASK[..., None], leaf, np.float32(np.nan)) for leaf in (xs, targets)]
    clean, dirty = (sj.fit(model, [sj.Batch(*data, MASK)] * 2, key=key) for data in ((xs, targets), nan))
    assert_same(dirty.params, clean.params)


def test_evaluation_is_the_mean_over_all_valid_steps(key):
    model = sj.Model(sj.VanillaRNN(D, N), sj.Gaussian(N, 2))
    params = model.init(key)
    masks = [MASK, np.ones_like(MASK), MASK & False]
    batches = [sj.Batch(numbers(n, 3, 4, D), numbers(9 + n, 3, 4, 2), mask) for n, mask in enumerate(masks)]
    every = [-sj.log_probs(model, params, b.xs, b.targets, mask=b.mask)[1][b.mask] for b in batches]
    expected = np.concatenate(every).mean()
    assert sj.evaluate(model, params, batches) == pytest.approx(expected, rel=1e-5)
    batches[1] = sj.Batch(batches[1].xs, batches[1].targets)  # no mask: all are valid
    assert sj.evaluate(model, params, batches) == pytest.approx(expected, rel=1e-5)
    with raises(ValueError, "at least one valid step", "got none"):
        sj.evaluate(model, params, [])


def test_evaluation_in_windows_is_that_of_the_text_in_one_go(key):
    params = READER.init(key)
    whole = sj.evaluate(READER, params, [sj.Batch(TOKENS[None, :-1], TOKENS[None, 1:])])
    windows = sj.evaluate(READER, params, sj.data.windows(TOKENS, 1, 2, passes=1))
    assert windows == pytest.approx(whole, rel=1e-5)
    cut = sj.evaluate(READER, params, [sj.Batch(TOKENS[:-1].reshape(11, 2), TOKENS[1:].reshape(11, 2))])
    assert abs(cut - whole) > 1e-3


def test_a_reset_within_a_batch_is_a_new_sequence(key):
    params, reset = READER.init(key), np.zeros((1, 22), bool)
    reset[0, 10] = True
    joined = sj.evaluate(READER, params, [sj.Batch(TOKENS[None, :-1], TOKENS[None, 1:], reset=reset)])
    parts = [sj.Batch(TOKENS[None, a:b], TOKENS[None, a + 1 : b + 1]) for a, b in ((0, 10), (10, 22))]
    assert joined == pytest.approx(sj.evaluate(READER, params, parts), rel=1e-5)


@pytest.mark.parametrize("name", ["last", "mean", "max"])
def test_many_to_one_reads_the_pool_of_the_valid_steps(name, key):
    pool = {"last": sj.last_valid, "mean": sj.masked_mean, "max": sj.masked_max}[name]
    model, targets = sj.Model(sj.VanillaRNN(D, N), sj.Categorical(N, 5)), jnp.array([3, 0, 4])
    params, xs = model.init(key), numbers(0, 3, 4, D)
    xs = np.where(MASK[..., None], xs, np.float32(np.nan))

    def objective(params):
        total = 0.0
        for x, valid, y in zip(xs, MASK, targets, strict=True):
            s, hs = model.cell.initial_state(params.cell), []
            for x_t in jnp.asarray(x[valid]):
                s, h = model.cell.step(params.cell, s, x_t)
                hs.append(h)
            pooled = {"last": hs[-1], "mean": sum(hs) / np.float32(len(hs)), "max": jnp.max(jnp.stack(hs), 0)}[name]
            total -= model.head.log_prob(params.head, pooled, y)
        return total / 3

    loss, gradient = jax.value_and_grad(objective)(params)
    batch = sj.Batch(xs, targets, MASK)
    fitted = sj.fit(model, [batch], loss=sj.ManyToOne(pool), optimizer=optax.sgd(1.0), clip_norm=None, params=params)
    assert fitted.history["loss"][0] == pytest.approx(float(loss), rel=1e-5)
    assert_close(fitted.params, jax.tree.map(jnp.subtract, params, gradient))


def test_many_to_one_is_evaluated_as_the_mean_over_sequences(key):
    model = sj.Model(sj.VanillaRNN(D, N), sj.Categorical(N, 5))
    params, loss = model.init(key), sj.ManyToOne()
    short, long = (sj.Batch(numbers(n, 3, n, D), np.array([1, 2, 3])) for n in (1, 8))
    apart = [sj.evaluate(model, params, [batch], loss=loss) for batch in (short, long)]
    assert apart[0] != apart[1]
    assert sj.evaluate(model, params, [short, long], loss=loss) == pytest.approx(np.mean(apart), rel=1e-5)


def counting(traces):
    """The loss of every step, which notes each time that it is traced."""

    def loss(*arguments):
        traces.append(len(traces))
        return sj.every_step(*arguments)

    return loss


def test_a_rebuilt_model_is_not_compiled_again(key):
    optimizer, traces = optax.adam(0.01), []
    loss = counting(traces)
    for _ in range(3):
        model, batches = regression(sj.stack([sj.VanillaRNN(D, 5), sj.LearnedState(sj.VanillaRNN(5, N))]))
        state = sj.training.start(model, optimizer, key)
        list(sj.training.updates(model, batches, state, optimizer=optimizer, loss=loss))
    assert len(traces) == 1


@pytest.mark.parametrize("optimizer", [None, optax.adam(0.01)], ids=["default", "given"])
def test_fitting_a_second_time_is_not_compiled_again(optimizer, key):
    traces = []
    loss = counting(traces)
    for _ in range(2):
        model, batches = regression(sj.VanillaRNN(D, N))
        validation = {"validation": lambda stream=batches: stream, "validate_every": 2}
        sj.fit(model, batches, optimizer=optimizer, loss=loss, key=key, **validation)
    assert len(traces) == 2  # the update and the evaluation
