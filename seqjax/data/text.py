"""Text as a stream of characters, such as the topics of the Python manual.

Every Python includes the manual, so training on real prose needs no network. Its text differs slightly between versions
of Python; the hash of the corpus identifies the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from seqjax.cells.arguments import described
from seqjax.cells.whole_numbers import whole_number
from seqjax.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text, and its characters as integers.

    Args:
        name: the source of the text.
        text: the whole text.
        vocabulary: the distinct characters of the text, sorted. The token of a character is its index.
        notes: what was changed while the text was read, in words.

    Example:
        >>> import seqjax as sj
        >>> corpus = sj.data.Corpus.of("toy", "abacus")
        >>> corpus.vocabulary, corpus.tokens.tolist()
        ('abcsu', [0, 1, 0, 2, 4, 3])
    """

    name: str
    text: str
    vocabulary: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, text: str, notes: tuple[str, ...] = ()) -> Corpus:
        """Builds the corpus of a text, with the vocabulary of its characters.

        Raises:
            ValueError: the text is empty.
        """
        if not text:
            raise ValueError(
                f"expected text in {name}, got none: choose a file with at least a few thousand characters"
            )
        return cls(name, text, "".join(sorted(set(text))), notes)

    @property
    def tokens(self) -> np.ndarray:
        """The text as tokens (length,)."""
        return encode(self.text, self.vocabulary, self.name)

    @property
    def sha256(self) -> str:
        """The SHA-256 hash of the text in UTF-8, which identifies the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class UnknownCharacter(ValueError):
    """A text has a character that is not in the vocabulary."""


def encode(text: str, vocabulary: str, name: str = "the text") -> np.ndarray:
    """Converts characters to tokens.

    Args:
        text: the text.
        vocabulary: the characters, in the order of their tokens.
        name: the name of the text in the message.

    Returns:
        Tokens (length,), int32.

    Raises:
        UnknownCharacter: the text has characters that are not in the vocabulary.

    Example:
        >>> import seqjax as sj
        >>> sj.data.encode("cab", "abc").tolist()
        [2, 0, 1]
    """
    # UTF-32 has four bytes per character, so the search runs in numpy and not per character. "surrogatepass" lets
    # unpaired surrogates through to the message below.
    for argument, value in (("text", text), ("vocabulary", vocabulary)):
        if not isinstance(value, str):
            raise TypeError(f"expected {argument} as a str, got {described(value)}: decode bytes first")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    known = np.frombuffer(vocabulary.encode("utf-32-le"), np.uint32)
    order = np.argsort(known)  # searchsorted needs sorted values, but a vocabulary has any order
    places = np.searchsorted(known, codes, sorter=order)
    tokens = order[np.minimum(places, len(known) - 1)] if len(known) else places
    wrong = np.flatnonzero(known[tokens] != codes) if len(known) else np.arange(len(codes))
    if len(wrong):
        characters = "".join(sorted({text[i] for i in wrong}))
        shown = repr(characters[:10]) + ("..." if len(characters) > 10 else "")
        raise UnknownCharacter(
            f"expected only the {len(known)} characters of the vocabulary in {name}, "
            f"got {len(wrong)} others ({shown}), the first at position {wrong[0]}: "
            f"use the text that the vocabulary was built from, or remove them"
        )
    return tokens.astype(np.int32)


def decode(tokens: Sequence[int] | Int[Any, "..."], vocabulary: str) -> str:
    """Converts tokens to characters.

    Example:
        >>> import seqjax as sj
        >>> sj.data.decode([2, 0, 1], "abc")
        'cab'
    """
    if not isinstance(vocabulary, str):
        raise TypeError(f"expected vocabulary as a str, got {described(vocabulary)}: Corpus.vocabulary")
    tokens = as_tokens(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(vocabulary):
        raise ValueError(
            f"expected tokens from 0 to {len(vocabulary) - 1}, got {tokens.min()} to {tokens.max()}: use the "
            f"vocabulary that they were encoded with"
        )
    return "".join(vocabulary[token] for token in tokens.ravel())


def as_tokens(tokens: Any) -> np.ndarray:
    """Returns tokens as an array of whole numbers on the host.

    Raises:
        TypeError: they are not whole numbers.
    """
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError):  # rows of different lengths
        array = np.asarray(None)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"expected tokens as whole numbers, got {described(tokens)}: sj.data.encode(text, vocabulary)")
    return array.astype(int) if not array.size else array


def manual_topics() -> Corpus:
    """The topics of the Python manual, about half a million characters of technical English.

    Returns:
        The corpus; its name includes the version of Python.

    Source: `pydoc_data.topics` of the standard library, which `help("topics")` lists.

    Example:
        >>> import seqjax as sj
        >>> len(sj.data.manual_topics().text) > 400_000
        True
    """
    from pydoc_data import topics

    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus.of(
        f"pydoc_data.topics of Python {version}", "\n".join(topics.topics[k] for k in sorted(topics.topics))
    )


def unigram_entropy(tokens: Sequence[int] | Int[Any, " length"]) -> float:
    """H = -sum_v p_v log2 p_v of the token frequencies: the bits per token of the best model without memory.

    Args:
        tokens: integers (length,).

    Returns:
        The entropy, in bits.

    Raises:
        ValueError: there is no token.

    Source: Shannon 1948.

    Example:
        >>> import seqjax as sj
        >>> sj.data.unigram_entropy([0, 1, 2, 3])
        2.0
    """
    tokens = as_tokens(tokens)
    if not tokens.size:
        raise ValueError("expected at least one token, got none: an empty text has no entropy")
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def split(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits tokens into training, validation and test data: the first 90 %, the next 5 % and the last 5 %.

    Example:
        >>> import numpy as np, seqjax as sj
        >>> [len(part) for part in sj.data.split(np.arange(1000))]
        [900, 50, 50]
    """
    if not getattr(tokens, "ndim", 0):
        raise TypeError(f"expected tokens (length,), got {described(tokens)}: np.asarray(tokens)")
    first, second = len(tokens) * 90 // 100, len(tokens) * 95 // 100
    return tokens[:first], tokens[first:second], tokens[second:]


