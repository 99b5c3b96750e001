"""What the partition of a cell's step found, in a page that a person can read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from seqjax import kernels
from seqjax.cell import Cell, Params, strong_type
from seqjax.sequence._checks import check_methods
from seqjax.sequence._execution.jacobian import units_of
from seqjax.sequence._execution.kernel import kernel_supports
from seqjax.sequence._masked_step import last_output
from seqjax.sequence._parameter_checks import check_params
from seqjax.sequence._partition.loops import Stage
from seqjax.sequence._partition.parts import CUTS, Parts
from seqjax.sequence._partition.plan import NoPlan, Traced, plan_of, traced_one
from seqjax.sequence._partition.program import Eqn, inline, multiplications, needed, reach, source_line


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of the step.

    Attributes:
        shape: of its weights.
        lines: the places in the source where it is written; several if several products became one.
    """

    shape: tuple[int, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_shape(self.shape)}{_at(self.lines)}"


@dataclasses.dataclass(frozen=True)
class LoopExplanation:
    """One loop over time, or what needs no loop.

    Attributes:
        carried: the names of the leaves of the state that the loop carries.
        per_chunk: the products that run once per chunk of time.
        per_step: the products that run once per step.
        saved: the leaves that are saved at every step for the backward pass.
        saved_bytes: their bytes per example and step.
        rematerialized: the leaves that the backward pass computes again, without products.
        plain: whether it runs as a plain scan, because there is no product to take out of the loop.
        kernel: the compiled kernel that supports it, "lstm", "gru" or "vanilla".
        slow: what stays in the loop although it holds a product, and the line that causes it.
    """

    carried: tuple[str, ...]
    per_chunk: tuple[Product, ...]
    per_step: tuple[Product, ...]
    saved: tuple[str, ...]
    saved_bytes: int
    rematerialized: tuple[str, ...]
    plain: bool
    kernel: str | None
    slow: tuple[str, ...]

    def __str__(self) -> str:
        if not self.carried:
            lines = [f"  product, for all steps at once: {product}" for product in self.per_chunk]
            return "\n".join(["after the loops, from the states", *(lines or ["  no product"])])
        lines = [f"loop over {', '.join(self.carried)}"]
        lines += [f"  product, once per chunk: {product}" for product in self.per_chunk]
        lines += [f"  product, once per step:  {product}" for product in self.per_step]
        if self.plain:
            lines.append("  runs as a plain scan: no product to take out of the loop outweighs what stays in it")
        else:
            names = ", ".join(self.saved) or "no leaf"
            lines.append(f"  saved for the backward pass: {names}, {self.saved_bytes} bytes per example and step")
            if self.rematerialized:
                lines.append(f"  rematerialized: {', '.join(self.rematerialized)}")
        supported = "none supports it, so XLA runs the loop" if self.kernel is None else self.kernel
        built = "" if self.kernel is None or kernels.available() else " (not available here, so XLA runs the loop)"
        lines.append(f"  kernel: {supported}{built}")
        return "\n".join([*lines, *(f"  SLOW: {reason}" for reason in self.slow)])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a cell is unrolled. `print` it.

    Attributes:
        cell: its name.
        loops: its loops, in the order in which they run.
        jacobian: the form of ds_t/ds_{t-1}.
        fallback: why the step runs as a plain scan, if it does.
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
        params: its parameters, as arrays or shapes.
        x: the input of one example at one time, as `cell.step` takes it, as arrays or shapes.

    Returns:
        `Explanation`. Printed, it says which products run once per chunk and once per step, what is saved for the
        backward pass, which form of the Jacobian applies, and which line keeps something in the slow part.

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
    state = jax.eval_shape(lambda p: strong_type(cell.initial_state(p)), params)
    x = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf), x)
    traced = traced_one(cell, last_output, params, state, (x, None, None, None))
    plan = plan_of(traced, True)
    name = type(cell).__name__
    if isinstance(plan, NoPlan):
        return Explanation(name, (), "that of the whole step, by jax.jacfwd", plan.reason)
    leaves = [
        jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    loops = [_loop(stage, parts, leaves) for stage, parts in zip(plan.stages, plan.parts, strict=True)]
    shown = tuple(loop for loop in loops if loop.carried or loop.per_chunk)
    return Explanation(name, shown, _jacobian(traced), None)


def _loop(stage: Stage, parts: Parts, names: list[str]) -> LoopExplanation:
    own = [names[i] for i in stage.leaves]
    seen = [n for n, s in zip(own, parts.seen, strict=True) if s]
    size = sum(v.aval.size * v.aval.dtype.itemsize for v, s in zip(parts.state, parts.seen, strict=True) if s)
    # The lines stand in the program before products were merged.
    jaxpr: Any = stage.program.jaxpr
    eqns, _ = needed(jaxpr.eqns, jaxpr.outvars)
    first = len(jaxpr.invars) - len(stage.inputs) - len(stage.leaves)
    late = reach(eqns, jaxpr.invars[first : first + len(stage.leaves)])
    early = reach(eqns, jaxpr.invars[first + len(stage.leaves) :])
    products = [e for e in eqns if e.primitive.name in CUTS]
    in_loop = [e for e in products if e.outvars[0] in late]
    before = [e for e in products if e.outvars[0] not in late and e.outvars[0] in early]
    kernel = kernel_supports(parts) if stage.leaves else None
    return LoopExplanation(
        carried=tuple(own),
        per_chunk=_products([e for e in parts.drive if e.primitive.name in CUTS], before),
        per_step=_products([c.eqn for c in parts.cuts], in_loop),
        saved=tuple(seen),
        saved_bytes=size,
        rematerialized=tuple(n for n in own if n not in seen),
        plain=not parts.pays,
        kernel=None if kernel is None else kernel.name,
        slow=tuple(_slow(parts)),
    )


def _products(merged: list[Eqn], written: list[Eqn]) -> tuple[Product, ...]:
    found = []
    for e in merged:
        weights = e.invars[-1].aval.shape
        lines = [source_line(w) for w in written if w.invars[-1].aval.shape[-1] in weights]
        found.append(Product(weights, tuple(dict.fromkeys(line for line in lines if line))))
    return tuple(found)


def _slow(parts: Parts) -> list[str]:
    cuts, found = {id(c.eqn) for c in parts.cuts}, []
    late = reach(parts.rest, parts.state)
    for e in parts.rest:
        name, line = e.primitive.name, source_line(e)
        where = f" at {line}" if line else ""
        if name in CUTS and id(e) not in cuts:
            both = all(v in late for v in e.invars if not hasattr(v, "val"))
            why = "both operands depend on the state" if both else "its weights depend on the input"
            found.append(f"a product{where}: {why}, so it and its gradients run once per step")
        elif name not in CUTS and multiplications(e):
            found.append(f"a product inside {name}{where}: it and its gradients run once per step, as in a plain scan")
    return found


def _jacobian(traced: Traced) -> str:
    parts = Parts(inline(traced.program), traced.params, traced.state, with_sigmoids=False)
    if not parts.state:
        return "none: the cell carries no state"
    units = units_of(parts)
    if units is None:
        return "one tangent of the rest per number of the state, the cuts' tangents read off their weights"
    behind = sum(c.operand not in parts.state for c in parts.cuts)
    cost = "no product of matrices" if not behind else f"{behind} product{'s' * (behind > 1)} of matrices"
    return f"D_s + sum_i D_i W_i: the rest acts unit by unit, {cost}"


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _at(lines: tuple[str, ...]) -> str:
    return f", written at {', '.join(lines)}" if lines else ""
