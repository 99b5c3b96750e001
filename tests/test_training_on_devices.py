"""Training on several devices is training on one: the same numbers, and one sum over the devices per update."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import raises
from test_sharded_batches import assert_equal, collectives

import seqjax as sj
from seqjax.kernels.build import compiler_command
from seqjax.training._devices import by_rows, everywhere, mesh_of
from seqjax.training.loop import compiled_update

MODEL = sj.Model(sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 6)]), sj.Categorical(6, 5))
ADAM = optax.adam(1e-2)
OPTIMIZER = sj.training.clipped(ADAM, 1.0)
ROWS = 8


def windows(rows=ROWS):
    """Windows of a text that continue one another, the last ones of another pass."""
    return sj.data.windows(np.random.default_rng(0).integers(0, 5, rows * 24 + 1), rows, 8, passes=2)


def fitted(devices, stream=(), **options):
    return sj.fit(MODEL, stream, optimizer=ADAM, key=jax.random.key(0), devices=devices, **options)


def program_of_update(devices, model=MODEL, loss=sj.every_step, batch=None):
    """The compiled update, with what it is called with."""
    batch, mesh = batch or next(windows()), mesh_of(devices)
    state = everywhere(mesh, sj.training.start(model, OPTIMIZER, jax.random.key(0)))
    data = by_rows(mesh, (batch.xs, batch.targets, batch.mask, batch.reset))
    return compiled_update(model, OPTIMIZER, loss, 1.0).lower(state, data, None).compile()


def check_collectives(devices, **options):
    """The only collective is the sum of the gradients and of the loss, after all loops."""
    assert collectives(program_of_update(devices, **options)) == [("all-reduce", True)] * (len(devices) > 1)


def check_trainings(counts, stream):
    """Compares trainings on some numbers of devices with that on one, and with themselves."""
    params = MODEL.init(jax.random.key(0))
    expected = fitted(None, stream, params=params)
    for count in counts:
        devices = jax.devices()[:count]
        found, again = (fitted(devices, stream, params=params) for _ in range(2))
        assert_equal((found.params, found.history["loss"]), (expected.params, expected.history["loss"]))
        jax.tree.map(np.testing.assert_array_equal, found.params, again.params)
        assert {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found.params)} == {True}
        assert found.state.carried[1].h.sharding.shard_shape((ROWS, 6)) == (ROWS // count, 6)
        check_collectives(devices)


COUNTS = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_disable_most_optimizations", True)
import test_training_on_devices as tests
from seqjax import kernels
assert len(jax.devices()) == 8 and kernels.available() == (sys.argv[2] == "kernel")
tests.check_trainings((1, 2, 4, 8), [next(tests.windows())])
"""


@pytest.mark.thorough
@pytest.mark.parametrize("loops", ["kernel", "xla"])
def test_one_two_four_and_eight_devices_train_the_same_network(loops):
    if loops == "kernel" and compiler_command() is None:
        pytest.skip("there is no C++ compiler")
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", SEQJAX_KERNEL="off")
    if loops == "kernel":
        del environment["SEQJAX_KERNEL"]
    command = [sys.executable, "-c", COUNTS, os.path.dirname(__file__), loops]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


def test_two_devices_train_the_network_of_one():
    check_trainings((2,), list(windows()))


def test_two_devices_evaluate_as_one_does():
    params, stream = MODEL.init(jax.random.key(0)), list(windows())
    expected = sj.evaluate(MODEL, params, stream)
    assert sj.evaluate(MODEL, params, stream, devices=jax.devices()) == pytest.approx(expected, rel=1e-5)


def test_an_update_of_masked_sequences_and_of_a_large_vocabulary_gathers_nothing():
    mask = jnp.arange(30)[None] < jnp.arange(12, 12 + 2 * ROWS, 2)[:, None]
    numbers = np.random.default_rng(0).normal(size=(ROWS, 30, 3)).astype(np.float32)
    regression = sj.Model(sj.GRU(3, 4), sj.Gaussian(4, 3))
    last = sj.Batch(numbers, numbers[:, 0], mask)
    assert program_has_only_sums(regression, sj.ManyToOne(), last)
    tokens = np.random.default_rng(0).integers(0, 1200, (ROWS, 130))
    reader = sj.Model(sj.stack([sj.Embedding(1200, 3), sj.GRU(3, 4)]), sj.Categorical(4, 1200))
    assert program_has_only_sums(reader, sj.every_step, sj.Batch(tokens, tokens))


def program_has_only_sums(model, loss, batch):
    """Whether an update on two devices adds numbers over them, outside all loops, and does nothing else with them."""
    return set(collectives(program_of_update(jax.devices()[:2], model, loss, batch))) == {("all-reduce", True)}


def test_a_batch_that_the_devices_do_not_divide_is_computed_by_each_of_them_and_a_warning_says_so():
    batch = next(windows(3))
    with pytest.warns(UserWarning, match="2 devices do not divide a batch of 3 rows.* choose a multiple of 2"):
        found = sj.fit(MODEL, [batch], key=jax.random.key(0), devices=jax.devices())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = sj.fit(MODEL, [batch], key=jax.random.key(0))
    assert_equal(found.params, expected.params)


def test_a_training_goes_on_with_another_number_of_devices():
    stream = list(windows())
    whole = sj.fit(MODEL, stream, key=jax.random.key(0))
    half = sj.fit(MODEL, stream[:2], key=jax.random.key(0), devices=jax.devices())
    rest = sj.fit(MODEL, stream[2:], state=half.state, devices=jax.devices()[:1])
    assert_equal(rest.params, whole.params)


def test_devices_that_are_none_are_refused():
    with raises(ValueError, "one device or more", "devices=jax.devices()"):
        fitted([])
    with raises(ValueError, "each once", "CpuDevice"):
        fitted(jax.devices()[:1] * 2)
