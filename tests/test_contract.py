"""The cell contract: every cell keeps it, a broken one is refused for its own reason, and equal ones compile once."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import pkgutil
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import EVERY, OURS, D, Leaky, N
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracles import BATCH, TIME, assert_close, drawn, drawn_states, like, scanned

import seqjax as sj


@pytest.mark.parametrize("name", EVERY)
def test_every_cell_keeps_the_contract(name):
    assert sj.testing.check_cell(EVERY[name]).count("has finite gradients") == 1


@pytest.mark.parametrize("name", ["lstm", "linen-lstm"])
def test_the_contract_holds_in_float64(name, x64):
    assert sj.testing.check_cell(EVERY[name]).count("has finite gradients") == 1


class Counts(Leaky):
    calls = 0

    def step(self, params, h, x):
        Counts.calls += 1
        h, o = Leaky.step(self, params, h, x)
        return h + Counts.calls, o


class ClipsItsWeightsInPlace(Leaky):
    def init(self, key):
        return {name: np.array(3 * p) for name, p in Leaky.init(self, key).items()}

    def step(self, params, h, x):
        if isinstance(params["W"], np.ndarray):
            np.clip(params["W"], -1, 1, out=params["W"])
        return Leaky.step(self, params, h, x)


class Swaps(Leaky):
    def step(self, params, h, x):
        h, o = Leaky.step(self, params, h, x)
        return (h, o), h


class ReturnsTheStateAlone(Leaky):
    def step(self, params, h, x):
        return Leaky.step(self, params, h, x)[0]


class DriftsWithItsInput(Leaky):
    def step(self, params, h, x):
        with jax.numpy_dtype_promotion("standard"):
            h = h + jnp.sum(x)
        return h, h


class IgnoresTheDtypeOfItsParameters(Leaky):
    def initial_state(self, params):
        return jnp.zeros(N)


class ForgetsItsType(Leaky):
    def step(self, params, h, x):
        h, o = Leaky.step(self, params, h, x)
        return jax.lax.full_like(h, 0.5) if h.dtype == jnp.bfloat16 else jnp.full(N, 0.5), o  # full is weakly typed


class KnowsThatItIsTraced(Leaky):
    def step(self, params, h, x):
        h, o = Leaky.step(self, params, h, x)
        return h, o + 1 if isinstance(h, jax.core.Tracer) else o


class HasNoGradientAtItsStart(Leaky):
    def step(self, params, h, x):
        return Leaky.step(self, params, h, x)[0], jnp.linalg.norm(h)  # which has none at h = 0


class HasNoGradientAtPadding(Leaky):
    def step(self, params, h, x):
        return Leaky.step(self, params, h, x / jnp.linalg.norm(x))  # a unit vector, but 0 / 0 at x = 0


class HasNoInputShape:
    init, initial_state, step = Leaky.init, Leaky.initial_state, Leaky.step


BROKEN = [
    (object(), "the methods init, initial_state and step"),
    (sj.LSTM, "the methods init, initial_state and step"),
    (HasNoInputShape(), "an example input"),
    (Counts(), "the same step twice to give the same result"),
    (ClipsItsWeightsInPlace(), "leave its arguments as they are"),
    (Swaps(), "lax.scan's order"),
    (ReturnsTheStateAlone(), "(new_state, output) from step"),
    (DriftsWithItsInput(), "x.astype(state.dtype) corrects a wrong dtype"),
    (IgnoresTheDtypeOfItsParameters(), "a bfloat16 state from bfloat16 parameters"),
    (ForgetsItsType(), "one trace for three steps"),
    (KnowsThatItIsTraced(), "the loop's output at row 0, time 0"),
    (HasNoGradientAtItsStart(), "finite gradients at the initial state"),
    (HasNoGradientAtPadding(), "gradient"),
]


@pytest.mark.parametrize(("cell", "reason"), BROKEN, ids=[type(cell).__name__ for cell, _ in BROKEN])
def test_a_broken_cell_is_refused_for_its_own_reason(cell, reason):
    with pytest.raises(AssertionError, match=re.escape(reason)):
        sj.testing.check_cell(cell)


def test_a_cell_without_gradients_passes_where_none_are_asked_for():
    assert "has finite gradients" not in sj.testing.check_cell(HasNoGradientAtItsStart(), differentiable=False)


def types(tree):
    """All that lax.scan compares: the tree, shapes, dtypes and weak types."""
    leaves = [(leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


@pytest.mark.parametrize("params_dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "name", ["vanilla", "gru-before", "learned-stack", "user", "linen-gru", "nnx-lstm", "equinox-lstm"]
)
def test_the_type_of_the_state_never_drifts(name, params_dtype, x64):
    cell = EVERY[name]
    params, xs = drawn(cell, params_dtype)
    flags = np.ones((BATCH, TIME), bool)
    given = drawn_states(cell, params)
    for x_dtype in ("bfloat16", "float16", "float32", "float64"):
        run = partial(sj.unroll, cell)
        final, _ = jax.eval_shape(run, params, xs.astype(x_dtype), state=given, mask=flags, reset=flags)
        assert types(final) == types(given)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(final)} == {params_dtype}


def test_a_weakly_typed_state_becomes_a_strong_one():
    class Halves(Leaky):
        def initial_state(self, params):
            return 0.0

        def step(self, params, state, x):
            return jnp.asarray(0.5), x * state  # 0.5 is weakly typed, and so is 0.0

    params, xs = drawn(Leaky(), "float32")
    for flags in (None, np.ones((BATCH, TIME), bool)):
        final, outputs = sj.unroll(Halves(), params, xs, mask=flags, reset=flags)
        assert types(final) == types(jnp.full(BATCH, 0.5, "float32"))
        assert_close(outputs, jnp.zeros_like(xs) if flags is not None else 0.5 * xs.at[:, 0].set(0))


REBUILT = {
    "vanilla": lambda: sj.VanillaRNN(D, N, "relu", recurrent_init=sj.SpectralRadius(0.5)),
    "lstm": lambda: sj.LSTM(D, N, forget_bias=2.0, input_init=sj.Uniform(0.1), dtype=jnp.float32),
    "gru": lambda: sj.GRU(D, N, "before"),
    "embedding": lambda: sj.Embedding(7, N),
    "stack": lambda: sj.stack([sj.LSTM(D, 5), sj.LearnedState(sj.GRU(5, N))]),
}


@pytest.mark.parametrize("name", REBUILT)
def test_cells_are_values(name):
    cell, again = REBUILT[name](), REBUILT[name]()
    assert cell == again
    assert hash(cell) == hash(again)
    assert pickle.loads(pickle.dumps(cell)) == cell
    assert eval(repr(cell), vars(sj)) == cell  # the repr is what one would write
    assert sum(cell == other() for other in REBUILT.values()) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.extra = 1


@pytest.mark.parametrize("field", [{"forget_bias": 0.5}, {"chrono": 9}, {"dtype": "bfloat16"}, {"hidden_size": 9}])
def test_cells_that_differ_in_one_field_are_unequal(field):
    assert dataclasses.replace(sj.LSTM(D, N), **field) != sj.LSTM(D, N)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Counting:
    """A cell that counts how often its step is traced."""

    inner: object
    traces = 0

    @property
    def input_shape(self):
        return self.inner.input_shape

    def init(self, key):
        return self.inner.init(key)

    def initial_state(self, params):
        return self.inner.initial_state(params)

    def step(self, params, state, x):
        Counting.traces += 1
        return self.inner.step(params, state, x)


@pytest.mark.parametrize("name", ["vanilla", "lstm", "gru", "stack"])
def test_rebuilding_a_cell_does_not_compile_again(name):
    params, xs = drawn(REBUILT[name](), "float32")
    traces = []
    for call in range(3):
        cell = Counting(REBUILT[name]())
        sj.unroll(cell, jax.tree.map(lambda p: p * call, params), xs + call)  # noqa: B023
        traces.append(Counting.traces)
    assert traces[0] == traces[1] == traces[2]
    sj.unroll(cell, params, xs[:, :2])
    assert Counting.traces > traces[2]  # another length is another program, so the count does count


def test_a_mutable_cell_is_never_stale():
    class Scaled(Leaky):
        def __init__(self, scale):
            self.scale = scale

        def step(self, params, h, x):
            h, o = super().step(params, h, x)
            return h, self.scale * o

    cell = Scaled(1.0)
    params, xs = drawn(cell, "float32")
    for wrapped in (cell, sj.stack([cell]), sj.LearnedState(cell)):
        cell.scale = 1.0
        p = params if wrapped is cell else wrapped.init(jax.random.key(0))
        once = sj.unroll(wrapped, p, xs)[1]
        cell.scale = 3.0
        assert_close(sj.unroll(wrapped, p, xs)[1], 3 * once)


def test_a_field_that_equality_does_not_see_is_never_stale():
    @dataclasses.dataclass(frozen=True)
    class Scaled(Leaky):
        scale: float = dataclasses.field(default=1.0, compare=False)

        def step(self, params, h, x):
            h, o = super().step(params, h, x)
            return h, self.scale * o

    params, xs = drawn(Scaled(), "float32")
    assert_close(sj.unroll(Scaled(3.0), params, xs)[1], 3 * sj.unroll(Scaled(1.0), params, xs)[1])


@pytest.mark.parametrize("name", ["lstm", "learned-stack", "user"])
def test_a_batch_on_two_devices_gives_what_it_gives_on_one(name):
    cell = EVERY[name]
    params, xs = drawn(cell, "float32")
    mesh = Mesh(np.array(jax.devices()), "batch")
    rows, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    (_, outputs), gradient = scanned(cell, jax.device_put(params, everywhere), jax.device_put(xs, rows))
    assert [shard.data.shape for shard in outputs.addressable_shards] == [(1, TIME, N)] * 2
    one = scanned(cell, params, xs)
    assert_close(((_, outputs), gradient), one)
    sharded = sj.unroll(cell, jax.device_put(params, everywhere), jax.device_put(xs, rows))
    assert_close(sharded, one[0])


def test_importing_has_no_side_effects():
    program = """
