"""Text files as a corpus: one or several files, folders, compressed or not, in any encoding."""

from __future__ import annotations

import codecs
import gzip
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqjax.data.text import Corpus

STANDARD_INPUT = "-"

# The UTF-32 mark of little endian starts with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_text(path: str | Path, *more: str | Path, encoding: str | None = None) -> Corpus:
    """Reads text files as one corpus.

    A folder stands for its files, those of its folders included, in the order of their names, without hidden ones. "-"
    is the standard input. A file that is compressed by gzip is decompressed. Files are joined by a line end. A byte
    order mark is removed, and the line ends CRLF and CR become LF; `Corpus.notes` says what was changed.

    Args:
        path, more: the files and folders.
        encoding: of the files; by default that of a byte order mark, or UTF-16 if every second byte is zero, or UTF-8.

    Returns:
        The corpus, named after the files.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is no text, a file is not text in its encoding, or there is no such encoding.

    Example:
        >>> import pathlib, tempfile, seqjax as sj
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "toy.txt"
        >>> _ = path.write_bytes(b"\\xef\\xbb\\xbfhello\\r\\n")
        >>> corpus = sj.data.read_text(path)
        >>> corpus.vocabulary, corpus.notes
        ('\\nehlo', ('a byte order mark was removed', 'line ends CRLF or CR became LF'))
    """
    if encoding is not None:
        _check_encoding(encoding)
    given = [path, *more]
    files = [file for each in given for file in _files(each)]
    found = [_decoded(_read(file), str(file), encoding) for file in files]
    text = "".join(
        part if part.endswith("\n") or k == len(found) - 1 else f"{part}\n" for k, (part, _) in enumerate(found)
    )
    notes = [] if len(files) == len(given) else [f"{len(files)} files were read"]
    for note in dict.fromkeys(note for _, notes_of_file in found for note in notes_of_file):
        count = sum(note in notes_of_file for _, notes_of_file in found)
        notes.append(note if len(files) == 1 else f"in {count} of {len(files)} files {note}")
    return Corpus.of(", ".join(map(_name, given)), text, tuple(notes))


def _name(path: str | Path) -> str:
    return "the standard input" if str(path) == STANDARD_INPUT else str(path)


def _files(path: str | Path) -> list[str | Path]:
    """The files that a path stands for."""
    if str(path) == STANDARD_INPUT or not Path(path).is_dir():
        return [path]
    files = sorted(file for file in _visible(Path(path)) if file.is_file())
    if not files:
        raise ValueError(f"expected text files in the folder {path}, got none: pass a folder with files")
    return [*files]


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield from _visible(path) if path.is_dir() else [path]


def _read(path: str | Path) -> bytes:
    """The bytes of a file, decompressed."""
    raw = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else Path(path).read_bytes()
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"expected a complete gzip file in {path}, got a damaged one ({error}): write it anew"
        ) from None


def _check_encoding(encoding: str) -> None:
    try:
        known = codecs.lookup(encoding)
    except LookupError:
        known = None
    # Codecs such as "hex" convert bytes to bytes.
    if known is None or not getattr(known, "_is_text_encoding", True):
        raise ValueError(f"expected a text encoding that Python knows, got {encoding!r}: such as utf-8 or latin-1")


def _decoded(raw: bytes, name: str, encoding: str | None) -> tuple[str, list[str]]:
    """The text of a file, and what was changed."""
    notes = []
    mark = next((mark for mark in MARKS if raw.startswith(mark)), b"")
    if mark and (encoding is None or MARKS[mark].startswith(codecs.lookup(encoding).name)):
        raw, encoding = raw[len(mark) :], MARKS[mark]
        notes.append("a byte order mark was removed")
    elif encoding is None:
        encoding = _without_mark(raw)
        if encoding != "utf-8":
            notes.append(f"{encoding} was recognized by its zero bytes")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        fix = "name its encoding, such as latin-1" if encoding == "utf-8" else "name its own encoding"
        raise ValueError(
            f"expected {encoding} in {name}, got {error.object[error.start : error.start + 1]!r} at position "
            f"{error.start}: {fix}"
        ) from None
    if "\0" in text or _is_binary(text):
        raise ValueError(
            f"expected text in {name}, got control characters: this is a binary file, or text in another encoding, "
            f"which can be named"
        )
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        notes.append("line ends CRLF or CR became LF")
    return text, notes


def _without_mark(raw: bytes) -> str:
    """The encoding of a text without a byte order mark: UTF-16 if nearly all zero bytes are at every second place."""
    start = np.frombuffer(raw[: 2**16], np.uint8)
    if len(raw) % 2 or not len(raw):
        return "utf-8"
    even, odd = (float(np.mean(start[first::2] == 0)) for first in (0, 1))
    if max(even, odd) > 0.3 and min(even, odd) < 0.05:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def _is_binary(text: str) -> bool:
    """Whether more than one in ten of the first characters is a control character other than white space."""
    start = np.frombuffer(text[: 2**16].encode("utf-32-le", "surrogatepass"), np.uint32)
    return int(np.sum((start < 32) & ~np.isin(start, [9, 10, 11, 12, 13, 27]))) > 0.1 * len(start)
