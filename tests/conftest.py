"""The strict harness: warnings are errors, promotion is strict, annotations are checked, and there are two devices."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["SEQJAX_KERNEL"] = "off"  # most tests are about XLA's loops; test_native_loops.py is about the kernel

from jaxtyping import install_import_hook

hook = install_import_hook("seqjax", "beartype.beartype")

import hypothesis  # noqa: E402 - the hook above must come before jax and seqjax
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402 - JAX has no public default for options of XLA

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # also for fixtures that are made before a test begins
QUICKER = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def knows(option, value):
    """Whether this version of XLA has an option."""
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compile_options(*args, **kwargs):
    """The options of XLA, with those that halve the time of a compilation where optimizations are switched off."""
    options = default_options(*args, **kwargs)
    if jax.config.read("jax_disable_most_optimizations"):
        options.env_option_overrides = [*options.env_option_overrides, *quicker]
    return options


quicker = [(option, value) for option, value in QUICKER.items() if knows(option, value)]
default_options, compiler.get_compile_options = compiler.get_compile_options, compile_options
hypothesis.settings.register_profile("seqjax", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("seqjax")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs a test in both precisions; float64 with 64-bit types switched on."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """The key that tests draw from."""
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """Compiles without most of XLA's optimizations, because nearly all the time of a quick test is compilation."""
    optimized = {"optimized"} & set(request.keywords)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops all compiled programs after a module once they are many.

    Linux lets a process have 65 530 memory maps, and each program on a CPU takes several: a run of all tests in one or
    two processes would end with a crash inside the compiler.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


THOROUGH = set((Path(__file__).parent / "thorough.txt").read_text().split())


def pytest_collection_modifyitems(items):
    """Marks as thorough what the quick tests leave out: tests in thorough.txt, and all cases of a test but the first.

    thorough.txt lists the tests whose single case took 2.5 seconds or more on two cores.
    """
    seen = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in THOROUGH or name in seen:
            item.add_marker("thorough")
        seen.add(name)
