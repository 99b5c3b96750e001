"""The kernel in C++ computes what XLA's own loops do, and leaves alone what it cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import ZOO, CoupledLSTM, Doubled, PeepholeLSTM
from flax import nnx
from oracles import drawn, drawn_states, like, weighted

import seqjax as sj
from benchmarks.hlo import loops
from seqjax import kernels
from seqjax.command import cli
from seqjax.kernels import calls
from seqjax.kernels.build import build, compiler_command
from seqjax.sequence._execution import formulas

pytestmark = pytest.mark.skipif(compiler_command() is None, reason="there is no C++ compiler")
KINDS = {
    "lstm": sj.LSTM,
    "gru": sj.GRU,
    "vanilla": sj.VanillaRNN,
    "relu": partial(sj.VanillaRNN, activation="relu"),
    "identity": partial(sj.VanillaRNN, activation="identity"),
    "learned": lambda d, n: sj.LearnedState(sj.GRU(d, n)),
    "before": partial(sj.GRU, reset="before"),  # two products per step, of which the second reads the first
    "writes": partial(sj.GRU, update="writes"),
    "peephole": PeepholeLSTM,
    "coupled": CoupledLSTM,
}


@pytest.fixture(scope="module", autouse=True)
def installed():
    """The kernel that the installation compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SEQJAX_KERNEL")
        jax.clear_caches()
        assert kernels.available(), kernels.status()
        yield
    jax.clear_caches()


def switched(patch, on):
    """Runs the loops in the kernel, or not at all; returns which kernel was chosen for each loop, or None."""
    chosen = []

    def kernel_for(parts):
        found = formulas.kernel_for(parts) if on else None
        chosen.append(None if found is None else found.name)
        return found

    patch.setattr("seqjax.sequence._execution.run.kernel_for", kernel_for)
    jax.clear_caches()
    return chosen


def both(patch, function, *arguments):
    """The results by the kernel and by XLA, with a compilation of each."""
    return by_each(patch, [(function, True), (function, False)], *arguments)


def by_each(patch, functions, *arguments):
    """The results of functions, each with the kernel or without it, with a compilation of each."""
    results = []
    for function, on in functions:
        chosen = switched(patch, on)
        results.append(jax.block_until_ready(jax.jit(function)(*arguments)))
        assert chosen
        assert all((name is not None) is on for name in chosen)
    switched(patch, True)
    return results


def value_and_gradient(cell, params, xs, state, **options):
    def value(params, xs, state):
        result = sj.unroll(cell, params, xs, state=state, **options)
        return weighted(result), result

    return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(params, xs, state)


