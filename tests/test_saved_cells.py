"""A saved cell comes back with the same bits, and a file from a stranger is data: nothing in it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import FOREIGN, OURS, Doubled
from errors import raises
from small_runs import finished as finished
from small_runs import metrics, state

import seqjax as sj

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

SAVED = OURS | {
    "options": sj.LSTM(
        3, 4, 0.5, input_init=sj.Uniform(0.1), recurrent_init=sj.Orthogonal(0.9), compute_dtype="bfloat16"
    ),
    "spectral": sj.VanillaRNN(3, 4, recurrent_init=sj.SpectralRadius(0.8)),
    "tokens": sj.stack([sj.Embedding(7, 3), sj.Dropout(3, 0.2), sj.LearnedState(sj.GRU(3, 4)), sj.Dropout(4)]),
    "nested": sj.stack([sj.stack([sj.LSTM(3, 2), sj.Dropout(2)]), sj.LearnedState(sj.stack([sj.GRU(2, 4)]))]),
    "model": sj.Model(sj.GRU(3, 4), sj.Categorical(4, 5)),
    "gaussian": sj.Model(sj.LearnedState(sj.LSTM(3, 4)), sj.Gaussian(4, 2, std=0.5)),
    "none": sj.Dropout(3),
}
SPECIAL = [-0.0, np.nan, -np.inf, 1e-45, 1.5]


def drawn(part, dtype="float32"):
    """Random parameters, the first ones special numbers."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(part.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=leaf.shape) for leaf in leaves]
    for array in arrays:
        array.flat[: len(SPECIAL)] = SPECIAL[: array.size]
    return jax.tree.unflatten(structure, [jnp.asarray(array, dtype) for array in arrays])


