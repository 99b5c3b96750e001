"""Batches of sequences of similar length, padded and shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from seqjax.data.batch import Batch


def pad(sequences: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences of different lengths with zeros at the end, and returns the mask of the valid steps.

    Args:
        sequences: arrays (time_b, ...); only the time may differ.

    Returns:
        The array (batch, longest time, ...) and the mask (batch, longest time).

    Raises:
        ValueError: there is no sequence, or the features of the sequences differ.

    Example:
        >>> import seqjax as sj
        >>> xs, mask = sj.data.pad([[1, 2, 3], [4]])
        >>> xs.tolist(), mask.tolist()
        ([[1, 2, 3], [4, 0, 0]], [[True, True, True], [True, False, False]])
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    if not arrays:
        raise ValueError("expected at least one sequence to pad, got none")
    shapes = {array.shape[1:] for array in arrays if array.ndim}
    if len(shapes) != 1 or not all(array.ndim for array in arrays):
        raise ValueError(f"expected sequences (time, ...) with the same features, got {[a.shape for a in arrays[:5]]}")
    lengths = np.array([len(array) for array in arrays])
    mask = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
    # An empty list becomes float64, so empty arrays must not decide the dtype of tokens.
    padded = np.zeros(
        (*mask.shape, *shapes.pop()), np.result_type(*([array for array in arrays if array.size] or arrays))
    )
    padded[mask] = np.concatenate(arrays)
    return padded, mask


def batches(
    sequences: Sequence[Any] | np.ndarray,
    targets: Sequence[Any] | np.ndarray,
    batch: int,
    *,
    seed: int | None = None,
    passes: int | None = 1,
    sort: bool = True,
) -> Iterator[Batch]:
    """Padded batches of sequences of similar length, so that there is little padding.

    Args:
        sequences: arrays (time_b, ...).
        targets: one target per sequence, or for each sequence an array (time_b, ...) with one target per step, which is
            padded like the sequence.
        batch: sequences per batch; the last batch of a pass may be smaller.
        seed: shuffles the sequences of equal length and the order of the batches, differently in each pass. None for no
            shuffle.
        passes: the number of passes over the sequences; None for an endless stream.
        sort: sort by length. With False, only the shuffle sets the order.

    Yields:
        `Batch`, with a mask if the lengths of its sequences differ.

    Raises:
        ValueError: the numbers of sequences and targets differ, or a size is not positive.

    Example:
        >>> import seqjax as sj
        >>> [b.xs.shape for b in sj.data.batches([[1], [1, 2, 3], [1, 2], [1]], [0, 1, 1, 0], batch=2)]
        [(2, 1), (2, 3)]
    """
    if len(sequences) != len(targets) or not len(sequences):
        raise ValueError(f"expected one target per sequence, got {len(targets)} for {len(sequences)} sequences")
    if batch < 1:
        raise ValueError(f"expected batch of at least 1, got {batch}")
    arrays = [np.asarray(sequence) for sequence in sequences]
    labels = [np.asarray(target) for target in targets]
    lengths = np.array([len(array) for array in arrays])
    # If only some targets have the length of their sequence, that is chance: they are vectors.
    per_step = all(label.ndim and len(label) == n for label, n in zip(labels, lengths, strict=True))

    def stream() -> Iterator[Batch]:
        random = None if seed is None else np.random.default_rng(seed)
        done = 0
        while passes is None or done < passes:
            order = np.arange(len(arrays)) if random is None else random.permutation(len(arrays))
            if sort:
                # A stable sort leaves sequences of equal length in their shuffled order.
                order = order[np.argsort(lengths[order], kind="stable")]
            groups = [order[i : i + batch] for i in range(0, len(order), batch)]
            if random is not None:
                random.shuffle(groups)
            for rows in groups:
                xs, mask = pad([arrays[i] for i in rows])
                ys = pad([labels[i] for i in rows])[0] if per_step else np.stack([labels[i] for i in rows])
                yield Batch(xs, ys, None if mask.all() else mask)
            done += 1

    return stream()
