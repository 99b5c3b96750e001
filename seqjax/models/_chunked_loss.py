"""The sum of -log p over many steps, a few steps at a time, so that the logits of all steps never exist together.

The gradient of a few steps is computed together with their loss, while their logits are there. What is kept is the
gradient by the outputs of the cell and the sum of the gradients by the parameters of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from seqjax.models.heads import Head, head_log_probs
from seqjax.sequence._execution.backward import pick, put
from seqjax.sequence._execution.chunks import Chunks, Leaves
from seqjax.sequence._execution.partitioned import NO_BATCH, partitioned
from seqjax.sequence._partition.program import inexact
from seqjax.sequence._sizes import is_known

AT_ONCE = 2**20  # numbers; fewer are faster all at once
ROWS = 512  # examples in a chunk, enough for a fast product


def steps_in_chunk(head: Head, params: PyTree, outputs: PyTree, targets: PyTree) -> int | None:
    """The number of steps of a chunk; None if the logits, or what else a head computes of a step, are small."""
    h, y = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), (outputs, targets))
    program = jax.make_jaxpr(head.log_prob)(params, h, y)
    largest = max((v.aval.size for e in program.jaxpr.eqns for v in e.outvars), default=1)
    batch, time = jax.tree.leaves(outputs)[0].shape[:2]
    if not is_known(time):  # the last chunk could be empty
        return None
    batch = batch if is_known(batch) else 1
    length = -(-ROWS // max(batch, 1))
    return length if batch * time * largest > AT_ONCE and length < time else None


def loss_in_chunks(
    head: Head, length: int, params: PyTree, outputs: PyTree, targets: PyTree, mask: Array | None
) -> Array:
    """sum_t -log p(y_t | h_t) over the valid steps.

    Args:
        head: the readout.
        length: the steps of a chunk.
        params, outputs, targets, mask: as for `head_log_probs`.
    """
    leaves, structure = jax.tree.flatten((params, outputs, targets))
    is_moving, count = [*map(inexact, leaves)], len(jax.tree.leaves(params))
    is_step = [i >= count for i in range(len(leaves))]
    chunks = Chunks(jax.tree.leaves(outputs)[0].shape[1], length, reverse=False)

    def of_chunk(leaves: Leaves, mask: Array | None, start: Array, steps: int) -> tuple[Callable[..., Array], Leaves]:
        """The loss of a chunk as a function of the moving leaves, and their values."""

        def of_steps(leaf: Array) -> Array:
            return lax.dynamic_slice_in_dim(leaf, start, steps, 1)

        part = [of_steps(leaf) if step else leaf for leaf, step in zip(leaves, is_step, strict=True)]
        valid = None if mask is None else of_steps(mask)

        def loss(moving: Leaves) -> Array:
            params, outputs, targets = jax.tree.unflatten(structure, put(part, is_moving, moving))
            return -jnp.sum(head_log_probs(head, params, outputs, targets, valid))

        return loss, pick(part, is_moving)

    def zero(leaves: Leaves, mask: Array | None) -> Array:
        loss, moving = of_chunk(leaves, mask, jnp.asarray(0), length)
        return jnp.zeros((), jax.eval_shape(loss, moving).dtype)

    def on_each_device(run: Callable[[Leaves, Array | None], PyTree], out: PyTree) -> Callable[..., Any]:
        """`run(leaves, mask)` on every device for its rows. Sums over the batch are then added once, after the loop."""

        def partitioned_run(leaves: Leaves, mask: Array | None) -> Any:
            def of_arrays(*arrays: Array) -> PyTree:
                return run(list(arrays[: len(leaves)]), None if mask is None else arrays[-1])

            arrays = leaves if mask is None else [*leaves, mask]
            return partitioned(
                of_arrays, arrays, [*(0 if step else NO_BATCH for step in is_step), 0][: len(arrays)], out
            )

        # A second derivative is that of the loop as a whole.
        partitioned_run = jax.custom_jvp(partitioned_run)
        partitioned_run.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
        return partitioned_run

    @jax.custom_jvp
    @partial(on_each_device, out=NO_BATCH)
    def total(leaves: Leaves, mask: Array | None) -> Array:
        def body(value: Array, start: Array, steps: int) -> tuple[Array, Leaves, None]:
            loss, moving = of_chunk(leaves, mask, start, steps)
            return value + loss(moving), [], None

        return chunks.scan(body, zero(leaves, mask))[0]

    @partial(on_each_device, out=(NO_BATCH, NO_BATCH, 0))
    def with_gradient(leaves: Leaves, mask: Array | None) -> tuple[Array, Leaves, Leaves]:
        of_params = pick(leaves[:count], is_moving[:count])

        def body(carry: tuple[Array, Leaves], start: Array, steps: int) -> tuple[Any, Leaves, None]:
            value, ct_params = carry
            loss, moving = of_chunk(leaves, mask, start, steps)
            more, cts = jax.value_and_grad(loss)(moving)
            n = len(of_params)
            ct_params = [a + b for a, b in zip(ct_params, cts[:n], strict=True)]
            return (value + more, ct_params), [jnp.swapaxes(ct, 0, 1) for ct in cts[n:]], None

        first = (zero(leaves, mask), [*map(jnp.zeros_like, of_params)])
        (value, ct_params), ct_steps, _ = chunks.scan(body, first)
        return value, ct_params, ct_steps

    @total.defjvp
    def total_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
        value, ct_params, ct_steps = with_gradient(*primals)
        moves = pick(list(tangents[0]), is_moving)
        changes = [jnp.sum(ct * t) for ct, t in zip([*ct_params, *ct_steps], moves, strict=True)]
        return value, sum(changes, jnp.zeros_like(value))

    return total(leaves, mask)
