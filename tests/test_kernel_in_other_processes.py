"""The kernel in exported programs, in the persistent cache, after a fork, and on several devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from seqjax import kernels
from seqjax.kernels.build import compiler_command

pytestmark = pytest.mark.skipif(compiler_command() is None, reason="there is no C++ compiler")
SETUP = """
import os, sys, warnings
import jax, jax.numpy as jnp, numpy as np, seqjax as sj
from seqjax import kernels
cell = sj.stack([sj.Embedding(5, 3), sj.LSTM(3, 9)])
params = cell.init(jax.random.key(0))
tokens = jnp.arange(80).reshape(4, 20) % 5
def loss(params, tokens, kernel=True):
    return (sj.unroll(cell, params, tokens, save="gates", kernel=kernel)[1] ** 2).sum()
def told(gradient):
    print(*(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient)))
"""


def python(code: str, *arguments: object, **environment: str) -> list[float]:
    """Runs code in a new process with the kernel. Returns the numbers of its last line."""
    kept = {name: value for name, value in os.environ.items() if name != "SEQJAX_KERNEL"}
    command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [*map(float, result.stdout.splitlines()[-1].split())]


@pytest.fixture(scope="module")
def expected():
    return python("told(jax.jit(jax.grad(loss))(params, tokens))", SEQJAX_KERNEL="off")


EXPORT = """
checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels.TARGETS]
def program(leaves, tokens):
    gradient = jax.grad(loss)(jax.tree.unflatten(jax.tree.structure(params), leaves), tokens, sys.argv[2] == "kernel")
    return jax.tree.leaves(gradient)
arguments = (jax.tree.leaves(params), tokens)
exported = jax.export.export(jax.jit(program), disabled_checks=checks if sys.argv[2] == "kernel" else [])(*arguments)
assert ("seqjax_forward" in exported.mlir_module()) is (sys.argv[2] == "kernel")
open(sys.argv[1], "wb").write(exported.serialize())
print(0)
"""
RUN = """
assert kernels.available()
told(jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call(jax.tree.leaves(params), tokens))
"""


def test_an_exported_program_runs_in_another_process_with_the_kernel_or_without_it(tmp_path, expected):
    for how in ("kernel", "plain"):
        python(EXPORT, tmp_path / how, how)
        np.testing.assert_allclose(python(RUN, tmp_path / how), expected, rtol=1e-4)
    without = python(RUN.replace("assert", "not"), tmp_path / "plain", SEQJAX_KERNEL="off")
    np.testing.assert_allclose(without, expected, rtol=1e-4)


CACHED = """
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
told(jax.jit(jax.grad(loss))(params, tokens))
"""


def test_the_persistent_cache_never_mixes_programs_with_the_kernel_and_without_it(tmp_path, expected):
    first, again = (python(CACHED, tmp_path) for _ in range(2))
    assert any(tmp_path.iterdir())
    assert again == first
    without = python(CACHED, tmp_path, SEQJAX_KERNEL="off")
    assert without == python("told(jax.jit(jax.grad(loss))(params, tokens))", SEQJAX_KERNEL="off")
    np.testing.assert_allclose([first, without], [expected] * 2, rtol=1e-4)


FORK = """
gradient = jax.block_until_ready(jax.jit(jax.grad(loss))(params, tokens))
warnings.simplefilter("ignore")  # JAX warns of a fork
child = os.fork()
if child == 0:
    os._exit(int(np.arange(3).sum()))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
told(jax.jit(jax.grad(loss))(params, tokens))
"""


def test_a_fork_leaves_the_kernel_of_its_parent_alone(expected):
    np.testing.assert_allclose(python(FORK), expected, rtol=1e-4)


SHARDED = """
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("batch")))
everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
told(jax.jit(jax.grad(loss))(everywhere, rows))
"""


def test_a_batch_on_two_devices_has_the_same_gradient(expected):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    np.testing.assert_allclose(python(SHARDED, XLA_FLAGS=flags), expected, rtol=1e-4)


def test_the_names_of_the_custom_calls_are_those_of_the_library():
    source = (kernels.FOLDER / "ffi.cpp").read_text()
    calls, types = re.findall(r"(seqjax_\w+)##suffix", source), re.findall(r"SEQJAX_FUNCTIONS\((_\w+),", source)
    assert {call + of for call in calls for of in types} == set(kernels.TARGETS)
