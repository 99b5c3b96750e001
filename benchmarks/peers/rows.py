"""The sizes, weights and inputs of all measurements. Imports no library, because torch's process imports this too."""

from __future__ import annotations

import itertools
import zlib
from typing import NamedTuple

import numpy as np

GATES = {"vanilla": 1, "lstm": 4, "gru": 3, "relu": 1, "gru before": 3}
KINDS = ("vanilla", "lstm", "gru")
EXTRAS = ("relu", "gru before")  # variants of the vanilla network and the GRU that only haiku has


class Row(NamedTuple):
    """The size of one comparison."""

    batch: int
    time: int
    features: int
    hidden: int

    @property
    def name(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, name: str) -> Row:
        return cls(*map(int, name.replace("x", ",").split(",")))


ROWS = [
    Row(1, 1000, 8, 8),
    Row(1, 150, 256, 256),
    Row(16, 25, 512, 512),
    Row(32, 50, 128, 128),
    Row(32, 128, 128, 128),
    Row(64, 150, 256, 256),
    Row(16, 128, 512, 512),
    Row(1, 672, 32, 32),
    Row(4, 4096, 6, 32),
]
EXTRA_ROWS = [Row(1, 1000, 8, 8), Row(32, 128, 128, 128)]
GROWTH = {
    "T": [Row(4, 4**k, 6, 32) for k in range(3, 9)],
    "H": [Row(16, 64, 2**k, 2**k) for k in range(4, 11)],
}


class Weights(NamedTuple):
    """Weights in seqjax's layout, gates as blocks of rows: W_xh (kn, d), W_hh (kn, n), b_h (kn,), b_hn (n,)."""

    W_xh: np.ndarray
    W_hh: np.ndarray
    b_h: np.ndarray
    b_hn: np.ndarray | None


def weights(kind: str, row: Row) -> Weights:
    """Draws weights uniform in +-1/sqrt(H), as torch does. Biases are not zero, so a misplaced bias is detected."""
    rng, bound, k = _random(kind, row), row.hidden**-0.5, GATES[kind]

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype("float32")

    # b_hn is zero because nnx's GRU has none.
    b_hn = np.zeros(row.hidden, "float32") if kind == "gru" else None
    return Weights(draw(k * row.hidden, row.features), draw(k * row.hidden, row.hidden), draw(k * row.hidden), b_hn)


def inputs(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """The inputs (B, T, D), and the weights (B, T, H) of the outputs in the scalar loss."""
    rng = _random("inputs", row)
    shapes = (row.batch, row.time, row.features), (row.batch, row.time, row.hidden)
    xs, of_outputs = (rng.standard_normal(shape, "float32") for shape in shapes)
    return xs, of_outputs


def blocks(array: np.ndarray, order: str, ours: str) -> np.ndarray:
    """Reorders the gates' blocks of rows: blocks(W, "zrn", "rzn") returns the order z, r, n."""
    parts = dict(zip(ours, np.split(array, len(ours)), strict=True))
    return np.concatenate([parts[gate] for gate in order])


def default_pairs() -> list[tuple[str, Row]]:
    return [*itertools.product(KINDS, ROWS), *itertools.product(EXTRAS, EXTRA_ROWS)]


def _random(name: str, row: Row) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), *row])
