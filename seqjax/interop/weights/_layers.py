"""Recurrent layers between the layouts of other libraries and the parameters of seqjax's cells.

`build` makes a cell and its parameters from `Layer`s, and `layers_of` takes them apart.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.cells.dropout import Dropout
from seqjax.cells.gru import GRU, GRUParams
from seqjax.cells.lstm import LSTM, LSTMParams
from seqjax.cells.stack import Stack, stack
from seqjax.cells.vanilla import ACTIVATIONS, VanillaParams, VanillaRNN
from seqjax.sequence._parameter_checks import check_params

CELLS = {LSTM: "lstm", GRU: "gru", VanillaRNN: "rnn"}


class Layer(NamedTuple):
    """One recurrent layer: arrays of numpy in the layout of seqjax's parameters, and the options of its cell."""

    kind: str
    W_xh: np.ndarray
    W_hh: np.ndarray
    b_h: np.ndarray
    b_hn: np.ndarray | None = None
    options: Mapping[str, Any] = {}


def check_activation(activation: str) -> str:
    """The activation, if a vanilla cell of seqjax has it.

    Raises:
        ValueError: it has not.
    """
    activation = "identity" if activation == "linear" else activation  # the name in Keras
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expected a vanilla network with {', '.join(ACTIVATIONS)}, got {activation!r}: no cell has it"
        )
    return activation


def activation_of(function: Callable[..., Any], title: str) -> str:
    """The name of an activation function of JAX, from its values.

    Raises:
        ValueError: it is no function that seqjax's cells have.
    """
    x = jnp.array([-2.0, -0.5, 0.0, 0.3, 1.7])
    for name, known in (ACTIVATIONS | {"sigmoid": jax.nn.sigmoid}).items():
        if np.allclose(function(x), known(x), atol=1e-6):
            return name
    got = getattr(function, "__name__", repr(function))
    raise ValueError(f"expected {title} with tanh, relu, sigmoid or no activation, got {got}: no cell of seqjax has it")


def check_gated(activation: str, gate: str, title: str) -> None:
    """Checks the activations of an LSTM or a GRU.

    Raises:
        ValueError: they are not tanh and the logistic sigmoid.
    """
    if (activation, gate) != ("tanh", "sigmoid"):
        raise ValueError(
            f"expected {title} with tanh, and sigmoid in its gates, got {activation} and {gate}: wrap the cell of the "
            f"library, or write your own with the methods init, initial_state and step"
        )


def reorder(array: np.ndarray, old: str, new: str) -> np.ndarray:
    """Blocks of rows in another order, such as from "zrn" to "rzn".

    Example:
        >>> import numpy as np
        >>> from seqjax.interop.weights._layers import reorder
        >>> reorder(np.array([1, 2, 3]), "zrn", "rzn").tolist()
        [2, 1, 3]
    """
    blocks = dict(zip(old, np.split(array, len(old)), strict=True))
    return np.concatenate([blocks[gate] for gate in new])


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b; where one of them is zero, the other with all its bits, also the sign of a zero."""
    return np.where(b == 0, a, np.where(a == 0, b, a + b))


def build(layers: Sequence[Layer], dropout: float = 0.0) -> tuple[Any, Params]:
    """The cell of one layer, or the stack of several layers, and its parameters.

    Args:
        layers: at least one.
        dropout: the rate of dropout between layers.

    Raises:
        ValueError: a layer does not read the outputs of the layer below it, the dtypes differ, or JAX has no float64.
    """
    if not layers:
        raise ValueError("expected the weights of at least one layer, got none: pass those of one layer or a list")
    for layer in layers:
        dtype = layer.W_hh.dtype
        if dtype != layers[0].W_hh.dtype:
            raise ValueError(
                f"expected layers in one dtype, got {layers[0].W_hh.dtype} and {dtype}: convert one of them"
            )
        check_holds(dtype)
    for number, (below, above) in enumerate(itertools.pairwise(layers)):
        if above.W_xh.shape[1] != below.W_hh.shape[1]:
            raise ValueError(
                f"expected layer {number + 1} to read the {below.W_hh.shape[1]} outputs of layer {number}, got one "
                f"with {above.W_xh.shape[1]} inputs: pass the layers in order, starting at the input"
            )
    parts = [_cell_and_params(layer) for layer in layers]
    if len(parts) == 1:
        return parts[0]
    if dropout:
        sizes = [layer.W_hh.shape[1] for layer in layers]
        between = [(Dropout(size, dropout), ()) for size in sizes]
        parts = [part for pair in zip(parts, between, strict=True) for part in pair][:-1]
    return stack([cell for cell, _ in parts]), tuple(params for _, params in parts)


def check_holds(dtype: Any) -> None:
    """Checks that JAX stores numbers of this dtype without rounding.

    Raises:
        ValueError: it is float64, and 64-bit types are off.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f'expected weights that JAX stores exactly, got {dtype}: jax.config.update("jax_enable_x64", True), or '
            f"convert the weights to float32"
        )


