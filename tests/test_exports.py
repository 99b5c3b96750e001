"""Exported functions: another process runs them from bytes, for any batch and time, and gives the values of a call."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from cells import EVERY, D, N
from errors import raises
from oracles import assert_close, drawn

import seqjax as sj
from seqjax.interop.export import MAGIC
from seqjax.kernels.build import compiler_command
from seqjax.training.loop import AT_ONCE, update_once

BT = "b, t, ..."
NEEDS_KERNEL = pytest.mark.skipif(compiler_command() is None, reason="there is no C++ compiler")
SIZES = [(1, 1), (3, 70)]

SETUP = """
import sys, pathlib
from functools import partial
import jax, jax.numpy as jnp, optax, seqjax as sj
cell = sj.stack([sj.Embedding(11, 3), sj.LSTM(3, 9)])
model = sj.Model(cell, sj.Categorical(9, 11))
params = model.init(jax.random.key(0))
optimizer = optax.adam(1e-2)
trained = sj.training.start(model, optimizer, params=params)
def program(data):
    return jax.export.deserialize(bytearray(data.split(b"\\n", 2)[2])).mlir_module()
def sequences(batch, time):
    return jax.random.randint(jax.random.key(1), (batch, time), 0, 11)
def states(batch):
    return jax.tree.map(lambda leaf: jnp.ones((batch, *leaf.shape)), cell.initial_state(params.cell))
def update(state, xs, ys):
    from seqjax.training.loop import AT_ONCE, update_once
    return update_once(model, optimizer, sj.every_step, 1.0, AT_ONCE, state, (xs, ys, None, None), None)
xs, ys, s = sequences(2, 3), sequences(2, 3), states(2)
functions = {
    "unroll": (partial(sj.unroll, cell), (params.cell, xs), ("...", "b, t")),
    "step": (jax.vmap(cell.step, (None, 0, 0)), (params.cell, s, xs[:, 0]), ("...", "b, ...", "b")),
    "closed": (lambda xs: sj.unroll(cell, params.cell, xs)[1], (xs,), ("b, t",)),
    "score": (partial(sj.log_probs, model), (params, xs, ys), ("...", "b, t", "b, t")),
    "update": (update, (trained, xs, ys), ("...", "b, t", "b, t")),
}
"""
EXPORTS = """
for name, (function, arguments, shapes) in functions.items():
    data = sj.export(function, *arguments, shapes=shapes)
    assert ("@seqjax_forward" in program(data)) is (sys.argv[2] == "kernel" and name != "step"), name
    (pathlib.Path(sys.argv[1]) / name).write_bytes(data)
print(0.0)
"""
RUNS = """
for batch, time in [(1, 1), (3, 70)]:
    xs, ys, s = sequences(batch, time), sequences(batch, time), states(batch)
    arguments = {"unroll": (params.cell, xs), "step": (params.cell, s, xs[:, 0]), "closed": (xs,),
                 "score": (params, xs, ys), "update": (trained, xs, ys)}
    for name, (function, _, _) in functions.items():
        found = sj.load_exported((pathlib.Path(sys.argv[1]) / name).read_bytes())(*arguments[name])
        expected = jax.jit(function)(*arguments[name])
        assert jax.tree.structure(found) == jax.tree.structure(expected), name
        print(max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (found, expected)))))
"""


def python(code: str, *arguments: object, **environment: str) -> list[float]:
    """Runs code in a new process. Returns the numbers that it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in ("SEQJAX_KERNEL", "XLA_FLAGS")}
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [*map(float, result.stdout.split())]


@pytest.mark.parametrize("how", [pytest.param("kernel", marks=NEEDS_KERNEL), "off"])
def test_a_new_process_runs_a_step_an_unroll_a_score_and_an_update_for_any_batch_and_time(tmp_path, how):
    environment = {} if how == "kernel" else {"SEQJAX_KERNEL": "off"}
    python(SETUP + EXPORTS, tmp_path, how, **environment)
    errors = python(SETUP + RUNS, tmp_path, **environment)
    assert len(errors) == 5 * len(SIZES)
    assert max(errors) < 1e-5