import sys, jax
before = dict(jax.config.values)
import seqjax
changed = {name for name, value in jax.config.values.items() if name in before and before[name] is not value}
heavy = {"matplotlib", "equinox", "flax", "haiku", "orbax", "torch", "tyro", "rich", "pandas"} & set(sys.modules)
from jax._src import xla_bridge
print(sorted(changed), sorted(heavy), xla_bridge.backends_are_initialized())
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[] [] False\n", "")


def test_a_cell_passes_through_jit_as_an_argument():
    for cell in (OURS["lstm"], OURS["learned-stack"], EVERY["linen-lstm"]):
        params, xs = drawn(cell, "float32")
        assert_close(jax.jit(sj.unroll)(cell, params, xs), sj.unroll(cell, params, xs))
        assert jax.tree.leaves(cell) == []
        assert like(cell, "float32", 0) == cell


def test_no_function_hides_the_module_of_its_name():
    names = [module.name for module in pkgutil.walk_packages(sj.__path__, "seqjax.") if "__main__" not in module.name]
    assert "seqjax.reports.html" in names
    for name in names:
        module, (parent, _, last) = importlib.import_module(name), name.rpartition(".")
        assert getattr(sys.modules[parent], last) is module


def test_nothing_imports_what_is_later_in_the_flow_of_data():
    order = ["cells", "kernels", "sequence", "interop", "parallel", "models", "data", "training", "analysis"]
    order += ["plots", "reports", "command"]
    root = Path(sj.__file__).parent
    for file in root.rglob("*.py"):
        folder = file.relative_to(root).parts[0]
        if folder in order:
            found = re.findall(r"^(?:from|import) seqjax\.(\w+)", file.read_text(), re.M)
            later = {name for name in found if name in order and order.index(name) > order.index(folder)}
            assert not later, f"{file} imports {later}"
