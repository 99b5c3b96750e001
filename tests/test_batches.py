"""Streams of batches: windows that read a text once and in order, and padded sequences that are all there, once."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from hypothesis import given
from hypothesis import strategies as st

import seqjax as sj


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 200))
def test_windows_laid_end_to_end_are_the_text_and_targets_are_one_ahead(batch, window, more):
    tokens = np.random.default_rng(more).integers(0, 50, batch * window + 1 + more)
    stream = list(sj.data.windows(tokens, batch, window, passes=1))
    rows = np.concatenate([b.xs for b in stream], axis=1)
    targets = np.concatenate([b.targets for b in stream], axis=1)
    stretch = (len(tokens) - 1) // batch
    assert rows.shape == (batch, stretch // window * window)
    for b, (row, target) in enumerate(zip(rows, targets, strict=True)):
        np.testing.assert_array_equal(row, tokens[b * stretch :][: len(row)])
        np.testing.assert_array_equal(target, tokens[b * stretch + 1 :][: len(row)])


def test_only_the_first_window_of_a_pass_starts_afresh():
    stream = sj.data.windows(np.arange(31), 2, 5)
    assert [b.continues for b in itertools.islice(stream, 7)] == [False, True, True, False, True, True, False]
    assert len(list(sj.data.windows(np.arange(31), 2, 5, passes=4))) == 12


@pytest.mark.parametrize("skip", [0, 1, 3, 4, 11])
def test_skipping_windows_is_leaving_them_out(skip):
    tokens = np.random.default_rng(0).integers(0, 9, 40)
    whole = list(itertools.islice(sj.data.windows(tokens, 2, 6), skip, skip + 8))
    skipped = list(itertools.islice(sj.data.windows(tokens, 2, 6, skip=skip), 8))
    for a, b in zip(whole, skipped, strict=True):
        np.testing.assert_array_equal(a.xs, b.xs)
        np.testing.assert_array_equal(a.targets, b.targets)
        assert a.continues == b.continues


def test_a_text_shorter_than_a_window_is_refused_with_the_length_that_it_needs():
    assert len(list(sj.data.windows(np.arange(13), 3, 4, passes=1))) == 1
    with raises(ValueError, "batch * window + 1 = 13", "got 12", "longer text"):
        sj.data.windows(np.arange(12), 3, 4)
    with raises(ValueError, "batch", "at least 1", "got 0"):
        sj.data.windows(np.arange(12), 0, 4)


def test_padding_puts_zeros_behind_and_the_mask_tells_them_apart():
    sequences = [np.full((n, 2), n + 1.0) for n in (3, 0, 1)]
    padded, mask = sj.data.pad(sequences)
    assert padded.shape == (3, 3, 2)
    for row, valid, sequence in zip(padded, mask, sequences, strict=True):
        np.testing.assert_array_equal(row[valid], sequence)
        assert not row[~valid].any()
        assert valid.tolist() == [t < len(sequence) for t in range(3)]


def test_an_empty_sequence_leaves_tokens_whole_numbers():
    padded, mask = sj.data.pad([[1, 2], []])
    assert np.issubdtype(padded.dtype, np.integer)
    assert (padded.tolist(), mask.sum(1).tolist()) == ([[1, 2], [0, 0]], [2, 0])


def test_sequences_that_do_not_fit_together_are_refused():
    with raises(ValueError, "at least one sequence", "got none"):
        sj.data.pad([])
    with raises(ValueError, "same features", "(2, 3)", "(2, 4)"):
        sj.data.pad([np.ones((2, 3)), np.ones((2, 4))])
    with raises(ValueError, "one target per sequence", "got 1 for 2"):
        sj.data.batches([[1], [2]], [0], 1)
    with raises(ValueError, "batch", "at least 1", "got 0"):
        sj.data.batches([[1], [2]], [0, 1], 0)


def numbered(lengths):
    """Sequences of these lengths, each of which holds its own number throughout."""
    return [np.full(n, 100 + i) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(1, 5), st.none() | st.integers(0, 9))
def test_a_pass_holds_every_sequence_once_with_its_own_target_and_length(lengths, batch, seed):
    seen = {}
    for b in sj.data.batches(numbered(lengths), list(range(len(lengths))), batch, seed=seed):
        mask = np.ones(b.xs.shape, bool) if b.mask is None else b.mask
        assert len(b.targets) == len(b.xs) <= batch
        for x, valid, target in zip(b.xs, mask, b.targets, strict=True):
            assert target not in seen
            seen[int(target)] = valid.sum()
            assert (x[valid] == 100 + target).all()
            assert not x[~valid].any()
    assert seen == dict(enumerate(lengths))


def test_sequences_of_like_length_stand_together():
    lengths = np.random.default_rng(0).integers(1, 50, 64)
    spread = [np.ptp(b.mask.sum(1)) for b in sj.data.batches(numbered(lengths), lengths, 8) if b.mask is not None]
    by_hand = np.ptp(np.sort(lengths).reshape(8, 8), axis=1)
    assert sorted(spread) == sorted(by_hand[by_hand > 0])
    kept = [b.targets for b in sj.data.batches(numbered(lengths), lengths, 8, sort=False)]
    np.testing.assert_array_equal(np.concatenate(kept), lengths)


def test_a_batch_of_equal_lengths_has_no_mask():
    stream = sj.data.batches(numbered([3, 1, 1, 3, 2]), range(5), 2)
    assert [(b.xs.shape, b.mask is None) for b in stream] == [((2, 1), True), ((2, 3), False), ((1, 3), True)]


def test_the_order_comes_from_the_seed_and_changes_with_the_pass():
    def order(seed, passes=2):
        stream = sj.data.batches(numbered([4] * 30), range(30), 5, seed=seed, passes=passes)
        return [b.targets.tolist() for b in stream]

    assert order(0) == order(0) != order(1)
    assert order(0)[:6] != order(0)[6:]
    assert order(0)[:6] == order(0, passes=1)
    assert order(None)[:6] == order(None)[6:] == np.arange(30).reshape(6, 5).tolist()
    endless = sj.data.batches(numbered([4] * 30), range(30), 5, seed=0, passes=None)
    assert [b.targets.tolist() for b in itertools.islice(endless, 12)] == order(0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 4))
def test_targets_of_every_step_are_padded_as_their_sequences(lengths, batch):
    xs = numbered(lengths)
    for b in sj.data.batches(xs, [10 * x for x in xs], batch):
        np.testing.assert_array_equal(b.targets, 10 * b.xs)


def test_vectors_as_targets_of_whole_sequences_are_stacked_even_where_a_length_is_theirs():
    xs = [np.full((n, 2), n) for n in (3, 1, 3)]
    targets = [np.full(3, float(n)) for n in (3, 1, 3)]
    for b in sj.data.batches(xs, targets, 2):
        assert b.targets.shape == (len(b.xs), 3)
        np.testing.assert_array_equal(b.targets[:, 0], b.xs[:, 0, 0])


def test_a_dataset_trains_whatever_its_lengths(key):
    cell = sj.stack([sj.Embedding(200, 2), sj.VanillaRNN(2, 3)])
    model, sequences = sj.Model(cell, sj.Categorical(3, 9)), numbered([0, 0, 2, 1])
    for loss, targets in [(sj.ManyToOne(), range(4)), (sj.every_step, [x - 100 for x in sequences])]:
        fitted = sj.fit(model, sj.data.batches(sequences, targets, 2), loss=loss, key=key)
        assert (fitted.reason, len(fitted.history["loss"])) == ("stream", 2)


def random_batch(seed, mask, reset, continues):
    random = np.random.default_rng(seed)
    xs, targets = random.normal(size=(2, 4, 3)).astype(np.float32), random.integers(0, 5, (2, 4), np.int32)
    flags = [random.random((2, 4)) < 0.5 if present else None for present in (mask, reset)]
    return sj.Batch(xs, targets, *flags, continues=continues)


def assert_same(got, expected):
    assert isinstance(got, sj.Batch)
    assert got.continues is expected.continues
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans())
def test_a_batch_is_a_pytree_and_transformations_keep_its_static_field(seed, mask, reset, continues):
    batch = random_batch(seed, mask, reset, continues)
    assert len(jax.tree.leaves(batch)) == 2 + mask + reset
    assert_same(jax.tree.map(jnp.asarray, batch), batch)
    shapes = jax.eval_shape(lambda b: b, batch)
    assert (shapes.xs.shape, shapes.continues) == ((2, 4, 3), continues)
    assert_same(jax.jit(lambda b: b)(batch), batch)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), batch, batch, batch)
    assert stacked.xs.shape == (3, 2, 4, 3)
    assert_same(jax.vmap(lambda b: b)(stacked), stacked)
    np.testing.assert_array_equal(jax.vmap(lambda b: b.targets.sum())(stacked), [batch.targets.sum()] * 3)


def test_a_batch_is_put_on_devices_by_its_sequences():
    batch = random_batch(0, mask=True, reset=False, continues=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "b")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b"))
    placed = jax.device_put(batch, sharding)
    assert_same(placed, batch)
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


def test_a_jit_function_is_traced_once_per_value_of_the_static_field():
    traces = []

    @jax.jit
    def total(batch):
        traces.append(batch.continues)
        return batch.xs.sum()

    for seed in range(3):
        for continues in (False, True):
            total(random_batch(seed, mask=True, reset=True, continues=continues))
    assert traces == [False, True]


def sequences_of(lengths, features=2):
    random = np.random.default_rng(0)
    return [random.normal(size=(n, features)).astype(np.float32) for n in lengths]


@pytest.mark.parametrize("make", [sj.data.batches, lambda *a, **k: sj.data.packed(*a, window=9, **k)])
def test_skipping_batches_is_leaving_them_out(make):
    xs = sequences_of([3, 1, 4, 1, 5, 9, 2, 6])
    whole = list(itertools.islice(make(xs, xs, batch=2, seed=3, passes=None), 12))
    skipped = list(itertools.islice(make(xs, xs, batch=2, seed=3, passes=None, skip=5), 7))
    for a, b in zip(whole[5:], skipped, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=30), st.integers(1, 4), st.integers(7, 20))
def test_packed_rows_hold_every_sequence_once_and_fewer_rows_than_sequences(lengths, batch, window):
    xs = [np.full((n, 1), i) for i, n in enumerate(lengths)]
    found = list(sj.data.packed(xs, xs, batch, window, seed=0))
    valid = [np.ones(b.xs.shape[:2], bool) if b.mask is None else b.mask for b in found]
    assert all(b.xs.shape[1] == window and len(b.xs) <= batch for b in found)
    values = np.concatenate([b.xs[mask][:, 0] for b, mask in zip(found, valid, strict=True)])
    assert np.bincount(values, minlength=len(lengths)).tolist() == lengths
    # A reset stands before each step that does not continue the sequence of the step before, and nowhere else in it.
    for b, mask in zip(found, valid, strict=True):
        changes = np.diff(b.xs[..., 0], axis=1, prepend=-1) != 0
        np.testing.assert_array_equal(b.reset[mask], changes[mask])
    assert sum(len(b.xs) for b in found) <= max(1, np.ceil(2 * sum(lengths) / window))  # no two rows are half empty
    assert sj.data.padding_share(found) == pytest.approx(1 - sum(lengths) / sum(mask.size for mask in valid))


def test_packed_sequences_have_the_outputs_and_the_gradient_of_rows_of_their_own():
    xs = sequences_of([5, 3, 4, 1, 7, 2])
    ys = [x.sum(axis=1) for x in xs]
    cell = sj.GRU(2, 4)
    params = cell.init(jax.random.key(0))

    def loss(params, batches):
        total = 0.0
        for b in batches:
            _, outputs = sj.unroll(cell, params, b.xs, mask=b.mask, reset=b.reset)
            errors = (outputs.sum(axis=-1) - b.targets) ** 2
            total += jnp.sum(errors if b.mask is None else jnp.where(b.mask, errors, 0.0))
        return total

    apart = list(sj.data.batches(xs, ys, batch=6))
    together = list(sj.data.packed(xs, ys, batch=2, window=11))
    assert [b.xs.shape for b in together] == [(2, 11, 2)]
    for a, b in zip(
        *(jax.tree.leaves(jax.value_and_grad(loss)(params, way)) for way in (apart, together)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sequences_are_read_when_their_batch_is_made():
    class Source:
        """Random access, as to files on disk."""

        read = 0

        def __len__(self):
            return 6

        def __getitem__(self, i):
            self.read += 1
            return np.full((4, 1), i)

    source = Source()
    stream = sj.data.batches(source, np.arange(6), 2, sort=False)
    before = source.read
    assert next(stream).xs[:, 0, 0].tolist() == [0, 1]
    assert source.read == before + 2


def test_sequences_that_cannot_be_packed_are_refused():
    with raises(ValueError, "at most window=2 steps", "got 3 in sequence 1", "1 such"):
        sj.data.packed([[1], [1, 2, 3]], [[1], [1, 2, 3]], 1, 2)
    with raises(ValueError, "one target per step", "sj.data.batches"):
        sj.data.packed([[1], [1, 2]], [0, 1], 1, 2)
    with raises(ValueError, "window", "at least 1", "got 0"):
        sj.data.packed([[1]], [[1]], 1, 0)
    with raises(ValueError, "expected sequences (time, ...)", "number 3 in place 1"):
        sj.data.batches([[1], 3], [0, 1], 1)
    with raises(ValueError, "at most time=1 steps", "got 2"):
        sj.data.pad([[1, 2]], 1)