def assert_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", SAVED)
def test_a_cell_comes_back_equal_and_its_parameters_as_the_same_bits(name, tmp_path):
    part, path = SAVED[name], tmp_path / "cell.safetensors"
    params = drawn(part)
    sj.save(path, part, params)
    loaded, back = sj.load(str(path))
    assert loaded == part
    assert hash(loaded) == hash(part)
    assert_bits(back, params)
    assert os.listdir(tmp_path) == ["cell.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_precision_of_the_parameters_is_kept(dtype, tmp_path, x64):
    params = drawn(sj.GRU(3, 4), dtype)
    sj.save(tmp_path / "a", sj.GRU(3, 4), params)  # a cell does not decide the precision of its parameters
    assert_bits(sj.load(tmp_path / "a")[1], params)
    if dtype == "float64":
        with jax.enable_x64(False), raises(ValueError, "expected numbers that JAX stores exactly", "jax_enable_x64"):
            sj.load(tmp_path / "a")


def test_an_optional_parameter_that_is_none_stays_none(tmp_path):
    params = drawn(sj.GRU(3, 4))._replace(b_hn=None)
    for part, p in ((sj.GRU(3, 4), params), (sj.stack([sj.GRU(3, 4)]), (params,))):
        sj.save(tmp_path / "a", part, p)
        assert_bits(sj.load(tmp_path / "a")[1], p)


def test_trained_parameters_of_a_transposed_view_are_saved_as_they_are(tmp_path):
    params = sj.VanillaParams(
        np.ones((3, 2), "float32").T, np.arange(4.0, dtype="float32").reshape(2, 2).T, np.ones(2, "f")
    )
    sj.save(tmp_path / "a", sj.VanillaRNN(3, 2), params)
    assert sj.load(tmp_path / "a")[1].W_hh.tolist() == [[0, 2], [1, 3]]


def test_other_programs_read_the_arrays_by_name_and_the_description_as_json(tmp_path):
    cell = sj.stack([sj.LSTM(3, 4), sj.GRU(4, 2)])
    sj.save(tmp_path / "a", cell, drawn(cell))
    assert set(safetensors.load_file(tmp_path / "a")) == {
        f"{layer}.{name}"
        for layer, names in enumerate(["W_xh W_hh b_h", "W_xh W_hh b_h b_hn"])
        for name in names.split()
    }
    content = json.loads(description(tmp_path / "a"))
    assert content["format"] == 1
    assert content["cell"]["class"] == "Stack"
    assert content["cell"]["fields"]["cells"][0]["fields"]["hidden_size"] == 4


def description(path):
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["seqjax"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path, cell = tmp_path / "a.safetensors", sj.LSTM(3, 4)
    sj.save(path, cell, drawn(cell))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        sj.save(path, cell, drawn(cell))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("cell", "params", "parts"),
    [
        (Doubled(3, 4), sj.LSTM(3, 4), ["got Doubled", "safetensors or orbax"]),
        (FOREIGN["user"], FOREIGN["user"], ["got Leaky"]),
        (FOREIGN["linen-lstm"], FOREIGN["linen-lstm"], ["got LinenCell"]),
        (sj.stack([sj.LSTM(3, 4), Doubled(4, 4)]), sj.LSTM(3, 4), ["cell.cells[1]", "got Doubled"]),
        (
            sj.LSTM(3, 4, input_init=jax.nn.initializers.normal()),
            sj.LSTM(3, 4),
            ["cell.input_init", "input_init=sj.Glorot()"],
        ),
        (sj.LSTM(3, 4), sj.LSTM(3, 5), ["params.W_xh (16, 3)", "got (20, 3)"]),
        (sj.LSTM(3, 4), sj.GRU(3, 4), ["expected params of LSTM"]),
        (sj.Model(sj.LSTM(3, 4), sj.Categorical(4, 5)), sj.LSTM(3, 4), ["ModelParams(cell, head)"]),
        (
            sj.Model(sj.LSTM(3, 4), sj.Categorical(4, 5)),
            sj.Model(sj.LSTM(3, 4), sj.Categorical(4, 6)),
            ["params.head.W_hy (5, 4)", "got (6, 4)"],
        ),
    ],
)
def test_what_a_file_could_not_give_back_is_not_written(cell, params, parts, tmp_path, key):
    with raises((TypeError, ValueError), "expected", "got", *parts):
        sj.save(tmp_path / "a", cell, params.init(key))
    assert not os.listdir(tmp_path)


def test_a_missing_package_is_named_with_its_extra(tmp_path, key, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    cell = sj.LSTM(3, 4)
    for call in (lambda: sj.save(tmp_path / "a", cell, cell.init(key)), lambda: sj.load(tmp_path / "a")):
        with raises(ModuleNotFoundError, "expected the package safetensors", "seqjax[files]"):
            call()


def test_a_folder_that_is_not_there_is_named(tmp_path, key):
    with raises(ValueError, "expected a folder to write to", "none"):
        sj.save(tmp_path / "none" / "a", sj.LSTM(3, 4), sj.LSTM(3, 4).init(key))


LSTM = {"class": "LSTM", "fields": {"input_size": 3, "hidden_size": 4}}
ARRAYS = {"W_xh": np.ones((16, 3), "f"), "W_hh": np.ones((16, 4), "f"), "b_h": np.ones(16, "f")}


def written(path, cell, arrays=None, **content):
    """A file as a stranger would write it."""
    text = cell if isinstance(cell, str) else json.dumps({"format": 1, "cell": cell} | content)
    safetensors.save_file(ARRAYS if arrays is None else arrays, path, {"seqjax": text})
    return path


def test_fields_that_are_left_out_have_their_defaults(tmp_path):
    assert sj.load(written(tmp_path / "a", LSTM))[0] == sj.LSTM(3, 4)


def deep(levels):
    cell = "1"
    for _ in range(levels):
        cell = f'{{"class": "LearnedState", "fields": {{"cell": {cell}}}}}'
    return f'{{"format": 1, "cell": {cell}}}'


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ({"class": "os.system", "fields": {"command": "touch hacked"}}, ["unknown class 'os.system'", "LSTM"]),
        ({"class": "fit", "fields": {}}, ["unknown class 'fit'"]),
        ({"class": "LSTMParams", "fields": {}}, ["unknown class 'LSTMParams'"]),
        ({"class": ["LSTM"], "fields": {}}, ["cannot be read (TypeError)"]),
        (
            {"class": "LSTM", "fields": {"input_size": 3, "hidden_size": 4, "__class__": 1}},
            ["unknown fields", "__class__"],
        ),
        ({"class": "LSTM", "fields": {"input_size": 3}}, ["fields that LSTM refuses", "hidden_size"]),
        ({"class": "LSTM", "fields": {"input_size": 3, "hidden_size": -1}}, ["refuses", "got -1"]),
        ({"class": "LSTM", "fields": {"input_size": 3, "hidden_size": 4, "dtype": "object"}}, ["refuses"]),
        ({"class": "LSTM", "fields": {"input_size": 3, "hidden_size": 4, "forget_bias": "x"}}, ["it cannot be built"]),
        ({"class": "LSTM", "fields": {"input_size": 3, "hidden_size": 4, "input_init": LSTM}}, ["it cannot be built"]),
        ({"class": "LearnedState", "fields": {"cell": 3}}, ["it cannot be built"]),
        ({"class": "Stack", "fields": {"cells": [LSTM, LSTM]}}, ["Stack refuses", "input_size"]),
        ({"class": "Stack", "fields": {"cells": []}}, ["Stack refuses"]),
        ({"class": "Glorot", "fields": {}}, ["a description of Glorot instead of a cell"]),
        ({"class": "LSTM"}, ["cannot be read (KeyError)"]),
        (LSTM["fields"], ["cannot be read (KeyError)"]),
        (3, ["a description of int"]),
        ("not json", ["cannot be read (JSONDecodeError)"]),
        ("[]", ["cannot be read (TypeError)"]),
        (deep(10_000), ["cannot be read (RecursionError)"]),
    ],
)
def test_a_description_of_something_else_is_refused_in_one_sentence(cell, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(ValueError, "expected a cell and its parameters from sj.save in", "got", "save them again", *parts):
        sj.load(written(tmp_path / "a", cell))
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"W_hh": None, "b_h": None, "U": np.ones(3, "f")}, ["no W_hh, no b_h", "the unknown U"]),
        ({"W_xh": np.ones((3, 16), "f"), "b_h": np.ones(12, "f")}, ["W_xh float32 (3, 16), b_h float32 (12,)"]),
        ({"b_h": np.ones(16, "int32")}, ["b_h int32 (16,)", "floating-point"]),
    ],
)
def test_arrays_that_are_not_those_of_the_cell_are_refused_all_at_once(changes, parts, tmp_path):
    arrays = {name: array for name, array in (ARRAYS | changes).items() if array is not None}
    with raises(ValueError, "expected a cell and its parameters", *parts):
        sj.load(written(tmp_path / "a", LSTM, arrays))


