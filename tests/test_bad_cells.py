"""Cells, parameters and steps that cannot work are refused in one sentence that names the cell and the user's line."""

from __future__ import annotations

import contextlib
import inspect
import os

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cells import OURS, D, Leaky, N, Readout, Sized
from errors import raises
from flax import nnx
from jax.experimental import io_callback

import seqjax as sj
from seqjax.sequence._parameter_checks import check_params
from seqjax.sequence._step_errors import check_effects, errors_of_step, explain_step_error, user_line

XS = jnp.zeros((2, 5, D))
LSTM = sj.LSTM(D, N)


def zeros(cell, dtype=None):
    """The parameters of a cell without a compilation."""
    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype or leaf.dtype), shapes)


PARAMS = zeros(LSTM)
CALLS = {
    "unroll": lambda cell, params, xs: sj.unroll(cell, params, xs),
    "trajectory": lambda cell, params, xs: sj.trajectory(cell, params, xs),
    "state_gradients": lambda cell, params, xs: sj.state_gradients(cell, params, xs, jnp.sum),
    "unroll_parallel": lambda cell, params, xs: sj.unroll_parallel(cell, params, xs),
    "gradient_by_lag": lambda cell, params, xs: sj.gradient_by_lag(cell, params, xs),
}
METHODS = "expected a cell, an object with the methods init, initial_state and step"


class HasNoStep:
    init, initial_state = Leaky.init, Leaky.initial_state


def a_step(params, state, x):
    return state, x


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        (sj.LSTM, ("got the class LSTM", "LSTM(...) builds one")),
        (HasNoStep, ("got the class HasNoStep", "build a cell")),
        (HasNoStep(), ("got HasNoStep without step", "add the missing methods")),
        (a_step, ("got the function a_step", "the step of a class that also has init and initial_state")),
        (None, ("got NoneType without init, initial_state, step",)),
        (sj.Model(LSTM, sj.Categorical(N, 2)), ("got Model", "pass model.cell with params.cell")),
        (nn.LSTMCell(N), ("got LSTMCell", "sj.from_linen makes a cell of it")),
        (nnx.LSTMCell, ("got the class LSTMCell", "sj.from_nnx makes a cell of it")),
        (eqx.nn.GRUCell, ("got the class GRUCell", "sj.from_equinox makes a cell of it")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else getattr(value, "__name__", type(value).__name__),
)
def test_what_is_not_a_cell(call, cell, parts):
    with raises(TypeError, METHODS, *parts):
        CALLS[call](cell, PARAMS, XS)


@pytest.mark.parametrize("call", CALLS)
def test_arguments_in_another_order(call):
    for params in (PARAMS, {"W": jnp.zeros(3)}, ()):
        with raises(TypeError, METHODS, f"got {type(params).__name__}", "the order of the arguments is (cell, params"):
            CALLS[call](params, LSTM, XS)
    with raises(TypeError, "expected params of LSTM(input_size=3", "the order of the arguments is (cell, params, xs)"):
        CALLS[call](LSTM, LSTM, XS)


