"""A readable account of the partition of a cell's step: which products run when, and what is slow."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from seqjax import kernels
from seqjax.cell import Cell, Params, names_of_state, strong_type
from seqjax.cells.arguments import as_array
from seqjax.sequence._checks import check_methods
from seqjax.sequence._execution.formulas import supported_kernel
from seqjax.sequence._execution.forward import Loop
from seqjax.sequence._execution.instructions import NoKernel
from seqjax.sequence._execution.jacobian import units_of
from seqjax.sequence._masked_step import emit_output
from seqjax.sequence._parameter_checks import check_params
from seqjax.sequence._partition.loops import Stage
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.plan import NoPlan, plan_of
from seqjax.sequence._partition.program import (
    PRODUCTS,
    Eqn,
    count_multiplications,
    dependents,
    inline,
    needed,
    source_line,
)
from seqjax.sequence._partition.tracing import Traced, traced_one


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of the step.

    Attributes:
        shape: the shape of its weights.
        lines: the lines "file:line" that it comes from; several if products were merged into one.
    """

    shape: tuple[int, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_shape(self.shape)}{_at(self.lines)}"


@dataclasses.dataclass(frozen=True)
class LoopExplanation:
    """One loop over time, or the products that need no loop.

    Attributes:
        carried: the names of the leaves of the state that the loop carries.
        per_chunk: the products that run once per chunk of time.
        per_step: the products that run once per step.
        saved: the leaves that are saved at every step for the backward pass.
        saved_bytes: the bytes of these leaves per example and step.
        rematerialized: the leaves that the backward pass computes again, without products.
        plain: whether the loop runs as a plain scan, because the products outside of it would not save enough work.
        kernel: the compiled kernel that supports the loop: "lstm", "gru", "vanilla" (tanh), "relu" or "identity", or
            "unitwise", which runs the instructions of any step that acts unit by unit. None if none supports it.
        no_kernel: why no kernel supports the loop; None if one does.
        slow: the reasons why products are slower than in other cells, with the lines that cause them.
    """

    carried: tuple[str, ...]
    per_chunk: tuple[Product, ...]
    per_step: tuple[Product, ...]
    saved: tuple[str, ...]
    saved_bytes: int
    rematerialized: tuple[str, ...]
    plain: bool
    kernel: str | None
    no_kernel: str | None
    slow: tuple[str, ...]

    def __str__(self) -> str:
        if not self.carried:
            lines = [f"  product, for all steps at once: {product}" for product in self.per_chunk]
            return "\n".join(["after the loops, from the states", *(lines or ["  no product"])])
        lines = [f"loop over {', '.join(self.carried)}"]
        lines += [f"  product, once per chunk: {product}" for product in self.per_chunk]
        lines += [f"  product, once per step:  {product}" for product in self.per_step]
        if self.plain:
            lines.append(
                "  runs as a plain scan: the products that could leave the loop do not outweigh those that stay"
            )
        else:
            names = ", ".join(self.saved) or "no leaf"
            lines.append(f"  saved for the backward pass: {names}, {self.saved_bytes} bytes per example and step")
            if self.rematerialized:
                lines.append(f"  rematerialized: {', '.join(self.rematerialized)}")
        if self.kernel is None:
            lines.append(f"  kernel: none, so XLA runs the loop: {self.no_kernel}")
        else:
            built = "" if kernels.available() else " (not available here, so XLA runs the loop)"
            lines.append(f"  kernel: {self.kernel}{built}")
        return "\n".join([*lines, *(f"  SLOW: {reason}" for reason in self.slow)])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a cell is unrolled. `print` shows it in words.

    Attributes:
        cell: the name of the cell.
        loops: the loops in the order in which they run.
        jacobian: the form of ds_t/ds_{t-1}.
        fallback: why the whole step runs as a plain scan; None if it does not.
    """

    cell: str
    loops: tuple[LoopExplanation, ...]
    jacobian: str
    fallback: str | None

    def __str__(self) -> str:
        head = f"{self.cell}, one step"
        if self.fallback is not None:
            return f"{head}\nSLOW: runs as a plain scan: {self.fallback}"
        return "\n".join([head, *map(str, self.loops), f"Jacobian: {self.jacobian}"])


def explain(cell: Cell, params: Params, x: PyTree) -> Explanation:
    """Explains how a cell is unrolled: which products run when, what is saved, and why something is slow.

    Args:
        cell: any cell.
        params: the parameters, as arrays or shapes.
        x: the input of `cell.step` for one example at one time, as arrays or shapes.

    Returns:
        `Explanation`. `print` shows which products run once per chunk and once per step, what is saved for the backward
        pass, which form of the Jacobian applies, and which lines make the loop slow.

    Raises:
        TypeError, ValueError: the step does not accept these parameters or this input.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.LSTM(8, 32)
        >>> found = sj.explain(cell, cell.init(jax.random.key(0)), jnp.ones(8))
        >>> [product.shape for product in found.loops[0].per_step], found.loops[0].saved, found.loops[0].kernel
        ([(128, 32)], ('h',), 'lstm')
        >>> found.jacobian
        'D_s + sum_i D_i W_i: the rest acts unit by unit, no product of matrices'
    """
    check_methods(cell)
    check_params(cell, params)
    # Shapes are enough, so large parameters need not be drawn for an explanation.
    state = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    x = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else as_array("x", leaf), x)
    traced = traced_one(cell, emit_output, params, state, (x, None, None, None))
    plan = plan_of(traced, True)
    name = type(cell).__name__
    if isinstance(plan, NoPlan):
        return Explanation(name, (), "that of the whole step, by jax.jacfwd", plan.reason)
    leaves = names_of_state(cell, state)
    loops = [_loop(stage, parts, leaves) for stage, parts in zip(plan.stages, plan.parts, strict=True)]
    # The last stage is not a loop. It is shown only if it has a product.
    shown = tuple(loop for loop in loops if loop.carried or loop.per_chunk)
    return Explanation(name, shown, _jacobian(traced), None)


def _loop(stage: Stage, parts: Parts, names: list[str]) -> LoopExplanation:
    own = [names[i] for i in stage.leaves]
    kernel, no_kernel = None, "it has no state"
    if stage.leaves:
        try:
            kernel, no_kernel = supported_kernel(parts), None
        except NoKernel as error:
            no_kernel = str(error)
    is_saved = Loop(parts, kernel if kernels.available() else None, reverse=False, chunk=1).is_saved
    saved = [n for n, s in zip(own, is_saved, strict=True) if s]
    size = sum(v.aval.size * v.aval.dtype.itemsize for v, s in zip(parts.state, is_saved, strict=True) if s)
    # From here on the program before products were merged, because merged products have no source lines.
    jaxpr: Any = stage.program.jaxpr
    eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
    first = len(jaxpr.invars) - len(stage.inputs) - len(stage.leaves)
    late = dependents(eqns, jaxpr.invars[first : first + len(stage.leaves)])
    early = dependents(eqns, jaxpr.invars[first + len(stage.leaves) :])
    products = [e for e in eqns if e.primitive.name in PRODUCTS]
    in_loop = [e for e in products if e.outvars[0] in late]
    before = [e for e in products if e.outvars[0] not in late and e.outvars[0] in early]
    return LoopExplanation(
        carried=tuple(own),
        per_chunk=_products([e for e in parts.drive if e.primitive.name in PRODUCTS], before),
        per_step=_products([c.eqn for c in parts.cuts], in_loop),
        saved=tuple(saved),
        saved_bytes=size,
        rematerialized=tuple(n for n in own if n not in saved),
        plain=not parts.saves_work,
        kernel=None if kernel is None else kernel.name,
        no_kernel=no_kernel,
        slow=tuple(_slow(parts)),
    )


def _products(merged: list[Eqn], written: list[Eqn]) -> tuple[Product, ...]:
    """The merged products, each with the lines of the written products that it may come from."""
    found = []
    for e in merged:
        weights = e.invars[-1].aval.shape
        # A merged product stacks weights, so only the size of the operand tells which products it contains.
        lines = [source_line(w) for w in written if w.invars[-1].aval.shape[-1] in weights]
        found.append(Product(weights, tuple(dict.fromkeys(line for line in lines if line))))
    return tuple(found)


def _slow(parts: Parts) -> list[str]:
    """The products that stay in the loop, although they are not cuts."""
    cuts, found = {id(c.eqn) for c in parts.cuts}, []
    late = dependents(parts.rest, parts.state)
    for e in parts.rest:
        name, line = e.primitive.name, source_line(e)
        where = f" at {line}" if line else ""
        if name in PRODUCTS and id(e) not in cuts:
            both = all(v in late for v in e.invars if not hasattr(v, "val"))
            why = "both operands depend on the state" if both else "its weights depend on the input"
            found.append(f"a product{where}: {why}, so it and its gradients run once per step")
        elif name not in PRODUCTS and count_multiplications(e):
            found.append(f"a product inside {name}{where}: it and its gradients run once per step, as in a plain scan")
    return found


def _jacobian(traced: Traced) -> str:
    parts = Parts(inline(traced.program), traced.n_params, traced.n_state, merge_sigmoids=False)
    if not parts.state:
        return "none: the cell has no state"
    units = units_of(parts)
    if units is None:
        return "one tangent of the rest per number of the state; the tangents of the cuts are rows of their weights"
    behind = sum(c.operand not in parts.state for c in parts.cuts)
    cost = "no product of matrices" if not behind else f"{behind} product{'s' * (behind > 1)} of matrices"
    return f"D_s + sum_i D_i W_i: the rest acts unit by unit, {cost}"


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _at(lines: tuple[str, ...]) -> str:
    return f", written at {', '.join(lines)}" if lines else ""
