"""Readable names of layers, fields of the state, gates and matrices.

The analyses name them by their path in the tree: "1.c" is the field c of the state of the second cell of a stack.
"""

from __future__ import annotations

import re
from typing import NamedTuple

FIELDS = {"h": "hidden state", "c": "cell state"}
_PREFIX = re.compile(r"((?:\d+[./])+)(.+)")


class Names(NamedTuple):
    """The readable names of what belongs to one cell.

    Only layers with a state are counted, so an embedding is not a layer.

    Attributes:
        fields: the paths of the fields of the state.

    Example:
        >>> from seqjax.reports.names import Names
        >>> names = Names(("1.h", "1.c"))
        >>> names.field("1.c"), names.gate("1/forget"), names.value("1/candidate"), names.value("1.W_hh.forget")
        ('layer 1, cell state', 'layer 1, forget gate', 'layer 1, candidate', 'layer 1, W_hh.forget')
        >>> names.in_text("It is lost first in 1.c.")
        'It is lost first in the cell state of layer 1.'
    """

    fields: tuple[str, ...] = ()

    def field(self, path: str) -> str:
        """The name of a field of the state."""
        layer, rest = self._split(path)
        return _join(layer, FIELDS.get(rest, rest))

    def gate(self, path: str) -> str:
        """The name of a gate."""
        return f"{self.value(path)} gate"

    def value(self, path: str) -> str:
        """The name of a matrix, or of a value that is not a gate."""
        return _join(*self._split(path))

    def in_text(self, text: str) -> str:
        """The text with readable names in place of the paths of fields."""
        for path in self.fields:
            layer, field = self._split(path)
            # A path of one letter may be a word or a symbol, so it is replaced only after "in".
            before = r"(?<![\w.])" if layer else r"(?<=\bin )"
            words = f"the {FIELDS.get(field, field)}{f' of {layer}' if layer else ''}"
            if layer or field in FIELDS:
                text = re.sub(rf"{before}{re.escape(path)}(?!\w)", words, text)
        return text

    def _split(self, path: str) -> tuple[str, str]:
        """The words for the layer, or none, and the rest of the path."""
        match = _PREFIX.fullmatch(path)
        prefixes = [found[1] for name in self.fields if (found := _PREFIX.fullmatch(name))]
        layers = [prefix.replace("/", ".") for prefix in dict.fromkeys(prefixes)]
        if match is None or match[1].replace("/", ".") not in layers:
            return "", path
        return f"layer {layers.index(match[1].replace('/', '.')) + 1}", match[2]


def _join(layer: str, name: str) -> str:
    return f"{layer}, {name}" if layer else name
