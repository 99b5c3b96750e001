"""Options that save memory: the update stays that of the whole batch, and too much memory is said before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import raises
from test_sharded_batches import assert_equal, collectives

import seqjax as sj
from seqjax.training._devices import by_rows, everywhere, mesh_of
from seqjax.training._gradient import Means
from seqjax.training.loop import compiled_update

ROWS, TIME = 8, 12
READER = sj.Model(sj.stack([sj.Embedding(5, 3), sj.VanillaRNN(3, 4)]), sj.Categorical(4, 5))
REGRESSION = sj.Model(sj.GRU(3, 4), sj.Gaussian(4, 2))
SGD = optax.sgd(0.1)


def windows():
    tokens = np.random.default_rng(0).integers(0, 5, ROWS * 2 * TIME + 1)
    return list(sj.data.windows(tokens, ROWS, TIME, passes=1))


def masked(rows=ROWS):
    random = np.random.default_rng(1)
    xs, targets = (random.normal(size=(rows, TIME, n)).astype(np.float32) for n in (3, 2))
    mask = np.arange(TIME) < random.integers(1, TIME, rows)[:, None]
    return sj.Batch(xs, targets, mask)


def trained(model, stream, **options):
    return sj.fit(model, stream, optimizer=SGD, clip_norm=None, params=model.init(jax.random.key(0)), **options)


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"accumulate": 2, "devices": 2}, {"checkpoint_every": 5}])
def test_windows_in_parts_train_as_whole_windows_do(options):
    if "devices" in options:
        options = options | {"devices": jax.devices()[: options["devices"]]}
    whole, parts = trained(READER, windows()), trained(READER, windows(), **options)
    assert_equal((parts.params, parts.state.carried), (whole.params, whole.state.carried))
    np.testing.assert_allclose(parts.history["loss"], whole.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(parts.history["grad_norm"], whole.history["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("loss", [sj.every_step, sj.ManyToOne()])
@pytest.mark.parametrize("devices", [None, 2])
def test_parts_with_masks_of_different_lengths_are_weighted(loss, devices):
    batch = masked()
    if loss is not sj.every_step:
        batch = sj.Batch(batch.xs, batch.targets[:, 0], batch.mask)
    whole = trained(REGRESSION, [batch], loss=loss)
    devices = None if devices is None else jax.devices()[:devices]
    parts = trained(REGRESSION, [batch], loss=loss, accumulate=4, devices=devices)
    assert_equal((parts.params, parts.history["loss"]), (whole.params, whole.history["loss"]))


@pytest.mark.parametrize("means", [{"accumulate": 2}, {"checkpoint_every": 3}])
def test_the_gradients_of_parts_are_added_over_the_devices_once(means):
    mesh, batch = mesh_of(jax.devices()[:2]), masked()
    update = compiled_update(REGRESSION, SGD, sj.every_step, None, Means(mesh=mesh, **means))
    state = everywhere(mesh, sj.training.start(REGRESSION, SGD, jax.random.key(0)))
    data = by_rows(mesh, (batch.xs, batch.targets, batch.mask, None))
    found = collectives(update.lower(state, data, None).compile())
    assert set(found) == {("all-reduce", True)}
    assert len(found) <= len(jax.tree.leaves(state.params)) + 2  # the loss and the weight


def test_parts_need_less_memory():
    model = sj.Model(sj.LSTM(3, 64), sj.Gaussian(64, 2))
    state = jax.eval_shape(lambda: sj.training.start(model, SGD, jax.random.key(0)))
    data = (jax.ShapeDtypeStruct((32, 512, 3), "float32"), jax.ShapeDtypeStruct((32, 2), "float32"), None, None)

    def temporaries(**options):
        update = compiled_update(model, SGD, sj.ManyToOne(), None, Means(**options))
        return update.lower(state, data, None).compile().memory_analysis().temp_size_in_bytes

    whole = temporaries()
    assert temporaries(accumulate=8) < whole / 4
    assert temporaries(checkpoint_every=32) < 0.9 * whole  # the outputs of all steps remain


def test_noise_is_drawn_for_each_part_and_the_same_again():
    model = sj.Model(sj.stack([sj.Dropout(3, 0.5), sj.VanillaRNN(3, 4)]), sj.Gaussian(4, 2))
    one, again, other = (
        trained(model, [masked()], accumulate=2, key=jax.random.key(seed)).history["loss"] for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_compute_dtype_is_that_of_the_states_and_not_of_parameters_or_loss():
    seen = {}

    @jax.tree_util.register_static
    class Watching(sj.GRU):
        def step(self, params, state, x):
            seen.update(state=state.h.dtype, params=params.W_hh.dtype, x=x.dtype)
            return super().step(params, state, x)

    def loss(head, params, outputs, targets, mask):
        seen.update(outputs=outputs.dtype, head=params.W_hy.dtype)
        return sj.every_step(head, params, outputs, targets, mask)

    model, batch = sj.Model(Watching(3, 4), sj.Gaussian(4, 2)), masked()
    short = trained(
        model, [batch, sj.Batch(batch.xs, batch.targets, continues=True)], loss=loss, compute_dtype="bfloat16"
    )
    assert {name: str(dtype) for name, dtype in seen.items()} == {
        "state": "bfloat16", "params": "bfloat16", "x": "bfloat16", "outputs": "float32", "head": "float32"
    }  # fmt: skip
    assert {leaf.dtype for leaf in jax.tree.leaves((short.params, short.state.carried))} == {jnp.dtype("float32")}
    full = trained(REGRESSION, [batch])
    assert short.history["loss"][0] == pytest.approx(full.history["loss"][0], rel=1e-2)
    assert short.history["loss"][0] != full.history["loss"][0]


def test_more_memory_than_there_is_is_said_before_the_first_update(monkeypatch):
    monkeypatch.setattr("seqjax.training._memory.device_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match=r"an update needs .* kB, and the device has 1 kB: use accumulate"):
        trained(REGRESSION, [masked()])


def test_what_does_not_divide_is_refused():
    with raises(ValueError, "accumulate of at least 1", "got 0"):
        trained(REGRESSION, [masked()], accumulate=0)
    with raises(ValueError, "evenly into 3 parts", "accumulate=3", "got 8 rows"):
        trained(REGRESSION, [masked()], accumulate=3)
    with raises(ValueError, "compute_dtype of floating-point numbers", "got int32"):
        trained(REGRESSION, [masked()], compute_dtype="int32")
