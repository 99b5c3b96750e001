"""Weights of torch.nn.RNN, LSTM and GRU. torch is imported only to read a .pt or .pth file."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.interop._safetensors import read_tensors
from seqjax.interop.weights._arrays import ORDER, as_numpy, check_kind, check_names, check_shapes, kind_by_shape
from seqjax.interop.weights._layers import (
    Layer,
    add,
    as_gru,
    b_hn_of,
    build,
    check_activation,
    check_no_bias,
    layers_of,
)
from seqjax.sequence._parameter_checks import kind_of

NAME = re.compile(r"(?:(.*)\.)?((?:weight|bias)_(?:ih|hh|hr)(?:_l(\d+)(_reverse)?)?)")
CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def from_torch(
    source: Any,
    *,
    prefix: str | None = None,
    cell: Literal["lstm", "gru", "rnn"] | None = None,
    nonlinearity: Literal["tanh", "relu"] | None = None,
) -> tuple[Any, Params]:
    """The weights of a recurrent layer of torch as a cell of seqjax and its parameters.

    torch stores the matrices in the layout of seqjax: (4n, d) and (4n, n), rows in the order i, f, g, o for an LSTM and
    r, z, n for a GRU. It has two biases, and b_h = bias_ih + bias_hh is their sum. In a GRU, the part of bias_hh that
    belongs to n stays apart, because the reset gate multiplies it: it is b_hn. A layer without biases has zeros.

    Args:
        source: a module (`torch.nn.LSTM`, a cell such as `torch.nn.LSTMCell`, or a model that contains one), a
            state_dict of tensors or arrays, or the path of a `.pt`, `.pth` or `.safetensors` file with a state_dict.
        prefix: the name of the layer inside a larger model, such as "encoder.rnn". Not necessary if there is only one.
        cell: the kind of the cell. The number of rows decides it, so this is only a check.
        nonlinearity: the activation of an RNN whose module is not given; "tanh" by default.

    Returns:
        An `LSTM`, `GRU` or `VanillaRNN`, or a `Stack` of them for several layers, with `Dropout` between the layers if
        the module has it; and the parameters, copied, in the dtype of the weights. Matrices and b_hn are the same bits.
        A bias b_h is a rounded sum, unless one of the two biases is zero.

    Raises:
        ValueError: names or shapes are not those of such a layer, all of them in one message; there are several layers
            of different names; the layer is bidirectional or has a projection.
        TypeError: the source is none of these, or an array is not floating-point.
        ModuleNotFoundError: the file needs a package that is not installed.

    Source: the equations in the documentation of `torch.nn.LSTM` and `torch.nn.GRU`.

    Example:
        >>> import numpy as np, seqjax as sj
        >>> weights = {"weight_ih_l0": np.ones((4, 1)), "weight_hh_l0": np.ones((4, 1))}
        >>> weights |= {"bias_ih_l0": np.full(4, 0.25), "bias_hh_l0": np.full(4, 0.5)}
        >>> cell, params = sj.from_torch({name: w.astype("float32") for name, w in weights.items()})
        >>> type(cell).__name__, cell.input_size, float(params.b_h[0])
        ('LSTM', 1, 0.75)
    """
    dropout = 0.0
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source))
    elif not isinstance(source, Mapping):
        module, prefix = _recurrent_module(source, prefix), None
        _check_module(module)
        # Cells have one layer, and the dropout of torch acts only between layers.
        dropout = float(getattr(module, "dropout", 0.0))
        nonlinearity = getattr(module, "nonlinearity", None)
        source = module.state_dict()
    title = "the weights of a recurrent layer of torch"
    arrays = as_numpy(_below_prefix(source, prefix))
    if not arrays:
        raise ValueError(_several({}, None))
    _check_directions(arrays)
    suffixes = _suffixes(arrays)
    parts = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if any("bias" in name for name in arrays) else [])
    check_names(arrays, [part + suffix for suffix in suffixes for part in parts], title)
    recurrent = f"weight_hh{suffixes[0]}"
    kind = kind_by_shape(recurrent, arrays[recurrent].shape, title)
    check_kind(cell, kind, title)
    rows = f"{len(ORDER[kind])}n".removeprefix("1")
    layout = {}
    for number, suffix in enumerate(suffixes):
        layout |= {f"weight_ih{suffix}": f"{rows} {'n' if number else 'd'}", f"weight_hh{suffix}": f"{rows} n"}
        layout |= {part + suffix: rows for part in parts[2:]}
    check_shapes(arrays, layout, title, recurrent)
    return build([_layer(kind, arrays, suffix, nonlinearity) for suffix in suffixes], dropout)


def to_torch(cell: Cell, params: Params, *, prefix: str = "", bias: bool = True) -> dict[str, np.ndarray]:
    """The parameters of a cell as a state_dict of the recurrent layer of torch with the same equations.

    `module.load_state_dict({name: torch.from_numpy(w) for name, w in sj.to_torch(cell, params).items()})` loads it into
    `torch.nn.LSTM(d, n)`, `GRU(d, n)` or `RNN(d, n)`, with `num_layers` for a stack. Build the `RNN` with
    `nonlinearity="relu"` for that activation, which the weights do not show.

    Args:
        cell: an `LSTM`, a `VanillaRNN` with tanh or relu, or a `GRU` with reset "after"; or a stack of cells of one of
            these kinds and one hidden size. `Dropout` between layers has no weights.
        params: its parameters.
        prefix: the name of the layer inside a larger model, such as "encoder.rnn".
        bias: False for a module that was built with `bias=False`; then all biases must be zero.

    Returns:
        Arrays by name. bias_ih is b_h, and bias_hh is zero except for b_hn of a GRU. `from_torch` returns the same
        bits. The gate of a GRU with update "writes" is negated, because the update gate of torch keeps. bfloat16
        becomes float32, because numpy has no bfloat16 that torch reads; it holds the same numbers.

    Raises:
        ValueError: no module of torch has these equations or sizes.
        TypeError: the cell is not one of these, or the parameters are not its own.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.GRU(2, 3)
        >>> weights = sj.to_torch(cell, cell.init(jax.random.key(0)))
        >>> weights["weight_ih_l0"].shape, sorted(weights)
        ((9, 2), ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0'])
    """
    layers = layers_of(cell, params, "torch")
    if not layers:
        raise ValueError("expected at least one recurrent layer for torch, got none: an LSTM, a GRU or a VanillaRNN")
    same = {(layer.kind, layer.W_hh.shape[1], layer.options.get("activation")) for layer in layers}
    if len(same) > 1:
        got = ", ".join(f"{kind} of {n}" for kind, n, _ in sorted(same, key=str))
        raise ValueError(
            f"expected layers of one kind and hidden size for one layer of torch, got {got}: convert each cell of the "
            f"stack for itself"
        )
    if not bias:
        check_no_bias(layers, "torch")
    start = f"{prefix.removesuffix('.')}." if prefix else ""
    weights = {}
    for number, layer in enumerate(layers):
        for name, array in _written(layer).items():
            if bias or "bias" not in name:
                array = array.astype("float32") if array.dtype == jnp.bfloat16 else array
                weights[f"{start}{name}_l{number}"] = array
    return weights


def _layer(kind: str, arrays: Mapping[str, np.ndarray], suffix: str, nonlinearity: str | None) -> Layer:
    W_xh, W_hh = arrays[f"weight_ih{suffix}"], arrays[f"weight_hh{suffix}"]
    none = np.zeros_like(W_hh[:, 0])
    b_ih, b_hh = (arrays.get(f"{name}{suffix}", none) for name in ("bias_ih", "bias_hh"))
    if kind == "gru":
        gates = 2 * W_hh.shape[1]
        b_h = np.concatenate([add(b_ih[:gates], b_hh[:gates]), b_ih[gates:]])
        return Layer(kind, W_xh, W_hh, b_h, b_hh[gates:], {"reset": "after", "update": "keeps"})
    options = {"activation": check_activation(nonlinearity or "tanh")} if kind == "rnn" else {}
    return Layer(kind, W_xh, W_hh, add(b_ih, b_hh), None, options)


def _written(layer: Layer) -> dict[str, np.ndarray]:
    bias_hh = np.zeros_like(layer.b_h)
    if layer.kind == "gru":
        layer = as_gru(layer, "torch", ["after"], "keeps")
        bias_hh[2 * layer.W_hh.shape[1] :] = b_hn_of(layer)
    elif layer.options.get("activation") == "identity":
        raise ValueError("expected a VanillaRNN with tanh or relu for torch, got identity: torch has no such RNN")
    return {"weight_ih": layer.W_xh, "weight_hh": layer.W_hh, "bias_ih": layer.b_h, "bias_hh": bias_hh}


def _recurrent_module(source: Any, prefix: str | None) -> Any:
    """The recurrent module inside a module of torch: itself, the one with a name, or the only one."""
    if not callable(getattr(source, "named_modules", None)):
        raise TypeError(
            f"expected a module of torch, a state_dict or the path of a file, got {kind_of(source)}: pass "
            f"module.state_dict(), or see sj.weights for other libraries"
        )
    found = {name: module for name, module in source.named_modules() if _class_of(module)}
    if prefix is not None:
        found = {name: module for name, module in found.items() if name == prefix.removesuffix(".")} or found
    if len(found) == 1 and (prefix is None or prefix.removesuffix(".") in found):
        return next(iter(found.values()))
    raise ValueError(_several(found, prefix))


def _class_of(module: Any) -> str:
    """The name of the recurrent class of torch that a module has; "" for another module."""
    bases = [base.__name__ for base in type(module).__mro__ if base.__module__ == "torch.nn.modules.rnn"]
    return next((name for name in bases if name in CLASSES), "")


def _check_module(module: Any) -> None:
    if getattr(module, "proj_size", 0):
        raise ValueError(_projection(f"{_class_of(module)} with proj_size={module.proj_size}"))
    if getattr(module, "bidirectional", False):
        raise ValueError(_bidirectional(f"a bidirectional {_class_of(module)}"))


def _projection(got: str) -> str:
    return (
        f"expected a layer of torch whose hidden state is not projected, got {got}: no cell of seqjax has a "
        f"projection, so train it with proj_size=0"
    )


def _bidirectional(got: str) -> str:
    return (
        f"expected a layer of torch that reads in one direction, got {got}: convert each direction for itself, the "
        f'second one with {{k.removesuffix("_reverse"): v for k, v in state_dict.items() if k.endswith("_reverse")}}, '
        f"and run it with sj.unroll(..., reverse=True)"
    )


def _check_directions(arrays: Mapping[str, np.ndarray]) -> None:
    projected = [name for name in arrays if name.startswith("weight_hr")]
    if projected:
        raise ValueError(_projection(", ".join(projected)))
    reverse = [name for name in arrays if name.endswith("_reverse")]
    if reverse:
        raise ValueError(_bidirectional(", ".join(reverse)))


def _suffixes(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The suffix of each layer: _l0, _l1 and so on, or none for the weights of a cell such as torch.nn.LSTMCell."""
    numbers = [match[3] for match in map(NAME.fullmatch, arrays) if match]
    if numbers and all(number is None for number in numbers):
        return [""]
    return [f"_l{number}" for number in range(1 + max((int(number) for number in numbers if number), default=0))]


def _below_prefix(state: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    """The weights of one layer of a larger state_dict, without the prefix of their names."""
    if not any(_is_weight(name) for name in state):
        # A checkpoint often stores the state_dict beside other things.
        inner = {
            key: value for key, value in state.items() if isinstance(value, Mapping) and any(map(_is_weight, value))
        }
        if len(inner) > 1:
            raise ValueError(f"expected one state_dict, got {', '.join(map(str, inner))}: pass one of these entries")
        state = next(iter(inner.values()), state)
    matches = [match for match in map(NAME.fullmatch, map(str, state)) if match]
    found = dict.fromkeys(match[1] or "" for match in matches)
    chosen = next(iter(found), "") if prefix is None else prefix.removesuffix(".")
    if (prefix is None and len(found) > 1) or (prefix is not None and chosen not in found):
        raise ValueError(_several(found, prefix))
    start = f"{chosen}." if chosen else ""
    below = {str(name).removeprefix(start): value for name, value in state.items() if str(name).startswith(start)}
    # Names with a dot belong to modules inside this one.
    return {name: value for name, value in below.items() if "." not in name and (start or _belongs(name, value))}


def _is_weight(name: Any) -> bool:
    return isinstance(name, str) and bool(NAME.fullmatch(name))


def _belongs(name: str, value: Any) -> bool:
    """Whether an entry at the top of a state_dict is a weight; a checkpoint also stores numbers and texts there."""
    return _is_weight(name) or hasattr(value, "shape")


def _several(found: Mapping[str, Any], prefix: str | None) -> str:
    names = ", ".join(repr(name) for name in found)
    if not found:
        return (
            "expected the weights of torch.nn.RNN, LSTM or GRU, weight_ih_l0, weight_hh_l0, bias_ih_l0 and bias_hh_l0, "
            "got none of these names: pass the state_dict of such a module"
        )
    if prefix is not None:
        return f"expected a recurrent layer of torch at prefix={prefix!r}, got layers at {names}: pass one of these"
    return f"expected one recurrent layer of torch, got layers at {names}: choose one with prefix={next(iter(found))!r}"


def _read(path: Path) -> Mapping[str, Any]:
    """The state_dict in a file."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise ValueError(f"expected a file with a state_dict, got {path}, which is not there: check the path")
    try:
        # By name: where torch is not installed, a type checker takes "import torch" for this file.
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"expected torch to read {path.name}, got no such package: pip install torch, or save the state_dict with "
            f"safetensors.torch.save_file"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - a damaged file fails in as many ways as it has layers
        content = None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"expected a state_dict in {path}, got a file without one: write it with "
            f"torch.save(module.state_dict(), path), because whole modules are pickled code and are not loaded"
        )
    return content
