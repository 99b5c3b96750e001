"""The unroll of a cell by the parts of its step is the scan over its step: in value and in every derivative."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import OURS, D, Doubled, N
from oracles import assert_close, drawn, drawn_states, like, scanned, weighted

import seqjax as sj
from benchmarks.hlo import loops
from seqjax.cells.stack import Stack
from seqjax.sequence._execution.chunks import chunk_length
from seqjax.sequence._masked_step import Inputs, emit_output, emit_state
from seqjax.sequence.unroll import _run_plainly

BATCH = 2
FLAGS = np.random.default_rng(0).random((2, 40, 1100)) < 0.7


class Peephole:
    """A user's cell: a state and an output that are trees, and a parameter that reads c elementwise."""

    input_shape = (D,)

    def init(self, key):
        return {"W": jax.random.normal(key, (N, N)), "U": jax.random.normal(key, (N, D)), "p": jnp.ones(N)}

    def initial_state(self, params):
        return {"h": 0.5 * params["p"], "c": jnp.zeros_like(params["p"])}

    def drive(self, params, x):
        u = params["U"] @ x.astype(params["U"].dtype)
        return {"gate": u[::-1] * params["p"], "in": u}

    def recur(self, params, state):
        return params["W"] @ state["h"], params["p"] * state["c"]

    def advance(self, state, drive, recurrent):
        product, peep = recurrent
        gate = jax.nn.sigmoid(drive["gate"] + peep)
        c = gate * state["c"] + (1 - gate) * jnp.tanh(drive["in"] + product)
        h = jnp.sin(c) * gate
        return {"h": h, "c": c}, {"sum": h + c, "c": c}

    def step(self, params, state, x):
        return self.advance(state, self.drive(params, x), self.recur(params, state))


class TokenSum(Peephole):
    """The same, reading tokens."""

    input_shape = ()

    def drive(self, params, x):
        return super().drive(params, params["U"].T[x % D].sum() * jnp.ones_like(params["U"][0]))


SPLIT = {
    "lstm": OURS["lstm"],
    "gru": OURS["gru-after"],
    "gru-before": OURS["gru-before"],
    "gru-writes": sj.GRU(D, N, update="writes"),
    "relu": OURS["vanilla-relu"],
    "identity": OURS["vanilla-identity"],
    "user": Peephole(),
    "learned": sj.LearnedState(Peephole()),
}


def plain(cell, params, xs, state=None, mask=None, reset=None, reverse=False, emit=emit_output):
    """The scan over `step`, differentiated by JAX alone."""
    if state is None:
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(xs)), cell.initial_state(params))
    return _run_plainly(cell, emit, reverse, params, state, Inputs(xs, mask, reset))


def flags(batch, time):
    return dict(mask=FLAGS[0, :batch, :time], reset=~FLAGS[1, :batch, :time])


def both(function, *arguments):
    """A function of an unroll, with the fast one and with the plain one; each in one compilation."""
    return [jax.jit(partial(function, unroll))(*arguments) for unroll in (sj.unroll, plain)]


@pytest.mark.parametrize("name", ["lstm", "gru", "gru-before", "user"])
def test_every_first_derivative_is_that_of_the_scan(name, x64):
    cell, time = SPLIT[name], 7
    params, xs = drawn(cell, "float64", time=time)
    state = drawn_states(cell, params)
    direction = like((params, state, xs), "float64", 5)

    def everything(unroll, params, state, xs, direction):
        outcomes = {}
        for case, options in {"bare": {}, "flags": flags(BATCH, time) | dict(reverse=True)}.items():
            run = lambda p, s, x: weighted(unroll(cell, p, x, state=s, **options))  # noqa: B023, E731
            outcomes[case] = jax.value_and_grad(run, argnums=(0, 1, 2))(params, state, xs)
            outcomes[f"{case}, jvp"] = jax.jvp(run, (params, state, xs), direction)
        outcomes["own state"] = jax.grad(lambda p: weighted(unroll(cell, p, xs, **flags(BATCH, time))))(params)
        outcomes["jacrev"] = jax.jacrev(lambda x: unroll(cell, params, x)[1])(xs)
        outcomes["jacfwd"] = jax.jacfwd(lambda s: unroll(cell, params, xs, state=s)[0])(state)
        return outcomes

    got, expected = both(everything, params, state, xs, direction)
    for case in expected:
        assert_close(got[case], expected[case])


