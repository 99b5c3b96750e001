"""A cell with its parameters in one file, in the safetensors format. A file is data: nothing in it is executed.

The arrays have the names of their places in the parameters, such as "0.W_xh". The metadata hold the class of the cell
and its fields as JSON. Only classes that seqjax exports are built from it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.cell import Cell, Params
from seqjax.cells.stack import Stack, stack
from seqjax.interop._safetensors import import_safetensors, read_tensors
from seqjax.models.model import Model
from seqjax.sequence._parameter_checks import check_params, described, differences, kind_of

FORMAT = 1
MODULES = ("seqjax.cells.", "seqjax.initializers", "seqjax.models.heads", "seqjax.models.model")


def save(path: str | os.PathLike[str], cell: Cell | Model, params: Params) -> None:
    """Writes a cell and its parameters to a safetensors file, which every library for this format can read.

    The file is complete or absent: it is written under another name and then renamed.

    Args:
        path: the file, usually with the ending `.safetensors`. An existing file is replaced.
        cell: a cell of seqjax, also a stack or a `LearnedState`, or a `Model` of such a cell and a head of seqjax.
        params: its parameters, in any precision.

    Raises:
        TypeError: the cell, or one of its fields, is not of a class that seqjax exports.
        ValueError, TypeError: the parameters are not those of the cell.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import jax, os, tempfile, seqjax as sj
        >>> cell = sj.stack([sj.Embedding(10, 4), sj.GRU(4, 8)])
        >>> path = os.path.join(tempfile.mkdtemp(), "gru.safetensors")
        >>> sj.save(path, cell, cell.init(jax.random.key(0)))
        >>> loaded, params = sj.load(path)
        >>> loaded == cell, params[1].W_hh.shape
        (True, (24, 8))
    """
    numpy, _ = import_safetensors()
    content = json.dumps({"format": FORMAT, "cell": _described(cell, "cell")})
    if isinstance(cell, Model):
        _check_model(cell, params)
    else:
        check_params(cell, params)
    named = jax.tree_util.tree_leaves_with_path(params)
    # Copies in C order: the package writes the memory of an array as it is.
    arrays = {_name(where): np.array(leaf, order="C") for where, leaf in named}
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"expected a folder to write to, got {path.parent}, which is not there: create it")
    beside = path.with_name(path.name + ".new")
    try:
        numpy.save_file(arrays, beside, {"format": "seqjax", "seqjax": content})
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> tuple[Any, Params]:
    """Reads a cell and its parameters from a file that `save` wrote.

    Args:
        path: the file.

    Returns:
        The cell, equal to the one that was saved, and the parameters with the same bits.

    Raises:
        ValueError: the file is missing, damaged or of another kind; it names an unknown class; its arrays are not those
            of its cell; or it has float64 numbers, and JAX has 64-bit types switched off.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import jax, os, tempfile, seqjax as sj
        >>> cell, path = sj.LSTM(2, 3), os.path.join(tempfile.mkdtemp(), "lstm.safetensors")
        >>> params = cell.init(jax.random.key(0))
        >>> sj.save(path, cell, params)
        >>> sj.load(path)[1].b_h.tolist() == params.b_h.tolist()
        True
    """
    path = Path(path)
    arrays, metadata = read_tensors(path)
    if "seqjax" not in metadata:
        raise ValueError(
            f"expected a file that sj.save wrote, got {path} with arrays only: sj.from_torch(path) reads the weights "
            f"of a recurrent layer of torch"
        )
    cell = _cell_of(metadata["seqjax"], path)
    like = _shapes(cell)
    if like is None:
        raise _damaged(path, f"fields of {type(cell).__name__} with which it cannot be built")
    _check_arrays(path, arrays, like)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    values = {name: jnp.array(array, dtype=array.dtype) for name, array in arrays.items()}
    return cell, jax.tree.unflatten(structure, [values.get(_name(where)) for where, _ in leaves])


def _shapes(part: Any) -> Any:
    """The shapes of the parameters that a cell, a head or a model draws; None if it cannot draw any."""
    try:
        with warnings.catch_warnings():  # JAX warns of float64 if 64-bit types are off
            warnings.simplefilter("ignore")
            return jax.eval_shape(lambda: part.init(jax.random.key(0)))
    except Exception:  # noqa: BLE001 - a file may describe a cell whose fields do not fit together
        return None


def _name(where: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(where, simple=True, separator=".")


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray], like: Any) -> None:
    """Compares the arrays of a file with the parameters that they must be, and reports all differences at once."""
    shapes = {_name(where): leaf.shape for where, leaf in jax.tree_util.tree_leaves_with_path(like)}
    got = [f"no {name}" for name in shapes if name not in arrays and name not in _optional_leaves(like)]
    for name, array in arrays.items():
        if name not in shapes:
            got.append(f"the unknown {name}")
        elif array.shape != shapes[name] or not jnp.issubdtype(array.dtype, jnp.floating):
            got.append(f"{name} {array.dtype} {array.shape}")
    if got:
        wanted = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise _damaged(path, f"{', '.join(got)} instead of floating-point {wanted}")
    for array in arrays.values():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(
                f"expected numbers that JAX stores exactly in {path}, got {array.dtype}: "
                f'jax.config.update("jax_enable_x64", True)'
            )


def _optional_leaves(tree: Any, name: str = "") -> set[str]:
    """The names of leaves that may be None, because None is the default of their field."""
    if not isinstance(tree, tuple):
        return set()
    defaults, found = getattr(tree, "_field_defaults", {}), set()
    for key, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
        found |= _optional_leaves(part, f"{name}{key}.")
        found |= {f"{name}{key}"} if key in defaults and defaults[key] is None else set()
    return found


def _check_model(model: Model, params: Any) -> None:
    """Checks the parameters of a cell and its head."""
    if not hasattr(params, "cell") or not hasattr(params, "head"):
        raise TypeError(f"expected ModelParams(cell, head) for a Model, got {described(params)}: pass model parameters")
    check_params(model.cell, params.cell, "params.cell")
    for name, wanted, got in differences(params.head, _shapes(model.head), "params.head"):
        raise ValueError(f"expected {name} {wanted} for {model.head!r}, got {got}: pass the parameters of this head")


@functools.cache
def _classes() -> dict[str, Any]:
    """The classes that a file may name: cells, heads, models and initializers that seqjax exports."""
    import seqjax  # not at the top of the file, because seqjax imports this module

    return {
        name: value
        for name, value in vars(seqjax).items()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__.startswith(MODULES)
    }


def _described(value: Any, place: str) -> Any:
    """A field, cell or initializer as JSON.

    Raises:
        TypeError: it is no value of a class that seqjax exports.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        return np.asarray(value).item()
    if isinstance(value, tuple):
        return [_described(part, f"{place}[{number}]") for number, part in enumerate(value)]
    kind = _classes().get(type(value).__name__)
    if kind is None or kind is not type(value):
        known = ", ".join(sorted(_classes()))
        fix = "store the parameters of your own cell as plain arrays, with safetensors or orbax"
        if place.endswith("_init"):
            fix = f"dataclasses.replace(cell, {place.rpartition('.')[2]}=sj.Glorot()) keeps the parameters"
        raise TypeError(f"expected {place} of a class that seqjax exports ({known}), got {kind_of(value)}: {fix}")
    names = [field.name for field in dataclasses.fields(kind)]
    return {
        "class": kind.__name__,
        "fields": {name: _described(getattr(value, name), f"{place}.{name}") for name in names},
    }


