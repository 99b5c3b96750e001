"""The recurrent layers of a `.keras` file, read as data: no class of the file is built, and no code of it runs.

The file is a zip archive. config.json describes the layers, and model.weights.h5 has their arrays in groups that are
named after the classes of the layers, such as layers/lstm_1/cell/vars for the second LSTM.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RECURRENT = ("SimpleRNN", "LSTM", "GRU")
FIX = "save it again with model.save(path)"


class StoredLayer(NamedTuple):
    """A recurrent layer of a file.

    Attributes:
        name: of the layer in its model.
        kind: the class of its cell, such as "LSTM".
        options: the arguments of the class.
        place: the group of its arrays.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    place: str


def read_layer(path: Path, name: str | None) -> tuple[StoredLayer, list[np.ndarray]]:
    """The only recurrent layer of a file, or the one with a name, and its arrays.

    Raises:
        ValueError: the file is missing or damaged, or it has no such layer, or several.
        ModuleNotFoundError: h5py is not installed.
    """
    if not path.is_file():
        raise ValueError(f"expected a .keras file, got {path}, which is not there: check the path")
    try:
        h5py = importlib.import_module("h5py")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"expected the package h5py to read {path.name}, got none: pip install h5py, or pass a layer of Keras"
        ) from None
    try:
        with zipfile.ZipFile(path) as file:
            config, weights = json.loads(file.read("config.json")), file.read("model.weights.h5")
        found = list(_layers_of(config, ""))
    except Exception as error:  # noqa: BLE001 - a damaged archive fails in many ways
        raise _damaged(path, f"a file without a readable config.json and model.weights.h5 ({_why(error)})") from None
    layer = _chosen(path, found, name)
    for option in ("activation", "recurrent_activation")[: 1 if layer.kind == "SimpleRNN" else 2]:
        if not isinstance(layer.options.get(option), str):
            raise _damaged(path, f"a layer {layer.name!r} whose {option} is not a name")
    try:
        with h5py.File(io.BytesIO(weights), "r") as file:
            group = _inner(h5py, file, layer.place)
            return layer, [_array(_inner(h5py, group, str(k))) for k in range(len(group))]
    except Exception as error:  # noqa: BLE001 - so does a damaged table of arrays
        raise _damaged(path, f"no readable arrays of the layer {layer.name!r} ({_why(error)})") from None


def _layers_of(config: Any, place: str) -> Iterator[StoredLayer]:
    """The recurrent layers of a model, and of the models inside it."""
    counts: Counter[str] = Counter()
    for layer in config["config"]["layers"]:
        kind, options = layer["class_name"], layer["config"]
        group = _snake_case(kind)
        counts[group] += 1
        inside = f"{place}layers/{group}{f'_{counts[group] - 1}' if counts[group] > 1 else ''}/"
        if "layers" in options:
            yield from _layers_of(layer, inside)
        elif kind in RECURRENT:
            yield StoredLayer(options["name"], kind, options, f"{inside}cell/vars")
        elif kind == "RNN":
            cell = options["cell"]
            of_layer = {"go_backwards": options.get("go_backwards", False)}
            yield StoredLayer(
                options["name"],
                cell["class_name"].removesuffix("Cell"),
                cell["config"] | of_layer,
                f"{inside}cell/vars",
            )
        elif kind == "Bidirectional":
            yield StoredLayer(options["name"], kind, options, "")


def _snake_case(name: str) -> str:
    """The name of the group of a class, as Keras writes it."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _chosen(path: Path, found: list[StoredLayer], name: str | None) -> StoredLayer:
    names = ", ".join(repr(layer.name) for layer in found)
    if not found:
        raise ValueError(
            f"expected a recurrent layer SimpleRNN, LSTM or GRU in {path}, got a model without one: pass another file"
        )
    chosen = [layer for layer in found if name in (None, layer.name)]
    if not chosen:
        raise ValueError(f"expected a recurrent layer of {path}, got layer={name!r}: pass one of {names}")
    if len(chosen) > 1:
        raise ValueError(
            f"expected one recurrent layer in {path}, got {names}: choose one with layer={chosen[0].name!r}"
            if name is None
            else f"expected one layer {name!r} in {path}, got {len(chosen)} of this name: load the model with Keras"
        )
    if chosen[0].kind not in RECURRENT:
        raise ValueError(
            f"expected a layer SimpleRNN, LSTM or GRU in {path}, got {chosen[0].name!r}, a {chosen[0].kind}: load the "
            f"model with Keras, and pass its layers or cells one by one"
        )
    return chosen[0]


def _inner(h5py: Any, group: Any, place: str) -> Any:
    """A member of a group. Links to other files are not followed."""
    for part in place.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"no {part} in {group.name}")
        group = group[part]
    return group


def _array(dataset: Any) -> np.ndarray:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} is in another file")
    return dataset[()]


def _why(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _damaged(path: Path, got: str) -> ValueError:
    return ValueError(f"expected a model of Keras 3 in {path}, got {got}: {FIX}")