@pytest.mark.slow
def test_every_second_derivative_is_that_of_the_scan(x64):
    cell, time = SPLIT["user"], 3
    params, xs = drawn(cell, "float64", time=time)
    v = like((params, xs), "float64", 6)

    def everything(unroll, params, xs, v):
        run = lambda p, x: weighted(unroll(cell, p, x, **flags(BATCH, time)))  # noqa: E731
        forward = lambda p, x: jax.jvp(run, (p, x), v)[1]  # noqa: E731
        gradient = jax.grad(run, (0, 1))
        along = lambda p, x: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(p, x), v))))  # noqa: E731
        return {
            "forward over reverse": jax.jvp(gradient, (params, xs), v)[1],
            "reverse over reverse": jax.grad(along, (0, 1))(params, xs),
            "reverse over forward": jax.grad(forward, (0, 1))(params, xs),
            "hessian": jax.hessian(lambda x: run(params, x))(xs),
        }

    got, expected = both(everything, params, xs, v)
    for case in expected:
        assert_close(got[case], expected[case])
    for case in ("reverse over reverse", "reverse over forward"):
        assert_close(got[case], got["forward over reverse"])


@pytest.mark.slow
def test_it_differentiates_inside_every_transformation(x64):
    cell = SPLIT["user"]
    params, xs = drawn(cell, "float64", time=5)
    many, pair = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params), jnp.stack([xs, xs + 1])

    def everything(unroll, params, xs):
        run = lambda p, x: weighted(unroll(cell, p, x, **flags(BATCH, 5)))  # noqa: E731
        gradient = jax.grad(run, (0, 1))
        descend = lambda p, x: (jax.tree.map(lambda a, g: a - 0.01 * g, p, gradient(p, x)[0]), run(p, x))  # noqa: E731
        return {
            "vmap over params": jax.vmap(gradient, (0, None))(many, xs),
            "vmap over inputs": jax.vmap(gradient, (None, 0))(params, pair),
            "nested vmap": jax.vmap(jax.vmap(jax.jit(gradient), (None, 0)), (0, None))(many, pair),
            "gradient of vmap": jax.grad(lambda p: jax.vmap(run, (None, 0))(p, pair).sum())(params),
            "vmap of a curvature": jax.vmap(lambda p: jax.jvp(jax.grad(run), (p, xs), (p, xs))[1])(many),
            "scan": jax.lax.scan(descend, params, pair),
            "checkpoint": jax.grad(jax.checkpoint(run), (0, 1))(params, xs),
        }

    got, expected = both(everything, params, xs)
    for case in expected:
        assert_close(got[case], expected[case])


@pytest.mark.parametrize(("name", "batch"), [("lstm", 1), ("user", 40)])
def test_chunks_that_do_not_divide_the_time_change_nothing(name, batch, x64):
    cell = SPLIT[name]
    for time, reverse in ((1, False), (53, True)) if batch > 1 else ((1033, False),):
        assert time == 1 or time % chunk_length(batch, time)
        params, xs = drawn(cell, "float64", batch, time)
        options = flags(batch, time) | dict(reverse=reverse)

        def value_and_gradient(unroll, params, xs, *, options=options):
            run = lambda p, x: (weighted(result := unroll(cell, p, x, **options)), result)  # noqa: E731
            return jax.value_and_grad(run, (0, 1), has_aux=True)(params, xs)

        assert_close(*both(value_and_gradient, params, xs))


