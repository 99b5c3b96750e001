"""`unroll` by the parts of a step is the plain scan over the step: for every kind of cell, in every derivative."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import TOKENS, ZOO, D, Leaky, N, PeepholeLSTM, Spiking, zoo

import seqjax as sj
from seqjax.cell import strong_type
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._flat_cell import flat_cell
from seqjax.sequence._masked_step import draw_noise, emit_output
from seqjax.sequence.unroll import Options, _run_batch

BATCH, TIME = 2, 6
FLAGS = np.random.default_rng(3).random((2, 6, 203)) < 0.7
# A surrogate is not the derivative of its function, so forward over reverse differs between a loop and a scan in JAX.
FIRST_ORDER = ("value", "gradient")
ROUNDED = {"lstm-bfloat16": 0.02, "nnx-lstm": 1e-5}  # the others agree to the last digits of float64


def plain(cell, params, xs, *, mask=None, reset=None, reverse=False, key=None):
    """The scan over `cell.step`, written out: what a mask and a reset mean, and nothing of the library's own loops."""
    batch, time = jax.tree.leaves(xs)[0].shape[:2]
    mask = np.ones((batch, time), bool) if mask is None else mask
    reset = np.zeros((batch, time), bool) if reset is None else reset
    choose = lambda flag, a, b: jax.tree.map(lambda a, b: jnp.where(flag, a, b), a, b)  # noqa: E731
    zeros = partial(jax.tree.map, jnp.zeros_like)

    def one(xs, mask, reset, noise):
        first = strong_type(cell.initial_state(params))

        def body(state, at):
            x, valid, restart, noise = at
            state = choose(restart, first, state)
            x = choose(valid, x, zeros(x))
            after, output = cell.step(params, state, x) if noise is None else cell.step(params, state, x, noise)
            return choose(valid, strong_type(after), state), choose(valid, output, zeros(output))

        return jax.lax.scan(body, first, (xs, mask, reset, noise), reverse=reverse)

    return jax.vmap(one)(xs, mask, reset, draw_noise(cell, key, batch, time))


def is_inexact(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def drawn(cell, batch=BATCH, time=TIME):
    """Parameters and inputs in float64."""
    params = jax.tree.map(lambda p: wide(jnp.asarray(p)), cell.init(jax.random.key(1)))
    if hasattr(cell, "example_input"):
        shapes = cell.example_input()
        return params, jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(x.ndim), (batch, time, *x.shape)), shapes
        )
    if cell.input_shape == ():
        return params, jax.random.randint(jax.random.key(2), (batch, time), 0, TOKENS)
    return params, jax.random.normal(jax.random.key(2), (batch, time, *cell.input_shape))


def wide(leaf):
    if not is_inexact(leaf):
        return leaf
    return leaf.astype("complex128" if jnp.iscomplexobj(leaf) else "float64")


def weighted(tree):
    """A number that depends on every entry of the inexact leaves in another way."""
    total = 0.0
    for leaf in filter(is_inexact, jax.tree.leaves(tree)):
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            weights = jnp.cos(1.0 + jnp.arange(part.size, dtype=part.dtype)).reshape(part.shape)
            total += (jnp.sin(part) * weights).sum()
    return total