def test_a_file_of_another_version_or_kind_is_refused_in_one_sentence(tmp_path):
    with raises(ValueError, "format 2 instead of 1", "another version"):
        sj.load(written(tmp_path / "a", LSTM, format=2))
    safetensors.save_file(ARRAYS, tmp_path / "plain")
    with raises(ValueError, "arrays only", "sj.from_torch(path)"):
        sj.load(tmp_path / "plain")
    (tmp_path / "text").write_text("hello, I am no weights file")
    whole = written(tmp_path / "a", LSTM).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "cut", "empty"):
        with raises(ValueError, "expected a safetensors file", str(tmp_path / name), "damaged"):
            sj.load(tmp_path / name)
    for path in (tmp_path / "none", tmp_path):
        with raises(ValueError, "expected a safetensors file", "check the path"):
            sj.load(path)


def test_a_finished_run_gives_its_model_parameters_vocabulary_and_history(finished):
    loaded = sj.load_run(str(finished))
    model, last = state(finished)
    assert loaded.model == model
    assert_bits(loaded.params, last.params)
    np.testing.assert_array_equal(loaded.history["loss"], metrics(finished).loss)
    tokens = sj.data.encode("the cat", loaded.vocabulary)
    assert sj.data.decode(tokens, loaded.vocabulary) == "the cat"
    _, log_p = sj.log_probs(loaded.model, loaded.params, tokens[None, :-1], tokens[None, 1:])
    assert log_p.shape == (1, 6)


def test_a_run_goes_into_one_file_and_back(finished, tmp_path):
    loaded = sj.load_run(finished)
    sj.save(tmp_path / "a", loaded.model, loaded.params)
    model, params = sj.load(tmp_path / "a")
    assert model == loaded.model
    assert_bits(params, loaded.params)


def test_every_exported_cell_can_be_saved():
    """A new cell is one file and one line of export, also here."""
    from seqjax.cells.registry import exported_cells
    from seqjax.models.saved import _classes

    assert set(exported_cells().values()) <= set(_classes().values())
    assert all(dataclasses.is_dataclass(kind) for kind in _classes().values())