def test_a_chunk_is_never_longer_than_the_time_nor_empty():
    for batch, time in itertools.product((0, 1, 2, 7, 64, 1000), (1, 2, 16, 17, 97, 1000, 4096, 100_003)):
        length = chunk_length(batch, time)
        assert 1 <= length <= time
        assert time // length <= 4096


@pytest.mark.parametrize("save", ["states", "gates"])
@pytest.mark.parametrize("name", ["lstm", "user"])
def test_the_loops_of_a_gpu_change_nothing(name, save, x64, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cell, batch, time = SPLIT[name], 33, 302  # chunks of 151 steps
    params, xs = drawn(cell, "float64", batch, time)
    options = flags(batch, time)

    def value_and_gradient(unroll, params, xs, **more):
        run = lambda p, x: (weighted(result := unroll(cell, p, x, **options, **more)), result)  # noqa: E731
        return jax.value_and_grad(run, (0, 1), has_aux=True)(params, xs)

    got = jax.jit(partial(value_and_gradient, sj.unroll, save=save))(params, xs)
    assert_close(got, jax.jit(partial(value_and_gradient, plain))(params, xs))


def test_on_a_gpu_no_loop_only_rematerializes_and_an_iteration_runs_several_steps(monkeypatch):
    cell, batch, time = sj.LSTM(D, N), 34, 2 * 132
    params, xs = drawn(cell, "float32", batch, time)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = jax.jit(jax.grad(lambda p: jnp.sum(sj.unroll(cell, p, xs)[1] ** 2)))
    found = loops(run.lower(params).compile().as_text())
    assert [loop.steps for loop in found if loop.innermost] == [132 // 6] * 2  # forward and backward


def test_nan_in_padding_and_in_a_state_that_is_reset_reaches_no_gradient(x64):
    cell, time = SPLIT["user"], 6
    params, xs = drawn(cell, "float64", time=time)
    mask, reset = np.arange(time) < np.array([[4], [0]]), np.zeros((BATCH, time), bool)
    reset[:, 0] = True
    state = drawn_states(cell, params)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, state)
    spoilt = jnp.where(mask[..., None], xs, np.nan)
    got = scanned(cell, params, spoilt, state=broken, mask=mask, reset=reset)
    assert_close(got, scanned(cell, params, jnp.where(mask[..., None], xs, 0.0), state=state, mask=mask, reset=reset))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    assert not np.any(got[1][1][~mask])


def test_a_gradient_of_one_argument_alone_is_that_part_of_all(x64):
    cell = SPLIT["lstm"]
    params, xs = drawn(cell, "float64")
    state = drawn_states(cell, params)
    run = lambda p, s, x: weighted(sj.unroll(cell, p, x, state=s))  # noqa: E731
    every = jax.jit(jax.grad(run, (0, 1, 2)))(params, state, xs)
    for i in range(3):
        assert_close(jax.jit(jax.grad(run, i))(params, state, xs), every[i])
    bias = jax.jit(jax.grad(lambda b: run(params._replace(b_h=b), state, xs)))(params.b_h)
    assert_close(bias, every[0].b_h)
    h = jax.jit(jax.grad(lambda h: run(params, state._replace(h=h), xs)))(state.h)
    assert_close(h, every[1].h)


def test_float32_and_bfloat16_stay_near_float64():
    cell, time = SPLIT["lstm"], 40
    with jax.enable_x64(True):
        params, xs = drawn(cell, "float64", time=time)
        exact = jax.jit(partial(scanned, cell))(params, xs)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        got = scanned(cell, *(jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), t) for t in (params, xs)))  # noqa: B023
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            assert str(a.dtype) == dtype
            np.testing.assert_allclose(np.asarray(a, float), b, atol=tolerance * np.abs(b).max())


