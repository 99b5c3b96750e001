"""Weights of the cells SimpleCell, LSTMCell, OptimizedLSTMCell and GRUCell of flax.nnx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.interop.weights._arrays import ORDER, as_numpy, check_names, check_shapes, flat, kind_by_shape
from seqjax.interop.weights._layers import Layer, as_gru, build, check_activation, layers_of, only_or_all
from seqjax.interop.weights.linen import _checked, by_gates, per_gate
from seqjax.sequence._parameter_checks import kind_of

TITLE = "the weights of a cell of flax.nnx"


def from_nnx(source: Any, *, activation: Literal["tanh", "relu", "identity"] | None = None) -> tuple[Any, Params]:
    """The weights of a cell of flax.nnx as a cell of seqjax and its parameters.

    `LSTMCell` has one transposed matrix per gate, with the names of flax.linen, but `if_` for `if`. The other cells
    have dense_i (d, 4n) and dense_h (n, 4n), with gates in the order i, f, g, o or r, z, n. The bias of an LSTM is on
    dense_h, that of the other cells on dense_i. The GRU of nnx has no b_hn, so b_hn = 0. `sj.from_nnx` wraps the cell
    of nnx instead, and keeps its weights as they are.

    Args:
        source: a module, also `nnx.RNN` around a cell; or its state as nested mappings, such as `nnx.state(module)` or
            `nnx.to_pure_dict(nnx.state(module, nnx.Param))`. A list of them, starting at the input, gives a stack.
        activation: of a SimpleCell whose module is not given; "tanh" by default.

    Returns:
        An `LSTM`, `GRU` or `VanillaRNN`, or a `Stack` of them, and its parameters, copied: the same bits.

    Raises:
        ValueError: names or shapes are not those of such a cell, all of them in one message; or the module has
            activations or a residual connection that no cell of seqjax has.
        TypeError: the source is none of these.

    Source: the cells of `flax.nnx`.

    Example:
        >>> import seqjax as sj
        >>> from flax import nnx
        >>> cell, params = sj.weights.from_nnx(nnx.GRUCell(2, 3, rngs=nnx.Rngs(0)))
        >>> cell.input_size, params.W_hh.shape, params.b_hn.tolist()
        (2, (9, 3), [0.0, 0.0, 0.0])
    """
    parts = source if isinstance(source, list | tuple) else [source]
    return build([_layer(part, activation) for part in parts])


def to_nnx(cell: Cell, params: Params, *, optimized: bool = False) -> Any:
    """The parameters of a cell as the state of a cell of flax.nnx with the same equations.

    `nnx.update(module, sj.weights.to_nnx(cell, params))` loads it into a module of the same sizes.

    Args:
        cell: an `LSTM`, a `GRU` with reset "after" and b_hn = 0 (`GRUCell` has no such bias), a `VanillaRNN`
            (`SimpleCell`, with its `activation_fn`), or a stack of them.
        params: its parameters.
        optimized: for an LSTM, whether the module is an `OptimizedLSTMCell`.

    Returns:
        Nested dictionaries of arrays; for a stack of several layers, a list of them. The gate of a GRU with update
        "writes" is negated, because the update gate of nnx keeps.

    Raises:
        ValueError: b_hn is not zero, or no cell of nnx has these equations.
        TypeError: the cell is not one of these, or the parameters are not its own.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> weights = sj.weights.to_nnx(cell, cell.init(jax.random.key(0)), optimized=True)
        >>> weights["dense_i"]["kernel"].shape, sorted(weights["dense_h"])
        ((2, 12), ['bias', 'kernel'])
    """
    layers = layers_of(cell, params, "flax.nnx")
    return only_or_all([_written(layer, number, optimized) for number, layer in enumerate(layers)])


def _layer(source: Any, activation: str | None) -> Layer:
    if not isinstance(source, Mapping):
        module = getattr(source, "cell", source)
        activation = _checked(module)
        from flax import nnx

        if not isinstance(module, nnx.Module):
            raise TypeError(f"expected a module of flax.nnx or its state, got {kind_of(source)}: see sj.weights")
        source = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    found = flat(source["cell"] if list(source) == ["cell"] else source)
    if not any(name.startswith("dense_") for name in found):
        names = {f"if.{name.partition('.')[2]}" if name.startswith("if_.") else name: a for name, a in found.items()}
        return by_gates(names, TITLE, activation)
    bias = "dense_h.bias" if "dense_h.bias" in found else "dense_i.bias"
    check_names(found, ["dense_i.kernel", "dense_h.kernel", bias], TITLE)
    arrays = as_numpy(found)
    kind = kind_by_shape("dense_h.kernel", arrays["dense_h.kernel"].shape, TITLE, gates_last=True)
    expected = "dense_h.bias" if kind == "lstm" else "dense_i.bias"
    check_names(found, ["dense_i.kernel", "dense_h.kernel", expected], TITLE)
    columns = f"{len(ORDER[kind])}n".removeprefix("1")
    layout = {"dense_i.kernel": f"d {columns}", "dense_h.kernel": f"n {columns}", bias: columns}
    check_shapes(arrays, layout, TITLE, "dense_h.kernel")
    options = {"rnn": {"activation": check_activation(activation or "tanh")}}
    options |= {"gru": {"reset": "after", "update": "keeps"}}
    return Layer(
        kind, arrays["dense_i.kernel"].T, arrays["dense_h.kernel"].T, arrays[bias], None, options.get(kind, {})
    )


def _written(layer: Layer, number: int, optimized: bool) -> dict[str, dict[str, Any]]:
    if layer.kind == "lstm" and not optimized:
        return {"if_" if name == "if" else name: weights for name, weights in per_gate(layer).items()}
    if layer.kind == "gru":
        layer = as_gru(layer, "flax.nnx", ["after"], "keeps")
        if layer.b_hn is not None and np.any(layer.b_hn):
            raise ValueError(
                f"expected b_hn = 0 in layer {number} for GRUCell of flax.nnx, which has no such bias, got up to "
                f"{np.abs(layer.b_hn).max():.3g}: use GRUCell of flax.linen, or train with b_hn=None"
            )
    weights = {"dense_i": {"kernel": jnp.array(layer.W_xh.T)}, "dense_h": {"kernel": jnp.array(layer.W_hh.T)}}
    weights["dense_h" if layer.kind == "lstm" else "dense_i"]["bias"] = jnp.array(layer.b_h)
    return weights
