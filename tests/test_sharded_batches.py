"""A batch on several devices: no device gathers it, the gradient is added once, and the values are those of one device.

What XLA does is read from the compiled program. The axis of the mesh is automatic, explicit, or manual inside
`jax.shard_map`.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import seqjax as sj
from seqjax.kernels.build import compiler_command

P = PartitionSpec
BATCH, TIME = 8, 200  # more than one chunk of time
KINDS = ["auto", "explicit", "shard_map"]
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.fixture(autouse=True)
def two_devices():
    if len(jax.devices()) < 2:
        pytest.skip("this process has one device")


def mesh_of(kind, name="data"):
    return jax.make_mesh((2,), (name,), axis_types=(AxisType.Explicit if kind == "explicit" else AxisType.Auto,))


def placed(kind, params, xs):
    """The parameters on every device, and a half of the batch on each."""
    mesh = mesh_of(kind)
    return jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(xs, NamedSharding(mesh, P("data")))


def on_mesh(kind, run, **options):
    """The function inside `jax.shard_map` for this kind."""
    if kind != "shard_map":
        return run
    return jax.shard_map(run, mesh=mesh_of(kind), in_specs=(P(), P("data")), out_specs=P("data"), **options)


def collectives(program):
    """Each collective of a compiled program, and whether it is outside all loops."""
    found, is_entry = [], False
    for line in program.as_text().splitlines():
        if line.endswith("{") and " -> " in line:
            is_entry = line.startswith("ENTRY")
        found += [(name, is_entry) for name in re.findall(COLLECTIVES, line)]
    return found


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def assert_sharded(tree):
    for leaf in jax.tree.leaves(tree):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 2


def compiled_and_run(run, *arguments):
    program = jax.jit(run).lower(*arguments).compile()
    return program, program(*arguments)


def sum_of_squares(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def check_unroll(kind, cell, xs, **options):
    """Compares the unroll and its gradient with those of one device, and reads the collectives of both programs."""
    params = cell.init(jax.random.key(0))

    def run(params, xs):
        return sj.unroll(cell, params, xs, **options)

    def gradient(params, xs):
        return jax.grad(lambda params: sum_of_squares(on_mesh(kind, run)(params, xs)))(params)

    everywhere = placed(kind, params, xs)
    program, result = compiled_and_run(on_mesh(kind, run), *everywhere)
    assert collectives(program) == []
    assert_sharded(result)
    assert_equal(result, jax.jit(run)(params, xs))
    program, result = compiled_and_run(gradient, *everywhere)
    found = collectives(program)
    assert set(found) == {("all-reduce", True)}
    assert len(found) <= len(jax.tree.leaves(params))
    assert_equal(result, jax.jit(jax.grad(lambda params: sum_of_squares(run(params, xs))))(params))


def numbers(*shape):
    return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize("save", ["states", "gates"])
@pytest.mark.parametrize("kind", KINDS)
def test_xla_loops_run_on_each_device_for_its_part_of_the_batch(kind, save):
    check_unroll(kind, sj.LSTM(3, 5), numbers(BATCH, TIME, 3), save=save)


def test_a_part_of_a_batch_that_the_devices_cannot_divide_evenly_has_the_same_gradient():
    cell = sj.GRU(2, 3)
    params, xs = cell.init(jax.random.key(0)), numbers(4, 6, 2)

    @jax.jit
    def gradient(params, xs):
        return jax.grad(lambda params: sum_of_squares(sj.unroll(cell, params, xs[:3])))(params)

    assert_equal(gradient(*placed("auto", params, xs)), gradient(params, xs))


KERNEL = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp
import seqjax as sj
from seqjax import kernels
import test_sharded_batches as tests
assert kernels.available() and len(jax.devices()) == 2
tokens = jnp.arange(tests.BATCH * tests.TIME).reshape(tests.BATCH, tests.TIME) % 5
for kind in tests.KINDS:
    for cell in (sj.LSTM(3, 5), sj.GRU(3, 5)):
        tests.check_unroll(kind, cell, tests.numbers(tests.BATCH, tests.TIME, 3))
        tests.check_unroll(kind, cell, tests.numbers(tests.BATCH, tests.TIME, 3), save="gates")
    tests.check_unroll(kind, sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 5)]), tokens, save="gates")
tests.check_ensemble("auto")
tests.check_ensemble("explicit")
tests.check_forgotten_reduction()
"""


