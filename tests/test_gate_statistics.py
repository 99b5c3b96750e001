"""Gate statistics against closed forms and a loop in numpy: held steps never count, and NaN is never averaged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import ZOO, D, Doubled, Leaky, N
from errors import raises
from hypothesis import given, settings
from hypothesis import strategies as st

import seqjax as sj
from seqjax.analysis.gates import gate_statistics
from seqjax.cell import optional
from seqjax.sequence._declared import declared

BATCH, TIME = 3, 5


def numbers(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def random_params(cell, seed, scale):
    leaves, structure = jax.tree.flatten(jax.eval_shape(cell.init, jax.random.key(0)))
    drawn = [jnp.asarray(numbers(seed + i, *leaf.shape, scale=scale)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize(("bias", "steps"), [(0.0, 1.443), (1.0, 3.192), (5.0, 148.9)])
def test_the_forget_bias_alone_sets_the_time_that_a_unit_remembers(bias, steps, x64):
    cell = sj.LSTM(D, N, dtype="float64")
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    params = params._replace(b_h=params.b_h.at[N : 2 * N].set(bias))
    forget = gate_statistics(cell, params, np.zeros((BATCH, TIME, D)))["forget"]
    sigma = 1 / (1 + np.exp(-bias))
    assert forget.mean == pytest.approx(sigma, abs=1e-15)
    np.testing.assert_allclose(forget.time_constant, np.full(N, -1 / np.log(sigma)), rtol=1e-12)
    np.testing.assert_allclose(forget.time_constant, steps, rtol=3e-4)
    assert (forget.saturated_low, forget.saturated_high) == (0.0, float(sigma > 0.9))


def test_a_gate_of_zero_weights_stands_in_the_middle_of_its_range():
    cell = sj.stack([sj.VanillaRNN(D, 5), sj.LSTM(5, N), sj.GRU(N, 2)])
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    statistics = gate_statistics(cell, params, numbers(0, BATCH, TIME, D))
    of_lstm = {f"1/{name}" for name in ("input", "forget", "candidate", "output")}
    assert set(statistics) == of_lstm | {f"2/{name}" for name in ("reset", "update", "candidate")}
    for name, gate in statistics.items():
        signed = name.endswith("candidate")
        assert gate.mean == (0.0 if signed else 0.5)
        assert (gate.edges[0], gate.edges[-1]) == (-1.0 if signed else 0.0, 1.0)
        assert gate.histogram[10] == 1.0
        assert (gate.saturated_low, gate.saturated_high) == (0.0, 0.0)
        assert np.isnan(gate.time_constant).all() if signed else np.allclose(gate.time_constant, 1 / np.log(2))


def statistics_by_hand(cell, params, xs, mask, reset):
    """Every activation at a valid step, in lists: by gate, then by unit."""
    named = {}
    for b in range(len(xs)):
        s = cell.initial_state(params)
        for t in range(len(xs[b])):
            s = cell.initial_state(params) if reset[b, t] else s
            if mask[b, t]:
                for name, gate in cell.gates(params, s, jnp.asarray(xs[b, t])).items():
                    units = named.setdefault(name, [[] for _ in range(len(gate))])
                    for unit, value in zip(units, np.asarray(gate, float), strict=True):
                        unit.append(value)
                s, _ = cell.step(params, s, jnp.asarray(xs[b, t]))
    return named


def share(values, condition):
    return sum(map(condition, values)) / len(values)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@settings(max_examples=3)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.5, 3.0]))
def test_the_statistics_are_those_of_a_loop_over_the_valid_steps(name, seed, scale):
    cell = {"lstm": sj.LSTM(D, N), "gru": sj.GRU(D, N)}[name]
    params, random = random_params(cell, seed, scale), np.random.default_rng(seed)
    mask, reset = random.random((BATCH, TIME)) < 0.7, random.random((BATCH, TIME)) < 0.2
    mask[0, 0] = True
    xs = np.where(mask[..., None], numbers(seed, BATCH, TIME, D), np.float32(np.nan))
    got = gate_statistics(cell, params, xs, mask=mask, reset=reset)
    expected = statistics_by_hand(cell, params, xs, mask, reset)
    assert set(got) == set(expected)
    for gate, units in expected.items():
        floor, everything = -0.9 if gate == "candidate" else 0.1, [value for unit in units for value in unit]
        low = [share(unit, lambda v, floor=floor: v < floor) for unit in units]
        high = [share(unit, lambda v: v > 0.9) for unit in units]
        means = [sum(unit) / len(unit) for unit in units]
        np.testing.assert_allclose(got[gate].unit_mean, means, atol=1e-5)
        np.testing.assert_allclose(got[gate].low, low)
        np.testing.assert_allclose(got[gate].high, high)
        assert got[gate].mean == pytest.approx(sum(everything) / len(everything), abs=1e-5)
        assert got[gate].saturated_low == pytest.approx(share(everything, lambda v, floor=floor: v < floor))
        assert got[gate].saturated_high == pytest.approx(share(everything, lambda v: v > 0.9))
        assert got[gate].histogram.sum() == pytest.approx(1)
        below = 1 if gate == "candidate" else 2  # bins up to the threshold
        assert got[gate].histogram[:below].sum() == pytest.approx(got[gate].saturated_low)
        if gate != "candidate":
            np.testing.assert_allclose(got[gate].time_constant, -1 / np.log(means), rtol=1e-3)


class Switch:
    """A user's cell whose gate is its input, whatever that is."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.zeros(3)

    def step(self, params, state, x):
        return state, state

    def gates(self, params, state, x):
        return {"own": x}