def assert_near(got, expected, tolerance=1e-4):
    """Within a share of the largest entry of each array: sums are taken in another order."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(b), initial=0.0)) if np.all(np.isfinite(b)) else 1.0
        np.testing.assert_allclose(a, b, tolerance, tolerance * (scale + 0.01), err_msg=jax.tree_util.keystr(path))


def case(kind, n, batch, time, d=3, dtype="float32"):
    cell = KINDS[kind](d, n)
    params, xs = drawn(cell, dtype, batch, time)
    params = jax.tree.map(lambda leaf: leaf / np.sqrt(n) if leaf.ndim == 2 else leaf, params)
    return cell, params, xs, drawn_states(cell, params, batch)


# Units that do not fill a vector or a panel, rows that do not fill a block, both ways to share the work among threads.
@pytest.mark.parametrize(
    ("kind", "n", "batch", "time", "reverse"),
    [
        ("lstm", 1, 1, 1, False),
        ("lstm", 5, 7, 40, True),
        ("lstm", 33, 20, 300, False),
        ("lstm", 130, 2, 40, False),
        ("gru", 1, 2, 7, True),
        ("gru", 33, 7, 40, False),
        ("gru", 96, 33, 40, True),
        ("gru", 130, 1, 7, False),
        ("vanilla", 1, 33, 7, False),
        ("vanilla", 8, 1, 40, True),
        ("vanilla", 96, 20, 300, False),
        ("vanilla", 130, 7, 7, True),
        ("learned", 5, 2, 7, False),
        ("lstm", 33, 1, 40, True),  # one row, which takes the products of all gates at once
        ("lstm", 130, 1, 7, False),
        ("lstm", 264, 9, 40, False),  # many rows, and too many weights for every thread to read them all
        ("gru", 200, 1, 7, False),  # so many weights that threads share their packing
        ("vanilla", 330, 2, 7, False),
        ("relu", 33, 7, 40, True),
        ("relu", 130, 9, 40, False),
        ("identity", 33, 20, 40, False),
        ("before", 1, 1, 1, False),
        ("before", 33, 20, 300, True),
        ("before", 130, 2, 7, False),  # threads share units, and wait between the products
        ("before", 264, 9, 20, False),
        ("writes", 130, 1, 7, True),
        ("peephole", 5, 7, 40, True),
        ("peephole", 190, 9, 20, False),
        ("coupled", 33, 13, 40, False),
    ],
)
def test_values_and_gradients_are_those_of_xla(kind, n, batch, time, reverse, monkeypatch):
    cell, params, xs, state = case(kind, n, batch, time)
    assert_same_by_all(monkeypatch, partial(value_and_gradient, cell, reverse=reverse), params, xs, state)


FLAGS = np.random.default_rng(0).random((2, 33, 300))


# Rows that are all masked, a step at which no row is valid, and a reset at a masked step are among them.
@pytest.mark.parametrize(
    ("kind", "n", "batch", "time", "options"),
    [
        ("lstm", 5, 7, 9, "mask"),
        ("lstm", 33, 20, 300, "mask reset"),
        ("lstm", 130, 2, 40, "reset reverse"),  # threads share units
        ("lstm", 264, 9, 20, "mask reset reverse"),
        ("gru", 33, 20, 100, "mask reset reverse"),
        ("gru", 130, 1, 20, "mask"),
        ("vanilla", 96, 33, 40, "mask reset"),
        ("relu", 33, 9, 20, "mask reset reverse"),
        ("learned", 9, 6, 300, "mask reset"),  # the initial state has a gradient
        ("learned", 9, 6, 20, "reset reverse"),
        ("before", 130, 3, 20, "mask reset reverse"),
        ("peephole", 9, 20, 300, "mask reset"),
    ],
)
def test_masks_and_resets_are_those_of_xla(kind, n, batch, time, options, monkeypatch):
    cell, params, xs, state = case(kind, n, batch, time)
    function = partial(value_and_gradient, cell, **chosen_flags(options, batch, time))
    assert_same_by_all(monkeypatch, function, params, xs, state)


def chosen_flags(names, batch, time):
    mask = (FLAGS[0, :batch, :time] < 0.7) & (np.arange(batch)[:, None] != 1) & (np.arange(time) != 2)
    flags = {"mask": mask, "reset": FLAGS[1, :batch, :time] < 0.1, "reverse": True}
    return {name: flags[name] for name in names.split()}


@pytest.mark.parametrize(
    ("kind", "n", "batch", "time", "options"),
    [
        ("lstm", 33, 20, 300, "mask reset"),
        ("lstm", 130, 1, 7, ""),
        ("lstm", 190, 9, 20, "reverse"),  # threads share units
        ("gru", 33, 7, 40, "mask reset reverse"),
        ("gru", 130, 1, 7, ""),
        ("vanilla", 96, 33, 40, "reset"),
        ("relu", 33, 9, 20, "mask reset reverse"),
        ("learned", 9, 6, 20, "mask reset"),
        ("before", 33, 7, 40, "mask reset reverse"),
        ("peephole", 130, 1, 7, "reset"),
        ("coupled", 9, 6, 20, "mask"),
    ],
)
def test_float64_has_all_its_digits(kind, n, batch, time, options, x64, monkeypatch):
    cell, params, xs, state = case(kind, n, batch, time, dtype="float64")
    function = partial(value_and_gradient, cell, **chosen_flags(options, batch, time))
    assert_same_by_all(monkeypatch, function, params, xs, state, tolerance=1e-12)


def test_tanh_and_sigmoid_are_accurate_to_the_last_digits_in_float64(x64, monkeypatch):
    chosen = switched(monkeypatch, True)
    x = np.concatenate([s * np.geomspace(1e-300, 700, 4001) for s in (1, -1)] + [np.linspace(-40, 40, 3999)])
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    h = sj.unroll(sj.VanillaRNN(1, 1), sj.VanillaParams(one, zero, jnp.zeros(1)), jnp.asarray(x)[:, None, None])[1]
    np.testing.assert_allclose(h[:, 0, 0], np.tanh(x), rtol=1e-15, atol=0)
    # The gates f = 0, g = 1 and o = 1 leave c = sigmoid(x).
    lstm = sj.LSTMParams(jnp.array([[1.0], [0.0], [0.0], [0.0]]), jnp.zeros((4, 1)), jnp.array([0.0, -1e4, 1e4, 1e4]))
    state, _ = sj.unroll(sj.LSTM(1, 1), lstm, jnp.asarray(x)[:, None, None])
    np.testing.assert_allclose(state.c[:, 0], 1 / (1 + np.exp(-x)), rtol=1e-15, atol=0)
    assert chosen == ["vanilla", "lstm"]


def assert_same_by_all(patch, function, *arguments, tolerance=1e-4):
    """The kernel in chunks and the kernel with saved gates compute what XLA's loops compute."""
    with_gates = partial(function, save="gates")
    in_chunks, saved, expected = by_each(patch, [(function, True), (with_gates, True), (function, False)], *arguments)
    assert_near(in_chunks, expected, tolerance)
    assert_near(saved, expected, tolerance)


MAPPED = {  # networks (2, 3, ...) and batches (2, 3, batch, ...)
    "networks": lambda f, many, xs: jax.vmap(f, (0, None))(first(many), xs[0, 0]),
    "batches": lambda f, many, xs: jax.vmap(f, (None, 0))(first(first(many)), xs[0]),
    "networks with their batches": lambda f, many, xs: jax.vmap(f)(first(many), xs[0]),
    "networks on all batches": lambda f, many, xs: jax.vmap(jax.vmap(f, (0, None)), (None, 0))(first(many), xs[0]),
    "twice": lambda f, many, xs: jax.vmap(jax.vmap(f, (0, None)))(many, xs[:, 0]),
}


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


