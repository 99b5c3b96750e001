"""Weights of the cores VanillaRNN, LSTM and GRU of dm-haiku. haiku itself is never imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.interop.weights._arrays import as_numpy, check_names, check_shapes, flat, kind_by_shape
from seqjax.interop.weights._layers import Layer, add, as_gru, build, layers_of, reorder

NAMES = {"lstm": "lstm", "gru": "gru", "rnn": "vanilla_rnn"}  # the names that haiku gives to its cores
CORE = re.compile(rf"(?:.*/)?(?:{'|'.join(NAMES.values())})(?:_\d+)?")


def from_haiku(params: Any, *, prefix: str | Sequence[str] | None = None) -> tuple[Any, Params]:
    """The parameters of a recurrent core of dm-haiku as a cell of seqjax and its parameters.

    haiku stores transposed matrices. Its LSTM has one matrix w (d + n, 4n) for inputs and hidden state, in the order
    i, g, f, o, and adds 1 to the forget gate at run time; here this 1 becomes part of b_h. Its GRU has the order z, r,
    a and is `sj.GRU(d, n, reset="before", update="writes")`. Its VanillaRNN has ReLU and one or two biases.

    Args:
        params: the parameters of a transformed function: arrays by module, {"lstm/linear": {"w": ..., "b": ...}}.
        prefix: the name of the core, such as "model/~/lstm"; a sequence of names, starting at the input, gives a stack.
            Not necessary if there is only one core with a default name.

    Returns:
        An `LSTM`, `GRU` or `VanillaRNN`, or a `Stack` of them, and its parameters, copied. They are the same bits,
        except for the forget bias b + 1, and the sum of two biases of a VanillaRNN, which are rounded.

    Raises:
        ValueError: names or shapes are not those of such a core, all of them in one message; or there is more than one
            core.
        TypeError: `params` is not a mapping, or an array is not floating-point.

    Source: `hk.LSTM`, `hk.GRU` and `hk.VanillaRNN`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell, params = sj.weights.from_haiku({"lstm/linear": {"w": jnp.ones((5, 12)), "b": jnp.zeros(12)}})
        >>> cell.input_size, params.b_h.tolist()[::3]  # 1 in the forget gate
        (2, [0.0, 1.0, 0.0, 0.0])
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"expected the parameters of haiku by module, got {type(params).__name__}: a dictionary")
    found = flat(params, "/")
    prefixes = _cores(found) if prefix is None else [prefix] if isinstance(prefix, str) else list(prefix)
    if prefix is None and len(prefixes) != 1:
        got = ", ".join(prefixes) or f"the modules {', '.join(map(str, params))}"
        raise ValueError(
            f"expected the parameters of one core of haiku, {', '.join(NAMES.values())}, got {got}: name the core with "
            f"prefix, or several in order with a list"
        )
    return build([_layer(found, name) for name in prefixes])