@pytest.fixture(autouse=True)
def untyped():
    """Without the checks of annotations: the size of an exported axis is a symbol and not an integer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def parts(data):
    """The entries of the first line, and the program."""
    line, _, program = data.removeprefix(MAGIC).partition(b"\n")
    return json.loads(line), program


def changed(data, program=None, **entries):
    """The bytes with another program or other entries, and the digest that belongs to them."""
    header, old = parts(data)
    program = old if program is None else program
    header |= {"sha256": hashlib.sha256(program).hexdigest()} | entries
    return MAGIC + json.dumps(header).encode() + b"\n" + program


def calls_kernel(data):
    return "@seqjax_" in jax.export.deserialize(bytearray(parts(data)[1])).mlir_module()


@NEEDS_KERNEL
def test_an_export_for_another_platform_holds_no_kernel_even_after_a_call_with_it(monkeypatch):
    monkeypatch.delenv("SEQJAX_KERNEL")
    cell = sj.LSTM(D, 13)  # a size of its own, because the program of another test would be found without the kernel
    params, xs = drawn(cell, "float32")
    run = jax.jit(partial(sj.unroll, cell))
    assert "seqjax_forward" in run.lower(params, xs).as_text()
    assert calls_kernel(sj.export(run, params, xs))
    assert not calls_kernel(sj.export(run, params, xs, kernel=False))
    for platforms in (["cuda"], ["cpu", "cuda"], ["tpu"]):
        assert not calls_kernel(sj.export(run, params, xs, platforms=platforms))
    assert "seqjax_forward" in run.lower(params, xs).as_text()


@NEEDS_KERNEL
def test_a_kernel_that_is_off_or_of_other_sources_is_refused(monkeypatch):
    monkeypatch.delenv("SEQJAX_KERNEL")
    cell = sj.LSTM(D, N)
    data = sj.export(partial(sj.unroll, cell), *drawn(cell, "float32"))
    with raises(ValueError, "expected the compiled kernel of the export, got another version of it"):
        sj.load_exported(changed(data, kernel="0"))
    monkeypatch.setenv("SEQJAX_KERNEL", "off")
    with raises(ValueError, "expected the compiled kernel of the export", "SEQJAX_KERNEL=off", "kernel=False"):
        sj.load_exported(data)


@pytest.mark.parametrize("name", ["vanilla", "gru-before", "learned-stack", "user", "linen-lstm", "nnx-simple"])
def test_every_kind_of_cell_runs_for_any_batch_and_time(name):
    cell = EVERY[name]
    params, xs = drawn(cell, "float32")
    flags = jnp.ones(xs.shape[:2], bool)

    def run(params, xs, mask, reset):
        return sj.unroll(cell, params, xs, mask=mask, reset=reset, reverse=True)

    call = sj.load_exported(sj.export(run, params, xs, flags, flags, shapes=("...", BT, BT, BT)))
    for batch, time in SIZES:
        xs = jax.random.normal(jax.random.key(2), (batch, time, D))
        mask, reset = (jax.random.bernoulli(jax.random.key(k), 0.7, (batch, time)) for k in (3, 4))
        assert_close(call(params, xs, mask, reset), run(params, xs, mask, reset))


GRU = sj.GRU(D, N)
HEAD = sj.Categorical(N, 3)


def gradient(params, xs, **options):
    return jax.grad(lambda p: (sj.unroll(GRU, p, xs, **options)[1] ** 2).sum())(params)


def chunked_loss(params, xs):
    targets = jnp.zeros(xs.shape[:2], int)
    return sj.every_step(HEAD, HEAD.init(jax.random.key(5)), sj.unroll(GRU, params, xs)[1], targets, None)


DERIVED = {
    "gradient": (gradient, "b, t, ..."),
    "gradient with saved gates": (partial(gradient, save="gates"), "b, t, ..."),
    "gradient of a known time": (gradient, "b, ..."),
    "gradient of a known batch": (gradient, "_, t, ..."),
    "checkpoints": (partial(gradient, checkpoint_every=7), "b, 7*n, ..."),
    "trajectory": (partial(sj.trajectory, GRU), "b, t, ..."),
    "gates": (partial(sj.gates, GRU), "b, t, ..."),
    "state gradients": (lambda p, xs: sj.state_gradients(GRU, p, xs, lambda s: s.h[:, -1].sum()), "b, t, ..."),
    "truncated": (lambda p, xs: sj.truncated_grad(GRU, p, xs, lambda o: (o**2).sum(), 5), "b, t, ..."),
    "parallel": (lambda p, xs: sj.unroll_parallel(GRU, p, xs)[0], "b, t, ..."),
    "parallel diagonal": (lambda p, xs: sj.unroll_parallel(GRU, p, xs, method=sj.QuasiELK())[0], "b, t, ..."),
    "loss": (chunked_loss, "b, t, ..."),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_function_of_an_unroll_runs_for_any_batch_and_time(name):
    function, shape = DERIVED[name]
    params, _ = drawn(GRU, "float32")
    call = sj.load_exported(sj.export(function, params, jnp.zeros((2, 70, D)), shapes=("...", shape)))
    for batch, time in [(2, 70)] if "known" in name else [(2, 7), (1, 70)]:
        xs = jax.random.normal(jax.random.key(2), (batch, time, D))
        assert_close(call(params, xs), function(params, xs))


def test_the_exponent_of_one_short_chunk_and_of_many_is_that_of_a_call():
    def run(params, xs):
        return sj.unroll_parallel(GRU, params, xs)[1].exponent

    params, _ = drawn(GRU, "float32")
    call = sj.load_exported(sj.export(run, params, jnp.zeros((1, 1, D)), shapes=("...", BT)))
    xs = jax.random.normal(jax.random.key(2), (2, 200, D))
    for time in (64, 200):  # from 64 steps on, both divide the time into chunks of 32
        assert_close(call(params, xs[:, :time]), run(params, xs[:, :time]))
    assert np.all(np.isfinite(call(params, xs[:, :1])))


def test_checkpoints_need_a_time_of_whole_chunks():
    params, xs = drawn(GRU, "float32")
    with raises(ValueError, "a time that is a multiple of checkpoint_every=4, got the unknown time t", '"4*n"'):
        sj.export(partial(sj.unroll, GRU, checkpoint_every=4), params, xs, shapes=("...", BT))


class Pair(NamedTuple):
    """A user's own state."""

    slow: Any
    fast: Any


