"""A stream computes what `unroll` computes, in chunks of any length, and goes on in another process."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import OURS, D
from errors import raises
from oracles import drawn

import seqjax as sj

TIME = 12


class Counted:
    """A user's cell: its state has a counter, and its output is a tree."""

    input_shape = (D,)

    def init(self, key):
        return {"a": jax.random.normal(key, (D,))}

    def initial_state(self, params):
        return {"sum": jnp.zeros(D, params["a"].dtype), "steps": jnp.int32(0)}

    def step(self, params, state, x):
        total = 0.5 * state["sum"] + params["a"] * x
        return {"sum": total, "steps": state["steps"] + 1}, {"mean": total.mean(), "steps": state["steps"]}


CELLS = {
    "lstm": OURS["lstm"],
    "short": sj.GRU(D, 4, dtype="bfloat16"),
    "stack": sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 4), sj.GRU(4, 2)]),
    "counted": Counted(),
}


def case(name, batch=2):
    cell = CELLS[name]
    if name == "stack":
        return cell, cell.init(jax.random.key(0)), jnp.arange(batch * TIME).reshape(batch, TIME) % 5
    params, xs = drawn(cell, "bfloat16" if name == "short" else "float32", batch, TIME)
    return cell, params, xs


def equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", CELLS)
def test_a_stream_has_the_bits_of_unroll_for_chunks_of_the_same_length(name):
    cell, params, xs = case(name)
    many, one = sj.stream(cell, params, batch=2), sj.stream(cell, params)
    state = None
    for start, end in ((0, 5), (5, 6), (6, 11), (11, 12)):
        chunk = jax.tree.map(lambda leaf, s=start, e=end: leaf[:, s:e], xs)
        state, outputs = sj.unroll(cell, params, chunk, state=state)
        equal(many.push(chunk), outputs)
        equal(many.state, state)
        alone = jax.tree.map(lambda leaf: leaf[:1], chunk)
        before = jax.tree.map(lambda leaf: leaf[None], one.state)
        equal(one.push(alone[0]), jax.tree.map(lambda leaf: leaf[0], sj.unroll(cell, params, alone, state=before)[1]))


def test_a_step_is_a_chunk_of_one_and_compiles_once():
    cell, params, xs = case("lstm")
    steps, chunks = sj.stream(cell, params, batch=2), sj.stream(cell, params, batch=2)
    for t in range(3):
        equal(steps.step(xs[:, t]), chunks.push(xs[:, t : t + 1])[:, 0])
    compiled = steps._push._cache_size()
    steps.step(xs[:, 3])
    assert steps._push._cache_size() == compiled


@pytest.mark.parametrize("name", CELLS)
def test_a_stream_goes_on_from_bytes(name):
    cell, params, xs = case(name)
    one, other = sj.stream(cell, params, batch=2), sj.stream(cell, params, batch=2)
    one.push(xs[:, :5])
    other.from_bytes(one.to_bytes())
    equal(other.push(xs[:, 5:]), one.push(xs[:, 5:]))


def test_a_random_key_in_the_state_goes_through_bytes():
    class Noisy(Counted):
        def initial_state(self, params):
            return {"key": jax.random.key(0)}

        def step(self, params, state, x):
            key, now = jax.random.split(state["key"])
            return {"key": key}, jax.random.normal(now, ())

    cell = Noisy()
    params = cell.init(jax.random.key(1))
    one, other = (sj.stream(cell, params) for _ in range(2))
    one.step(jnp.ones(D))
    other.from_bytes(one.to_bytes())
    assert one.step(jnp.ones(D)) == other.step(jnp.ones(D))


def test_other_bytes_and_inputs_are_refused_and_leave_the_state_alone():
    cell, params, xs = case("lstm")
    stream = sj.stream(cell, params, batch=2)
    stream.push(xs)
    state = stream.state
    gru = CELLS["short"]
    others = [sj.stream(cell, params).to_bytes(), sj.stream(gru, gru.init(jax.random.key(0)), batch=2).to_bytes()]
    for data, words in ((b"nothing", "bytes of a stream's state"), (others[0], "another batch"), (others[1], "got")):
        with raises(ValueError, words):
            stream.from_bytes(data)
    with raises(ValueError, "expected"):
        stream.push(xs[:, :, :-1])
    equal(stream.state, state)
    with raises(ValueError, "batch"):
        sj.stream(cell, params, batch=0)
