"""Batches out of sequences: padded to a common length, alike in length, shuffled, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from seqjax.data.batch import Batch


def pad(sequences: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of different lengths as one array, zeros behind the shorter ones, and the mask of what is not padding.

    Args:
        sequences: arrays (time_b, ...) that agree in all but the time.

    Returns:
        The array (batch, longest time, ...) and the mask (batch, longest time).

    Raises:
        ValueError: there is no sequence, or they disagree in their features.

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
    """Length-sorted, padded batches: sequences of like length together, so that little is padding.

    Args:
        sequences: arrays (time_b, ...).
        targets: for each sequence one label, or an array (time_b, ...) with one target a step, which is padded alike.
        batch: sequences in a batch; the last of a pass may hold fewer.
        seed: shuffles the sequences of equal length and the order of the batches, anew in each pass; None keeps it.
        passes: over the sequences; None for no end.
        sort: by length; False leaves the order to the shuffle alone.

    Yields:
        `Batch` with a mask, or without one where all sequences have one length.

    Raises:
        ValueError: the numbers of sequences and targets differ, or a size is not positive.

    Example:
        >>> import seqjax as sj
        >>> [b.xs.shape for b in sj.data.batches([[1], [1, 2, 3], [1, 2], [1]], [0, 1, 1, 0], batch=2)]
        [(2, 1), (2, 3)]
    """
    if len(sequences) != len(targets) or not len(sequences):
        raise ValueError(f"expected one target a sequence, got {len(targets)} for {len(sequences)} sequences")
    if batch < 1:
        raise ValueError(f"expected batch of at least 1, got {batch}")
    arrays = [np.asarray(sequence) for sequence in sequences]
    wanted = [np.asarray(target) for target in targets]
    lengths = np.array([len(array) for array in arrays])
    by_step = all(target.ndim and len(target) == n for target, n in zip(wanted, lengths, strict=True))

    def stream() -> Iterator[Batch]:
        random = None if seed is None else np.random.default_rng(seed)
        done = 0
        while passes is None or done < passes:
            order = np.arange(len(arrays)) if random is None else random.permutation(len(arrays))
            if sort:
                order = order[np.argsort(lengths[order], kind="stable")]
            groups = [order[i : i + batch] for i in range(0, len(order), batch)]
            if random is not None:
                random.shuffle(groups)
            for rows in groups:
                xs, mask = pad([arrays[i] for i in rows])
                ys = pad([wanted[i] for i in rows])[0] if by_step else np.stack([wanted[i] for i in rows])
                yield Batch(xs, ys, None if mask.all() else mask)
            done += 1

    return stream()
