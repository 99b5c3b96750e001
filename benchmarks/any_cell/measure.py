"""One comparison: compiles both unrolls of a cell, checks that they agree, and times them in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import seqjax as sj
from benchmarks.any_cell.pairs import CELLS, Pair
from benchmarks.hlo import loops
from benchmarks.machine import OtherLoad, call_times, in_turns
from benchmarks.peers.measure import DIRECTIONS, GRADIENT_WITHIN, OUTPUTS_WITHIN, Disagreement
from benchmarks.peers.rows import Row, inputs
from seqjax import kernels

XLA, KERNEL, OWN = "seqjax, XLA's loops", "seqjax, kernel", "own library"
KERNEL_CALL = 'custom_call_target="seqjax_'


class Program(NamedTuple):
    """A compiled call with its arguments."""

    call: Callable[[], Any]
    compile_seconds: float
    temporaries: int  # bytes
    text: str

    @property
    def calls_kernel(self) -> bool:
        return KERNEL_CALL in self.text

    def numbers(self) -> dict[str, Any]:
        """The figures that need no run. Products are missing if the program calls the kernel, which hides them."""
        fixed = {"compile": self.compile_seconds, "temporaries": self.temporaries}
        return fixed if self.calls_kernel else fixed | {"products": products_per_step(self.text)}


def seqjax_ways() -> dict[str, Callable[..., Any]]:
    """`sj.unroll` with XLA's loops only, and with the kernel if it is installed."""
    ways = {XLA: partial(sj.unroll, kernel=False), KERNEL: sj.unroll}
    return ways if kernels.available() else {XLA: ways[XLA]}


def products_per_step(text: str) -> list[int]:
    """The number of matrix products per step of each innermost loop in a compiled program, largest first."""
    return sorted((len(loop.products) for loop in loops(text) if loop.innermost), reverse=True)


def compare(name: str, row: Row, directions: list[str], budget: float) -> dict[str, Any]:
    """Measures one cell at one size.

    Args:
        name: a key of `CELLS`.
        row: the size.
        directions: the calls to time, "forward" and "backward" (forward with backward).
        budget: seconds per call and way.

    Returns:
        {direction: {way: numbers}}, the largest differences from the own library, and the load of other processes.
        If the kernel is installed but the program with it does not call it, the two ways of seqjax are one program.
        It is timed once, and both ways get its numbers.

    Raises:
        Disagreement: the outputs or a gradient of seqjax differ from those of the own library.
    """
    pair = CELLS[name].build(name, row)
    programs = {direction: compile_ways(pair, direction, row) for direction in DIRECTIONS}
    result: dict[str, Any] = {"difference": check_agreement(f"{name} {row.name}", pair, programs), "other load": {}}
    for direction in directions:
        ways = programs[direction]
        same = KERNEL in ways and not ways[KERNEL].calls_kernel
        timers = {way: partial(call_times, ways[way].call) for way in ways if not (same and way == KERNEL)}
        load = OtherLoad(os.getpid())
        times = in_turns(timers, budget)
        result["other load"][direction] = load.processors()
        if same:
            times[KERNEL] = times[XLA]
        result[direction] = {way: times[way] | program.numbers() for way, program in ways.items()}
        if KERNEL in ways:
            result[direction][KERNEL]["kernel"] = not same
    return result


def compile_ways(pair: Pair, direction: str, row: Row) -> dict[str, Program]:
    """The programs of seqjax, then that of the own library."""
    data = jax.device_put(inputs(row))
    programs = {}
    for name, unroll in seqjax_ways().items():
        outputs = partial(seqjax_outputs, unroll, pair.cell)
        programs[name] = compile_call(outputs, direction, pair.params, *data)
    programs[OWN] = compile_call(pair.own_unroll, direction, pair.own_params, *data)
    return programs


def seqjax_outputs(unroll: Callable[..., Any], cell: Any, params: Any, xs: jax.Array) -> jax.Array:
    return unroll(cell, params, xs)[1]


def compile_call(unroll: Callable[[Any, jax.Array], jax.Array], direction: str, *arguments: Any) -> Program:
    """Compiles the outputs, or a weighted sum of them with its gradients by params and xs.

    Args:
        unroll: (params, xs) to the outputs.
        direction: "forward" or "backward".
        *arguments: params, xs and the weights of the outputs.
    """

    def forward(params, xs, weights):
        return unroll(params, xs)

    def loss(params, xs, weights):
        return jnp.sum(unroll(params, xs) * weights)

    function = forward if direction == "forward" else jax.value_and_grad(loss, argnums=(0, 1))
    jax.clear_caches()  # otherwise the second way would not trace what the first has traced
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    size = compiled.memory_analysis().temp_size_in_bytes
    return Program(partial(compiled, *arguments), seconds, size, compiled.as_text())


def check_agreement(what: str, pair: Pair, programs: dict[str, dict[str, Program]]) -> dict[str, dict[str, float]]:
    """For each way of seqjax, the largest difference of an output, and of a gradient relative to its norm.

    Raises:
        Disagreement: a difference is too large.
    """
    outputs = np.asarray(programs["forward"][OWN].call())
    _, (of_params, of_xs) = programs["backward"][OWN].call()
    gradients = pair.to_cell_params(of_params), of_xs
    differences = {}
    for way in (way for way in programs["forward"] if way != OWN):
        by_output = float(np.abs(np.asarray(programs["forward"][way].call()) - outputs).max())
        by_gradient = relative_difference(programs["backward"][way].call()[1], gradients)
        if not (by_output <= OUTPUTS_WITHIN and by_gradient <= GRADIENT_WITHIN):
            raise Disagreement(
                f"{what}, {way}: outputs differ from its own library's by {by_output:.1e} (at most "
                f"{OUTPUTS_WITHIN:.0e}), a gradient by {by_gradient:.1e} of its norm (at most {GRADIENT_WITHIN:.0e})"
            )
        differences[way] = {"outputs": by_output, "gradients": by_gradient}
    return differences


def relative_difference(got: Any, expected: Any) -> float:
    """max over the leaves of |got - expected| / |expected|, in the Euclidean norm. Two zero leaves do not differ."""
    norms = [
        (np.linalg.norm(np.subtract(a, b)), np.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    ]
    return float(max(difference / norm if norm else difference for difference, norm in norms))
