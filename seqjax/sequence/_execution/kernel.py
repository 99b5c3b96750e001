"""The compiled loops of one cell: arrays of the cell in, arrays of the cell out.

`seqjax.sequence._execution.formulas` finds out which part of the cell is what the compiled loops mean by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqjax.kernels import calls
from seqjax.sequence._execution.chunks import Leaves

if TYPE_CHECKING:
    from seqjax.sequence._execution.backward import KnownSteps
    from seqjax.sequence._partition.parts import Hoisted
else:
    Hoisted = KnownSteps = Any


DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}  # that the compiled loops compute in


class Roles(NamedTuple):
    """Which part of a loop is what a kernel's formulas mean by it.

    Attributes:
        states: the leaf of the state that is h, and the leaf that is c if there is one.
        blocks: for each gate of the kernel, the block of the cut.
        valid, reset: the drive that is the mask, and the one that is the reset; None if there is none.
        initial: for each of `states`, the hoisted value that a reset sets; empty if there is no reset.
    """

    states: tuple[int, ...]
    blocks: tuple[int, ...]
    valid: int | None
    reset: int | None
    initial: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The compiled loops of one cell, and the order in which they read the cell's arrays.

    Attributes:
        name: the formulas, one of `seqjax.kernels.calls.CELLS`.
        size: n, the number of units.
        dtype: float32 or float64.
        roles: which leaf, block or value is what the kernel means by it.
        drives: for each gate of the kernel, the index of the drive and the block in it.
        biases: for each drive, the index of the hoisted value that is added to it; None if there is none.
        lookup: if the drives of all gates are one row of a table, the drive, and the index of the table among the
            hoisted values; None if they are not.
        outputs: for each output of a step, the leaf of the new state that it is, and whether it is zero where the step
            is masked.
    """

    name: str
    size: int
    dtype: np.dtype
    roles: Roles
    drives: tuple[tuple[int, int], ...]
    biases: tuple[int | None, ...]
    lookup: tuple[Any, int] | None
    outputs: tuple[tuple[int, bool], ...]

    saves_all = False  # whether the forward pass saves every leaf of the state

    @property
    def gates(self) -> int:
        """The number of gates."""
        return len(self.roles.blocks)

    @property
    def bytes_of_gates(self) -> int:
        """The bytes of what `forward_saving_gates` saves of one step of one row, besides its state."""
        return self.dtype.itemsize * self.size * (self.gates + (self.name == "gru"))

    @property
    def runs_backward(self) -> bool:
        """Whether the backward loop is compiled too. It reads cotangents of the outputs only if these are h."""
        return all(leaf == self.roles.states[0] for leaf, _ in self.outputs)

    def forward(self, hoisted: Hoisted, state: Leaves, drives: Leaves, reverse: bool) -> tuple[Leaves, Leaves]:
        """The state after each step of a chunk, and the outputs of each step, leaves (time, batch, n).

        Args:
            hoisted: from `Parts.hoist`.
            state: the state before the chunk.
            drives: without their biases.
            reverse: whether the loop runs from right to left.
        """
        loop = self._loop(hoisted, drives, reverse)
        states = self._leaves(calls.run_forward(loop, self._h_c(state), self._drives(drives)))
        return states, self._outputs(loop, states)

    def forward_saving_gates(
        self, hoisted: Hoisted, state: Leaves, drives: Leaves, tokens: Array | None, reverse: bool
    ) -> tuple[Leaves, Leaves, calls.SavedSteps]:
        """Like `forward`, for whole sequences, leaves (batch, time, n), with what `backward_from_gates` reads.

        Args:
            hoisted, state, drives, reverse: as for `forward`.
            tokens: with a `lookup`, the number of its row, (batch, time); otherwise None.
        """
        loop = self._loop(hoisted, drives, reverse)
        read = self._rows(hoisted, tokens) or self._drives(drives)
        states, saved = calls.run_forward_saving_gates(loop, self._h_c(state), read)
        states = self._leaves(states)
        return states, self._outputs(loop, states), saved

    def rematerialized(self, hoisted: Hoisted, first: Leaves, steps: KnownSteps, reverse: bool) -> Leaves:
        """The states before each step of a chunk of an LSTM, leaves (time, batch, n).

        Args:
            hoisted: from `Parts.hoist`.
            first: the state before the chunk.
            steps: the known steps, with h only in `before`. An LSTM saves h and not c, because the cut reads h only.
            reverse: whether the loop runs from right to left.
        """
        h, c = self.roles.states
        loop = self._loop(hoisted, steps.drives, reverse)
        c_before = calls.run_replay(loop, self._drives(steps.drives), self._reorder(steps.results[0]), first[c])
        return self._leaves([steps.before[h], c_before])

    def backward(
        self, hoisted: Hoisted, steps: KnownSteps, ct_state: Leaves, ct_outputs: Leaves, reverse: bool
    ) -> tuple[Leaves, Leaves, Leaves, Leaves]:
        """The cotangents of the state before a chunk, of the hoisted values, of its drives and of its cuts.

        Args:
            hoisted: from `Parts.hoist`.
            steps: the known steps.
            ct_state: the cotangents of the state after the chunk.
            ct_outputs: the cotangents of the outputs of each step, all of which are h.
            reverse: whether the loop runs from right to left.
        """
        loop, before = self._loop(hoisted, steps.drives, reverse), self._h_c(steps.before)
        known = (self._drives(steps.drives), self._reorder(steps.results[0]), before)
        ct_h = self._ct_h(loop, ct_outputs, before[0])
        cts, ct_cut = calls.run_backward(loop, known, self._h_c(ct_state), ct_h)
        return *self._cotangents(hoisted, steps.drives, cts), [self._in_order_of_cut(ct_cut)]

    def backward_from_gates(
        self,
        hoisted: Hoisted,
        drives: tuple[Leaves, Array | None],
        steps: tuple[calls.SavedSteps, Leaves, Leaves],
        ct_state: Leaves,
        ct_outputs: Leaves,
        reverse: bool,
        of_weights: bool,
    ) -> tuple[Leaves, Leaves, Leaves, tuple[Array, Array]]:
        """Like `backward`, for whole sequences, leaves (batch, time, n).

        Args:
            hoisted, ct_state, ct_outputs, reverse: as for `backward`.
            drives: `drives`, of which only the mask and the resets are read, and `tokens` of `forward_saving_gates`.
            steps: what `forward_saving_gates` saved, the state before the first step, and the states after each step.
            of_weights: whether the cotangents of the weights are wanted.

        Returns:
            The cotangents of the first state, of the hoisted values, of the drives, and of the weights and the bias of
            the cut; the latter two are empty if they are not wanted.
        """
        saved, first, states = steps
        loop, rows = self._loop(hoisted, drives[0], reverse), self._rows(hoisted, drives[1])
        of_loop = (saved, self._h_c(first), self._h_c(states))
        ct_h = self._ct_h(loop, ct_outputs, of_loop[2][0])
        cts, (ct_W, ct_b, ct_table) = calls.run_backward_from_gates(
            loop, of_loop, self._h_c(ct_state), ct_h, of_weights, rows
        )
        ct_before, ct_values, ct_drives = self._cotangents(hoisted, drives[0], cts)
        if self.lookup is not None:
            ct_values[self.lookup[1]] += self._in_order_of_cut(ct_table[:-1])
        if of_weights:
            ct_W, ct_b = self._in_order_of_cut(ct_W, axis=0), self._in_order_of_cut(ct_b)
        return ct_before, ct_values, ct_drives, (ct_W, ct_b)

    def _loop(self, hoisted: Hoisted, drives: Leaves, reverse: bool) -> calls.Loop:
        """What the loop reads of the parameters, the mask and the resets."""
        ((W, b),) = hoisted.weights
        valid, reset = (None if k is None else drives[k] for k in (self.roles.valid, self.roles.reset))
        return calls.Loop(
            self.name,
            self._reorder(W, axis=0),
            None if b is None else self._reorder(b),
            self._drive_bias(hoisted),
            valid,
            reset,
            tuple(hoisted.values[j] for j in self.roles.initial),
            reverse,
        )

    def _drive_bias(self, hoisted: Hoisted) -> Array | None:
        """What is added to the drives of all gates, (gates * n,)."""
        of_drives = [None if j is None else hoisted.values[j] for j in self.biases]
        added = [of_drives[i] for i, _ in self.drives]
        if all(value is None for value in added):
            return None
        starts = [k * self.size for _, k in self.drives]
        blocks = [b if b is None else b[at : at + self.size] for b, at in zip(added, starts, strict=True)]
        zero = jnp.zeros(self.size, self.dtype)
        return jnp.concatenate([zero if block is None else block for block in blocks])

    def _rows(self, hoisted: Hoisted, tokens: Array | None) -> calls.Rows | None:
        """The table, with one more row of NaN for each token that it does not have."""
        if self.lookup is None or tokens is None:
            return None
        table = hoisted.values[self.lookup[1]]
        size = table.shape[0]
        is_known = (tokens >= 0) & (tokens < size)
        table = jnp.concatenate([self._reorder(table), jnp.full((1, table.shape[1]), jnp.nan, table.dtype)])
        return calls.Rows(table, jnp.where(is_known, tokens, size).astype(jnp.int32))

    def _outputs(self, loop: calls.Loop, states: Leaves) -> Leaves:
        return [self._where_valid(loop, states[leaf], masked) for leaf, masked in self.outputs]

    def _ct_h(self, loop: calls.Loop, ct_outputs: Leaves, like: Array) -> Array:
        """The cotangents of h after each step, without those from later steps."""
        cts = [self._where_valid(loop, ct, masked) for ct, (_, masked) in zip(ct_outputs, self.outputs, strict=True)]
        return sum(cts[1:], cts[0]) if cts else jnp.zeros_like(like)

    def _where_valid(self, loop: calls.Loop, array: Array, masked: bool) -> Array:
        return jnp.where(loop.valid[..., None], array, 0) if masked and loop.valid is not None else array

    def _cotangents(self, hoisted: Hoisted, drives: Leaves, cts: calls.Cotangents) -> tuple[Leaves, Leaves, Leaves]:
        """The cotangents of the state before, of the hoisted values and of the drives from those of the kernel."""
        ct_hoisted = [jnp.zeros_like(value) for value in hoisted.values]
        for j, ct in zip(self.roles.initial, cts.initial, strict=True) if self.roles.initial else ():
            ct_hoisted[j] += ct.sum(axis=0)
        return self._leaves(cts.before), ct_hoisted, self._ct_drives(drives, cts.drives)

    def _in_order_of_cut(self, array: Array, axis: int = -1) -> Array:
        """The blocks of the gates in the order that they have in the cut."""
        return self._reorder(array, [self.roles.blocks.index(k) for k in range(self.gates)], axis)

    def _h_c(self, leaves: Leaves) -> Leaves:
        """From the leaves of the cell's state to h, and c if there is one."""
        return [leaves[k] for k in self.roles.states]

    def _ct_drives(self, drives: Leaves, ct_gates: Array) -> Leaves:
        """The cotangents of the cell's drives from those of the kernel's gates, (time, batch, gates * n)."""
        gate_of = {position: gate for gate, position in enumerate(self.drives)}
        by_gate = [ct_gates[..., k * self.size : (k + 1) * self.size] for k in range(self.gates)]
        found = []
        for i, drive in enumerate(drives):
            if i in (self.roles.valid, self.roles.reset):
                found.append(drive)  # it has no cotangent
                continue
            blocks = range(drive.shape[-1] // self.size)
            if [gate_of.get((i, k)) for k in blocks] == list(range(self.gates)):
                found.append(ct_gates)  # without slices, which XLA would copy
            else:
                zero = jnp.zeros_like(drive[..., : self.size])
                parts = [by_gate[gate_of[i, k]] if (i, k) in gate_of else zero for k in blocks]
                found.append(jnp.concatenate(parts, axis=-1))
        return found

    def _leaves(self, states: Iterable[Array]) -> Leaves:
        """From (h, c) to the leaves of the cell's state in their order."""
        return [value for _, value in sorted(zip(self.roles.states, states, strict=True), key=lambda pair: pair[0])]

    def _drives(self, drives: Leaves) -> Array:
        """The drives of all gates, (time, batch, gates * n)."""
        # A drive that has the order of the kernel already is not copied.
        if self.drives == tuple((self.drives[0][0], k) for k in range(self.gates)):
            whole = drives[self.drives[0][0]]
            if whole.shape[-1] == self.gates * self.size:
                return whole
        parts = [drives[i][..., k * self.size : (k + 1) * self.size] for i, k in self.drives]
        return jnp.concatenate(parts, axis=-1)

    def _reorder(self, array: Array, order: Iterable[int] | None = None, axis: int = -1) -> Array:
        """The blocks of an array in another order; by default from the order of the cut to that of the gates."""
        order = list(self.roles.blocks if order is None else order)
        if order == list(range(self.gates)):
            return array
        blocks = jnp.split(array, self.gates, axis=axis)
        return jnp.concatenate([blocks[k] for k in order], axis=axis)