def to_haiku(cell: Cell, params: Params, *, names: str | Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The parameters of a cell as those of the core of dm-haiku with the same equations.

    Args:
        cell: an `LSTM`, a `GRU` with reset "before", a `VanillaRNN` with ReLU, or a stack of them.
        params: its parameters.
        names: the name of the core, or of each core of a stack. By default the names that haiku gives: "lstm",
            "lstm_1", "gru", "vanilla_rnn".

    Returns:
        Arrays by module, for `transformed.apply`. The forget bias is b_f - 1, because haiku adds 1, and is rounded. A
        VanillaRNN has one bias, that of `hk.VanillaRNN(n, double_bias=False)`. The gate of a GRU with update "keeps" is
        negated, because the update gate of haiku writes.

    Raises:
        ValueError: no core of haiku has these equations, or there is another number of names.
        TypeError: the cell is not one of these, or the parameters are not its own.

    Example:
        >>> import jax, seqjax as sj
        >>> cell = sj.LSTM(2, 3)
        >>> weights = sj.weights.to_haiku(cell, cell.init(jax.random.key(0)))
        >>> weights["lstm/linear"]["w"].shape, float(abs(weights["lstm/linear"]["b"]).max())  # b_f = 1, less 1
        ((5, 12), 0.0)
    """
    layers = layers_of(cell, params, "haiku")
    if names is None:
        kinds = [NAMES[layer.kind] for layer in layers]
        before = [kinds[:number].count(kind) for number, kind in enumerate(kinds)]
        names = [f"{kind}_{count}" if count else kind for kind, count in zip(kinds, before, strict=True)]
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != len(layers):
        raise ValueError(f"expected one name for each of {len(layers)} cores of haiku, got {names}: name each core")
    weights = {}
    for name, layer in zip(names, layers, strict=True):
        weights |= {module: _arrays(part) for module, part in _written(layer, name).items()}
    return weights


def _arrays(part: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.array(array) for name, array in part.items()}


def _cores(found: Mapping[str, Any]) -> list[str]:
    """The modules with the default name of a core that have weights of a core."""
    places = [name.rpartition("/")[0] for name in found]
    return list(dict.fromkeys(core for at in places if CORE.fullmatch(core := re.sub(r"/linear(_1)?$", "", at))))


def _layer(found: Mapping[str, Any], prefix: str) -> Layer:
    title, start = f"the parameters of the core {prefix} of haiku", f"{prefix}/"
    own = as_numpy({name: value for name, value in found.items() if name.startswith(start)})
    arrays = {name.removeprefix(start): array for name, array in own.items()}
    if {"w_i", "w_h"} & set(arrays):
        layout = {"w_i": "d 3n", "w_h": "n 3n", "b": "3n"}
        check_names(arrays, layout, title)
        kind_by_shape("w_h", arrays["w_h"].shape, title, gates_last=True)
        check_shapes(arrays, layout, title, "w_h")
        W_xh, W_hh, b = (reorder(arrays[name].T, "zrn", "rzn") for name in layout)
        return Layer("gru", W_xh, W_hh, b, None, {"reset": "before", "update": "writes"})
    if any(name.startswith("linear_1/") for name in arrays):
        layout = {"linear/w": "d n", "linear_1/w": "n n", "linear/b": "n"}
        layout |= {"linear_1/b": "n"} if "linear_1/b" in arrays else {}
        check_names(arrays, layout, title)
        check_shapes(arrays, layout, title, "linear_1/w")
        b = add(arrays["linear/b"], arrays["linear_1/b"]) if "linear_1/b" in arrays else arrays["linear/b"]
        return Layer("rnn", arrays["linear/w"].T, arrays["linear_1/w"].T, b, None, {"activation": "relu"})
    check_names(arrays, ["linear/w", "linear/b"], title)
    n = arrays["linear/b"].size // 4
    # No array has n as one of its axes: w is (d + n, 4n).
    arrays["n"] = np.zeros(n, arrays["linear/b"].dtype)
    check_shapes(arrays, {"linear/w": "d+n 4n", "linear/b": "4n", "n": "n"}, title, "n")
    W = reorder(arrays["linear/w"].T, "igfo", "ifgo")
    d, b = W.shape[1] - n, reorder(arrays["linear/b"], "igfo", "ifgo")
    if d < 1:
        raise ValueError(
            f"expected {title} with linear/w (d + n, 4n) for n = {n}, got {W.shape[::-1]}: it has no inputs"
        )
    b[n : 2 * n] += 1  # haiku adds it at run time
    return Layer("lstm", W[:, :d], W[:, d:], b)


def _written(layer: Layer, name: str) -> dict[str, dict[str, np.ndarray]]:
    if layer.kind == "gru":
        layer = as_gru(layer, "haiku", ["before"], "writes")
        w_i, w_h, b = (reorder(array, "rzn", "zrn").T for array in layer[1:4])
        return {name: {"w_i": w_i, "w_h": w_h, "b": b}}
    if layer.kind == "rnn":
        if layer.options["activation"] != "relu":
            raise ValueError(
                f"expected a VanillaRNN with relu for haiku, got {layer.options['activation']}: hk.VanillaRNN has ReLU"
            )
        return {f"{name}/linear": {"w": layer.W_xh.T, "b": layer.b_h}, f"{name}/linear_1": {"w": layer.W_hh.T}}
    n, b = layer.W_hh.shape[1], layer.b_h.copy()
    b[n : 2 * n] -= 1  # haiku adds it at run time
    W = np.concatenate([layer.W_xh, layer.W_hh], axis=1)
    return {f"{name}/linear": {"w": reorder(W, "ifgo", "igfo").T, "b": reorder(b, "ifgo", "igfo")}}
