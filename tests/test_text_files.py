"""Text files are read as a person expects, and what was changed is said."""

import gzip
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import seqjax as sj
from tests.errors import raises

TEXT = "tab\tline\nü ☃ 😀\nand plain English, as most files are\n"
MARK = "a byte order mark was removed"
ENDS = "line ends CRLF or CR became LF"


@pytest.mark.parametrize(
    ("raw", "notes"),
    [
        (TEXT.encode(), ()),
        (TEXT.encode("utf-8-sig"), (MARK,)),
        (TEXT.replace("\n", "\r\n").encode(), (ENDS,)),
        (TEXT.replace("\n", "\r").encode(), (ENDS,)),
        (TEXT.encode("utf-16"), (MARK,)),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), (MARK,)),
        (TEXT.encode("utf-32"), (MARK,)),
        (TEXT.encode("utf-16-le"), ("utf-16-le was recognized by its zero bytes",)),
        (TEXT.encode("utf-16-be"), ("utf-16-be was recognized by its zero bytes",)),
        (gzip.compress(TEXT.replace("\n", "\r\n").encode("utf-8-sig"), mtime=0), (MARK, ENDS)),
    ],
)
def test_the_same_text_comes_from_every_way_to_store_it(tmp_path, raw, notes):
    (tmp_path / "a.txt").write_bytes(raw)
    corpus = sj.data.read_text(tmp_path / "a.txt")
    assert (corpus.text, corpus.notes, corpus.name) == (TEXT, notes, str(tmp_path / "a.txt"))


def test_an_encoding_can_be_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("für".encode("latin-1"))
    assert sj.data.read_text(tmp_path / "a.txt", encoding="latin-1").text == "für"
    (tmp_path / "b.txt").write_bytes("für".encode("utf-16"))
    assert sj.data.read_text(tmp_path / "b.txt", encoding="utf-16").text == "für"
    for wrong in ("klingon", "hex"):
        with raises(ValueError, "expected a text encoding", repr(wrong)):
            sj.data.read_text(tmp_path / "a.txt", encoding=wrong)


def test_files_and_folders_are_joined_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"two\r\n")
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (folder / ".hidden").write_bytes(bytes(9))
    corpus = sj.data.read_text(folder, folder / "a.txt")
    assert corpus.text == "one\ntwo\nthree\none"
    assert corpus.notes == ("4 files were read", f"in 1 of 4 files {ENDS}")
    assert corpus.name == f"{folder}, {folder / 'a.txt'}"


def test_the_standard_input_is_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    corpus = sj.data.read_text("-")
    assert (corpus.text, corpus.name) == ("from a pipe", "the standard input")


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (b"", ["expected text in", "got none"]),
        ("für".encode("latin-1"), ["expected utf-8 in", r"b'\xfc'", "position 1", "latin-1"]),
        (gzip.compress(b"text", mtime=0)[:-3], ["complete gzip file", "damaged"]),
        (b"\x1f\x8bnothing of the kind", ["complete gzip file", "damaged"]),
        (b"text with \0 in it, an odd number of bytes", ["expected text in", "control characters", "binary"]),
        (np.random.default_rng(0).bytes(999), ["expected"]),
        (bytes([1, 2, 3, 4]) * 50, ["expected text in", "binary"]),
        (b"\xff\xfea", ["expected utf-16-le in"]),
    ],
)
def test_a_file_that_holds_no_text_is_refused_by_name(tmp_path, raw, parts):
    (tmp_path / "wrong.txt").write_bytes(raw)
    with raises(ValueError, "wrong.txt", *parts):
        sj.data.read_text(tmp_path / "wrong.txt")


def test_a_folder_without_files_is_refused(tmp_path):
    with raises(ValueError, "expected text files in the folder", str(tmp_path)):
        sj.data.read_text(tmp_path)