@pytest.mark.parametrize(
    ("kind", "mapped", "save", "options"),
    [
        ("lstm", "networks", "gates", "mask reset"),
        ("lstm", "batches", "states", "mask reset"),
        ("lstm", "batches", "gates", ""),
        ("lstm", "networks on all batches", "gates", ""),
        ("gru", "networks with their batches", "states", "reset"),
        ("gru", "twice", "gates", "mask"),
        ("vanilla", "networks on all batches", "states", ""),
        ("before", "networks", "states", "mask reset"),
        ("peephole", "twice", "gates", "reset"),
        ("peephole", "batches", "states", "mask"),
    ],
)
def test_mapped_networks_and_batches_are_those_of_xla_without_a_loop(kind, mapped, save, options, monkeypatch):
    cell, (batch, time) = KINDS[kind](3, 9), (4, 24)
    keys = jax.random.split(jax.random.key(0), (2, 3))
    many = jax.vmap(jax.vmap(cell.init))(keys)
    xs = jax.random.normal(jax.random.key(1), (2, 3, batch, time, 3))

    def one(params, xs):
        flags = chosen_flags(options, batch, time)
        return jax.value_and_grad(lambda *given: weighted(sj.unroll(cell, *given, save=save, **flags)), (0, 1))(
            params, xs
        )

    function = partial(MAPPED[mapped], one)
    assert_near(*both(monkeypatch, function, many, xs))
    calls_in_loops = [loop for loop in loops(jax.jit(function).lower(many, xs).compile().as_text()) if loop.steps == 3]
    assert not calls_in_loops  # one iteration per network


# Tokens outside the vocabulary give NaN, and those of masked steps reach nothing.
@pytest.mark.parametrize(
    ("kind", "n", "batch", "time"), [("lstm", 33, 9, 60), ("gru", 130, 2, 40), ("vanilla", 5, 33, 7)]
)
def test_embedded_tokens_are_rows_of_a_table_without_a_product(kind, n, batch, time, monkeypatch):
    inner, params, _, _ = case(kind, n, batch, time)
    cell = sj.stack([sj.Embedding(6, 3), inner])
    params = (sj.EmbeddingParams(jax.random.normal(jax.random.key(0), (6, 3))), params)
    mask = FLAGS[1, :batch, :time] < 0.8
    tokens = jnp.asarray(np.where(mask, (FLAGS[0, :batch, :time] * 6).astype(np.int32), 99))

    def function(params, tokens, save="states"):
        def value(params):
            result = sj.unroll(cell, params, tokens, mask=mask, save=save)
            return weighted(result), result

        return jax.value_and_grad(value, has_aux=True)(params)

    assert_same_by_all(monkeypatch, function, params, tokens)
    assert f"tensor<{batch * time}x3xf32>" not in jax.jit(function).lower(params, tokens).as_text()
    row, t = np.argwhere(mask)[3]
    for wrong in (6, -1):
        (_, (_, outputs)), _ = jax.jit(partial(function, save="gates"))(params, tokens.at[row, t].set(wrong))
        assert np.isnan(outputs[row, t]).all()
        assert np.isfinite(np.delete(outputs, row, axis=0)).all()


def test_a_trajectory_and_nan_behind_a_mask_or_a_reset_are_those_of_xla(monkeypatch):
    cell, params, xs, state = case("lstm", 9, 6, 12)
    mask, reset = FLAGS[0, :6, :12] < 0.7, FLAGS[1, :6, :12] < 0.2
    xs = jnp.where(mask[..., None], xs, jnp.nan)
    state = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), state)
    reset[0, 0] = True

    def gradient(params, xs):
        def value(params, xs):
            states = sj.trajectory(cell, params, xs, state=state, mask=mask, reset=reset)
            return weighted(jax.tree.map(lambda leaf: leaf[:, 1:], states)), states  # s_0 has a NaN

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, xs)

    got, expected = both(monkeypatch, gradient, params, xs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got[1]))
    assert_near(got[1], expected[1])
    np.testing.assert_array_equal(np.isnan(got[0][1].h), np.isnan(expected[0][1].h))


def states_of_kernel(batch, valid=None, n=37, time=30):
    """The states of an LSTM from drives that are drawn row by row, by a direct call of the kernel."""
    keys = jax.random.split(jax.random.key(0), 33)[:batch]
    drives = jax.vmap(lambda key: jax.random.normal(key, (time, 4 * n)), out_axes=1)(keys)
    W = jax.random.normal(jax.random.key(1), (4 * n, n)) / 6
    loop = calls.Loop("lstm", W, jnp.ones(4 * n), valid=valid)
    return jax.jit(partial(calls.run_forward, loop))([jnp.zeros((batch, n))] * 2, drives)


def test_a_row_does_not_depend_on_the_rows_beside_it_to_the_last_bit():
    whole = states_of_kernel(33)
    masked = states_of_kernel(33, jnp.asarray(FLAGS[0, :30, :33] < np.linspace(0, 1.5, 33)))
    for batch in (1, 2, 5, 20):
        for a, b in zip(states_of_kernel(batch), whole, strict=True):
            np.testing.assert_array_equal(a, b[:, :batch])
    for a, b in zip(masked, whole, strict=True):
        np.testing.assert_array_equal(a[:, 23:], b[:, 23:])  # rows without a masked step