def everything(unroll, cell, params, xs, **options):
    """Value, gradient, directional derivative and Hessian-vector product, in one program."""
    leaves, tree = jax.tree.flatten((params, xs))
    moving = [leaf for leaf in leaves if is_inexact(leaf)]

    def loss(values):
        values = iter(values)
        params, xs = tree.unflatten(next(values) if is_inexact(leaf) else leaf for leaf in leaves)
        result = unroll(cell, params, xs, **options)
        return weighted(result), [leaf for leaf in jax.tree.leaves(result) if not is_key(leaf)]

    def gradient(values):
        return jax.value_and_grad(loss, has_aux=True)(values)

    direction = [jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(moving)]
    ((_, result), gradients), ((along, _), curvature) = jax.jvp(gradient, (moving,), (direction,))
    return {"value": result, "gradient": gradients, "jvp": along, "Hessian-vector product": curvature}


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_same(got, expected, tolerance=1e-10):
    """Each array within a share of its largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        if a.dtype != jax.dtypes.float0:
            scale = np.abs(b).max(initial=1e-3)
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def compare(cell, batch=BATCH, time=TIME, tolerance=1e-10, **options):
    params, xs = drawn(cell, batch, time)
    got, expected = (jax.jit(partial(everything, unroll, cell, **options))(params, xs) for unroll in (sj.unroll, plain))
    orders = FIRST_ORDER if isinstance(cell, Spiking) else expected
    assert_same({order: got[order] for order in orders}, {order: expected[order] for order in orders}, tolerance)


@pytest.mark.parametrize("name", ZOO)
def test_unroll_is_the_scan_over_the_step_in_value_and_every_derivative(name, x64):
    flags = dict(mask=FLAGS[0, :BATCH, :TIME], reset=~FLAGS[1, :BATCH, :TIME], reverse=True)
    options = flags if list(ZOO).index(name) % 2 else {}
    if name == "dropout-stack":
        options = options | {"key": jax.random.key(4)}
    compare(ZOO[name], tolerance=ROUNDED.get(name, 1e-10), **options)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["lstm", "gru-after", "linen-lstm", "layer-norm-lstm", "learned-stack"])
def test_the_optimized_program_is_the_scan_too(name, x64):
    options = dict(mask=FLAGS[0, :BATCH, :TIME], reset=FLAGS[1, :BATCH, :TIME])
    compare(ZOO[name], tolerance=ROUNDED.get(name, 1e-10), **options)


# 6 rows of 203 steps are several chunks and a remainder.
@pytest.mark.parametrize("name", ["linen-gru", "peephole-lstm", "learned-stack", "counter"])
def test_chunks_and_a_remainder_change_nothing(name, x64):
    compare(ZOO[name], 6, 203)


@pytest.mark.parametrize(
    ("name", "batch", "time"),
    [("linen-gru", 6, 203), ("counter", 6, 203), ("peephole-lstm", 2, 6), ("learned-stack", 2, 6)],
)
def test_saved_products_change_nothing(name, batch, time, x64, monkeypatch):
    monkeypatch.setattr("seqjax.sequence._execution.run.SLOW_PRODUCT", 1)
    params, xs = drawn(ZOO[name], batch, time)
    jax.clear_caches()
    got = jax.jit(partial(everything, partial(sj.unroll, save="gates"), ZOO[name]))(params, xs)
    assert_same(got, jax.jit(partial(everything, plain, ZOO[name]))(params, xs))


@pytest.mark.parametrize("reset", ["before", "after"])
def test_embedded_tokens_are_rows_of_a_table_of_products(reset, x64):
    compare(sj.stack([sj.Embedding(TOKENS, D), sj.GRU(D, N, reset=reset)]), BATCH, 2 * TOKENS)


def test_a_table_is_made_only_if_it_is_small_and_saves_work():
    def has_table(vocabulary, hidden, batch, time):
        cell = sj.stack([sj.Embedding(vocabulary, 2), sj.GRU(2, hidden)])
        params = jax.eval_shape(cell.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((batch, time), "int32")
        return f"{vocabulary},{3 * hidden}]" in str(
            jax.make_jaxpr(lambda p, x: sj.unroll(cell, p, x)[1])(params, tokens)
        )

    assert has_table(50, 4, 10, 10)
    assert not has_table(51, 4, 10, 10)  # with fewer steps, the product of every step is less work
    assert not has_table(5000, 512, 100, 1000)  # 31 MB


@pytest.mark.parametrize("name", ["layer-norm-lstm", "equinox-gru"])
def test_checkpoints_change_nothing(name, x64):
    params, xs = drawn(ZOO[name], time=7)
    got = jax.jit(partial(everything, sj.unroll, ZOO[name], checkpoint_every=3))(params, xs)
    assert_same(got, jax.jit(partial(everything, plain, ZOO[name]))(params, xs))


@pytest.mark.parametrize("name", ["linen-lstm", "symmetric"])
def test_every_transformation_passes(name, x64):
    cell = ZOO[name]
    params, xs = drawn(cell)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def transformed(unroll, params, many, xs):
        loss = lambda p, x: weighted(unroll(cell, p, x))  # noqa: E731
        return {
            "vmap": jax.vmap(jax.grad(loss), (0, None))(many, xs),
            "jacfwd": jax.jacfwd(lambda x: unroll(cell, params, x)[1])(xs),
            "jacrev": jax.jacrev(lambda x: unroll(cell, params, x)[1])(xs),
            "reverse over reverse": jax.grad(lambda x: weighted(jax.grad(loss)(params, x)))(xs),
        }

    got, expected = (jax.jit(partial(transformed, unroll))(params, many, xs) for unroll in (sj.unroll, plain))
    assert_same(got, expected)


def test_a_trajectory_is_every_state_of_the_scan(x64):
    cell = ZOO["stack-of-stacks"]
    params, xs = drawn(cell)
    every = [plain(cell, params, xs[:, :t])[0] for t in range(1, TIME + 1)]
    got = jax.tree.map(lambda leaf: leaf[:, 1:], sj.trajectory(cell, params, xs))
    assert_same(got, jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *every))


def test_a_value_that_a_cell_closes_over_has_its_derivative(x64):
    class Timed(Leaky):
        def __init__(self, tau):
            self.tau = tau

        def step(self, params, h, x):
            h = h + self.tau * (jnp.tanh(params["W"] @ h + params["U"] @ x) - h)
            return h, h

    params, xs = drawn(Leaky())

    def derivatives(unroll, tau):
        loss = lambda tau, p: weighted(unroll(Timed(tau), p, xs))  # noqa: E731
        one = jax.grad(loss, (0, 1))(tau, params)
        return (
            one,
            jax.vmap(jax.grad(loss), (0, None))(jnp.stack([tau, 2 * tau]), params),
            jax.hessian(loss)(tau, params),
        )

    got, expected = (jax.jit(partial(derivatives, unroll))(jnp.float64(0.3)) for unroll in (sj.unroll, plain))
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("name", "per_step"),
    [
        ("lstm", 1), ("linen-lstm", 1), ("linen-gru", 1), ("nnx-lstm", 1), ("equinox-gru", 1), ("peephole-lstm", 1),
        ("layer-norm-lstm", 1), ("gru-before", 2), ("readout", 1), ("min-gru", 0), ("learned-stack", 1),
        ("convolutional", 1), ("symmetric", 2),
    ],
)  # fmt: skip
def test_a_loop_holds_one_product_per_cut(name, per_step):
    cell = ZOO[name]
    loops = [loop for loop in sj.explain(cell, cell.init(jax.random.key(0)), jnp.zeros(D)).loops if loop.carried]
    assert [len(loop.per_step) for loop in loops] == [per_step] * len(loops)
    assert not any(loop.slow for loop in loops)


def test_what_stays_slow_is_explained_by_the_line_that_causes_it():
    for name, why in (("conditional", "a product inside cond"), ("inner-loop", "a product inside"), ("bilinear", "")):
        cell = ZOO[name]
        (loop,) = sj.explain(cell, cell.init(jax.random.key(0)), jnp.zeros(D)).loops
        assert loop.slow
        assert why in loop.slow[0]
        assert "cells.py:" in loop.slow[0]


def test_side_effects_run_step_by_step_and_explain_says_why(capfd):
    class Printing(PeepholeLSTM):
        def step(self, params, state, x):
            jax.debug.print("x = {}", x[0])
            return super().step(params, state, x)

    cell = Printing(D, N)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((1, 3, D))
    _, outputs = sj.unroll(cell, params, xs)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("x = 1.0") == 3
    np.testing.assert_allclose(outputs, sj.unroll(PeepholeLSTM(D, N), params, xs)[1], rtol=1e-5)
    assert "side effects" in sj.explain(cell, params, xs[0, 0]).fallback


def test_a_partition_that_fails_falls_back_and_explain_says_why(monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("an equation of another release of JAX")

    cell = PeepholeLSTM(D, 5)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((1, 3, D))
    expected = plain(cell, params, xs)
    monkeypatch.setattr("seqjax.sequence._partition.plan.Parts", broken)
    jax.clear_caches()
    got = sj.unroll(cell, params, xs)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), got, expected)
    assert "another release of JAX" in sj.explain(cell, params, xs[0, 0]).fallback
    jax.clear_caches()


def test_a_cell_rebuilt_by_value_compiles_once():
    cell = zoo(D, N)["linen-lstm"]
    params, xs = cell.init(jax.random.key(0)), jnp.ones((2, 5, D))
    sj.unroll(cell, params, xs)
    run = cached_jit(_run_batch, cell, emit_output, Options())
    assert run._cache_size() == 1
    sj.unroll(zoo(D, N)["linen-lstm"], params, xs)
    assert run is cached_jit(_run_batch, zoo(D, N)["linen-lstm"], emit_output, Options())
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", ["linen-lstm", "nnx-gru", "equinox-lstm"])
def test_pushing_and_pulling_many_columns_is_one_product_per_step(name):
    cell = ZOO[name]
    params, x = cell.init(jax.random.key(0)), jnp.ones(D)
    flat = flat_cell(cell, params, normal_form=True)
    n = sum(leaf.size for leaf in jax.tree.leaves(cell.initial_state(params)))
    at, v, frame = (x, None, None, None), jnp.ones(n), jnp.ones((3, n))
    products = [str(jax.make_jaxpr(use)(params, v, frame, at)).count("dot_general") for use in (flat.push, flat.pull)]
    assert products == [3, 3]  # of the input, of the state, and of the columns