def _cell_and_params(layer: Layer) -> tuple[Any, Params]:
    d, n, dtype = layer.W_xh.shape[1], layer.W_hh.shape[1], layer.W_hh.dtype.name
    kind = next(cell for cell, name in CELLS.items() if name == layer.kind)
    cell = kind(d, n, dtype=dtype, **layer.options)
    # A copy, because the other library may change its weights in place.
    W_xh, W_hh, b_h = (jnp.array(a, dtype=a.dtype) for a in layer[1:4])
    if isinstance(cell, GRU):
        return cell, GRUParams(W_xh, W_hh, b_h, jnp.array(b_hn_of(layer)) if cell.reset == "after" else None)
    return cell, (LSTMParams if layer.kind == "lstm" else VanillaParams)(W_xh, W_hh, b_h)


def layers_of(cell: Cell, params: Params, library: str) -> list[Layer]:
    """The recurrent layers of a cell, with copies of their parameters. Dropout between layers has no weights.

    Raises:
        TypeError: a layer is no LSTM, GRU or vanilla network of seqjax.
        ValueError, TypeError: the parameters are not those of the cell.
    """
    # Nothing is traced or compiled: the parameters may be on any device.
    _check_classes(cell, library)
    check_params(cell, params)
    return _layers(cell, params)


def _check_classes(cell: Any, library: str) -> None:
    if type(cell) is Stack:
        for part in cell.cells:
            _check_classes(part, library)
    # Exact classes, because the step of a subclass may compute something else.
    elif type(cell) not in (*CELLS, Dropout):
        got = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
        fix = {
            "Embedding": "pass the layers above it, sj.stack(cell.cells[1:]) and params[1:]",
            "LearnedState": "pass cell.cell and params.cell, and set the initial state yourself",
        }.get(type(cell).__name__, "sj.save stores every cell of seqjax")
        raise TypeError(f"expected an LSTM, a GRU or a VanillaRNN, or a stack of them, for {library}, got {got}: {fix}")


def _layers(cell: Any, params: Params) -> list[Layer]:
    if isinstance(cell, Stack):
        return [layer for part, p in zip(cell.cells, params, strict=True) for layer in _layers(part, p)]
    if isinstance(cell, Dropout):
        return []
    names = [field.name for field in dataclasses.fields(cell)]
    options = {name: getattr(cell, name) for name in ("activation", "reset", "update") if name in names}
    # Copies in C order, which others may change.
    W_xh, W_hh, b_h = (np.array(leaf, order="C") for leaf in params[:3])
    b_hn = None if len(params) < 4 or params[3] is None else np.array(params[3])
    return [Layer(CELLS[type(cell)], W_xh, W_hh, b_h, b_hn, options)]


def as_gru(layer: Layer, library: str, reset: Sequence[str], update: str) -> Layer:
    """A GRU whose update gate has the meaning that it has in a library.

    A gate that writes is one minus a gate that keeps, and 1 - sigma(a) = sigma(-a). So the other meaning is the same
    network with the rows of z negated.

    Raises:
        ValueError: the library has no GRU with this place of the reset gate.
    """
    if layer.options["reset"] not in reset:
        raise ValueError(
            f'expected a GRU with reset="{reset[0]}" for {library}, got reset="{layer.options["reset"]}": other '
            f"equations, so train sj.GRU(d, n, reset={reset[0]!r})"
        )
    if layer.options["update"] == update:
        return layer
    n = layer.W_hh.shape[1]
    arrays = [array.copy() for array in layer[1:4]]
    for array in arrays:
        array[n : 2 * n] *= -1
    return layer._replace(W_xh=arrays[0], W_hh=arrays[1], b_h=arrays[2], options={**layer.options, "update": update})


def b_hn_of(layer: Layer) -> np.ndarray:
    """b_hn, or zeros if the layer has none."""
    return np.zeros_like(layer.b_h[: layer.W_hh.shape[1]]) if layer.b_hn is None else layer.b_hn


def check_no_bias(layers: Sequence[Layer], library: str) -> None:
    """Checks that all biases are zero, for a layer without biases.

    Raises:
        ValueError: one is not, so the layer would compute something else.
    """
    for number, layer in enumerate(layers):
        for name, b in (("b_h", layer.b_h), ("b_hn", layer.b_hn)):
            if b is not None and np.any(b):
                raise ValueError(
                    f"expected {name} = 0 in layer {number} for {library} without biases, got up to "
                    f"{np.abs(b).max():.3g}: leave out bias=False"
                )


def only_or_all(written: list[Any]) -> Any:
    """The weights of the only layer, or the list of the weights of all layers."""
    return written[0] if len(written) == 1 else written
