"""`.keras` files: the layer's own outputs, and one clear sentence for every file that is not one, without Keras."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises

import seqjax as sj

h5py = pytest.importorskip("h5py")
D, N = 3, 4
XS = np.random.default_rng(0).normal(size=(2, 5, D)).astype("float32")


@contextlib.contextmanager
def lenient():
    """Keras promotes dtypes and ranks, and warns."""
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with lenient():
        return pytest.importorskip("keras")


LAYERS = {
    "lstm": lambda k: k.layers.LSTM(N, return_sequences=True),
    "gru": lambda k: k.layers.GRU(N, return_sequences=True),
    "gru reset before": lambda k: k.layers.GRU(N, return_sequences=True, reset_after=False),
    "relu without a bias": lambda k: k.layers.SimpleRNN(N, "relu", use_bias=False, return_sequences=True),
    "cell": lambda k: k.layers.RNN(k.layers.LSTMCell(N), return_sequences=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_file_gives_the_outputs_of_its_layer(keras, tmp_path, name):
    path = tmp_path / "model.keras"
    with lenient():
        # Layers of other classes around it, and a dense layer whose arrays must not be taken for it.
        layer = LAYERS[name](keras)
        model = keras.Sequential([keras.layers.Input((None, D)), keras.layers.Masking(), layer, keras.layers.Dense(2)])
        layer.set_weights([np.random.default_rng(1).normal(size=w.shape).astype(w.dtype) for w in layer.get_weights()])
        expected = np.asarray(layer(XS))
        model.save(path)
    cell, params = sj.from_keras(path)
    np.testing.assert_allclose(sj.unroll(cell, params, jnp.asarray(XS))[1], expected, atol=1e-5)
    from_layer = sj.from_keras(layer)
    assert cell == from_layer[0]
    for a, b in zip(params, from_layer[1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def several(keras, tmp_path_factory):
    """A model with LSTMs, one of them in a model inside it, a layer in two directions and one that runs backwards."""
    path = tmp_path_factory.mktemp("keras") / "several.keras"
    with lenient():
        inner = keras.Sequential(
            [keras.layers.Input((None, D)), keras.layers.LSTM(N, return_sequences=True, name="in")]
        )
        x = keras.layers.Input((None, D))
        h = keras.layers.LSTM(N, return_sequences=True, name="low")(inner(x))
        h = keras.layers.LSTM(5, return_sequences=True, name="high")(h)
        h = keras.layers.Bidirectional(keras.layers.GRU(2, return_sequences=True), name="both")(h)
        model = keras.Model(x, keras.layers.GRU(2, go_backwards=True, name="back")(h))
        model.save(path)
        weights = {layer.name: layer.get_weights() for layer in (*inner.layers, *model.layers)}
    return path, weights


def test_a_layer_of_several_is_chosen_by_its_name(several):
    path, weights = several
    for name in ("in", "low", "high"):
        found, expected = sj.from_keras(path, layer=name)[1], sj.from_keras(weights[name])[1]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


WRONG_NAMES = {
    None: ["expected one recurrent layer", "'in', 'low', 'high', 'both', 'back'", "layer='in'"],
    "dense": ["got layer='dense'", "pass one of 'in', 'low', 'high', 'both', 'back'"],
    "both": ["got 'both', a Bidirectional"],
    "back": ["reads forwards, got go_backwards=True"],
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_choice_that_does_not_fit_is_refused(several, name):
    with raises(ValueError, *WRONG_NAMES[name]):
        sj.from_keras(several[0], layer=name)


def archive(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("_", "."), content)
    return path


def table(**arrays):
    """A file of arrays by their places, with "0" to "2" in the group of the first LSTM."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray):
                file[f"layers/lstm/cell/vars/{name[1:]}"] = array
            else:
                file[f"layers/lstm/cell/vars/{name[1:]}"] = h5py.ExternalLink(array, "secret")
    return content.getvalue()


LSTM_OPTIONS = {"name": "deep", "activation": "tanh", "recurrent_activation": "sigmoid"}


def config(options=LSTM_OPTIONS, kind="LSTM"):
    return json.dumps({"class_name": "Sequential", "config": {"layers": [{"class_name": kind, "config": options}]}})


RIGHT = {"_0": np.ones((D, 4 * N), "f4"), "_1": np.ones((N, 4 * N), "f4"), "_2": np.ones(4 * N, "f4")}


def test_a_file_is_read_without_keras(tmp_path):
    path = archive(tmp_path / "a.keras", config_json=config())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("model.weights.h5", table(**RIGHT))
    code = "import sys, seqjax as sj; print(sj.from_keras(sys.argv[1])[0].hidden_size, 'keras' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert result.stdout.split() == [str(N), "False"], result.stderr


def test_files_that_are_none_are_refused_in_one_sentence(tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["secret"] = np.zeros((D, 4 * N), "f4")
    right = table(**RIGHT)
    cases = [
        (config(), right[: len(right) // 2], "expected a model of Keras 3"),
        (config(), b"", "no readable arrays of the layer 'deep'"),
        (config(), table(_0=RIGHT["_0"]), "got 1 arrays"),
        (config(), table(**RIGHT | {"_0": str(secret)}), "no 0 in /layers/lstm/cell/vars"),
        (config(), table(**RIGHT | {"_2": np.ones(5, "f4")}), "bias (4n) = (16,), got (5,)"),
        (config(LSTM_OPTIONS | {"activation": "gelu"}), right, "got gelu and sigmoid"),
        (config({"name": "a"}), right, "expected a model of Keras 3"),
        (config(kind="Dense"), right, "got a model without one"),
        ("[" * 99999, right, "without a readable config.json"),
        ('{"config": 3}', right, "without a readable config.json"),
    ]
    for text, weights, part in cases:
        path = archive(tmp_path / "a.keras", config_json=text)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("model.weights.h5", weights)
        with raises(ValueError, part):
            sj.from_keras(path)
    for content in (b"", b"PK\x03\x04", b"\x89HDF"):
        (tmp_path / "b.keras").write_bytes(content)
        with raises(ValueError, "expected a model of Keras 3", "save it again with model.save(path)"):
            sj.from_keras(tmp_path / "b.keras")
    with raises(ValueError, "which is not there: check the path"):
        sj.from_keras(tmp_path / "none.keras")
    with raises(ValueError, "expected a file for layer='deep'"):
        sj.from_keras([np.ones((D, 4 * N)), np.ones((N, 4 * N))], layer="deep")
