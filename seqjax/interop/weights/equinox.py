"""Weights of the cells LSTMCell and GRUCell of equinox. equinox itself is never imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.interop.weights._arrays import ORDER, as_numpy, check_names, check_shapes, kind_by_shape
from seqjax.interop.weights._layers import Layer, as_gru, b_hn_of, build, check_no_bias, layers_of, only_or_all
from seqjax.sequence._parameter_checks import kind_of

NAMES = ("weight_ih", "weight_hh", "bias", "bias_n")
TITLE = "the weights of a cell of equinox"


def from_equinox(source: Any) -> tuple[Any, Params]:
    """The weights of a cell of equinox as a cell of seqjax and its parameters.

    equinox has the layout of seqjax: weight_ih (4n, d), weight_hh (4n, n) and one bias, in the order i, f, g, o or
    r, z, n; bias_n of a GRU is b_hn. A cell without a bias has zeros. `sj.from_equinox` wraps the cell of equinox
    instead, and keeps its weights as they are.

    Args:
        source: an `equinox.nn.LSTMCell` or `GRUCell`, or its arrays by name. A list of them, starting at the input,
            gives a stack.

    Returns:
        An `LSTM` or `GRU`, or a `Stack` of them, and its parameters, copied: the same bits.

    Raises:
        ValueError: names or shapes are not those of such a cell, all of them in one message.
        TypeError: the source is none of these.

    Source: `equinox.nn.LSTMCell` and `GRUCell`.

    Example:
        >>> import equinox as eqx, jax, seqjax as sj
        >>> cell, params = sj.weights.from_equinox(eqx.nn.GRUCell(2, 3, key=jax.random.key(0)))
        >>> cell.input_size, params.W_xh.shape, params.b_hn.shape
        (2, (9, 2), (3,))
    """
    parts = source if isinstance(source, list | tuple) else [source]
    return build([_layer(part) for part in parts])


def to_equinox(cell: Cell, params: Params, *, bias: bool = True) -> Any:
    """The parameters of a cell as the arrays of a cell of equinox with the same equations.

    `eqx.tree_at(lambda m: [getattr(m, name) for name in arrays], module, list(arrays.values()))` replaces those of a
    module of the same sizes.

    Args:
        cell: an `LSTM`, a `GRU` with reset "after", or a stack of them.
        params: its parameters.
        bias: False for modules that were built with `use_bias=False`; then all biases must be zero.

    Returns:
        Arrays by the names weight_ih, weight_hh, bias and, for a GRU, bias_n; for a stack of several layers, a list.
        The gate of a GRU with update "writes" is negated, because the update gate of equinox keeps.

    Raises:
        ValueError: no cell of equinox has these equations, or a bias is not zero.
        TypeError: the cell is not one of these, or the parameters are not its own.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> sorted(sj.weights.to_equinox(cell, cell.init(jax.random.key(0))))
        ['bias', 'weight_hh', 'weight_ih']
    """
    layers = layers_of(cell, params, "equinox")
    if not bias:
        check_no_bias(layers, "equinox")
    written = [_written(layer) for layer in layers]
    return only_or_all([{name: a for name, a in arrays.items() if bias or "bias" not in name} for arrays in written])


def _layer(source: Any) -> Layer:
    if not isinstance(source, Mapping):
        found = {name: getattr(source, name, None) for name in NAMES}
        if found["weight_hh"] is None:
            raise TypeError(f"expected an LSTMCell or GRUCell of equinox, or its arrays, got {kind_of(source)}")
        source = found
    found = {name: value for name, value in source.items() if value is not None}
    arrays = as_numpy(found)
    names = ["weight_ih", "weight_hh"]
    if "weight_hh" not in arrays:
        check_names(arrays, [*names, "bias"], TITLE)
    kind = kind_by_shape("weight_hh", arrays["weight_hh"].shape, TITLE)
    if kind == "rnn":
        raise ValueError(f"expected {TITLE}, an LSTMCell or a GRUCell, got weight_hh {arrays['weight_hh'].shape}")
    if len(arrays) > 2:
        names += ["bias", "bias_n"] if kind == "gru" else ["bias"]
    check_names(arrays, names, TITLE)
    rows = f"{len(ORDER[kind])}n"
    layout = {"weight_ih": f"{rows} d", "weight_hh": f"{rows} n", "bias": rows, "bias_n": "n"}
    check_shapes(arrays, {name: layout[name] for name in names}, TITLE, "weight_hh")
    W_hh = arrays["weight_hh"]
    b = arrays.get("bias", np.zeros_like(W_hh[:, 0]))
    options = {"reset": "after", "update": "keeps"} if kind == "gru" else {}
    return Layer(kind, arrays["weight_ih"], W_hh, b, arrays.get("bias_n"), options)


def _written(layer: Layer) -> dict[str, Any]:
    if layer.kind == "rnn":
        raise ValueError("expected an LSTM or a GRU for equinox, got a VanillaRNN: equinox has no such cell")
    if layer.kind == "gru":
        layer = as_gru(layer, "equinox", ["after"], "keeps")
    arrays = {"weight_ih": layer.W_xh, "weight_hh": layer.W_hh, "bias": layer.b_h}
    arrays |= {"bias_n": b_hn_of(layer)} if layer.kind == "gru" else {}
    return {name: jnp.array(array) for name, array in arrays.items()}