def test_the_named_tuples_of_a_user_are_arguments_and_results():
    call = sj.load_exported(sj.export(lambda s: Pair(s.fast, 2 * s.slow), Pair(jnp.ones(2), jnp.zeros(3))))
    found = call(Pair(jnp.ones(2), jnp.zeros(3)))
    assert type(found) is Pair
    assert (found.slow.tolist(), found.fast.tolist()) == ([0.0] * 3, [2.0] * 2)


def test_a_class_that_is_not_imported_is_named(tmp_path):
    path = tmp_path / "pair"
    path.write_bytes(sj.export(lambda s: s.slow, Pair(jnp.ones(2), jnp.zeros(3))))
    code = f"import seqjax as sj, sys\nsj.load_exported(open({str(path)!r}, 'rb').read())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "expected the class test_exports.Pair of an argument or a result, got no such class" in result.stderr


def test_a_class_with_other_fields_is_named():
    data = sj.export(lambda s: s.slow, Pair(jnp.ones(2), jnp.zeros(3)))
    with raises(ValueError, "test_exports.Pair with the fields ['slow', 'last'], got ['slow', 'fast']"):
        sj.load_exported(changed(data, classes={"test_exports.Pair": ["slow", "last"]}))


def test_a_container_of_another_library_is_refused_with_what_to_do():
    cell = sj.from_equinox(eqx.nn.GRUCell, D, N)
    params, xs = drawn(cell, "float32")
    call = sj.load_exported(sj.export(lambda xs: sj.unroll(cell, params, xs)[1], xs, shapes=BT))
    assert_close(call(xs[:1]), sj.unroll(cell, params, xs[:1])[1])
    with raises(TypeError, "got the class GRUCell: close over it, or pass its leaves"):
        sj.export(partial(sj.unroll, cell), params, xs)


WRONG = {
    "rank": ((4, 7), "float32", "expected argument 1 float32[b, t, 3]", "got float32[4, 7]"),
    "features": ((4, 7, 5), "float32", "expected argument 1 float32[b, t, 3]", "got float32[4, 7, 5]"),
    "dtype": ((4, 7, 3), "int32", "expected argument 1 float32[b, t, 3]", "got int32[4, 7, 3]"),
}