def own(*steps):
    return gate_statistics(Switch(), {}, np.array([steps], np.float32))["own"]


def test_a_user_s_gate_at_its_ends_lasts_no_step_or_for_ever():
    gate = own([0, 1, 0.5], [0, 1, 0.25])
    np.testing.assert_allclose(gate.time_constant, [0, np.inf, -1 / np.log(0.375)])
    assert (gate.low.tolist(), gate.high.tolist()) == ([1, 0, 0], [0, 1, 0])


def test_what_lies_outside_the_range_counts_in_the_outermost_bin_and_has_no_time():
    gate = own([0.5, 2, 0.3])
    assert gate.histogram[-1] == pytest.approx(1 / 3)
    assert np.isnan(gate.time_constant).tolist() == [False, True, False]
    gate = own([-0.95, 0.95, 0.0], [0.5, 0.95, -7.0])
    assert (gate.edges[0], gate.histogram[0], gate.saturated_low) == (-1, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert gate.high.tolist() == [0, 1, 0]
    assert np.isnan(gate.time_constant).all()


def test_what_cannot_be_counted_is_refused():
    cell = sj.LSTM(D, N)
    params, xs = cell.init(jax.random.key(0)), numbers(0, BATCH, TIME, D)
    xs[1, 3, 0] = np.nan
    with raises(ValueError, "expected finite gates", "'candidate'", "sequence 1 at step 3", "params"):
        gate_statistics(cell, params, xs)
    with raises(ValueError, "at least one valid step, got none"):
        gate_statistics(cell, params, xs, mask=np.zeros((BATCH, TIME), bool))
    with raises(TypeError, "names its gates", "got Leaky"):
        gate_statistics(Leaky(), Leaky().init(jax.random.key(0)), xs)


LSTM_ROLES = {"input": "writes", "forget": "keeps", "candidate": "candidate", "output": "reads"}
GRU_ROLES = {"reset": "reads", "update": "keeps", "candidate": "candidate"}
DECLARED = {
    "lstm": (sj.LSTM(D, N), LSTM_ROLES),
    **{
        f"gru {reset} {update}": (sj.GRU(D, N, reset, update), GRU_ROLES | {"update": role})
        for reset in ("after", "before")
        for update, role in (("keeps", "keeps"), ("writes", "replaces"))
    },
    "learned state": (sj.LearnedState(sj.LSTM(D, N)), LSTM_ROLES),
    "stack": (
        sj.stack([sj.VanillaRNN(D, 5), sj.LearnedState(sj.LSTM(5, N)), sj.GRU(N, 2)]),
        {f"1/{name}": role for name, role in LSTM_ROLES.items()}
        | {f"2/{name}": role for name, role in GRU_ROLES.items()},
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_every_gate_has_a_role_by_the_same_name(name, key):
    cell, roles = DECLARED[name]
    params = cell.init(key)
    gates = cell.gates(params, cell.initial_state(params), jnp.ones(D))
    assert cell.gate_roles == roles
    assert set(gates) == set(roles)


@pytest.mark.parametrize("name", [name for name in DECLARED if name.startswith(("lstm", "gru"))])
def test_roles_and_memory_describe_the_step(name, key):
    cell, roles = DECLARED[name]
    params = random_params(cell, 0, 1.0)
    state = jax.tree.map(lambda leaf: leaf + 0.5, cell.initial_state(params))
    gates = cell.gates(params, state, jnp.ones(D))
    new, _ = cell.step(params, state, jnp.ones(D))
    of = {role: gates[gate] for gate, role in roles.items()}
    keep = of["keeps"] if "keeps" in of else 1 - of["replaces"]
    write = of.get("writes", of.get("replaces", 1 - keep))
    expected = keep * getattr(state, cell.memory) + write * of["candidate"]
    np.testing.assert_allclose(getattr(new, cell.memory), expected, rtol=1e-5, atol=1e-6)


class Mistaken(Switch):
    """A user's cell with a mistake inside its properties."""

    @property
    def input_shape(self):
        return (self.featurs,)

    @property
    def gates(self):
        return self.gate_functon

    @property
    def noise(self):
        raise AttributeError("a mistake in noise")

    @property
    def gate_roles(self):
        return {"own": self.rol}


WRAPPED = {
    "cell": Mistaken(),
    "stack": sj.stack([Mistaken(), Switch()]),
    "learned state": sj.LearnedState(Mistaken()),
    "stack in a learned state": sj.LearnedState(sj.stack([Mistaken(), Switch()])),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize(("part", "mistake"), [("gates", "gate_functon"), ("noise", "mistake"), ("gate_roles", "rol")])
def test_a_mistake_inside_a_property_of_a_user_s_cell_is_reported(name, part, mistake):
    with pytest.raises(AttributeError, match=mistake):
        optional(WRAPPED[name], part)


def test_a_mistake_inside_input_shape_is_reported():
    for cell in (Mistaken(), sj.LearnedState(Mistaken())):
        with pytest.raises(AttributeError, match="featurs"):
            sj.unroll(cell, cell.init(jax.random.key(0)), jnp.ones((1, 2, 3)))
    with pytest.raises(AttributeError, match="featurs"):
        sj.stack([sj.VanillaRNN(D, 3), Mistaken()])


def test_wrappers_have_the_optional_parts_of_their_cells_only():
    plain = (sj.stack([sj.VanillaRNN(D, N)]), sj.LearnedState(sj.VanillaRNN(D, N)))
    for cell in (*plain, sj.LearnedState(plain[0]), sj.stack([plain[1]])):
        assert [optional(cell, part) for part in ("gates", "gate_roles", "noise", "memory")] == [None] * 4
        assert not any(hasattr(cell, part) for part in ("gates", "gate_roles", "noise"))
        assert optional(cell, "input_shape") == (D,)


class Twice(sj.GRU):
    """Reads its input twice as large, so the gates of the GRU are not those of this step."""

    def step(self, params, state, x):
        return super().step(params, state, 2 * x)


class Opposite(sj.LSTM):
    """Keeps 1 - f of the old state: the same gates in another role."""

    def step(self, params, state, x):
        i, f, g, o = sj.lstm_gates(params, state, x)
        c = (1 - f) * state.c + i * g
        h = o * jnp.tanh(c)
        return sj.LSTMState(h, c), h


class Checkpointed(sj.GRU):
    """The same step with another derivative."""

    def step(self, params, state, x):
        return jax.checkpoint(super().step)(params, state, x)


class Named(Twice):
    """Declares the gates of its own step, but not their roles."""

    def step(self, params, state, x):
        return super().step(params, state, x)

    def gates(self, params, state, x):
        return super().gates(params, state, 2 * x)


@pytest.mark.parametrize(
    "cell", [Twice(D, N), Opposite(D, N), ZOO["residual-stack"]], ids=lambda cell: type(cell).__name__
)
def test_gates_of_a_base_class_are_refused_for_another_step(cell, key):
    name = type(cell).__name__
    for wrapped in (cell, sj.LearnedState(cell), sj.stack([sj.GRU(D, D), cell])):
        params, xs = wrapped.init(key), jnp.ones((1, 2, D))
        for call in (sj.gates, gate_statistics):
            with raises(TypeError, f"expected {name} to define gates beside its own step", f"in {name}"):
                call(wrapped, params, xs)
        assert [declared(wrapped, part) for part in ("gates", "gate_roles", "memory")] == [None] * 3


@pytest.mark.parametrize("cell", [Doubled(D, N), Checkpointed(D, N)], ids=lambda cell: type(cell).__name__)
def test_gates_of_a_base_class_hold_if_the_step_computes_the_same_state(cell, key):
    base = type(cell).__mro__[1](D, N)
    params, xs = cell.init(key), numbers(0, BATCH, TIME, D)
    jax.tree.map(np.testing.assert_array_equal, sj.gates(cell, params, xs), sj.gates(base, params, xs))
    assert declared(cell, "gate_roles") == base.gate_roles
    assert declared(cell, "memory") == base.memory


def test_gates_that_a_subclass_declares_are_those_of_its_step(key):
    cell = Named(D, N)
    params, xs = cell.init(key), numbers(0, BATCH, TIME, D)
    expected = sj.gates(sj.GRU(D, N), params, 2 * xs)["update"]
    assert float(jnp.abs(sj.gates(sj.GRU(D, N), params, xs)["update"][:, 0] - expected[:, 0]).max()) > 0.05
    np.testing.assert_allclose(sj.gates(cell, params, xs)["update"], expected, atol=1e-6)
    assert declared(cell, "gate_roles") is None