def test_trajectories_and_gates_are_those_of_the_scan(x64):
    for name, reverse in (("lstm", True), ("user", False)):
        cell = SPLIT[name]
        params, xs = drawn(cell, "float64", time=20)
        options = flags(BATCH, 20) | dict(reverse=reverse)
        run = lambda p: sj.trajectory(cell, p, xs, **options)  # noqa: B023, E731
        scan = lambda p: plain(cell, p, xs, emit=emit_state, **options)[1]  # noqa: B023, E731
        steps = slice(None, -1) if reverse else slice(1, None)
        assert_close(jax.tree.map(lambda leaf: leaf[:, steps], jax.jit(run)(params)), jax.jit(scan)(params))  # noqa: B023
        ends = lambda states: jax.tree.map(lambda leaf: leaf[:, steps], states)  # noqa: B023, E731
        fast, slow = (jax.grad(lambda p: weighted(f(p))) for f in (lambda p: ends(run(p)), scan))  # noqa: B023
        assert_close(jax.jit(fast)(params), jax.jit(slow)(params))
    cell = SPLIT["lstm"]
    params, xs = drawn(cell, "float64", time=4)
    before = jax.tree.map(lambda leaf: leaf[:, :-1], sj.trajectory(cell, params, xs))
    by_step = jax.vmap(jax.vmap(partial(cell.gates, params)))(before, xs)
    assert_close(sj.gates(cell, params, xs), by_step)


def test_tokens_weak_types_and_whole_number_outputs_pass():
    class Counting(Peephole):
        def advance(self, state, drive, recurrent):
            state, output = super().advance(state, drive, recurrent)
            return state, (output, jnp.argmax(output["c"]))

    for cell in (TokenSum(), Counting()):
        params, xs = drawn(cell, "float32")
        if cell.input_shape == ():
            xs = jnp.arange(12).reshape(2, 6)
        params["p"] = jnp.full(N, 0.5)
        assert params["p"].weak_type

        def everything(unroll, params, xs, *, cell=cell):
            run = lambda p: jax.tree.leaves(unroll(cell, p, xs))  # noqa: E731
            loss = lambda p: sum(jnp.sum(leaf**2) for leaf in run(p) if leaf.dtype == jnp.float32)  # noqa: E731
            return run(params), jax.value_and_grad(loss)(params), jax.jvp(loss, (params,), (params,))

        got, expected = both(everything, params, xs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, 1e-4, 1e-5)
    params, _ = drawn(TokenSum(), "float32")
    by_tokens = jax.grad(lambda x: weighted(sj.unroll(TokenSum(), params, x)), allow_int=True)(jnp.ones((2, 6), int))
    assert by_tokens.dtype == jax.dtypes.float0


def test_a_cell_that_holds_a_traced_value_is_differentiated_with_respect_to_it():
    class Timed(Peephole):
        def __init__(self, tau):
            self.tau = tau

        def advance(self, state, drive, recurrent):
            new, output = super().advance(state, drive, recurrent)
            return jax.tree.map(lambda a, b: a + self.tau * (b - a), state, new), output

    params, xs = drawn(Timed(0.5), "float32")

    def everything(unroll, tau):
        loss = lambda tau, p: weighted(unroll(Timed(tau), p, xs))  # noqa: E731
        return (
            jax.grad(loss, (0, 1))(tau, params),
            jax.grad(lambda p: loss(tau, p))(params),
            jax.vmap(jax.grad(loss), (0, None))(jnp.stack([tau, 2 * tau]), params),
        )

    got, expected = both(everything, jnp.float32(0.3))
    assert_close(got, expected)
    assert_close(jax.grad(lambda tau: weighted(sj.unroll(Timed(tau), params, xs)))(jnp.float32(0.3)), expected[0][0])


class Halved(Doubled):
    """Carries half of c."""

    def step(self, params, state, x):
        state, output = super().step(params, state, x)
        return sj.LSTMState(state.h, state.c / 2), output


class Peeping(sj.LSTM):
    """Its gates read c."""

    def step(self, params, state, x):
        return super().step(params._replace(b_h=params.b_h + 0.3 * jnp.tile(state.c, 4)), state, x)


