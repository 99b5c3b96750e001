"""Many networks trained at once are the networks trained one after another, and one that fails disturbs no other."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import raises

import seqjax as sj

MODEL = sj.Model(sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 6), sj.Dropout(6, 0.2)]), sj.Categorical(6, 5))
KEYS = jax.random.split(jax.random.key(0), 3)
RATES = jnp.array([1e-3, 3e-2, 1e-2])


def batches(count=4):
    """Windows of which every second one continues the one before."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (count, 2, 9)))
    return [sj.Batch(t[:, :-1], t[:, 1:], continues=bool(i % 2)) for i, t in enumerate(tokens)]


def trained(**options):
    return sj.fit_many(MODEL, batches(), keys=KEYS, settings={"learning_rate": RATES}, **options)


@pytest.fixture(scope="module")
def found():
    return trained()


def test_each_network_is_that_of_a_training_of_its_own(found):
    assert len(found) == 3
    assert found.reasons == ("stream",) * 3
    for i, rate in enumerate(RATES):
        alone = sj.fit(MODEL, batches(), key=KEYS[i], optimizer=optax.adam(float(rate)))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found[i].params, alone.params)
        assert found[i].history.keys() == alone.history.keys()
        for name in ("step", "loss", "grad_norm", "clipped", "param_norm", "grad_norm/cell.1.W_hh"):
            np.testing.assert_allclose(found[i].history[name], alone.history[name], rtol=1e-4, err_msg=name)
    assert int(found[1].state.step) == 4


def test_a_network_that_fails_keeps_its_last_numbers_and_disturbs_no_other(found):
    some = sj.fit_many(
        MODEL, batches(), keys=KEYS, optimizer=optax.sgd, settings={"learning_rate": jnp.array([0.1, 1e38, 0.1])},
        clip_norm=None,
    )  # fmt: skip
    others = sj.fit_many(
        MODEL, batches(), keys=KEYS, optimizer=optax.sgd, settings={"learning_rate": 0.1}, clip_norm=None
    )
    assert [reason.startswith("not finite at step") for reason in some.reasons] == [False, True, False]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(some.params))
    for i in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, some[i].params, others[i].params)
    assert "network 1 (not finite at step" in str(some)


def test_a_number_of_steps_ends_the_training():
    assert trained(steps=2).reasons == ("steps",) * 3
    assert trained(steps=2).history["loss"].shape == (3, 2)


def test_each_network_is_validated_for_itself():
    found = trained(validation=lambda: batches(2), validate_every=2)
    assert found.history["validation_step"].tolist() == [[2, 4]] * 3
    for i in range(3):
        expected = sj.evaluate(MODEL, found[i].params, batches(2))
        assert found[i].history["validation"][-1] == pytest.approx(expected, rel=1e-5)
        assert "validation" in str(found[i])


@pytest.mark.skipif(len(jax.devices()) < 2, reason="this process has one device")
def test_devices_share_the_networks():
    def both(devices):
        return sj.fit_many(
            MODEL, batches(), keys=KEYS[:2], settings={"learning_rate": RATES[:2]}, devices=devices,
            validation=lambda: batches(2),
        )  # fmt: skip

    found, expected = both(jax.devices()[:2]), both(None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found.params, expected.params)
    np.testing.assert_allclose(found.history["validation"], expected.history["validation"], rtol=1e-4)
    for leaf in jax.tree.leaves((found.params, found.state.carried)):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 1
    with raises(ValueError, "networks that 2 devices divide evenly", "got 3"):
        sj.fit_many(MODEL, batches(), keys=KEYS, devices=jax.devices()[:2])


def test_what_does_not_fit_is_said():
    with raises(ValueError, "one key for each network", "jax.random.split"):
        sj.fit_many(MODEL, batches(), keys=KEYS[0])
    with raises(ValueError, "learning_rate", "3 networks"):
        sj.fit_many(MODEL, batches(), keys=KEYS, settings={"learning_rate": jnp.ones(2)})
    with raises(TypeError, "sj.Batch"):
        sj.fit_many(MODEL, [1], keys=KEYS)