ONE_PROCESS = """
import os, sys
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[: int(sys.argv[1])]))
import hashlib, pathlib, jax, jax.numpy as jnp, numpy as np, seqjax as sj
if folder := os.environ.get("LIBRARY_BY_CLANG"):
    found, _ = sj.kernels._load(pathlib.Path(folder))
    sj.kernels.loaded = lambda: found
digest, total = hashlib.sha256(), []
for n, batch in ((64, 33), (264, 9)):
    cell = sj.LSTM(1, n)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (batch, 60, 1))
    reset = np.random.default_rng(0).random((batch, 60)) < 0.1
    for save in ("states", "gates"):
        loss = lambda params: (sj.unroll(cell, params, xs, reset=reset, save=save)[1] ** 2).sum()
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        total += [float(value), float(jnp.sqrt((gradient.W_hh**2).sum()))]
    digest.update(np.asarray(sj.unroll(cell, params, xs, reset=reset)[1]).tobytes())
    digest.update(np.asarray(gradient.W_hh).tobytes())  # from saved gates, without a product of XLA
print(sj.kernels.status(), digest.hexdigest(), *total, sep="|")
"""


def in_one_process(threads=2, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "SEQJAX_KERNEL"} | environment
    result = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, str(threads)], env=environment, capture_output=True, text=True, check=True
    )
    status, digest, *total = result.stdout.strip().split("|")
    return status, digest, [float(number) for number in total], result.stderr


