"""The n-gram model, which predicts a token from the few tokens before it: the baseline of a recurrent model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


def ngram_bits(
    training: Sequence[int] | Int[Any, " training"],
    tokens: Sequence[int] | Int[Any, " length"],
    order: int,
    vocabulary: int | None = None,
) -> float:
    """The bits per token of an interpolated n-gram model (Witten-Bell).

        p_k(x | u) = (count(u x) + distinct(u) p_{k-1}(x | u')) / (count(u) + distinct(u))

    The context u is the k - 1 tokens before x, and u' is u without its first token; p_0 = 1 / vocabulary. count(u x) is
    the number of times that x follows u in the training tokens, and distinct(u) is the number of different tokens that
    follow u. The interpolation has no parameter to tune.

    Args:
        training: the tokens to count, (training,).
        tokens: the tokens to predict, (length,), which follow the training tokens.
        order: n, so the model reads n - 1 tokens; with 1 it is the unigram model.
        vocabulary: the number of different tokens; by default one more than the largest of them.

    Returns:
        The mean of -log2 p_n over `tokens`, in bits.

    Raises:
        ValueError: there is no token to predict, or the order is less than 1.

    Source: Witten and Bell 1991, method C; Chen and Goodman 1999, "An empirical study of smoothing techniques".

    Example:
        >>> from seqjax.data.ngram import ngram_bits
        >>> periodic = [0, 1, 2, 3] * 1000
        >>> round(ngram_bits(periodic, periodic[:400], 1), 2), ngram_bits(periodic, periodic[:400], 5) < 0.01
        (2.0, True)
    """
    if order < 1 or not len(tokens):
        raise ValueError(
            f"expected an order of at least 1 and a token to predict, got {order} and {len(tokens)} tokens"
        )
    text = np.concatenate([np.asarray(training, np.int64), np.asarray(tokens, np.int64)])
    size, start = int(text.max()) + 1, len(training)
    p = np.full(len(tokens), 1 / (size if vocabulary is None else vocabulary))
    contexts = np.zeros(len(text), np.int64)  # the context before each token, as an integer
    for _ in range(order):
        _, first, pairs = np.unique(contexts * size + text, return_index=True, return_inverse=True)
        pair_counts = np.bincount(pairs[:start], minlength=len(first))
        counts = np.bincount(contexts[:start], minlength=contexts.max() + 1)
        distinct = np.bincount(contexts[first[pair_counts > 0]], minlength=len(counts))
        u, total = contexts[start:], (counts + distinct)[contexts[start:]]
        p = np.where(total > 0, (pair_counts[pairs[start:]] + distinct[u] * p) / np.maximum(total, 1), p)
        contexts = np.concatenate([[len(first)], pairs[:-1]])  # the next context has one token more
    return float(-np.log2(p).mean())