def test_a_class_whose_methods_need_no_object_is_a_cell():
    class Sums:
        init = staticmethod(lambda key: {})
        initial_state = staticmethod(lambda params: jnp.zeros(()))
        step = staticmethod(lambda params, state, x: (state + x, state + x))

    assert sj.unroll(Sums, {}, jnp.ones((1, 3)))[1].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("params", "kind", "parts"),
    [
        (zeros(sj.LSTM(D, 5)), ValueError, ("params.W_xh (16, 3)", "got (20, 3)", "cell.init(key)")),
        (zeros(sj.LSTM(4, N)), ValueError, ("params.W_xh (16, 3)", "got (16, 4)", "cell.init(key)")),
        (zeros(sj.GRU(D, N)), TypeError, ("LSTMParams(W_xh=(16, 3)", "got GRUParams(W_xh=(12, 3)", "cell.init(key)")),
        (PARAMS._asdict(), TypeError, ("LSTMParams(W_xh=(16, 3)", "got {'W_hh': (16, 4)", "LSTMParams(**params)")),
        (tuple(PARAMS), TypeError, ("LSTMParams(W_xh=(16, 3)", "got ((16, 3), (16, 4)", "LSTMParams(*params)")),
        (PARAMS[:2], TypeError, ("LSTMParams(W_xh=(16, 3)", "got ((16, 3), (16, 4))", "cell.init(key)")),
        (PARAMS.W_xh, TypeError, ("LSTMParams(W_xh=(16, 3)", "got an array (16, 3)")),
        (sj.ModelParams(PARAMS, ()), TypeError, ("LSTMParams(W_xh=(16, 3)", "got ModelParams(", "pass params.cell")),
        (PARAMS._replace(W_xh=PARAMS.W_xh.T), ValueError, ("params.W_xh (16, 3)", "got (3, 16)", "params.W_xh.T")),
        (PARAMS._replace(W_hh=PARAMS.W_hh.T), ValueError, ("params.W_hh (16, 4)", "got (4, 16)", "params.W_hh.T")),
        (
            PARAMS._replace(b_h=jnp.zeros(1)),
            ValueError,
            ("params.b_h (16,)", "got (1,)", "jnp.broadcast_to(params.b_h"),
        ),
        (PARAMS._replace(b_h=jnp.zeros(())), ValueError, ("params.b_h (16,)", "got ()", "jnp.broadcast_to")),
        (PARAMS._replace(b_h=0.0), ValueError, ("params.b_h (16,)", "got ()", "jnp.broadcast_to")),
        (PARAMS._replace(b_h=None), ValueError, ("params.b_h (16,)", "got None", "cell.init(key)")),
        (PARAMS._replace(b_h={"b": PARAMS.b_h}), TypeError, ("b_h=(16,)", "b_h={'b': (16,)}")),
    ],
    ids=range(15),
)
def test_parameters_of_something_else(call, params, kind, parts):
    with raises(kind, "expected params", "LSTM(input_size=3, hidden_size=4)", *parts):
        CALLS[call](LSTM, params, XS)


def test_parameters_of_the_other_cells():
    gru, before = sj.GRU(D, N), sj.GRU(D, N, reset="before")
    with raises(TypeError, "expected params of GRU(input_size=3", "got LSTMParams("):
        check_params(gru, PARAMS)
    with raises(ValueError, "expected params.b_hn None for GRU(", "got (4,)"):
        check_params(before, zeros(gru))
    with raises(ValueError, "expected params.E (7, 3) for Embedding(vocabulary=7, features=3)", "got (3, 7)", ".E.T"):
        check_params(sj.Embedding(7, 3), sj.EmbeddingParams(jnp.zeros((3, 7))))
    with raises(ValueError, "expected params.W_hh (4, 4) for VanillaRNN", "got (4, 5)"):
        check_params(sj.VanillaRNN(D, N), zeros(sj.VanillaRNN(D, N))._replace(W_hh=jnp.zeros((4, 5))))
    with raises(TypeError, "expected params of Dropout(features=3), (), got LSTMParams("):
        check_params(sj.Dropout(D), PARAMS)


def test_parameters_inside_a_stack_and_a_learned_state():
    cell = sj.stack([sj.LSTM(D, 5), sj.LearnedState(sj.GRU(5, N))])
    first, second = params = zeros(cell)
    with raises(ValueError, "expected params with one entry per layer, 2, got 1"):
        sj.unroll(cell, (first,), XS)
    with raises(TypeError, "expected params of Stack, a tuple of the parameters of 2 layers, got {'a': "):
        sj.unroll(cell, {"a": first, "b": second}, XS)
    with raises(TypeError, "expected params of Stack", "got ModelParams(", "pass params.cell"):
        sj.unroll(cell, sj.ModelParams(params, ()), XS)
    with raises(TypeError, "expected params[0] of LSTM(input_size=3, hidden_size=5)", "got LearnedStateParams("):
        sj.unroll(cell, (second, first), XS)
    with raises(ValueError, "expected params[1].cell.b_h (12,) for GRU(input_size=5, hidden_size=4)", "got (1,)"):
        sj.unroll(cell, (first, second._replace(cell=second.cell._replace(b_h=jnp.zeros(1)))), XS)
    with raises(ValueError, "expected params[1].state.h (4,) for LearnedState", "got (1,)", "broadcast_to"):
        sj.unroll(cell, (first, second._replace(state=sj.GRUState(jnp.zeros(1)))), XS)
    with raises(TypeError, "expected params[1] of LearnedState, LearnedStateParams(cell, state), got GRUParams("):
        sj.unroll(cell, (first, second.cell), XS)