def test_every_variant_of_this_processor_computes_what_xla_does_with_any_number_of_threads():
    expected = in_one_process(SEQJAX_KERNEL="off")
    assert expected[0].startswith("XLA runs the loops: SEQJAX_KERNEL=off")
    assert kernels.loaded().supported
    for variant in kernels.loaded().supported:
        status, digest, total, _ = in_one_process(SEQJAX_KERNEL=variant)
        assert status == f"{variant} of the compiled kernel"
        np.testing.assert_allclose(total, expected[2], rtol=1e-4)
    assert digest == in_one_process(threads=1, SEQJAX_KERNEL=variant)[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang")
def test_a_library_by_clang_computes_what_xla_does(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "clang++")
    build(jax.ffi.include_dir(), tmp_path)
    monkeypatch.setenv("LIBRARY_BY_CLANG", str(tmp_path))
    expected = in_one_process(SEQJAX_KERNEL="off")
    for variant in kernels.loaded().supported:
        status, _, total, _ = in_one_process(SEQJAX_KERNEL=variant)
        assert status == f"{variant} of the compiled kernel"
        np.testing.assert_allclose(total, expected[2], rtol=1e-4)


def test_a_word_that_is_no_variant_is_said_and_xla_runs_the_loops():
    status, _, _, warned = in_one_process(SEQJAX_KERNEL="x86-64-v9")
    for text in (status, warned):
        assert "expected SEQJAX_KERNEL to be one of off, x86-64" in text.replace("neon", "x86-64")
    assert "got 'x86-64-v9'" in warned


UNITWISE = [
    *("lstm-bfloat16", "gru-after-writes", "gru-before", "peephole-lstm", "coupled-lstm", "complex-matrix"),
    *("symmetric", "rematerialized", "multiplicative", "learned-time", "spiking"),
    *("lstm-subclass", "stack", "stack-of-stacks", "haiku-lstm"),
]


@pytest.mark.parametrize("name", UNITWISE)
def test_any_cell_that_acts_unit_by_unit_runs_in_the_kernel(name, x64, monkeypatch):
    cell = ZOO[name]
    dtype = "float32" if "bfloat16" in name else "float64"
    params, xs = drawn(cell, dtype, 7, 20)
    function = partial(value_and_gradient, cell, **chosen_flags("mask reset", 7, 20))
    tolerance = 1e-11 if dtype == "float64" else 2e-2
    assert_near(*both(monkeypatch, function, params, xs, drawn_states(cell, params, 7)), tolerance=tolerance)


class Elementwise(sj.VanillaRNN):
    """Has every elementwise function that the kernel knows, a chain of three products, and an output of its own."""

    def step(self, params, state, x):
        W, h = params.W_hh, state.h
        a = params.W_xh @ x + params.b_h
        b = jnp.tanh(W @ (jnp.exp(-(h**2)) * a) - h) / (1.5 + jnp.abs(a))
        c = jnp.sqrt(1 + b**2) + jax.lax.rsqrt(2 + jnp.square(h)) + jnp.clip(b, -0.3, 0.4) - jax.nn.relu(a)
        d = jnp.where((W @ (b + h) > c) & ~(c != c) | (h == 2), jnp.maximum(c, a), jnp.minimum(-c, 0.1 * a**3))
        new = jax.nn.silu(W @ jax.nn.sigmoid(d)) + jax.nn.leaky_relu(d) / 4 + jnp.where(d <= 0.2, jax.nn.relu6(d), 0.1)
        return sj.VanillaState(jnp.where(new >= 3, 3.0, new)), jnp.concatenate([d * a, jnp.where(c < d, c, b)])


@pytest.mark.parametrize(("n", "batch", "dtype"), [(5, 7, "float64"), (130, 2, "float32"), (1, 1, "float64")])
def test_every_instruction_computes_its_function_and_its_derivative(n, batch, dtype, monkeypatch):
    with jax.enable_x64(dtype == "float64"):
        cell = Elementwise(3, n)
        params, xs = drawn(cell, dtype, batch, 12)
        params = jax.tree.map(lambda leaf: leaf / np.sqrt(n).astype(dtype) if leaf.ndim == 2 else leaf, params)
        function = partial(value_and_gradient, cell, **chosen_flags("mask reset reverse", batch, 12))
        assert sj.explain(cell, params, xs[0, 0]).loops[0].kernel == "unitwise"
        state = drawn_states(cell, params, batch)
        assert_near(*both(monkeypatch, function, params, xs, state), tolerance=1e-11 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize(
    "cell",
    [
        sj.LSTM(3, 33, dtype="bfloat16"),
        sj.GRU(3, 20, dtype="bfloat16"),
        sj.GRU(3, 20, reset="before", compute_dtype="bfloat16"),
        sj.VanillaRNN(3, 9, dtype="bfloat16"),
    ],
)
def test_bfloat16_is_as_close_to_exact_numbers_as_with_xla(cell, monkeypatch):
    params = cell.init(jax.random.key(0))
    dtype = params.W_hh.dtype
    xs = jax.random.normal(jax.random.key(1), (5, 40, 3), dtype)
    exact = type(cell)(3, cell.hidden_size, **({"reset": cell.reset} if isinstance(cell, sj.GRU) else {}))

    def function(cell, params, xs):
        def value(params, xs):
            state, outputs = sj.unroll(cell, params, xs)
            return jnp.sum(outputs.astype("float32") ** 2), (state, outputs)

        found = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, xs)
        assert {leaf.dtype for leaf in jax.tree.leaves(found[1])} == {dtype}
        return found

    kernel, by_xla = both(monkeypatch, partial(function, cell), params, xs)
    params, xs = jax.tree.map(lambda leaf: leaf.astype("float32"), (params, xs))
    dtype = np.dtype("float32")
    expected = jax.tree.leaves(function(exact, params, xs))
    for got, other, leaf in zip(jax.tree.leaves(kernel), jax.tree.leaves(by_xla), expected, strict=True):
        errors = [np.abs(each.astype("float32") - leaf).max() / np.abs(leaf).max() for each in (got, other)]
        assert errors[0] < max(2 * errors[1], 0.01)


class Unknown(sj.VanillaRNN):
    """Its activation is no instruction."""

    def step(self, params, state, x):
        h = jnp.sin(params.W_xh @ x + params.W_hh @ state.h)
        return sj.VanillaState(h), h


@pytest.mark.parametrize(
    ("cell", "dtype", "reason"),
    [
        (Unknown(3, 4), "float32", "it has no instruction for sin at tests/test_native_loops.py:"),
        (sj.LSTM(3, 4), "float16", "it computes in float16, and the kernel in float64, or in float32 and bfloat16"),
        (ZOO["min-gru"], "float32", "no product of a step reads the state"),
        (ZOO["layer-norm-lstm"], "float32", "the step mixes units (reduce_sum at tests/cells.py:"),
        (ZOO["delay-line"], "float32", "the leaves of its state are not vectors of one size"),
    ],
)
def test_explain_says_why_no_kernel_runs_a_loop(cell, dtype, reason, monkeypatch):
    params, xs = drawn(cell, dtype, 2, 5)
    loop = sj.explain(cell, params, xs[0, 0]).loops[0]
    assert loop.kernel is None
    assert str(loop.no_kernel).startswith(reason)
    assert f"kernel: none, so XLA runs the loop: {reason}" in str(loop)
    chosen = switched(monkeypatch, True)
    jax.eval_shape(partial(sj.unroll, cell), params, xs)
    assert None in chosen or loop.plain


@pytest.mark.parametrize("kind", ["lstm", "gru", "vanilla", "relu", "before"])
def test_no_input_is_too_large_and_nan_and_infinity_pass(kind, monkeypatch):
    cell, params, xs, state = case(kind, 9, 6, 5)
    payload = np.array(0x7FC00001, np.uint32).view(np.float32)
    bad = np.array([1e4, -1e4, np.inf, -np.inf, np.nan, payload], np.float32)
    xs = jnp.asarray(np.where(np.arange(5)[:, None] == 2, bad[:, None, None], xs))
    unroll = lambda params, xs, state: sj.unroll(cell, params, xs, state=state)  # noqa: E731
    got, expected = both(monkeypatch, unroll, params, xs, state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)
    assert np.all(np.isfinite(got[1][:2]))
    assert np.all(np.isnan(got[1][4:, 2:]))
    # A NaN whose bits are not the usual ones, in one gate and one unit alone.
    for row in range(params.b_h.size):
        one = params._replace(b_h=params.b_h.at[row].set(payload))
        (_, outputs), unit = unroll(one, xs[:2, :1], jax.tree.map(lambda leaf: leaf[:2], state)), row % 9
        assert np.all(np.isnan(outputs[..., unit]))


def test_small_numbers_are_not_flushed_to_zero(monkeypatch):
    chosen = switched(monkeypatch, True)
    cell, params, xs, state = case("lstm", 5, 2, 7)
    jax.block_until_ready(value_and_gradient(cell, params, xs, state))
    assert set(chosen) == {"lstm"}
    assert np.float32(1e-40) * np.float32(1) != 0
    assert np.full(100, 1e-40, np.float32).sum() != 0


def test_each_type_and_convention_runs_in_the_loops_that_support_it(monkeypatch):
    def chosen(cell, dtype="float32", change=lambda params: params, **options):
        names = switched(monkeypatch, True)
        with jax.enable_x64(dtype == "float64"):
            params, xs = drawn(cell, dtype, 2, 5)
            jax.make_jaxpr(jax.grad(lambda p: weighted(sj.unroll(cell, p, xs, **options))))(change(params))
        return set(names)

    flags = np.ones((2, 5), bool)
    cell = sj.LSTM(3, 4)
    assert chosen(cell) == {"lstm"}
    assert chosen(cell, "float64") == {"lstm"}
    assert chosen(cell, "bfloat16") == chosen(sj.LSTM(3, 4, compute_dtype="bfloat16")) == {"unitwise"}
    assert chosen(cell, "float16") == {None}
    assert chosen(cell, mask=flags) == chosen(cell, reset=flags) == chosen(cell, mask=flags, reset=flags) == {"lstm"}
    assert chosen(cell, kernel=False) == set()
    assert chosen(sj.GRU(3, 4, update="writes")) == {"unitwise"}
    assert chosen(sj.VanillaRNN(3, 4, activation="relu")) == {"relu"}
    assert chosen(sj.GRU(3, 4, reset="before")) == {"unitwise"}
    with jax.numpy_dtype_promotion("standard"):
        short = lambda p: p._replace(W_xh=p.W_xh.astype("bfloat16"), b_h=p.b_h.astype("bfloat16"))  # noqa: E731
        assert chosen(cell, change=short) == {"lstm"}  # the sums that the loop reads are float32


class UsersLSTM:
    """Other names, weights (in, out), other orders of the gates and of the state."""

    input_shape = (3,)

    def init(self, key):
        K, R, b = jax.random.normal(key, (3, 4, 24)) / 3
        return {"K": K[:3], "R": jnp.tile(K, (2, 1))[:6] + R[:1], "bias": b[0]}

    def initial_state(self, params):
        return {"cell": jnp.zeros(6), "hidden": jnp.zeros(6)}

    def step(self, params, state, x):
        a = state["hidden"] @ params["R"] + x @ params["K"] + params["bias"]
        o, g, f, i = a[:6], a[6:12], a[12:18], a[18:]
        c = jnp.tanh(g) * jax.nn.sigmoid(i) + state["cell"] * jax.nn.sigmoid(f)
        h = jnp.tanh(c) * jax.nn.sigmoid(o)
        return {"cell": c, "hidden": h}, h


class UsersGRU:
    """The update gate first, its mix written in another way, and the bias of the candidate apart."""

    input_shape = (3,)

    def init(self, key):
        W, U = jax.random.normal(key, (2, 15, 5)) / 3
        return {"W": W[:, :3], "U": U, "b": U[:, 0], "b_n": W[:5, 3]}

    def initial_state(self, params):
        return jnp.zeros(5)

    def step(self, params, h, x):
        from_x, (u_z, u_r, u_n) = params["W"] @ x + params["b"], jnp.split(params["U"] @ h, 3)
        z, r = jax.nn.sigmoid(from_x[:5] + u_z), jax.nn.sigmoid(from_x[5:10] + u_r)
        n = jnp.tanh(from_x[10:] + r * (u_n + params["b_n"]))
        h = n + z * (h - n)
        return h, h


class AddedCell(UsersLSTM):
    """One gate reads c: another formula with the same arrays."""

    def step(self, params, state, x):
        a = state["hidden"] @ params["R"] + x @ params["K"] + params["bias"]
        o, g, f, i = a[:6], a[6:12], a[12:18] + state["cell"], a[18:]
        c = jnp.tanh(g) * jax.nn.sigmoid(i) + state["cell"] * jax.nn.sigmoid(f)
        h = jnp.tanh(c) * jax.nn.sigmoid(o)
        return {"cell": c, "hidden": h}, h


class TwiceTheDrive(sj.VanillaRNN):
    """Adds the drive to itself."""

    def step(self, params, state, x):
        h = jnp.tanh(2 * (params.W_xh @ x) + params.W_hh @ state.h)
        return sj.VanillaState(h), h


class BroadcastDrive(sj.VanillaRNN):
    """Every unit has the same drive."""

    def step(self, params, state, x):
        h = jnp.tanh((params.W_xh @ x).sum() + params.W_hh @ state.h)
        return sj.VanillaState(h), h


@jax.custom_jvp
def relu(x):
    """The values and the name of `jax.nn.relu`, and another derivative."""
    return jnp.maximum(x, 0)


relu.defjvps(lambda t, _, x: t * jax.nn.sigmoid(x))


class Surrogate(sj.VanillaRNN):
    """Its activation has a surrogate derivative."""

    def step(self, params, state, x):
        h = relu(params.W_xh @ x + params.W_hh @ state.h + params.b_h)
        return sj.VanillaState(h), h


FOREIGN_KERNELS = {
    "linen LSTM": (lambda: sj.from_linen(nn.LSTMCell(7), 3), "lstm"),
    "linen fused LSTM": (lambda: sj.from_linen(nn.OptimizedLSTMCell(7), 3), "lstm"),
    "linen GRU": (lambda: sj.from_linen(nn.GRUCell(7), 3), "gru"),
    "linen simple": (lambda: sj.from_linen(nn.SimpleCell(7), 3), "vanilla"),
    "nnx LSTM": (lambda: sj.from_nnx(nnx.LSTMCell, 3, 7), "lstm"),
    "nnx GRU": (lambda: sj.from_nnx(nnx.GRUCell, 3, 7), "gru"),
    "equinox LSTM": (lambda: sj.from_equinox(eqx.nn.LSTMCell, 3, 7), "lstm"),
    "equinox GRU": (lambda: sj.from_equinox(eqx.nn.GRUCell, 3, 7), "gru"),
    "user's LSTM": (UsersLSTM, "lstm"),
    "user's GRU": (UsersGRU, "gru"),
    "drive twice": (lambda: TwiceTheDrive(3, 7), "vanilla"),
}


@pytest.mark.parametrize("name", FOREIGN_KERNELS)
def test_a_cell_with_the_kernels_formulas_runs_in_it_whoever_wrote_it(name, monkeypatch):
    build, expected = FOREIGN_KERNELS[name]
    cell = build()
    params, xs = drawn(cell, "float32", 2, 40)
    params = jax.tree.map(lambda leaf: leaf / 2, params)
    state = drawn_states(cell, params, 2)
    assert sj.explain(cell, params, xs[0, 0]).loops[0].kernel == expected
    assert_near(*both(monkeypatch, partial(value_and_gradient, cell), params, xs, state))


@pytest.mark.parametrize(
    "cell",
    [
        AddedCell(),
        BroadcastDrive(3, 7),
        Surrogate(3, 7),
        sj.GRU(3, 4, update="writes"),
        sj.GRU(3, 4, reset="before"),
    ],
)
def test_a_cell_with_other_formulas_never_runs_in_loops_with_formulas_of_their_own(cell, monkeypatch):
    params, xs = drawn(cell, "float32", 2, 40)
    assert sj.explain(cell, params, xs[0, 0]).loops[0].kernel == "unitwise"
    state = drawn_states(cell, params, 2)
    assert_near(*both(monkeypatch, partial(value_and_gradient, cell), params, xs, state))


def test_a_subclass_with_another_step_leaves_the_kernel_behind(monkeypatch):
    class Silent(sj.LSTM):
        def step(self, params, state, x):
            state, output = super().step(params, state, x)
            return state, 0 * output

    cell, params, xs, _ = case("lstm", 5, 2, 7)
    _, plain = sj.unroll(cell, params, xs)
    chosen = switched(monkeypatch, True)
    given = sj.LearnedStateParams(params, sj.LSTMState(jnp.zeros(5), jnp.zeros(5)))
    for doubled, p in ((Doubled(3, 5), params), (sj.LearnedState(Doubled(3, 5)), given)):
        assert_near(sj.unroll(doubled, p, xs)[1], 2 * plain)
    for silent, p in ((Silent(3, 5), params), (sj.LearnedState(Silent(3, 5)), given)):
        assert not np.any(sj.unroll(silent, p, xs)[1])
    assert set(chosen) == {"unitwise"}


@pytest.mark.parametrize("save", ["states", "gates"])
def test_it_runs_under_vmap_in_scans_and_to_the_second_derivative(save, monkeypatch):
    cell, params, xs, _ = case("lstm", 5, 2, 7)
    loss = lambda p, xs: weighted(sj.unroll(cell, p, xs, save=save))  # noqa: E731
    direction = like(params, "float32", 7)

    def everything(params, xs):
        many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
        pair = jnp.stack([xs, -xs, xs + 1])
        gradient = jax.grad(loss)
        return (
            jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(many, pair),
            jax.jvp(partial(gradient, xs=xs), (params,), (direction,))[1],
            jax.grad(lambda p: weighted(gradient(p, xs)))(params),
            jax.lax.scan(lambda p, x: (jax.tree.map(lambda a, g: a - 0.01 * g, p, gradient(p, x)), ()), params, pair)[
                0
            ],
        )

    assert_near(*both(monkeypatch, everything, params, xs), tolerance=1e-3)


def by_lax_scan(cell, params, xs, state, **_):
    """The unroll as plain JAX."""
    step = jax.vmap(cell.step, (None, 0, 0))
    state, outputs = jax.lax.scan(partial(step, params), state, jnp.swapaxes(xs, 0, 1))
    return state, jnp.swapaxes(outputs, 0, 1)


# A scan and `jax.checkpoint` evaluate the loop in part, and then JAX drops custom rules of derivatives.
@pytest.mark.parametrize(
    ("kind", "on", "save"),
    [("lstm", True, "states"), ("gru", True, "gates"), ("lstm", False, "states"), ("before", True, "states")],
)
def test_second_derivatives_inside_scans_and_checkpoints_are_those_of_lax_scan(kind, on, save, x64, monkeypatch):
    cell, params, xs, state = case(kind, 5, 2, 4, dtype="float64")
    pair, v = jnp.stack([xs, -xs]), like(params, "float64", 7)

    def everything(unroll, params, pair, state, v):
        def body(p, state, xs):
            state, outputs = unroll(cell, p, xs, state=state, save=save)
            return state, weighted(outputs)

        def in_scan(body, p):
            return jnp.sum(jax.lax.scan(partial(body, p), state, pair)[1])

        def along(f):
            return jax.jvp(jax.grad(f), (params,), (v,))[1]

        checkpointed = jax.checkpoint(body)
        return {
            "scan": along(partial(in_scan, body)),
            "checkpoint": along(lambda p: checkpointed(p, state, pair[0])[1]),
            "scan of checkpoint": along(partial(in_scan, checkpointed)),
            "reverse over reverse": jax.grad(lambda p: weighted(jax.grad(partial(in_scan, checkpointed))(p)))(params),
            "vmap": jax.vmap(lambda scale: along(lambda p: scale * in_scan(checkpointed, p)))(jnp.arange(3.0)),
            "vmap over networks": jax.vmap(lambda p: jax.jvp(jax.grad(partial(in_scan, checkpointed)), (p,), (v,))[1])(
                jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
            ),
            "hessian": jax.hessian(lambda b: in_scan(checkpointed, params._replace(b_h=b)))(params.b_h),
        }

    chosen = switched(monkeypatch, on)
    got = jax.jit(partial(everything, sj.unroll))(params, pair, state, v)
    expected = jax.jit(partial(everything, by_lax_scan))(params, pair, state, v)
    assert {name is not None for name in chosen} == {on}
    for name in expected:
        assert_near(got[name], expected[name], 1e-11)


def test_calls_from_many_threads_agree(monkeypatch):
    """Calls share XLA's threads, and none waits for a thread that another one holds."""
    switched(monkeypatch, True)
    runs = []
    for n, batch in ((130, 2), (64, 16)):  # sharing units, and sharing rows
        cell, params, xs, state = case("lstm", n, batch, 200)
        runs.append(partial(jax.jit(partial(value_and_gradient, cell)), params, xs, state))
    alone = [run() for run in runs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: runs[i % 2](), range(24)))
    for i, result in enumerate(results):
        assert_near(result, alone[i % 2])


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "seqjax.kernels", *arguments],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("nonexistent", "expected a C++17 compiler, found no nonexistent"), ("false", "false failed")],
)
def test_what_hinders_a_compilation_is_said_and_leaves_the_library_alone(compiler, said):
    before = kernels.digest(kernels.FOLDER / kernels.LIBRARY)
    result = command(CXX=compiler)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(said)
    assert "Traceback" not in result.stderr
    assert kernels.digest(kernels.FOLDER / kernels.LIBRARY) == before