@pytest.mark.skipif(compiler_command() is None, reason="there is no C++ compiler")
def test_the_kernel_runs_on_each_device_for_its_part_of_the_batch():
    environment = {name: value for name, value in os.environ.items() if name != "SEQJAX_KERNEL"}
    command = [sys.executable, "-c", KERNEL, os.path.dirname(__file__)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def check_ensemble(kind):
    """A network per device: each device runs its own, so nothing is gathered and nothing is added."""
    cell = sj.GRU(2, 3)
    params, xs = jax.vmap(cell.init)(jax.random.split(jax.random.key(0), 4)), numbers(2, 30, 2)

    def gradient(params, xs):
        return jax.grad(lambda params: sum_of_squares(sj.unroll(cell, params, xs)[1]))(params)

    run = jax.vmap(gradient, (0, None))
    mesh = mesh_of(kind, "members")
    everywhere = jax.device_put(params, NamedSharding(mesh, P("members"))), jax.device_put(xs, NamedSharding(mesh, P()))
    program, result = compiled_and_run(run, *everywhere)
    assert collectives(program) == []
    assert_sharded(result)
    assert_equal(result, jax.jit(run)(params, xs))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_each_device_runs_its_own_members_of_an_ensemble(kind):
    check_ensemble(kind)


def check_forgotten_reduction():
    cell = sj.LSTM(2, 3)
    params, xs = placed("auto", cell.init(jax.random.key(0)), numbers(4, 5, 2))

    def loss(params, xs):
        return jnp.sum(sj.unroll(cell, params, xs)[1])

    run = jax.shard_map(loss, mesh=mesh_of("auto"), in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        run(params, xs)


def test_a_sum_that_is_not_added_over_the_devices_is_an_error():
    check_forgotten_reduction()


def both(function, cell=None, kinds=KINDS, time=12):
    """A function of (cell, params, xs) on every kind of mesh, beside its result on one device."""
    cell = cell or sj.GRU(3, 4)
    params, xs = cell.init(jax.random.key(0)), numbers(4, time, 3)

    def run(params, xs):
        return function(cell, params, xs)

    expected = run(params, xs)
    for kind in kinds:
        yield jax.jit(on_mesh(kind, run))(*placed(kind, params, xs)), expected


FUNCTIONS = {
    "trajectory": sj.trajectory,
    "reversed trajectory": lambda *arguments: sj.trajectory(*arguments, reverse=True),
    "gates": sj.gates,
    "unroll_parallel": lambda *arguments: sj.unroll_parallel(*arguments)[0],
    "step_jacobians": lambda *arguments: sj.analysis.step_jacobians(*arguments).by_state,
    "checkpoint_every": lambda *arguments: sj.unroll(*arguments, checkpoint_every=5),
    "mask and reset": lambda cell, params, xs: sj.unroll(cell, params, xs, mask=xs[..., 0] > 0, reset=xs[..., 1] > 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_over_a_sharded_batch_return_sharded_results(name):
    for found, expected in both(FUNCTIONS[name]):
        assert_sharded(found)
        assert_equal(found, expected)


@pytest.mark.parametrize("name", ["checkpoint_every", "trajectory"])
def test_gradients_of_other_functions_are_those_of_one_device(name):
    cell = sj.GRU(3, 4)
    params, xs = cell.init(jax.random.key(0)), numbers(4, 12, 3)

    def gradient(kind):
        run = on_mesh(kind, lambda params, xs: FUNCTIONS[name](cell, params, xs))
        return jax.jit(jax.grad(lambda params, xs: sum_of_squares(run(params, xs))))

    expected = gradient("auto")(params, xs)
    for kind in KINDS:
        assert_equal(gradient(kind)(*placed(kind, params, xs)), expected)


def of_outputs(outputs):
    return jnp.sum(outputs**2)


GRADIENTS = {
    "state_gradients": lambda *arguments: sj.state_gradients(*arguments, sum_of_squares),
    "weight_gradients_by_step": lambda *arguments: sj.weight_gradients_by_step(*arguments, of_outputs),
    "truncated_grad": lambda *arguments: sj.truncated_grad(*arguments, of_outputs, 3),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_through_time_are_those_of_one_device(name):
    for found, expected in both(GRADIENTS[name], kinds=["auto", "explicit"]):
        assert_equal(found, expected)


ANALYSES = {
    "cell_path": {},
    "fixed_points": {"count": 8},
    "frame_growth": {},
    "gate_statistics": {},
    "gradient_by_lag": {},
    "jacobian_product": {},
    "lag_growth": {"lags": 3},
    "lyapunov_exponents": {},
    "parameter_sensitivity": {},
    "product_singular_values": {},
    "score_by_length": {},
    "spectrum": {},
    "step_jacobians": {},
    "verdict": {"horizon": 5},
}
NO_BATCH = {"ablation", "clipping_statistics", "kaplan_yorke_dimension", "loss_cliff", "matrix_spectrum"}
NO_BATCH |= {"memory_horizon", "recurrent_matrices", "state_parts"}


def test_every_analysis_of_a_batch_is_tested_on_a_mesh():
    functions = {name for name in dir(sj.analysis) if inspect.isfunction(getattr(sj.analysis, name))}
    assert functions == ANALYSES.keys() | NO_BATCH


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_of_a_sharded_batch_are_those_of_one_device(name):
    cell = sj.LSTM(3, 2) if name == "cell_path" else sj.GRU(3, 2)
    model, xs = sj.Model(cell, sj.Gaussian(2, 3)), numbers(2, 20, 3)
    params = model.init(jax.random.key(0))

    def analysed(params, xs):
        if name == "score_by_length":
            return sj.analysis.score_by_length(model, params, [sj.Batch(xs, xs)])
        inputs = np.zeros(3, np.float32) if name == "fixed_points" else xs
        return getattr(sj.analysis, name)(cell, params.cell, inputs, **ANALYSES[name])

    found, expected = analysed(*placed("explicit", params, xs)), analysed(params, xs)
    numbers_of = [[leaf for leaf in jax.tree.leaves(each) if hasattr(leaf, "dtype")] for each in (found, expected)]
    assert len(numbers_of[0]) == len(numbers_of[1]) > 0
    for a, b in zip(*numbers_of, strict=True):
        if np.asarray(b).dtype.kind == "U":
            assert a.tolist() == b.tolist()
        else:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-5)


class WithMeanOfRows:
    """A cell that reads the mean state of the whole batch, by a collective."""

    def init(self, key):
        return 0.5 * jnp.eye(3)

    def initial_state(self, params):
        return jnp.zeros(3)

    def step(self, params, state, x):
        state = jnp.tanh(params @ state + x + jax.lax.pmean(state, "rows"))
        return state, state


def test_a_cell_with_a_collective_has_the_same_gradient_under_vmap_and_shard_map():
    cell, xs = WithMeanOfRows(), numbers(2, 6, 3)

    def outputs(params, xs):
        return sj.unroll(cell, params, xs)[1]

    mapped = jax.vmap(lambda params, row: outputs(params, row[None])[0], (None, 0), axis_name="rows")
    mesh = mesh_of("auto", "rows")
    sharded = jax.shard_map(outputs, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))

    def loss_by_hand(W):
        states, total = jnp.zeros((2, 3)), 0.0
        for t in range(6):
            states = jnp.tanh(states @ W.T + xs[:, t] + jnp.broadcast_to(states.mean(0), (2, 3)))
            total += jnp.sum(states**2)
        return total

    params = cell.init(None)
    expected = jax.grad(loss_by_hand)(params)

    def gradient(run):
        return jax.jit(jax.grad(lambda params: sum_of_squares(run(params, xs))))(params)

    assert_equal(gradient(mapped), expected)
    assert_equal(gradient(sharded), expected)