def _cell_of(text: str, path: Path) -> Any:
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise _damaged(path, f"format {content['format']!r} instead of {FORMAT}, of another version of seqjax")
        cell = _built(content["cell"], path)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise _damaged(path, f"a description that cannot be read ({type(error).__name__})") from None
    if not callable(getattr(cell, "init", None)):
        raise _damaged(path, f"a description of {kind_of(cell)} instead of a cell")
    return cell


def _built(content: Any, path: Path) -> Any:
    """The value that JSON describes.

    Raises:
        ValueError: it names a class that seqjax does not export, or fields that the class does not accept.
    """
    if isinstance(content, list):
        return tuple(_built(part, path) for part in content)
    if not isinstance(content, Mapping):
        return content
    kind = _classes().get(content["class"])
    if kind is None:
        known = ", ".join(sorted(_classes()))
        raise _damaged(path, f"the unknown class {content['class']!r}, which is not one of {known}")
    unknown = sorted(set(content["fields"]) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise _damaged(path, f"unknown fields of {kind.__name__}, {', '.join(unknown)}")
    fields = {name: _built(value, path) for name, value in content["fields"].items()}
    try:
        # `stack` checks the layers, which the class itself does not.
        return stack(fields["cells"]) if kind is Stack else kind(**fields)
    except Exception as error:  # noqa: BLE001 - a class may refuse its fields in any way
        raise _damaged(path, f"fields that {kind.__name__} refuses ({str(error).splitlines()[0]})") from None


def _damaged(path: Path, got: str) -> ValueError:
    return ValueError(f"expected a cell and its parameters from sj.save in {path}, got {got}: save them again")
