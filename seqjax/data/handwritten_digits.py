"""Handwritten digits as sequences of 64 pixels (needs scikit-learn: the extra "digits")."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """Images as sequences, read row by row.

    Attributes:
        xs: pixels in [0, 1], (count, 64, 1).
        labels: 0..9, (count,).
    """

    xs: np.ndarray
    labels: np.ndarray


def digits(*, test_share: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """The 1797 handwritten digits of 8 x 8 pixels, as sequences of 64 steps, split into training and test digits.

    Args:
        test_share: the fraction of the digits that is used for testing.
        seed: the seed of the random split.

    Returns:
        Training and test digits.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: `test_share` is not between 0 and 1.

    Source: Alpaydin and Kaynak 1998, UCI repository; shipped with scikit-learn.

    Example:
        >>> import seqjax as sj
        >>> train, test = sj.data.digits()
        >>> train.xs.shape, test.labels.shape
        ((1438, 64, 1), (359,))
    """
    if not 0 < test_share < 1:
        raise ValueError(f"expected test_share between 0 and 1, got {test_share}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'expected scikit-learn for the digits, got none: pip install "seqjax[digits]"'
        ) from None
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    # The pixels are integers from 0 to 16.
    xs, labels = (pixels / 16).astype(np.float32)[..., None], labels.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(xs))
    first = round(len(xs) * test_share)
    test, train = order[:first], order[first:]
    return Digits(xs[train], labels[train]), Digits(xs[test], labels[test])
