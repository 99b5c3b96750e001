"""The same call compiles once; objects that may have changed compile again, and a warning names them."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises

import seqjax as sj
from seqjax.sequence import _cached_jit
from seqjax.sequence._cached_jit import IdentityWarning

XS = jnp.ones((2, 5, 3))
TRACES = []


@dataclasses.dataclass(frozen=True)
class Counting:
    """A running sum, whose step records when it is traced."""

    size: int = 3

    def init(self, key):
        return {"a": jnp.ones(self.size)}

    def initial_state(self, params):
        return jnp.zeros_like(params["a"])

    def step(self, params, state, x):
        TRACES.append(1)
        state = params["a"] * (state + x)
        return state, state


class ByIdentity(Counting):
    """The same cell without equality by value."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


CELL = Counting()
PARAMS = CELL.init(jax.random.key(0))


def of_states(states):
    return jnp.sum(states**2)


def traces(call):
    """How often the step is traced in a second call with equal arguments."""
    call()
    TRACES.clear()
    call()
    return len(TRACES)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sj.unroll(Counting(), PARAMS, XS),
        lambda: sj.unroll(Counting(), PARAMS, XS, reverse=True, checkpoint_every=2),
        lambda: sj.trajectory(Counting(), PARAMS, XS),
        lambda: sj.state_gradients(Counting(), PARAMS, XS, of_states),
        lambda: sj.weight_gradients_by_step(Counting(), PARAMS, XS, of_states),
        lambda: sj.truncated_grad(Counting(), PARAMS, XS, of_states, 2),
        lambda: sj.truncated_grad(Counting(), PARAMS, XS, of_states, 9),
    ],
)
def test_a_second_call_does_not_compile_again(call):
    assert traces(call) <= 2  # the initial state and the state are checked by tracing, and nothing compiles


def test_a_cell_by_identity_compiles_again_and_one_warning_names_the_fix():
    cell, other = ByIdentity(), ByIdentity()
    _cached_jit._warned.discard(ByIdentity)
    with pytest.warns(IdentityWarning, match=r"ByIdentity compares by identity.*dataclass\(frozen=True\)") as caught:
        sj.unroll(cell, PARAMS, XS)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdentityWarning)
        sj.unroll(other, PARAMS, XS)  # once for a class
    TRACES.clear()
    sj.unroll(cell, PARAMS, XS)
    assert TRACES


def test_no_warning_inside_a_jit_of_the_user():
    cell = ByIdentity()
    _cached_jit._warned.discard(ByIdentity)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdentityWarning)
        jax.jit(lambda params, xs: sj.unroll(cell, params, xs)[1])(PARAMS, XS)


class Weighted:
    """An objective that can change."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, head, params, outputs, targets, mask):
        return self.weight * jnp.mean(outputs)


@pytest.mark.filterwarnings("ignore:.*compares by identity")
def test_an_objective_that_was_changed_does_not_give_the_former_answer():
    model = sj.Model(sj.GRU(3, 4), sj.Gaussian(4, 1))
    params, batch = model.init(jax.random.key(0)), sj.Batch(XS, jnp.ones((2, 5, 1)))
    objective = Weighted(1.0)
    first = sj.evaluate(model, params, [batch], loss=objective)
    objective.weight = 3.0
    assert sj.evaluate(model, params, [batch], loss=objective) == pytest.approx(3 * first, rel=1e-6)
    assert sj.evaluate(model, params, [batch], loss=partial(objective)) == pytest.approx(3 * first, rel=1e-6)


def test_jit_takes_a_cell_as_a_static_argument_and_ours_as_any_argument():
    expected = sj.unroll(CELL, PARAMS, XS)[1]
    np.testing.assert_allclose(jax.jit(sj.unroll, static_argnums=0)(CELL, PARAMS, XS)[1], expected, rtol=1e-6)
    lstm = sj.LSTM(3, 4)
    params = lstm.init(jax.random.key(0))
    np.testing.assert_allclose(jax.jit(sj.unroll)(lstm, params, XS)[1], sj.unroll(lstm, params, XS)[1], rtol=1e-6)


def test_a_batch_goes_through_jit_vmap_and_device_put():
    model = sj.Model(sj.GRU(3, 4), sj.Gaussian(4, 1))
    params, batch = model.init(jax.random.key(0)), sj.Batch(XS, jnp.ones((2, 5, 1)), continues=True)

    def loss(batch):
        outputs = sj.unroll(model.cell, params.cell, batch.xs, mask=batch.mask)[1]
        return sj.every_step(model.head, params.head, outputs, batch.targets, batch.mask)

    expected = loss(batch)
    assert jax.device_put(batch, jax.devices()[0]).continues
    np.testing.assert_allclose(jax.jit(loss)(batch), expected, rtol=1e-6)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch)
    np.testing.assert_allclose(jax.vmap(loss)(many), [expected, expected], rtol=1e-6)


def test_fits_under_vmap_over_seeds_are_the_single_fits():
    model = sj.Model(sj.GRU(3, 4), sj.Gaussian(4, 1))
    stream = [sj.Batch(XS * scale, jnp.ones((2, 5, 1))) for scale in (0.5, 1.0, 2.0, 0.1)]
    options = dict(validation=lambda: stream[:1], validate_every=2)
    keys = jax.random.split(jax.random.key(1), 3)
    many = jax.vmap(lambda key: sj.fit(model, stream, key=key, **options))(keys)
    assert many.reason == "stream"
    for i in (0, 2):
        one = sj.fit(model, stream, key=keys[i], **options)
        for name, values in one.history.items():
            np.testing.assert_allclose(many.history[name][i], values, rtol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-6)


def test_window_of_another_kind_is_refused():
    for window in (0, 1.5, True):
        with raises(ValueError, "expected a window of at least 1 step"):
            sj.truncated_grad(CELL, PARAMS, XS, of_states, window)
