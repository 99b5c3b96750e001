"""Weights of the cells SimpleCell, LSTMCell, OptimizedLSTMCell and GRUCell of flax.linen. flax is never imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.interop.weights._arrays import as_numpy, check_names, check_shapes, flat
from seqjax.interop.weights._layers import (
    Layer,
    activation_of,
    as_gru,
    b_hn_of,
    build,
    check_activation,
    check_gated,
    layers_of,
    only_or_all,
)
from seqjax.sequence._parameter_checks import kind_of

# The layers of each cell in the order of seqjax's rows, and those that have a bias.
DENSE = {"lstm": ("ii if ig io", "hi hf hg ho"), "gru": ("ir iz in", "hr hz hn"), "rnn": ("i", "h")}
BIASES = {"lstm": "hi hf hg ho", "gru": "ir iz in hn", "rnn": "i"}


def from_linen(
    variables: Any, *, module: Any = None, activation: Literal["tanh", "relu", "identity"] | None = None
) -> tuple[Any, Params]:
    """The variables of a cell of flax.linen as a cell of seqjax and its parameters.

    flax stores one transposed matrix per gate: ii, if, ig, io (d, n) and hi, hf, hg, ho (n, n) for an LSTM. The bias of
    an LSTM is on the h layers. A GRU has r, z, n with the bias on the i layers, and b_hn on hn. `sj.from_linen` wraps
    the cell of flax instead, and keeps its variables as they are.

    Args:
        variables: {"params": {...}} or its content, of a cell or of `flax.linen.RNN`. A list of them, starting at the
            input, gives a stack.
        module: the cell of flax, if its activations should be checked.
        activation: of a SimpleCell; "tanh" by default.

    Returns:
        An `LSTM`, `GRU` or `VanillaRNN`, or a `Stack` of them, and its parameters, copied: the same bits.

    Raises:
        ValueError: names or shapes are not those of such a cell, all of them in one message; or the module has
            activations or a residual connection that no cell of seqjax has.
        TypeError: the variables are no mapping, or an array is not floating-point.

    Source: the cells of `flax.linen`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, seqjax as sj
        >>> module = nn.GRUCell(3)
        >>> variables = module.init(jax.random.key(0), jnp.zeros(3), jnp.zeros(2))
        >>> cell, params = sj.weights.from_linen(variables)
        >>> cell.input_size, params.W_xh.shape, params.b_hn.shape
        (2, (9, 2), (3,))
    """
    phi = activation if module is None else _checked(getattr(module, "cell", module))
    parts = variables if isinstance(variables, list | tuple) else [variables]
    return build([_layer(part, phi) for part in parts])


def to_linen(cell: Cell, params: Params) -> Any:
    """The parameters of a cell as the variables of a cell of flax.linen with the same equations.

    Args:
        cell: an `LSTM` (for `LSTMCell` and `OptimizedLSTMCell`), a `GRU` with reset "after" (`GRUCell`), a `VanillaRNN`
            (`SimpleCell`, with its `activation_fn`), or a stack of them.
        params: its parameters.

    Returns:
        {"params": {...}} for `module.apply`; for a stack of several layers, a list of them. The gate of a GRU with
        update "writes" is negated, because the update gate of flax keeps.

    Raises:
        ValueError: no cell of flax has these equations.
        TypeError: the cell is not one of these, or the parameters are not its own.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> variables = sj.weights.to_linen(cell, cell.init(jax.random.key(0)))
        >>> variables["params"]["hf"]["bias"].tolist()
        [1.0, 1.0, 1.0]
    """
    return only_or_all([{"params": _written(layer)} for layer in layers_of(cell, params, "flax.linen")])


def gates_first(names: Mapping[str, Any]) -> str:
    """The kind of a cell from the names of its layers, such as "ii.kernel"; an LSTM if they are unknown."""
    known = {kind: {f"{name}.kernel" for part in parts for name in part.split()} for kind, parts in DENSE.items()}
    return max(known, key=lambda kind: len(known[kind] & set(names)))


def by_gates(found: Mapping[str, Any], title: str, activation: str | None) -> Layer:
    """A layer from one matrix per gate, with the names of flax.linen."""
    kind = gates_first(found)
    x_names, h_names = (part.split() for part in DENSE[kind])
    layout = {f"{name}.kernel": "d n" for name in x_names} | {f"{name}.kernel": "n n" for name in h_names}
    layout |= {f"{name}.bias": "n" for name in BIASES[kind].split()}
    check_names(found, layout, title)
    arrays = as_numpy(found)
    check_shapes(arrays, layout, title, f"{h_names[0]}.kernel")
    W_xh, W_hh = (np.concatenate([arrays[f"{name}.kernel"].T for name in names]) for names in (x_names, h_names))
    biases = [arrays[f"{name}.bias"] for name in BIASES[kind].split()]
    if kind == "gru":
        options = {"reset": "after", "update": "keeps"}
        return Layer(kind, W_xh, W_hh, np.concatenate(biases[:3]), biases[3], options)
    options = {"activation": check_activation(activation or "tanh")} if kind == "rnn" else {}
    return Layer(kind, W_xh, W_hh, np.concatenate(biases), None, options)


def per_gate(layer: Layer) -> dict[str, dict[str, Any]]:
    """The matrices and biases of a layer per gate, with the names of flax.linen."""
    names = [part.split() for part in DENSE[layer.kind]]
    blocks = zip(names, (layer.W_xh, layer.W_hh), strict=True)
    weights = {name: {"kernel": jnp.array(W.T)} for part, W_s in blocks for name, W in _split(part, W_s)}
    biases = BIASES[layer.kind].split()
    for name, b in _split(biases[: len(names[0])], layer.b_h):
        weights[name]["bias"] = jnp.array(b)
    if layer.kind == "gru":
        weights["hn"]["bias"] = jnp.array(b_hn_of(layer))
    return weights


def _split(names: list[str], array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return list(zip(names, np.split(array, len(names)), strict=True))


def _layer(variables: Any, activation: str | None) -> Layer:
    for name in ("params", "cell"):  # of module.init, and of flax.linen.RNN
        variables = variables[name] if isinstance(variables, Mapping) and list(variables) == [name] else variables
    if not isinstance(variables, Mapping):
        raise TypeError(f"expected the variables of a cell of flax.linen, got {kind_of(variables)}: module.init(...)")
    return by_gates(flat(variables), "the variables of a cell of flax.linen", activation)


def _written(layer: Layer) -> dict[str, dict[str, Any]]:
    return per_gate(as_gru(layer, "flax.linen", ["after"], "keeps") if layer.kind == "gru" else layer)


def _checked(module: Any) -> str | None:
    """Checks the activations of a cell of flax, and returns that of a SimpleCell."""
    title = f"a cell {type(module).__name__} of flax"
    if getattr(module, "residual", False):
        raise ValueError(
            f"expected {title} without a residual connection, got residual=True: no cell of seqjax has one"
        )
    if not hasattr(module, "activation_fn"):
        raise TypeError(f"expected a recurrent cell of flax, got {type(module).__name__}: pass one such as LSTMCell")
    activation = activation_of(module.activation_fn, title)
    if hasattr(module, "gate_fn"):
        check_gated(activation, activation_of(module.gate_fn, title), title)
        return None
    return activation