def test_parameters_that_fit_in_every_form():
    for cell in [*OURS.values(), sj.Embedding(7, D), sj.Dropout(D)]:
        params = zeros(cell)
        check_params(cell, params)
        check_params(cell, jax.eval_shape(lambda p: p, params))
        check_params(cell, jax.tree.map(np.asarray, zeros(cell, "float16")))
        many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params)
        jax.eval_shape(jax.vmap(lambda p, cell=cell: check_params(cell, p), axis_size=2), many)
        jax.eval_shape(jax.grad(lambda p, cell=cell: check_params(cell, p) or 0.0), params)
    gru = sj.GRU(D, N)
    check_params(gru, zeros(gru)._replace(b_hn=None))
    check_params(sj.stack([LSTM, gru.__class__(N, N)]), [PARAMS, zeros(sj.GRU(N, N))])
    check_params(sj.Dropout(D), None)


def test_a_cell_of_the_user_decides_for_itself():
    class Scaled(sj.LSTM):
        def init(self, key):
            return super().init(key), 1.0

        def initial_state(self, params):
            return super().initial_state(params[0])

        def step(self, params, state, x):
            return super().step(params[0], state, x)

    check_params(Scaled(D, N), (PARAMS, 2.0))
    check_params(sj.stack([Scaled(D, N)]), ((PARAMS, 2.0, "more"),))
    check_params(Leaky(), {"anything": None})
    check_params(sj.LearnedState(Leaky()), sj.LearnedStateParams({}, jnp.zeros(9)))
    check_params(sj.LSTM(D, N, input_init=lambda key, shape, dtype: np.asarray(key)), "not drawn under a trace")


def test_integer_parameters_are_refused_and_every_precision_passes():
    for wrong in ("int32", "bool", "complex64"):
        with raises(TypeError, "expected floating-point params.W_hh for LSTM(input_size=3", f"got {wrong}"):
            check_params(LSTM, PARAMS._replace(W_hh=PARAMS.W_hh.astype(wrong)))
    for right in ("float16", "bfloat16", "float64"):
        check_params(LSTM, jax.tree.map(lambda leaf, right=right: np.asarray(leaf).astype(jnp.dtype(right)), PARAMS))


def test_parameters_of_a_subclass_with_the_methods_of_its_base():
    class Mine(sj.GRU):
        """Adds nothing to the methods of a cell."""

    with raises(ValueError, "expected params.W_xh (12, 3) for Mine(input_size=3, hidden_size=4)", "got (15, 3)"):
        sj.unroll(Mine(D, N), zeros(sj.GRU(D, 5)), XS)
    check_params(Mine(D, N), zeros(sj.GRU(D, N)))


def test_parameters_that_contradict_a_size_that_a_cell_of_the_user_declares():
    cell, other = Readout(D, N), Readout(D, 5)
    for call in (sj.unroll, sj.trajectory, sj.analysis.step_jacobians):
        with raises(
            ValueError,
            "['U'] (4, 3) for FromParams(input_size=3, hidden_size=4) with a state (4,)",
            "got (5, 3) with a",
        ):
            call(FromParams(D, N), FromParams(D, 5).init(jax.random.key(0)), XS)
    check_params(
        cell, other.init(jax.random.key(0))
    )  # its state does not follow the parameters, so its step reports it
    low_rank = LowRank(D, N)
    check_params(low_rank, low_rank.init(jax.random.key(0)) | {"A": jnp.zeros((N, 2)), "B": jnp.zeros((2, N))})


