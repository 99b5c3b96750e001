"""Weights of the layers SimpleRNN, LSTM and GRU of Keras 3. Keras itself is never imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seqjax.cell import Cell, Params
from seqjax.interop.weights._arrays import ORDER, as_numpy, check_kind, check_names, check_shapes, flat, kind_by_shape
from seqjax.interop.weights._keras_file import read_layer
from seqjax.interop.weights._layers import (
    Layer,
    add,
    as_gru,
    b_hn_of,
    build,
    check_activation,
    check_gated,
    check_no_bias,
    layers_of,
    only_or_all,
    reorder,
)
from seqjax.sequence._parameter_checks import kind_of

NAMES = ("kernel", "recurrent_kernel", "bias")
THEIRS = ORDER | {"gru": "zrn"}
TITLE = "the weights of a recurrent layer of Keras"
BOTH = {"reset": "after", "update": "keeps"}, {"reset": "before", "update": "keeps"}


def from_keras(
    source: Any,
    *,
    cell: Literal["lstm", "gru", "rnn"] | None = None,
    reset_after: bool | None = None,
    activation: Literal["tanh", "relu", "linear"] | None = None,
    layer: str | None = None,
) -> tuple[Any, Params]:
    """The weights of a recurrent layer of Keras as a cell of seqjax and its parameters.

    Keras stores the transposed matrices: kernel (d, 4n) and recurrent_kernel (n, 4n). The gates of an LSTM have the
    order i, f, c, o, and those of a GRU z, r, h. `reset_after=True` of its GRU is reset "after" and has two biases
    (2, 3n), whose sum is b_h, except for the part b_hn that the reset gate multiplies. `reset_after=False` is
    `sj.GRU(d, n, reset="before", update="keeps")`.

    Args:
        source: a layer or cell of Keras, `layer.get_weights()`, its arrays by the names kernel, recurrent_kernel and
            bias, or the path of a `.keras` file, from which nothing is executed. A list of such sources, starting at
            the input, gives a stack.
        cell: the kind of the cell. The shapes decide it, so this is only a check.
        reset_after: for a GRU without a bias whose layer is not given. The shape of a bias decides it.
        activation: of a SimpleRNN whose layer is not given; "tanh" by default.
        layer: the name of the layer in a file that has several recurrent layers.

    Returns:
        An `LSTM`, `GRU` or `VanillaRNN`, or a `Stack` of them, and its parameters, copied. They are the same bits,
        except for b_h of a GRU with reset "after", which is a rounded sum unless one of the two biases is zero.

    Raises:
        ValueError: names or shapes are not those of such a layer, all of them in one message; an activation that no
            cell of seqjax has; a layer that reads backwards or in both directions; or a file that is damaged or has no
            such layer.
        TypeError: the source is none of these.
        ModuleNotFoundError: the file needs h5py, which is not installed.

    Source: the layers of Keras 3, `keras.layers.GRU`.

    Example:
        >>> import numpy as np, seqjax as sj
        >>> weights = [np.ones((2, 9), "float32"), np.ones((3, 9), "float32"), np.ones((2, 9), "float32")]
        >>> cell, params = sj.from_keras(weights)
        >>> type(cell).__name__, cell.reset, params.b_h.tolist()[::4], params.b_hn.tolist()
        ('GRU', 'after', [2.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    """
    is_file = isinstance(source, str | os.PathLike)
    if layer is not None and not is_file:
        raise ValueError(f"expected a file for layer={layer!r}, got {kind_of(source)}: pass that layer itself")
    if not is_file and _is_list_of_layers(source):
        parts = [_layers(part, cell, reset_after, activation) for part in source]
        return build([layer for part in parts for layer in part])
    return build(_layers(source, cell, reset_after, activation, layer))


def to_keras(cell: Cell, params: Params, *, bias: bool = True) -> list[Any]:
    """The parameters of a cell as the weights of a layer of Keras with the same equations.

    `layer.set_weights(sj.to_keras(cell, params))` loads them into a layer that was built with the same sizes:
    `keras.layers.LSTM(n)`, `SimpleRNN(n, activation=...)`, or `GRU(n, reset_after=...)`, where reset "after" is
    `reset_after=True`.

    Args:
        cell: an `LSTM`, `GRU` or `VanillaRNN`, or a stack of them. `Dropout` between layers has no weights.
        params: its parameters.
        bias: False for layers that were built with `use_bias=False`; then all biases must be zero.

    Returns:
        [kernel, recurrent_kernel, bias]; for a stack of several layers, a list of these lists. The first bias of a GRU
        with reset "after" is b_h, and the second one is zero except for b_hn. The gate of a GRU with update "writes" is
        negated, because the update gate of Keras keeps. `from_keras` returns the same bits otherwise.

    Raises:
        TypeError: the cell is not one of these, or the parameters are not its own.
        ValueError: the parameters have other shapes, or a bias is not zero.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> [w.shape for w in sj.to_keras(cell, cell.init(jax.random.key(0)))]
        [(2, 12), (3, 12), (12,)]
    """
    layers = layers_of(cell, params, "Keras")
    if not bias:
        check_no_bias(layers, "Keras")
    return only_or_all([_written(layer)[: 3 if bias else 2] for layer in layers])


def _is_list_of_layers(source: Any) -> bool:
    return isinstance(source, list | tuple) and not all(hasattr(part, "shape") for part in source)


def _layers(
    source: Any, cell: str | None, reset_after: bool | None, activation: str | None, name: str | None = None
) -> list[Layer]:
    """The layers of one source; several for a layer of stacked cells."""
    if isinstance(source, str | os.PathLike):
        stored, source = read_layer(Path(source), name)
        _check_direction(stored.options)
        activation, reset_after = _options(stored.kind, stored.options, activation)
    elif not isinstance(source, Mapping | Sequence):
        source = _cell_of(source)
        if hasattr(source, "cells"):  # StackedRNNCells
            return [layer for part in source.cells for layer in _layers(part, cell, reset_after, activation)]
        activation, reset_after = _options(type(source).__name__, source.get_config(), activation)
        source = {name: getattr(source, name, None) for name in NAMES}
        source = {name: value for name, value in source.items() if value is not None}
    return [_layer(_named(source), cell, reset_after, activation)]


def _options(kind: str, options: Mapping[str, Any], activation: str | None) -> tuple[str | None, bool | None]:
    """The activation and the place of the reset gate of a layer or a cell, from its class and arguments."""
    if "Simple" in kind:
        activation = options["activation"]
    else:
        check_gated(options["activation"], options["recurrent_activation"], f"a layer {kind}")
    return activation, options.get("reset_after")


def _check_direction(options: Mapping[str, Any]) -> None:
    if options.get("go_backwards", False):
        raise ValueError(
            "expected a layer of Keras that reads forwards, got go_backwards=True: pass layer.get_weights(), and run "
            "the cell with sj.unroll(..., reverse=True), which keeps each output at its own time"
        )


def _cell_of(layer: Any) -> Any:
    """The cell of a layer of Keras, or the cell itself."""
    for name in ("forward_layer", "backward_layer"):
        if hasattr(layer, name):
            raise ValueError(
                "expected a layer of Keras that reads in one direction, got Bidirectional: convert "
                "layer.forward_layer, and layer.backward_layer.get_weights() for sj.unroll(..., reverse=True)"
            )
    _check_direction({"go_backwards": getattr(layer, "go_backwards", False)})
    cell = getattr(layer, "cell", layer)
    if hasattr(cell, "cells"):
        return cell
    if not hasattr(cell, "state_size") or not hasattr(cell, "recurrent_kernel"):
        fix = "build it with its input shape" if hasattr(cell, "state_size") else "pass a layer SimpleRNN, LSTM or GRU"
        raise TypeError(
            f"expected a recurrent layer of Keras that is built, or its weights, got {kind_of(layer)}: {fix}"
        )
    return cell


def _named(source: Any) -> dict[str, np.ndarray]:
    if isinstance(source, Mapping):
        # The path of a variable in Keras is such as "lstm/lstm_cell/kernel".
        source = {name.rpartition("/")[2]: value for name, value in flat(source, "/").items()}
    elif len(source) not in (2, 3):
        raise ValueError(f"expected {TITLE}, {', '.join(NAMES)}, got {len(source)} arrays: pass layer.get_weights()")
    else:
        source = dict(zip(NAMES, source, strict=False))
    arrays = as_numpy(source)
    check_names(arrays, NAMES if "bias" in arrays or len(arrays) > 2 else NAMES[:2], TITLE)
    return arrays


def _layer(arrays: dict[str, np.ndarray], cell: str | None, reset_after: bool | None, activation: str | None) -> Layer:
    kind = kind_by_shape("recurrent_kernel", arrays["recurrent_kernel"].shape, TITLE, gates_last=True)
    check_kind(cell, kind, TITLE)
    columns = f"{len(ORDER[kind])}n".removeprefix("1")
    layout = {"kernel": f"d {columns}", "recurrent_kernel": f"n {columns}"}
    if kind == "gru":
        shown = arrays["bias"].ndim == 2 if "bias" in arrays else reset_after
        if shown is None:
            raise ValueError(
                f"expected {TITLE} with a bias, (2, 3n) for reset_after=True or (3n,), got a GRU without one: pass "
                f"reset_after=True or reset_after=False"
            )
        reset_after = shown if reset_after is None else reset_after
    layout |= {"bias": f"2 {columns}" if reset_after and kind == "gru" else columns} if "bias" in arrays else {}
    check_shapes(arrays, layout, TITLE, "recurrent_kernel")
    W_xh, W_hh = (reorder(arrays[name].T, THEIRS[kind], ORDER[kind]) for name in NAMES[:2])
    bias = arrays.get("bias", np.zeros_like(W_hh[:, 0]))
    if kind != "gru":
        options = {"activation": check_activation(activation or "tanh")} if kind == "rnn" else {}
        return Layer(kind, W_xh, W_hh, bias, None, options)
    if not reset_after:
        return Layer(kind, W_xh, W_hh, reorder(bias, "zrn", "rzn"), None, BOTH[1])
    b_x, b_h = (reorder(b, "zrn", "rzn") for b in (bias if bias.ndim == 2 else (bias, bias)))
    gates = 2 * W_hh.shape[1]
    return Layer(kind, W_xh, W_hh, np.concatenate([add(b_x[:gates], b_h[:gates]), b_x[gates:]]), b_h[gates:], BOTH[0])


def _written(layer: Layer) -> list[np.ndarray]:
    if layer.kind == "gru":
        layer = as_gru(layer, "Keras", ["after", "before"], "keeps")
    W_xh, W_hh, bias = (reorder(array, ORDER[layer.kind], THEIRS[layer.kind]) for array in layer[1:4])
    if layer.options.get("reset") == "after":
        second = np.zeros_like(bias)
        second[2 * layer.W_hh.shape[1] :] = b_hn_of(layer)
        bias = np.stack([bias, second])
    return [np.ascontiguousarray(W_xh.T), np.ascontiguousarray(W_hh.T), bias]
