"""Batches of sequences of different lengths: padded beside sequences of similar length, or packed into rows."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from seqjax.cells.arguments import described
from seqjax.cells.whole_numbers import whole_number
from seqjax.data.batch import Batch


@runtime_checkable
class Sequences(Protocol):
    """Arrays (time_b, ...) by number: a list, an array, or a source that reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: Any, /) -> Any: ...


def pad(sequences: Sequences, time: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences of different lengths with zeros at the end, and returns the mask of the valid steps.

    Args:
        sequences: arrays (time_b, ...); only the time may differ.
        time: the number of steps; by default that of the longest sequence.

    Returns:
        The array (batch, time, ...) and the mask (batch, time).

    Raises:
        ValueError: there is no sequence, the features of the sequences differ, or a sequence is longer than `time`.

    Example:
        >>> import seqjax as sj
        >>> xs, mask = sj.data.pad([[1, 2, 3], [4]])
        >>> xs.tolist(), mask.tolist()
        ([[1, 2, 3], [4, 0, 0]], [[True, True, True], [True, False, False]])
    """
    _check_source("sequences", sequences)
    arrays = [_as_sequence(sequence) for sequence in sequences]
    time = None if time is None else whole_number("time", time, 0)
    if not arrays:
        raise ValueError("expected at least one sequence to pad, got none")
    shapes = {array.shape[1:] for array in arrays if array.ndim}
    if len(shapes) != 1 or not all(array.ndim for array in arrays):
        raise ValueError(f"expected sequences (time, ...) with the same features, got {[a.shape for a in arrays[:5]]}")
    lengths = np.array([len(array) for array in arrays])
    longest = int(lengths.max(initial=0))
    if time is not None and longest > time:
        raise ValueError(f"expected sequences of at most time={time} steps, got {longest}: use a larger time")
    mask = np.arange(longest if time is None else time)[None] < lengths[:, None]
    # An empty list becomes float64, so empty arrays must not decide the dtype of tokens.
    padded = np.zeros(
        (*mask.shape, *shapes.pop()), np.result_type(*([array for array in arrays if array.size] or arrays))
    )
    padded[mask] = np.concatenate(arrays)
    return padded, mask


def batches(
    sequences: Sequences,
    targets: Sequences,
    batch: int,
    *,
    seed: int | None = None,
    passes: int | None = 1,
    sort: bool = True,
    skip: int = 0,
) -> Iterator[Batch]:
    """Padded batches of sequences of similar length, so that there is little padding.

    Sequences and targets are read when their batch is made, so they can be larger than memory: a memory-mapped array,
    or any object with `len(sequences)` and `sequences[i]`. The n-th batch depends only on n, so a stream with `skip=n`
    yields the same batches as one that has already yielded n.

    Args:
        sequences: arrays (time_b, ...).
        targets: one target per sequence, or for each sequence an array (time_b, ...) with one target per step, which is
            padded like the sequence.
        batch: sequences per batch; the last batch of a pass may be smaller.
        seed: shuffles the sequences of equal length and the order of the batches, differently in each pass. None for no
            shuffle.
        passes: the number of passes over the sequences; None for an endless stream.
        sort: sort by length. With False, only the shuffle sets the order.
        skip: the number of batches to skip at the start.

    Yields:
        `Batch`, with a mask if the lengths of its sequences differ.

    Raises:
        ValueError: the numbers of sequences and targets differ, or a size is not positive.

    Example:
        >>> import seqjax as sj
        >>> [b.xs.shape for b in sj.data.batches([[1], [1, 2, 3], [1, 2], [1]], [0, 1, 1, 0], batch=2)]
        [(2, 1), (2, 3)]
    """
    lengths, per_step = _lengths(sequences, targets)
    batch, skip, passes = whole_number("batch", batch), whole_number("skip", skip, 0), _count(passes)

    def orders() -> Iterator[np.ndarray]:
        """The rows of each batch."""
        for random in _passes(seed, passes):
            order = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
            if sort:
                # A stable sort leaves sequences of equal length in their shuffled order.
                order = order[np.argsort(lengths[order], kind="stable")]
            groups = [order[i : i + batch] for i in range(0, len(order), batch)]
            if random is not None:
                random.shuffle(groups)
            yield from groups

    def stream() -> Iterator[Batch]:
        for rows in itertools.islice(orders(), skip, None):
            xs, mask = pad([sequences[i] for i in rows])
            labels = [np.asarray(targets[i]) for i in rows]
            yield Batch(xs, pad(labels)[0] if per_step else np.stack(labels), None if mask.all() else mask)

    return stream()


def packed(
    sequences: Sequences,
    targets: Sequences,
    batch: int,
    window: int,
    *,
    seed: int | None = None,
    passes: int | None = 1,
    skip: int = 0,
) -> Iterator[Batch]:
    """Batches whose rows hold several sequences one after the other, with a reset before each.

    A reset starts the state anew, so the outputs of each sequence are those of a row of its own, with less padding.
    Rows are filled best fit first, from the longest sequence to the shortest. Sequences and targets are read when their
    batch is made, and `skip` works as in `batches`.

    Args:
        sequences: arrays (time_b, ...), at most `window` steps each.
        targets: for each sequence an array (time_b, ...) with one target per step.
        batch: rows per batch; the last batch of a pass may be smaller.
        window: the steps of a row.
        seed: shuffles the sequences of equal length and the order of the rows, differently in each pass. None for no
            shuffle.
        passes: the number of passes over the sequences; None for an endless stream.
        skip: the number of batches to skip at the start.

    Yields:
        `Batch` with leaves (batch, window, ...), a mask if steps are left over, and resets.

    Raises:
        ValueError: the numbers of sequences and targets differ, a target is not one per step, a sequence is longer than
            the window, or a size is not positive.

    Source: best fit decreasing, Johnson 1973, "Near-optimal bin packing algorithms".

    Example:
        >>> import seqjax as sj
        >>> lines = [[1, 2, 3], [4], [5, 6]]
        >>> [(b.xs.tolist(), b.reset.tolist()) for b in sj.data.packed(lines, lines, batch=2, window=4)]
        [([[1, 2, 3, 4], [5, 6, 0, 0]], [[True, False, False, True], [True, False, False, False]])]
    """
    lengths, per_step = _lengths(sequences, targets)
    batch, window = whole_number("batch", batch), whole_number("window", window)
    skip, passes = whole_number("skip", skip, 0), _count(passes)
    if not per_step:
        raise ValueError(
            "expected one target per step of each sequence, got others: several sequences share a row, so a row has "
            "no single target; use sj.data.batches"
        )
    if (long := np.flatnonzero(lengths > window)).size:
        raise ValueError(
            f"expected sequences of at most window={window} steps, got {lengths[long[0]]} in sequence {long[0]} and "
            f"{len(long)} such: use a larger window, or cut them"
        )

    def rows() -> Iterator[list[list[int]]]:
        """The sequences in the rows of each batch."""
        for random in _passes(seed, passes):
            order = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
            order = order[np.argsort(-lengths[order], kind="stable")]
            filled = _best_fit(order, lengths, window)
            if random is not None:
                random.shuffle(filled)
            yield from (filled[i : i + batch] for i in range(0, len(filled), batch))

    def stream() -> Iterator[Batch]:
        for members in itertools.islice(rows(), skip, None):
            xs, ys = (_joined(values, members, window) for values in (sequences, targets))
            ends = [np.cumsum([0, *lengths[row]]) for row in members]
            mask = np.arange(window) < np.array([end[-1] for end in ends])[:, None]
            reset = np.zeros(mask.shape, bool)
            for flags, end in zip(reset, ends, strict=True):
                flags[end[:-1][end[:-1] < window]] = True
            yield Batch(xs, ys, None if mask.all() else mask, reset)

    return stream()


def padding_share(stream: Iterable[Batch]) -> float:
    """The share of the steps of some batches that are padding.

    Example:
        >>> import seqjax as sj
        >>> lines = [[1, 2, 3], [4], [5, 6]]
        >>> sj.data.padding_share(sj.data.packed(lines, lines, batch=2, window=4))
        0.25
    """
    steps = valid = 0
    for batch in stream:
        rows, time = np.shape(jax.tree.leaves(batch.xs)[0])[:2]
        steps += rows * time
        valid += rows * time if batch.mask is None else int(np.sum(batch.mask))
    return 1 - valid / steps if steps else 0.0


def _lengths(sequences: Sequences, targets: Sequences) -> tuple[np.ndarray, bool]:
    """The length of each sequence, and whether all targets have one value per step."""
    for name, values in (("sequences", sequences), ("targets", targets)):
        _check_source(name, values)
    if len(sequences) != len(targets) or not len(sequences):
        raise ValueError(f"expected one target per sequence, got {len(targets)} for {len(sequences)} sequences")
    # Each is read once, because a source may read it from a disk.
    lengths = np.array([_steps(i, sequences[i]) for i in range(len(sequences))])
    labels = (_as_sequence(targets[i]) for i in range(len(targets)))
    # If only some targets have the length of their sequence, that is chance: they are vectors.
    per_step = all(label.ndim and len(label) == n for label, n in zip(labels, lengths, strict=True))
    return lengths, per_step


def _steps(i: int, sequence: Any) -> int:
    array = _as_sequence(sequence)
    if not array.ndim:
        raise ValueError(f"expected sequences (time, ...), got the number {sequence!r} in place {i}")
    return len(array)


def _check_source(name: str, values: Any) -> None:
    is_number = getattr(values, "ndim", 1) == 0
    if is_number or isinstance(values, dict | str | bytes) or not isinstance(values, Sequences):
        raise TypeError(
            f"expected {name} as a list of arrays (time, ...), or a source with a length, got {described(values)}"
        )


def _as_sequence(sequence: Any) -> np.ndarray:
    try:
        array = np.asarray(sequence)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind in "OSU":
        raise TypeError(f"expected sequences of numbers, got {described(sequence)}: encode text with sj.data.encode")
    return array


def _count(passes: int | None) -> int | None:
    return None if passes is None else whole_number("passes", passes, 0, hint="None for an endless stream")


def _passes(seed: int | None, passes: int | None) -> Iterator[np.random.Generator | None]:
    """The random numbers of each pass, which continue those of the pass before."""
    random = None if seed is None else np.random.default_rng(whole_number("seed", seed, 0))
    return itertools.repeat(random) if passes is None else itertools.repeat(random, passes)


def _best_fit(order: np.ndarray, lengths: np.ndarray, window: int) -> list[list[int]]:
    """Rows of sequences, each sequence in the row in which the fewest steps are then left over."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (steps that are left over, row), sorted
    for i in order:
        n = int(lengths[i])
        place = bisect.bisect_left(left, (n, -1))
        if place < len(left):
            free, row = left.pop(place)
        else:
            free, row = window, len(rows)
            rows.append([])
        rows[row].append(int(i))
        bisect.insort(left, (free - n, row))
    return rows


def _joined(values: Sequences, members: list[list[int]], window: int) -> np.ndarray:
    """Rows of sequences one after the other, (rows, window, ...), with zeros after the last."""
    rows = [np.concatenate([np.asarray(values[i]) for i in row]) for row in members]
    return pad(rows, window)[0]