def windows(
    tokens: np.ndarray, batch: int, window: int, *, passes: int | None = None, skip: int = 0
) -> Iterator[Batch]:
    """Consecutive windows of a text in `batch` rows; each window continues the previous one.

    The text is divided into `batch` equal parts, and row b reads part b. After each pass, every row starts again at the
    beginning of its part. The n-th window depends only on n, so a stream that starts with `skip=n` yields the same
    windows as one that has already yielded n.

    Args:
        tokens: the text (length,).
        batch: the number of rows.
        window: steps per window.
        passes: the number of passes over the text; None for an endless stream.
        skip: the number of windows to skip at the start.

    Yields:
        `Batch` with xs and targets (batch, window); the targets are one step ahead.

    Raises:
        ValueError: the text is too short for one window.

    Example:
        >>> import numpy as np, seqjax as sj
        >>> [(b.xs.tolist(), b.continues) for b in sj.data.windows(np.arange(10), batch=1, window=4, passes=1)]
        [([[0, 1, 2, 3]], False), ([[4, 5, 6, 7]], True)]
    """
    batch, window, skip = whole_number("batch", batch), whole_number("window", window), whole_number("skip", skip, 0)
    passes = None if passes is None else whole_number("passes", passes, 0)
    if getattr(tokens, "ndim", None) != 1:
        raise ValueError(f"expected tokens (length,), got {described(tokens)}: one text as one row")
    # The last token is only a target: targets are one step ahead.
    length = (len(tokens) - 1) // batch
    count = length // window
    if count < 1:
        raise ValueError(
            f"expected at least batch * window + 1 = {batch * window + 1} characters for one window of {window} steps "
            f"in {batch} rows, got {len(tokens)}: use a longer text, or a smaller batch or window"
        )
    rows = np.asarray(tokens)[: batch * length].reshape(batch, length)
    ahead = np.asarray(tokens)[1 : batch * length + 1].reshape(batch, length)

    def stream() -> Iterator[Batch]:
        n = skip
        while passes is None or n < passes * count:
            at = (n % count) * window
            part = slice(at, at + window)
            # The first window after a skip continues too: training that resumes there restores the state.
            yield Batch(rows[:, part], ahead[:, part], continues=n % count > 0)
            n += 1

    return stream()
