"""Backward: the cotangents of the states through a chunk, then the gradients of the weights at once.

    ct s_{t-1} = D_s^T ct s_t + sum_i W_i^T D_i^T ct s_t

D_s and D_i are the derivatives of the rest of the step by its state and by its cuts, at states and cuts that are all
known before the loop. So the loop holds one product per cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from seqjax.sequence._execution.chunks import Chunks, chunk_length, cut, scan_once
from seqjax.sequence._execution.forward import Leaves, over_chunk
from seqjax.sequence._execution.kernel import Kernel
from seqjax.sequence._partition.parts import Parts
from seqjax.sequence._partition.program import inexact


def pick(tree: PyTree, wanted: PyTree) -> list[Any]:
    """The leaves for which `wanted` is True."""
    return [leaf for leaf, w in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True) if w]


def put(tree: PyTree, wanted: PyTree, values: Sequence[Any]) -> PyTree:
    """The tree with other leaves where `wanted` is True."""
    those = iter(values)
    return jax.tree.map(lambda leaf, w: next(those) if w else leaf, tree, wanted)


def backward(
    parts: Parts,
    kernel: Kernel | None,
    reverse: bool,
    params: Leaves,
    state: Leaves,
    xs: Leaves,
    saved: tuple[Leaves, Leaves],
    ct_after: Leaves,
    ct_kept: Leaves,
    wanted: list[bool],
) -> list[Array]:
    """The cotangents of the wanted leaves of [*params, *state, *xs].

    Args:
        parts, kernel, reverse, params, state, xs: as for `forward`.
        saved: what `forward` saved.
        ct_after, ct_kept: the cotangents of the inexact leaves of what `forward` returned.
        wanted: for each leaf of the inputs; True for inexact ones only.
    """
    batch, time = xs[0].shape[:2]
    n_params, n_state = len(params), len(state)
    wanted_params, wanted_x = wanted[:n_params], wanted[n_params + n_state :]
    moves = parts.moving(wanted)
    floats = [inexact(leaf) for leaf in state]
    seen, first = saved
    hoisted = parts.hoist(params)
    loop = Loop(parts, kernel, reverse, hoisted, floats, moves)

    def chunk(carry: Any, start: Array, length: int) -> tuple[Any, Leaves, None]:
        ct_after, ct_fixed = carry
        x, last = cut(xs, start, length), [leaf[start // chunks.length] for leaf in first]
        before = _states_before(parts, reverse, last, cut(seen, start, length))

        def early(fixed: Any, x: Leaves) -> Any:
            inputs = over_chunk(parts.without_biases, (length, batch), None, 0)(fixed, x)
            drives = parts.with_biases(fixed, inputs)
            constant = lax.stop_gradient(drives)
            results = over_chunk(parts.results, (length, batch), None, 0, 0)(fixed, before, constant)
            return (pick(drives, moves.passed), pick(results, moves.cuts)), (inputs, results)

        _, (inputs, results), pull = _pullback(early, (hoisted, x), (moves.fixed, wanted_x))
        if not all(parts.seen):
            before = loop.rematerialized(length, last, before, inputs, results)
        ct_after, ct_extra, cts = loop.run(length, ct_after, before, inputs, results, cut(ct_kept, start, length))
        cts = pull(cts)
        ct_fixed = [total + ct.astype(total.dtype) for total, ct in zip(ct_fixed, cts[: len(ct_fixed)], strict=True)]
        places = [i for i, w in enumerate(pick(moves.extra, moves.fixed[0])) if w]
        for i, ct in zip(places, ct_extra, strict=True):
            ct_fixed[i] += ct
        return (ct_after, ct_fixed), cts[len(ct_fixed) :], None

    chunks = Chunks(time, chunk_length(batch, time), reverse)
    fixed = pick(hoisted, moves.fixed)
    carry = (ct_after, [jnp.zeros(leaf.shape, _at_least_32_bits(leaf.dtype)) for leaf in fixed])
    (ct_state, ct_fixed), ct_xs, _ = chunks.scan(chunk, carry, back=True)

    def hoist(some: list[Any]) -> list[Any]:
        return pick(parts.hoist(put(params, wanted_params, some)), moves.fixed)

    ct_fixed = [ct.astype(leaf.dtype) for ct, leaf in zip(ct_fixed, fixed, strict=True)]
    ct_params = jax.vjp(hoist, pick(params, wanted_params))[1](ct_fixed)[0]
    wanted_state = [w for w, f in zip(wanted[n_params : n_params + n_state], floats, strict=True) if f]
    return [*ct_params, *pick(ct_state, wanted_state), *ct_xs]


class Loop:
    """The loops of the backward pass through one chunk.

    Its inputs are the passed values without their biases, as in `forward.run_chunk`.
    """

    def __init__(
        self, parts: Parts, kernel: Kernel | None, reverse: bool, hoisted: Any, floats: list[bool], moves: Any
    ) -> None:
        self.parts, self.reverse, self.hoisted, self.floats, self.moves = parts, reverse, hoisted, floats, moves
        self.kernel = kernel

    def run(
        self, length: int, ct_after: Leaves, before: Leaves, inputs: Leaves, results: Leaves, ct_kept: Leaves
    ) -> tuple[Leaves, Leaves, tuple[Leaves, Leaves]]:
        """The cotangents of the state before the chunk, of the extra parameters, and of (drives, results)."""
        parts, hoisted, moves = self.parts, self.hoisted, self.moves
        if self.kernel is not None and self.kernel.runs_backward:
            drives = parts.with_biases(hoisted, inputs)
            ct_before, ct_drives, ct_results = self.kernel.backward(
                hoisted[1], ct_after, before, drives, results, ct_kept, self.reverse
            )
            return ct_before, [], (pick(ct_drives, moves.passed), pick(ct_results, moves.cuts))

        def step(carry: Any, at: Any) -> Any:
            ct_after, ct_extra = carry
            before, inputs, results, ct_kept, _ = at
            drives = parts.with_biases(hoisted, inputs)

            def rest(state: Leaves, drives: Leaves, results: Leaves, extra: Leaves) -> Any:
                out = jax.vmap(parts.finish_known, (None, 0, 0, 0))((extra, hoisted[1]), state, drives, results)
                return [leaf for leaf in jax.tree.leaves(out) if inexact(leaf)], None

            wanted = (self.floats, moves.passed, moves.cuts, moves.extra)
            *_, pull = _pullback(rest, (before, drives, results, hoisted[0]), wanted)
            cts = iter(pull([*ct_after, *ct_kept]))
            ct_before, ct_drives, ct_results, ct_more = ([next(cts) for w in ws if w] for ws in wanted)
            ct_extra = [a + b.astype(a.dtype) for a, b in zip(ct_extra, ct_more, strict=True)]
            return (ct_before, ct_extra), (ct_drives, ct_results)

        at = (before, inputs, results, ct_kept, jnp.arange(length))
        extra = [jnp.zeros(leaf.shape, _at_least_32_bits(leaf.dtype)) for leaf in pick(hoisted[0], moves.extra)]
        (ct_before, ct_extra), cts = scan_once(step, (ct_after, extra), at, not self.reverse)
        return ct_before, ct_extra, cts

    def rematerialized(self, length: int, first: Leaves, before: Leaves, inputs: Leaves, results: Leaves) -> Leaves:
        """All leaves of s_{t-1} for every t: those that no cut reads are computed again by the steps, without products.

        Args:
            first: the state before the chunk.
            before: the leaves that the cuts read; None for the others.
        """
        parts = self.parts
        if self.kernel is not None:
            drives = parts.with_biases(self.hoisted, inputs)
            return self.kernel.rematerialized(first, before, drives, results, self.reverse)

        def fill(some: Leaves, others: Leaves) -> Leaves:
            return [o if s is None else s for s, o in zip(some, others, strict=True)]

        def step(hidden: Leaves, at: Any) -> tuple[Leaves, Leaves]:
            before, inputs, results, _ = at
            state = fill(before, hidden)
            drives = parts.with_biases(self.hoisted, inputs)
            after = jax.vmap(parts.next_state, (None, 0, 0, 0))(self.hoisted, state, drives, results)
            return [None if seen else leaf for leaf, seen in zip(after, parts.seen, strict=True)], hidden

        hidden = [None if seen else leaf for leaf, seen in zip(first, parts.seen, strict=True)]
        at = (before, inputs, results, jnp.arange(length))
        return fill(before, lax.scan(step, hidden, at, reverse=self.reverse)[1])


def _states_before(parts: Parts, reverse: bool, first: Leaves, seen: Leaves) -> Leaves:
    """s_{t-1} for every t of a chunk, (time, batch, ...): the leaves that the cuts read, and None for the others."""
    rows = iter(seen)

    def join(first: Array, rows: Array) -> Array:
        return jnp.concatenate([rows[1:], first[None]] if reverse else [first[None], rows[:-1]])

    return [join(leaf, next(rows)) if is_seen else None for leaf, is_seen in zip(first, parts.seen, strict=True)]


def _pullback(f: Callable[..., Any], args: Any, wanted: Any) -> tuple[Any, Any, Callable[[Any], list[Any]]]:
    """f(*args) = (out, other): both, and the map from cotangents of `out` to those of the wanted leaves of `args`."""

    def of_wanted(values: list[Any]) -> Any:
        return f(*put(args, wanted, values))

    out, pull, other = jax.vjp(of_wanted, pick(args, wanted), has_aux=True)
    return out, other, lambda cts: pull(cts)[0]


def _at_least_32_bits(dtype: DTypeLike) -> Any:
    """The dtype in which cotangents are summed over time."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32