@pytest.fixture
def exported():
    def run(params, xs, h):
        return sj.unroll(GRU, params, xs, state=sj.GRUState(h))

    params, xs = drawn(GRU, "float32")
    return sj.export(run, params, xs, jnp.zeros((2, N)), shapes=("...", BT, "b, ..."))


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_another_shape_or_dtype_is_named(exported, name):
    shape, dtype, *parts = WRONG[name]
    with raises(ValueError, *parts):
        sj.load_exported(exported)(drawn(GRU, "float32")[0], jnp.zeros(shape, dtype), jnp.zeros((4, N)))


def test_sizes_that_contradict_each_other_are_named(exported):
    params, xs = drawn(GRU, "float32")
    with raises(ValueError, "expected argument 2 float32[b, 4] with b = 2, t = 6, got float32[3, 4]"):
        sj.load_exported(exported)(params, xs, jnp.zeros((3, N)))


def test_other_containers_are_named(exported):
    params, xs = drawn(GRU, "float32")
    with raises(ValueError, "expected arguments", "GRUParams", "pass the same containers"):
        sj.load_exported(exported)(params._asdict(), xs, jnp.zeros((2, N)))


def test_a_size_that_is_an_expression_is_checked_too():
    double = sj.load_exported(sj.export(lambda x: 2 * x, jnp.zeros(2), shapes="2*n"))
    assert double(jnp.ones(4)).tolist() == [2.0] * 4
    with raises(ValueError, "expected arguments float32[2*n]"):
        double(jnp.ones(3))


def test_a_program_for_another_platform_is_refused_where_it_cannot_run():
    run = sj.load_exported(sj.export(lambda x: 2 * x, jnp.zeros(2), platforms=["cuda"]))
    with raises(ValueError, "exported for the cpu of this process, got one for cuda"):
        run(jnp.zeros(2))


def test_bytes_of_another_kind_are_refused_in_one_sentence(exported):
    wrong = [b"", b"PK", exported[:-9], exported[:40], MAGIC + b"[]\n", MAGIC + b"\xff\n", MAGIC + b"[" * 9999]
    for data in wrong:
        with raises(ValueError, "expected the bytes of sj.export", "export the function again"):
            sj.load_exported(data)


def test_the_path_of_a_file_is_refused_with_how_to_read_it():
    with raises(TypeError, "expected the bytes of sj.export, got", "read_bytes()"):
        sj.load_exported("unroll.bin")


def test_a_program_that_this_jax_cannot_read_names_both_versions(exported):
    program = parts(exported)[1]
    for other in (b"\0" * 64, program[:100] + b"\0" * 100 + program[200:]):
        with raises(ValueError, f"expected a function that jax {jax.__version__} reads, got one of jax 99.0"):
            sj.load_exported(changed(exported, other, jax="99.0"))


def test_a_program_that_calls_python_is_refused():
    target = "xla_ffi_python_cpu_callback"

    def run(x):
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, index=np.int64(0))

    checks = [jax.export.DisabledSafetyCheck.custom_call(target)]
    program = bytes(jax.export.export(jax.jit(run), disabled_checks=checks)(jnp.zeros(2)).serialize())
    with raises(ValueError, f"expected a function without calls of Python, got {target}"):
        sj.load_exported(changed(sj.export(lambda x: x, jnp.zeros(2)), program))


def test_an_update_of_training_is_exported_with_its_optimizer():
    model, optimizer = sj.Model(sj.GRU(1, 4), sj.Gaussian(4, 1)), optax.adam(1e-2)
    state, xs = sj.training.start(model, optimizer, jax.random.key(0)), jnp.ones((2, 3, 1))

    def update(state, xs):
        return update_once(model, optimizer, sj.every_step, 1.0, AT_ONCE, state, (xs, xs, None, None), None)

    call = sj.load_exported(sj.export(update, state, xs, shapes=("...", BT)))
    xs = jnp.ones((5, 8, 1))
    (found, metrics), (expected, _) = call(state, xs), jax.jit(update)(state, xs)
    assert (found.step, type(found), type(metrics)) == (1, sj.training.TrainState, sj.training.Metrics)
    assert_close(found.params, expected.params)