class FromParams(Sized):
    """The size of the state is that of the parameters."""

    def initial_state(self, params):
        return self.zeros(params, params["W"].shape[0])

    def step(self, params, h, x):
        h = jnp.tanh(params["W"] @ h + params["U"] @ x)
        return h, h


class LowRank(FromParams):
    """The rank of the recurrent matrix is that of the parameters, and no size of the cell."""

    def shapes(self, d, n):
        return {"A": (n, 1), "B": (1, n), "W": (n, n), "U": (n, d)}


class HasNoHash:
    __hash__ = None

    def __call__(self, key, shape, dtype):
        return jnp.zeros(shape, dtype)


def test_an_initializer_without_a_hash():
    cell = sj.LSTM(D, N, input_init=HasNoHash())
    check_params(cell, PARAMS)
    with raises(ValueError, "expected params.b_h (16,)", "got (1,)"):
        check_params(cell, PARAMS._replace(b_h=jnp.zeros(1)))


def test_inputs_with_one_axis_more():
    for cell, xs in ((LSTM, jnp.zeros((7, 2, 5, D))), (sj.Embedding(9, D), jnp.zeros((7, 2, 5), int))):
        fix = "jax.vmap adds a second batch axis, jax.vmap(lambda xs: sj.unroll(cell, params, xs))(xs)"
        with raises(ValueError, "expected xs (batch, time", f"got {xs.shape}", fix):
            sj.unroll(cell, zeros(cell), xs)