class Residual(Stack):
    """Layers with skip connections."""

    def step(self, params, state, x, noise=None):
        new = []
        for cell, p, s in zip(self.cells, params, state, strict=True):
            s, y = cell.step(p, s, x)
            x = x + y
            new.append(s)
        return tuple(new), x


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "cell", [Doubled(D, N), Halved(D, N), Peeping(D, N), Residual((sj.GRU(D, D), sj.LSTM(D, D)))], ids=type
)
def test_the_step_of_a_subclass_is_what_runs(cell, learned):
    cell = sj.LearnedState(cell) if learned else cell
    params, xs = drawn(cell, "float32", BATCH, 40)
    value = jax.value_and_grad(lambda unroll, params: weighted(unroll(cell, params, xs)), argnums=1)
    assert_close(*both(value, params))


def test_a_search_for_all_states_follows_the_step_of_a_subclass(x64):
    cell = Residual((sj.GRU(D, D), sj.LSTM(D, D)))
    params, xs = drawn(cell, "float64", BATCH, 20)
    result, found = sj.unroll_parallel(cell, params, xs)
    assert found.converged.all()
    assert_close(result, jax.jit(partial(plain, cell))(params, xs))


def test_numbers_among_the_parameters_and_states_of_nothing_pass():
    class Mixed(Peephole):  # not hashable, and so not compiled around
        __hash__ = None

        def advance(self, state, drive, recurrent):
            state, output = super().advance(state, drive, recurrent)
            return state, output["sum"]

        def recur(self, params, state):
            product, peep = super().recur(params, state)
            return params["scale"] * product, peep

        def step(self, params, state, x):
            return self.advance(state, self.drive(params, x), self.recur(params, state))

    class Stateless:
        input_shape = (D,)

        def init(self, key):
            return jnp.ones(N)

        def initial_state(self, params):
            return ()

        def drive(self, params, x):
            return x.sum()

        def recur(self, params, state):
            return params

        def advance(self, state, drive, recurrent):
            return state, drive * recurrent

        def step(self, params, state, x):
            return self.advance(state, self.drive(params, x), self.recur(params, state))

    params, xs = drawn(Peephole(), "float32", BATCH, 40)
    numbers = params | {"scale": 0.5}
    assert_close(sj.unroll(Mixed(), numbers, xs), sj.unroll(Mixed(), params | {"scale": jnp.float32(0.5)}, xs))
    gradient = jax.grad(lambda p: sj.unroll(Stateless(), p, xs)[1].sum())(jnp.ones(N))
    assert_close(gradient, jnp.full(N, xs.sum()))


def test_a_cell_that_hashes_by_value_is_traced_once():
    traces = 0

    @dataclasses.dataclass(frozen=True)
    class Counted(Peephole):
        size: int = N

        def advance(self, state, drive, recurrent):
            nonlocal traces
            traces += 1
            return super().advance(state, drive, recurrent)

    params, xs = drawn(Counted(), "float32")
    gradient = lambda: jax.grad(lambda p: weighted(sj.unroll(Counted(), p, xs)))(params)  # noqa: E731
    sj.unroll(Counted(), params, xs)
    first, _ = gradient(), sj.unroll(Counted(), params, xs)
    once = traces
    assert_close(gradient(), first)
    sj.unroll(Counted(), params, xs + 1)
    assert traces == once


def test_a_stack_of_cells_in_parts_is_the_scan_of_its_step(x64):
    cell = sj.stack([OURS["lstm"], sj.LearnedState(sj.GRU(N, N)), sj.GRU(N, D, reset="before"), Peephole()])
    params, xs = drawn(cell, "float64")

    def value_and_gradient(unroll, params, xs):
        run = lambda p: (weighted(result := unroll(cell, p, xs, **flags(BATCH, 6))), result)  # noqa: E731
        return jax.value_and_grad(run, has_aux=True)(params)

    assert_close(*both(value_and_gradient, params, xs))
