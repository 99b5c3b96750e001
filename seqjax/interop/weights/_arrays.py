"""Arrays of another library by their names: as arrays of numpy, and compared with the layout of the library.

A library's layout is a table from the names of its arrays to their shapes, such as {"weight_ih_l0": "4n d"}, with n
hidden units and d inputs. All differences are reported in one error, before anything is converted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from seqjax.sequence._parameter_checks import kind_of

ORDER = {"lstm": "ifgo", "gru": "rzn", "rnn": "h"}  # the blocks of rows of seqjax's parameters


def as_numpy(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of any library as arrays of numpy, possibly with the same memory.

    Raises:
        TypeError: some of them are no arrays of floating-point numbers.
    """
    arrays = {name: _as_numpy(value) for name, value in found.items()}
    wrong = []
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            got = kind_of(found[name]) if array.dtype == object else f"{array.dtype} {array.shape}"
            wrong.append((name, got))
    if wrong:
        names, got = (", ".join(part) for part in zip(*wrong, strict=True))
        raise TypeError(
            f"expected {'arrays' if len(wrong) > 1 else 'an array'} of floating-point numbers as {names}, got {got}: "
            f"pass the weights themselves"
        )
    return arrays


def _as_numpy(value: Any) -> np.ndarray:
    if type(value).__module__.startswith("keras."):  # a variable, whose value is an array of its backend
        value = value.value
    if callable(getattr(value, "detach", None)):  # a tensor of torch
        value = value.detach().cpu()
        # numpy has no bfloat16, but ml_dtypes has; float32 holds every bfloat16.
        value = value.float().numpy().astype(jnp.bfloat16) if "bfloat16" in str(value.dtype) else value.numpy()
    elif callable(getattr(value, "numpy", None)):  # a tensor of TensorFlow
        value = value.numpy()
    return np.asarray(value)


def flat(tree: Any, separator: str = ".") -> dict[str, Any]:
    """The leaves of nested mappings by names such as "ii.kernel"."""
    if not isinstance(tree, Mapping):
        return {"": tree}
    return {
        f"{key}{separator}{name}" if name else str(key): leaf
        for key, value in tree.items()
        for name, leaf in flat(value, separator).items()
    }


def check_names(found: Iterable[str], expected: Iterable[str], title: str) -> None:
    """Compares names of arrays, and reports all differences at once.

    Raises:
        ValueError: names are missing, unknown or renamed.
    """
    found, expected = list(found), list(expected)
    missing, extra = [n for n in expected if n not in found], [n for n in found if n not in expected]
    if not missing and not extra:
        return
    renamed = {}
    for name in missing:
        close = difflib.get_close_matches(name, [n for n in extra if n not in renamed.values()], 1, 0.6)
        renamed |= {name: close[0]} if close else {}
    fixes = [f"rename {old} to {new}" for new, old in renamed.items()]
    left = [name for name in missing if name not in renamed]
    fixes += [f"add {', '.join(left)}"] if left else []
    left = [name for name in extra if name not in renamed.values()]
    fixes += [f"leave out {', '.join(left)}"] if left else []
    parts = [f"no {', '.join(missing)}"] if missing else []
    parts += [f"the unknown {', '.join(extra)}"] if extra else []
    raise ValueError(f"expected {title}, {', '.join(expected)}, got {' and '.join(parts)}: {'; '.join(fixes)}")


def check_shapes(arrays: Mapping[str, np.ndarray], layout: Mapping[str, str], title: str, recurrent: str) -> None:
    """Compares the shapes and dtypes of arrays with a layout, and reports all differences at once.

    Args:
        arrays: the arrays by name, with the names of the layout.
        layout: the shape of each array in d inputs and n hidden units, such as "4n d".
        title: whose weights these are, for the message.
        recurrent: the name of the array that decides n.

    Raises:
        ValueError: shapes differ, or there is more than one dtype.
    """
    n = dict(zip(layout[recurrent].split(), arrays[recurrent].shape, strict=False)).get("n", 0)
    d = _inputs(layout, arrays, n)
    wrong = []
    for name, spec in layout.items():
        wanted, got = tuple(_size(term, d, n) for term in spec.split()), arrays[name].shape
        if got != wanted:
            hint = f" (transposed: pass {name}.T)" if got == wanted[::-1] else ""
            sizes = f" = {wanted}" if d or "d" not in spec else ""
            wrong.append((f"{name} ({', '.join(spec.split())}){sizes}", f"{got}{hint}"))
    if wrong:
        wanted, got = zip(*wrong, strict=True)
        raise ValueError(
            f"expected {title} with n = {n} hidden units and {f'd = {d}' if d else 'd'} inputs, {', '.join(wanted)}, "
            f"got {', '.join(got)}: pass arrays of these shapes"
        )
    names: dict[str, list[str]] = {}
    for name in layout:
        names.setdefault(arrays[name].dtype.name, []).append(name)
    if len(names) > 1:
        got = " and ".join(f"{dtype} in {', '.join(of)}" for dtype, of in names.items())
        raise ValueError(f"expected {title} in one dtype, got {got}: convert them to one of these dtypes")


def _inputs(layout: Mapping[str, str], arrays: Mapping[str, np.ndarray], n: int) -> int:
    """The number of inputs d, from the first array that fits the layout with it, or that fits if it is transposed."""
    for step in (1, -1):
        for name, spec in layout.items():
            terms, shape = spec.split(), arrays[name].shape[::step]
            for term, size in zip(terms, shape, strict=False):
                d = size - n * ("+n" in term)
                if "d" in term and d > 0 and shape == tuple(_size(other, d, n) for other in terms):
                    return d
    return 0


def _size(term: str, d: int, n: int) -> int:
    known = {"d": d, "d+n": d + n, "n": n}
    return known[term] if term in known else int(term.removesuffix("n")) * (n if term.endswith("n") else 1)


def kind_by_shape(name: str, shape: tuple[int, ...], title: str, *, gates_last: bool = False) -> str:
    """The kind of a layer from the shape of its recurrent matrix: "lstm" (4n, n), "gru" (3n, n) or "rnn" (n, n).

    Args:
        name: the name of the matrix, for the message.
        shape: its shape.
        title: whose weights these are, for the message.
        gates_last: whether the library stores the transposed matrix, (n, 4n).

    Raises:
        ValueError: the shape is none of these.
    """
    wanted = ", ".join(f"(n, {k}n)" if gates_last else f"({k}n, n)" for k in "43") + " or (n, n)"
    hint = "pass the recurrent matrix of an LSTM, a GRU or a vanilla network"
    if len(shape) == 2 and min(shape) > 0:
        gates, n = shape[::-1] if gates_last else shape
        for kind, blocks in ORDER.items():
            if gates == len(blocks) * n:
                return kind
            if n == len(blocks) * gates:
                hint = f"it is transposed, pass {name}.T"
    raise ValueError(f"expected {title} with {name} {wanted}, got {shape}: {hint}")


def check_kind(asked: str | None, kind: str, title: str) -> None:
    """Checks the argument `cell` against the kind that the shapes show.

    Raises:
        ValueError: it is another kind, or none of the three.
    """
    if asked is not None and asked not in ORDER:
        raise ValueError(f'expected cell to be "lstm", "gru" or "rnn", got {asked!r}')
    if asked not in (None, kind):
        raise ValueError(f'expected {title} of cell="{asked}", got the shapes of cell="{kind}": leave `cell` out')