@contextlib.contextmanager
def unchecked():
    """The annotations are not checked, as for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("rate", [0, 0.0, np.float32(0), np.int64(0)])
def test_dropout_that_drops_nothing(rate, key):
    xs = jnp.arange(24.0).reshape(2, 3, 4)
    with unchecked():
        cell = sj.Dropout(4, rate)
    assert cell == sj.Dropout(4, 0.0)
    assert type(cell.rate) is float
    outputs = jax.jit(lambda xs: sj.unroll(cell, (), xs, key=key)[1])(xs)
    assert outputs.tolist() == xs.tolist()


def test_dropout_rates():
    with unchecked():
        assert sj.Dropout(4, np.float64(0.5)) == sj.Dropout(4, jnp.asarray(0.5)) == sj.Dropout(4)
    for rate in (1, -1, np.float32(1.5), float("nan")):
        with raises(ValueError, "expected Dropout rate from 0 to below 1, got"):
            sj.Dropout(4, rate)
    for rate in ("0.5", None, True, False, [0.5, 0.5]):
        with raises(TypeError, f"expected Dropout rate as a number from 0 to below 1, got {rate!r}"):
            sj.Dropout(4, rate)


class Rotates:
    """A complex cell, s_t = p s_{t-1} + x_t."""

    input_shape = (N,)

    def init(self, key):
        return {"p": jnp.asarray(np.exp(1j * np.arange(N)), "complex64")}

    def initial_state(self, params):
        return jnp.zeros_like(params["p"])

    def step(self, params, state, x):
        state = params["p"] * state + x.astype(state.dtype)
        return state, state


class KnowsThatItIsTraced(Rotates):
    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return state, output + 1j if isinstance(state, jax.core.Tracer) else output


class LosesItsImaginaryPart(Rotates):
    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return state.real, output


class HasNoImaginaryGradient(Rotates):
    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return state, jax.lax.complex(output.real, jnp.sqrt(params["p"].imag * 0))


def test_a_complex_cell():
    for x in (jnp.ones(N), jnp.ones(N, "complex64")):
        assert sj.testing.check_cell(Rotates(), x)[-1] == "has finite gradients"


@pytest.mark.parametrize("x", [jnp.ones(N), jnp.ones(N, "complex64")], ids=["real", "complex"])
@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (KnowsThatItIsTraced(), "expected the loop's output at row 0, time 0"),
        (LosesItsImaginaryPart(), "expected the new state to have the type of the old one"),
        (HasNoImaginaryGradient(), "expected finite gradients at the initial state"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_complex_cell_that_is_wrong_in_its_imaginary_part(cell, reason, x):
    with raises(AssertionError, reason):
        sj.testing.check_cell(cell, x)


def test_numbers_that_differ_in_their_imaginary_part_are_not_close():
    one = jnp.ones(2, "complex64")
    assert sj.testing._close(one, one + 0j)
    assert not sj.testing._close(one, one + 1j)
    assert not sj.testing._close(one.real, one + 1j)
    xs = sj.testing._sequence(one)
    assert len({complex(x) for x in xs[..., 0].ravel()}) == xs[..., 0].size
    spoilt = sj.testing._fill_padding(xs, jnp.zeros(xs.shape[:2], bool))
    assert bool(jnp.isnan(spoilt.real).all() & jnp.isnan(spoilt.imag).all())


def line_of(function, number=1):
    """A line of a function of this file, as a message names it."""
    return f"{os.path.basename(__file__)}:{inspect.getsourcelines(function)[1] + number}"


def trace(cell, params=None, x=None):
    """What a sequence call does with a cell, with its errors explained."""
    params, x = cell.init(jax.random.key(0)) if params is None else params, jnp.zeros(D) if x is None else x
    with errors_of_step(cell, params, x):
        return jax.make_jaxpr(lambda *args: cell.step(*args))(params, jnp.zeros(N), x)


class Broken(Leaky):
    def step(self, params, h, x):
        h = self.bad(params, h, x)  # here
        return h, h


class ConcatenatesAlongFeatures(Broken):
    def bad(self, params, h, x):
        return jnp.concatenate([h, x], axis=1)[:, :N]


class WritesTheBatchOut(Broken):
    def bad(self, params, h, x):
        return jnp.einsum("bd,nd->bn", x, params["U"])


class UnpacksTheBatch(Broken):
    def bad(self, params, h, x):
        _, d = x.shape
        return h * d


class NamesTheBatch(Broken):
    def bad(self, params, h, x):
        return h - jax.lax.pmean(h, "batch")


class LooksUp(Broken):
    def bad(self, params, h, x):
        return params["W"][x[0]]


class Branches(Broken):
    def bad(self, params, h, x):
        return h if x[0] > 0 else -h


class UsesNumpy(Broken):
    def bad(self, params, h, x):
        return h + np.tanh(h)


class Counts(Broken):
    def bad(self, params, h, x):
        return h + jnp.zeros(int(x[0]))


class Mixes(Broken):
    def bad(self, params, h, x):
        return h + x[0].astype("bfloat16")


class Divides(Broken):
    def bad(self, params, h, x):
        return h * (1 / 0)


class Bare(Broken):
    def bad(self, params, h, x):
        raise StopIteration


ONE, TRACEABLE = "to run on one example at one time, x (3,)", "to be traceable by JAX"
VMAP = "sj.unroll adds the batch axis with jax.vmap"


@pytest.mark.parametrize(
    ("cell", "kind", "parts"),
    [
        (ConcatenatesAlongFeatures(), ValueError, (ONE, "axis 1 is out of bounds", VMAP)),
        (WritesTheBatchOut(), ValueError, (ONE, "Einstein sum subscript 'bd'", VMAP)),
        (UnpacksTheBatch(), ValueError, (ONE, "not enough values to unpack", VMAP)),
        (NamesTheBatch(), NameError, (ONE, "unbound axis name: batch", VMAP)),
        (LooksUp(), TypeError, ("to index with whole numbers", "got indexer with type float32", ".astype(int)")),
        (Branches(), jax.errors.TracerBoolConversionError, (TRACEABLE, "jnp.where or jax.lax.cond")),
        (UsesNumpy(), jax.errors.TracerArrayConversionError, (TRACEABLE, "use jax.numpy instead of numpy")),
        (Counts(), jax.errors.ConcretizationTypeError, (TRACEABLE, "a size or a Python number cannot depend on")),
        (Mixes(), ValueError, ("to compute in the dtype of its state", "TypePromotionError", "x.astype(state.dtype)")),
        (Divides(), ZeroDivisionError, (ONE, "division by zero")),
        (Bare(), RuntimeError, (ONE, "got StopIteration at")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Broken) else "",
)
def test_a_step_that_jax_cannot_run(cell, kind, parts):
    with raises(kind, f"expected {type(cell).__name__}.step ", line_of(type(cell).bad), *parts):
        trace(cell)


def test_the_layer_that_raises_is_named(key):
    cell = sj.stack([sj.Dropout(D), sj.LearnedState(LooksUp())])
    params = cell.init(key)
    expected = "expected LooksUp.step to index with whole numbers"
    with raises(TypeError, expected, line_of(LooksUp.bad)), errors_of_step(cell, params):
        jax.eval_shape(cell.step, params, cell.initial_state(params), jnp.zeros(D))


@pytest.mark.parametrize(
    ("params", "kind", "parts"),
    [
        (
            {"V": jnp.zeros((N, N))},
            KeyError,
            ("params {'U': (4, 3), 'W': (4, 4)}, got {'V': (4, 4)}", "KeyError", "'W'"),
        ),
        (
            {"W": jnp.zeros((N, N)), "U": jnp.zeros((N, 2))},
            TypeError,
            ("params['U'] (4, 3), got (4, 2)", "dot_general"),
        ),
        (PARAMS, TypeError, ("got LSTMParams(W_xh=(16, 3)", "tuple indices must be integers")),
    ],
    ids=["dict", "shape", "tuple"],
)
def test_parameters_with_which_the_step_of_a_user_fails(params, kind, parts):
    with raises(kind, "expected Leaky.step to get parameters like those of Leaky.init", *parts):
        trace(Leaky(), params)


def test_parameters_with_which_the_initial_state_of_a_user_fails():
    expected = "expected Leaky.initial_state to get parameters like those of Leaky.init"
    for call in CALLS.values():
        with raises(KeyError, expected, "got {'V': (4, 4)}", "KeyError at ", "cells.py:"):
            call(Leaky(), {"V": jnp.zeros((N, N))}, XS)
    with raises(KeyError, expected):
        sj.unroll(Leaky(), {"V": jnp.zeros((N, N))}, XS, state=jnp.zeros((2, N)))


def test_an_initial_state_that_is_none():
    class Named(Leaky):
        def initial_state(self, params):
            return "zero"

    with raises(TypeError, "expected Named.initial_state to return the state of one example, got TypeError", "zero"):
        sj.unroll(Named(), Leaky().init(jax.random.key(0)), XS)


def test_an_error_of_the_right_form_passes():
    error = ValueError("expected the sun, got rain")
    with pytest.raises(ValueError, match=r"^expected the sun, got rain$") as caught, errors_of_step(Leaky()):
        raise error
    assert caught.value is error

    class LosesALeaf(Leaky):
        def step(self, params, h, x):
            return (h, h), h

    expected = "expected LosesALeaf.step to return a state of the structure that it got"
    with raises(TypeError, expected), errors_of_step(LosesALeaf()):
        sj.unroll(LosesALeaf(), Leaky().init(jax.random.key(0)), XS)


def test_a_step_that_returns_another_state_or_no_output_is_named_with_its_line():
    class Other(Leaky):
        wrong = staticmethod(lambda h: (h, h))

        def step(self, params, h, x):
            return self.wrong(h)

    line = f"test_bad_cells.py:{Other.step.__code__.co_firstlineno}"
    for wrong in (lambda h: ((h, h), h), lambda h: (h.astype("bfloat16"), h), lambda h: h):
        cell = Other()
        cell.wrong = wrong
        with raises(TypeError, "expected Other.step", line):
            sj.unroll(cell, cell.init(jax.random.key(0)), XS)


def test_the_gates_of_swapped_arguments_and_of_a_class_are_not_a_cell_s():
    for cell, params in ((PARAMS, LSTM), (sj.LSTM, PARAMS)):
        with raises(TypeError, METHODS):
            sj.gates(cell, params, XS)


class NeedsACode(Exception):
    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = code

    def __str__(self):
        return f"code {self.code}"


def test_an_error_keeps_its_type_if_it_takes_a_message():
    for error in (ValueError("a"), KeyError("a"), Exception("a"), jax.errors.UnexpectedTracerError("a")):
        explained = explain_step_error(Leaky(), error)
        assert type(explained) is type(error)
        assert explained.args[0].startswith("expected Leaky.step to ")
    decoding = UnicodeDecodeError("utf-8", b"a", 0, 1, "reason")
    assert type(explain_step_error(Leaky(), decoding)) is UnicodeError
    explained = explain_step_error(Leaky(), NeedsACode(3, "none"))
    assert type(explained) is RuntimeError
    assert str(explained) == "expected Leaky.step to run on one example at one time, got NeedsACode, code 3"


class Remembers(Leaky):
    def __init__(self):
        self.seen = []

    def step(self, params, h, x):
        self.seen.append(h)
        h = h + self.seen[0]
        return h, h


class Appends(Remembers):
    def step(self, params, h, x):
        self.seen.append(x)
        return h, h


def test_a_step_that_keeps_what_is_traced():
    cell, kept = Remembers(), "to keep no traced value outside its state"
    fix = "carry what a later step needs in the state, and return what you want to see as the output"
    params, leak = cell.init(jax.random.key(0)), jax.errors.UnexpectedTracerError

    def run():
        with errors_of_step(cell, params, only=leak):
            jax.jit(lambda *args: cell.step(*args))(params, jnp.zeros(N), jnp.zeros(D))

    run()
    with raises(leak, f"expected Remembers.step {kept}", f"got a value of an earlier trace at {__file__}:", fix):
        run()
    explained = str(explain_step_error(cell, leak("of an operation whose line JAX does not know")))
    assert explained.endswith(f" at {__file__}:{inspect.getsourcelines(Remembers.step)[1]}: {fix}")
    with pytest.raises(ValueError, match=r"^a$"), errors_of_step(cell, only=leak):
        raise ValueError("a")
    for cell in (Remembers(), Appends()):
        with raises(AssertionError, f"expected {type(cell).__name__}.step {kept}", "outlives the step", fix):
            sj.testing.check_cell(cell)
    with raises(AssertionError, "expected Branches.step to be traceable by JAX", line_of(Branches.bad)):
        sj.testing.check_cell(Branches())


class Prints(Leaky):
    def step(self, params, h, x):
        io_callback(print, None, h, ordered=True)
        return h, h


def test_ordered_side_effects():
    cell, fix = Prints(), "use ordered=False"
    expected, line = "expected Prints.step to have no ordered side effects", line_of(Prints.step)
    with raises(ValueError, expected, line, fix):
        check_effects(cell, trace(cell))
    params = cell.init(jax.random.key(0))

    def scan(h, xs):
        return jax.lax.scan(lambda h, x: cell.step(params, h, x), h, xs)

    with raises(ValueError, expected, line, fix), errors_of_step(cell, params):
        jax.eval_shape(jax.vmap(scan), jnp.zeros((2, N)), XS)


def test_side_effects_that_a_batch_can_have():
    class Shows(Leaky):
        def step(self, params, h, x):
            jax.debug.print("{}", h, ordered=True)
            io_callback(print, None, h)
            return h, h

    check_effects(Shows(), trace(Shows()))


def test_the_line_of_the_user():
    assert user_line(None) is None
    with pytest.raises(TypeError) as caught:
        jnp.zeros("a")
    assert user_line(caught.value).startswith(f"{__file__}:")
    assert user_line(caught.value) == user_line(caught.value.__traceback__)
    assert user_line(ValueError()) is None