def test_a_folder_that_cannot_be_written_and_an_unknown_processor_are_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="expected a folder that can be written"):
        build(jax.ffi.include_dir(), tmp_path / "file")
    with pytest.raises(RuntimeError, match="expected one of the processors x86_64, aarch64, got sparc"):
        build(jax.ffi.include_dir(), tmp_path, "sparc")


def test_the_command_takes_no_arguments():
    for argument, code, said in (("--help", 0, "$CXX"), ("--hlep", 2, "--hlep")):
        result = command(argument)
        assert (result.returncode, said in result.stdout + result.stderr) == (code, True)
        assert "compiled /" not in result.stdout


def test_a_missing_damaged_or_old_library_is_not_loaded(tmp_path):
    assert "not installed" in kernels._load(tmp_path)[0].reason
    digests, library = (tmp_path / name for name in (kernels.DIGESTS, kernels.LIBRARY))
    contents = [(kernels.FOLDER / path.name).read_bytes() for path in (digests, library)]
    of_sources, of_library = contents[0].decode().split()
    for written, size, unexpected, said in (
        (of_sources, None, False, "not installed"),  # a file that was cut short
        (f"{of_sources} {of_library}", 5000, True, "is damaged; python -m seqjax.kernels compiles it anew"),
        (f"{of_library} {of_library}", None, True, "was compiled from other sources"),
    ):
        digests.write_text(written)
        library.write_bytes(contents[1][:size])
        found, is_unexpected = kernels._load(tmp_path)
        assert (found.variant, is_unexpected) == (None, unexpected)
        assert said in found.reason
    library.write_text("not a library")
    digests.write_text(f"{of_sources} {kernels.digest(library)}")
    found, is_unexpected = kernels._load(tmp_path)
    assert is_unexpected
    assert found.reason.startswith("the kernel does not load (")


def test_the_environment_switches_it_off_at_any_time(monkeypatch):
    assert kernels.available()
    monkeypatch.setenv("SEQJAX_KERNEL", "off")
    assert not kernels.available()
    assert kernels.status() == "XLA runs the loops: SEQJAX_KERNEL=off switches the kernel off"


def test_info_names_the_variant_that_runs_and_the_command_prints_it(capfd):
    found = sj.info()
    assert found.kernel == kernels.loaded().variant == found.variants[0]
    assert found.versions["jax"] == jax.__version__
    assert cli.run(["info"]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed == str(found).splitlines()
    assert printed[-1].startswith(f"kernel    {found.kernel} of the compiled kernel")
