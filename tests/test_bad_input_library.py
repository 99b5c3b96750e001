"""Bad input to cells and sequence calls is refused with what was expected, what came and the likely fix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from cells import D, Leaky, N
from errors import raises

import seqjax as sj

CELL = sj.LSTM(D, N)
PARAMS = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(CELL.init, jax.random.key(0)))
XS = jnp.zeros((2, 5, D))
STATE = sj.LSTMState(jnp.zeros((2, N)), jnp.zeros((2, N)))
ON = jnp.ones((2, 5), bool)
VERBS = {
    "unroll": lambda *a, **k: sj.unroll(CELL, *a, **k),
    "trajectory": lambda *a, **k: sj.trajectory(CELL, *a, **k),
    "gates": lambda *a, **k: sj.gates(CELL, *a, **k),
    "state_gradients": lambda *a, **k: sj.state_gradients(CELL, *a, jnp.sum, **k),
    "weight_gradients_by_step": lambda *a, **k: sj.weight_gradients_by_step(CELL, *a, jnp.sum, **k),
    "truncated_grad": lambda *a, **k: sj.truncated_grad(CELL, *a, jnp.sum, 2, **k),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("xs", "fix"),
    [
        (jnp.zeros((5, D)), "add the missing axis, xs[None] for one sequence or xs[:, None] for one time step"),
        (jnp.zeros(D), "add a batch and a time axis, xs[None, None]"),
        (jnp.zeros((2, 5)), "add a feature axis, xs[..., None], or look tokens up with sj.Embedding"),
        (jnp.zeros((2, 5, D + 1)), "the cell is LSTM(input_size=3"),
        (jnp.zeros((2, 5, D, 1)), "the cell is LSTM(input_size=3"),
    ],
    ids=lambda value: str(value.shape) if hasattr(value, "shape") else "",
)
def test_inputs_of_another_shape(verb, xs, fix):
    with raises(ValueError, "expected xs (batch, time, 3)", f"got {xs.shape}", fix):
        VERBS[verb](PARAMS, xs)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["mask", "reset"])
def test_flags_of_another_shape_or_type(verb, name):
    run = VERBS[verb]
    for flags in (jnp.ones((3, 5), bool), jnp.ones((2, 4), bool), jnp.ones(5, bool), jnp.ones((2, 5, 1), bool)):
        with raises(ValueError, f"expected {name} (batch, time) = (2, 5) as in xs", f"got {flags.shape}"):
            run(PARAMS, XS, **{name: flags})
    for flags, fix in ((ON.astype(int), f"{name} != 0"), (ON.astype(float), "sj.length_mask(lengths, time)")):
        with raises(TypeError, f"expected a boolean {name}, got {flags.dtype}", fix):
            run(PARAMS, XS, **{name: flags})


@pytest.mark.parametrize("verb", VERBS)
def test_states_of_another_structure_batch_or_type(verb):
    run = VERBS[verb]
    with raises(ValueError, "expected a state of LSTM", "LSTMState", "got PyTreeDef(*)", "pass the final state"):
        run(PARAMS, XS, state=STATE.h)
    with raises(ValueError, "expected state.c (batch, ...) = (2, 4) as in xs, got (3, 4)", "a state of its own"):
        run(PARAMS, XS, state=sj.LSTMState(STATE.h, jnp.zeros((3, N))))
    with raises(ValueError, "expected state.h (batch, ...) = (2, 4) as in xs, got (4,)"):
        run(PARAMS, XS, state=sj.LSTMState(jnp.zeros(N), STATE.c))
    with raises(TypeError, "expected state.h of the parameters' dtype float32, got bfloat16", "state.h.astype("):
        run(PARAMS, XS, state=sj.LSTMState(STATE.h.astype("bfloat16"), STATE.c))


def test_inputs_that_are_not_one_array():
    with raises(ValueError, "got no array", "xs of shape (batch, time, 0)"):
        sj.unroll(Leaky(), {}, ())
    cell = type("Free", (Leaky,), {"input_shape": None})()
    with raises(ValueError, "expected one (batch, time) for every leaf of xs, got [(2, 4), (2, 5)]", "in step"):
        sj.unroll(cell, {}, {"a": XS, "b": XS[:, :4]})
    with raises(ValueError, "expected xs['a'] (batch, time, ...), got (2,)", "add the missing axis"):
        sj.unroll(cell, {}, {"a": jnp.zeros(2), "b": XS})


@pytest.mark.parametrize(
    ("cell", "name"), [(sj.VanillaRNN(D, N), "VanillaRNN"), (sj.LSTM(D, N), "LSTM"), (sj.GRU(D, N), "GRU")]
)
def test_a_step_over_a_batch_or_over_whole_numbers(cell, name, key):
    params = cell.init(key)
    state = cell.initial_state(params)
    with raises(ValueError, f"expected one example at one time, x (3,), in {name}.step", "got (2, 3)", "sj.unroll"):
        cell.step(params, state, jnp.zeros((2, D)))
    with raises(TypeError, f"expected floating-point x in {name}.step, got int32", "x.astype(float)", "sj.Embedding"):
        sj.unroll(cell, params, jnp.zeros((2, 5, D), "int32"))


def test_tokens_that_are_not_whole_numbers(key):
    cell = sj.Embedding(5, D)
    with raises(TypeError, "expected whole-number tokens in Embedding.step, got float32", "x.astype(int)"):
        sj.unroll(cell, cell.init(key), jnp.zeros((2, 5)))


@pytest.mark.parametrize(
    ("new", "parts"),
    [
        (lambda s: {**s, "a": s["a"][:2]}, ("keep the type of its state['a'], float32[4], got float32[2]", "cast it")),
        (lambda s: {**s, "b": s["b"].astype("bfloat16")}, ("state['b'], float32[4], got bfloat16[4]", "cast it")),
        (lambda s: {"a": s["a"]}, ("return a state of the structure that it got", "return (new_state, output)")),
        (lambda s: s["a"], ("return a state of the structure that it got", "in this order")),
    ],
    ids=["shape", "dtype", "lost leaf", "output first"],
)
def test_a_step_that_changes_its_state(new, parts):
    class Broken(Leaky):
        def initial_state(self, params):
            return {"a": jnp.zeros(N), "b": jnp.zeros(N)}

        def step(self, params, state, x):
            return new(state), x

    params = Leaky().init(jax.random.key(0))
    with raises(TypeError, "expected Broken.step to", *parts):
        sj.unroll(Broken(), params, XS)
    with raises(TypeError, "expected Broken.step to", *parts):
        sj.unroll(sj.stack([Broken()]), (params,), XS, mask=ON)


def test_a_step_that_returns_no_pair():
    class StateAlone(Leaky):
        def step(self, params, h, x):
            return h

    with raises(TypeError, "expected StateAlone.step to return (new_state, output)"):
        sj.unroll(StateAlone(), Leaky().init(jax.random.key(0)), XS)


@pytest.mark.parametrize("make", [sj.VanillaRNN, sj.LSTM, sj.GRU, sj.Embedding])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3", None])
def test_sizes_that_are_no_sizes(make, size):
    for sizes in ((size, 3), (3, size)):
        with raises(ValueError, f"expected {make.__name__}", "to be a whole number of at least 1", f"got {size!r}"):
            make(*sizes)


def test_options_that_do_not_exist():
    with raises(ValueError, "activation to be one of tanh, relu, identity", "got 'sigmoid'"):
        sj.VanillaRNN(D, N, activation="sigmoid")
    with raises(ValueError, "expected GRU reset to be one of after, before", "got 'during'"):
        sj.GRU(D, N, reset="during")
    with raises(ValueError, "expected GRU update to be one of keeps, writes", "got 'new'"):
        sj.GRU(D, N, update="new")
    for make in (sj.LSTM, sj.GRU):
        with raises(ValueError, f"expected {make.__name__} chrono", "at least 3 steps", "got 2"):
            make(D, N, chrono=2)
        with raises(TypeError, f"expected {make.__name__} dtype to be floating-point, got int32", "use float32"):
            make(D, N, dtype="int32")
    with raises(ValueError, "expected a square matrix for a spectral radius, got (4, 3)", "use it for W_hh"):
        sj.VanillaRNN(D, N, input_init=sj.SpectralRadius()).init(jax.random.key(0))


def test_stacks_that_do_not_fit():
    with raises(ValueError, "expected at least one cell in a stack, got none", "stack([LSTM(8, 64)])"):
        sj.stack([])
    with raises(TypeError, "expected cells in a stack, got int as entry 1", "init, initial_state and step"):
        sj.stack([CELL, 3])


def test_a_class_is_not_a_cell():
    with raises(TypeError, "expected cells in a stack, got", "LSTM", "as entry 0"):
        sj.stack([sj.LSTM])


@pytest.mark.parametrize(
    ("cells", "gives"),
    [
        ([sj.LSTM(D, 5), sj.GRU(N, N)], 5),
        ([CELL, sj.LearnedState(sj.LSTM(5, N))], 4),
        ([sj.LearnedState(sj.VanillaRNN(D, 5)), CELL], 5),
        ([sj.Embedding(9, 5), CELL], 5),
        ([sj.stack([sj.GRU(9, D), sj.LSTM(D, 5)]), CELL], 5),
    ],
    ids=["lstm", "above learned", "below learned", "embedding", "stack in a stack"],
)
def test_layers_that_do_not_fit(cells, gives):
    with raises(ValueError, f"layer 1 of the stack to read the {gives} features that layer 0 gives", "input_size"):
        sj.stack(cells)


@pytest.mark.parametrize("window", [0, -3, 1.5, True, None])
def test_windows_that_are_none(window):
    with raises(ValueError, f"expected a window of at least 1 step, got {window!r}", "window=1 is no recurrence"):
        sj.truncated_grad(CELL, PARAMS, XS, jnp.sum, window)


def test_a_state_that_has_no_gradient():
    class Counts(Leaky):
        def initial_state(self, params):
            return {"n": jnp.zeros((), int)}

        def step(self, params, state, x):
            return {"n": state["n"] + 1}, x

    params = Leaky().init(jax.random.key(0))
    with raises(TypeError, "expected a floating-point state", "got int32 in Counts's state['n']", "as an input"):
        sj.state_gradients(Counts(), params, XS, jnp.sum)


def test_gates_of_a_cell_that_names_none(key):
    for cell in (sj.VanillaRNN(D, N), sj.stack([sj.VanillaRNN(D, N)]), sj.LearnedState(sj.VanillaRNN(D, N)), Leaky()):
        with raises(TypeError, f"names its gates, got {type(cell).__name__}", "gates(params, state, x)"):
            sj.gates(cell, {}, XS)


def test_lengths_that_do_not_fit():
    with raises(ValueError, "expected lengths from 0 to time = 3, got 1 to 4"):
        sj.length_mask(jnp.array([1, 4]), 3)
    with raises(ValueError, "expected lengths from 0 to time = 3, got -1 to 2"):
        sj.length_mask(jnp.array([-1, 2]), 3)
    with raises(ValueError, "expected lengths (batch,), got (2, 1)", "one length for each sequence"):
        sj.length_mask(jnp.array([[1], [2]]), 3)
    with raises(TypeError, "expected whole-number lengths, got float32", "lengths.astype(int)"):
        sj.length_mask(jnp.array([1.0]), 3)


@pytest.mark.parametrize("pool", [sj.last_valid, sj.masked_mean, sj.masked_max])
def test_pooling_over_something_else(pool):
    with raises(ValueError, "expected mask (batch, time) = (2, 5)", "got (3, 5)"):
        pool(XS, jnp.ones((3, 5), bool))
    with raises(TypeError, "expected a boolean mask, got int32"):
        pool(XS, ON.astype("int32"))
    with raises(ValueError, "expected outputs (batch, time, ...)", "got (2,)"):
        pool(jnp.zeros(2))
