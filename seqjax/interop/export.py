"""A function of arrays, such as an unroll, as bytes that another process runs: `jax.export` in one line.

The bytes begin with a line of JSON: the versions, the digest of the program, and the names of the NamedTuples among its
arguments and results. The program of `jax.export` follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import export as jax_export
from jaxtyping import PyTree

from seqjax import kernels
from seqjax.kernels._exporting import Target, exporting_to
from seqjax.sequence._parameter_checks import described, kind_of
from seqjax.sequence._sizes import is_known

MAGIC = b"seqjax export 1\n"
CONTAINERS = (tuple, list, dict, type(None))


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A function from `load_exported`. Call it with arguments of the shapes and dtypes that it was exported for.

    Attributes:
        arguments: the shapes and dtypes of the arguments; an unknown size is a symbol, such as b.
        results: those of the results.
        platforms: where it runs, such as ("cpu",).
    """

    arguments: tuple[PyTree, ...]
    results: PyTree
    platforms: tuple[str, ...]
    _run: Callable[..., Any] = dataclasses.field(repr=False)

    def __call__(self, *arguments: PyTree) -> PyTree:
        """Runs the function.

        Raises:
            ValueError: the arguments have other shapes, dtypes or containers, or the program is for another platform.
        """
        _check_arguments(self.arguments, arguments)
        here = jax.default_backend()
        if not ({"cuda", "rocm"} if here == "gpu" else {here}) & set(self.platforms):
            raise ValueError(
                f"expected a function that was exported for the {here} of this process, got one for "
                f"{', '.join(self.platforms)}: export it with this platform among platforms"
            )
        try:
            return self._run(*arguments)
        except ValueError as error:  # a size that is an expression, such as 2*b
            raise ValueError(f"expected arguments {_shown(self.arguments)}: {str(error).splitlines()[0]}") from None


def export(
    function: Callable[..., PyTree],
    *arguments: PyTree,
    shapes: str | tuple[PyTree, ...] | None = None,
    platforms: Sequence[str] | None = None,
    kernel: bool = True,
) -> bytes:
    """Compiles a function of arrays to a program that another process runs without its source.

    Args:
        function: any function of trees of arrays: `partial(sj.unroll, cell)`, `partial(sj.log_probs, model)`, a step
            `jax.vmap(cell.step, (None, 0, 0))`, or an update of training. Arrays that it closes over, such as the
            parameters of a trained model, become a part of the program.
        *arguments: arrays, or `jax.ShapeDtypeStruct`s, in tuples, lists, dictionaries and NamedTuples.
        shapes: which sizes are unknown, as for `jax.export.symbolic_args_specs`: for each argument, or for each of its
            leaves, "..." keeps all sizes, and "b, t, ..." names the first two. By default all sizes are those of
            `arguments`.
        platforms: "cpu", "cuda", "rocm" or "tpu", one or more; by default the one of this process.
        kernel: whether a program for CPUs only may contain the compiled kernel. With it, the program is as fast as in
            this process, and runs only where the same version of seqjax is installed.

    Returns:
        What `load_exported` reads.

    Raises:
        TypeError: an argument or a result is in a container of another class.
        ValueError: JAX cannot export the function, for example because it calls Python or depends on an unknown size.
        ModuleNotFoundError: flatbuffers is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> cell = sj.GRU(2, 3)
        >>> params, zero = cell.init(jax.random.key(0)), sj.GRUState(jnp.zeros((1, 3)))
        >>> step = jax.vmap(cell.step, (None, 0, 0))
        >>> data = sj.export(step, params, zero, jnp.ones((1, 2)), shapes=("...", "b, ...", "b, ..."))
        >>> state, output = sj.load_exported(data)(params, sj.GRUState(jnp.zeros((4, 3))), jnp.ones((4, 2)))
        >>> state.h.shape, output.shape
        ((4, 3), (4, 3))
    """
    _check_flatbuffers()
    chosen = tuple(platforms or (jax_export.default_export_platform(),))
    checks = [jax_export.DisabledSafetyCheck.custom_call(name) for name in kernels.TARGETS]
    specs = jax_export.symbolic_args_specs(arguments, shapes)
    with exporting_to(Target(chosen, kernel)):
        exported = jax_export.export(jax.jit(function), platforms=chosen, disabled_checks=checks)(*specs)
    kinds = {kind for tree in (exported.in_tree, exported.out_tree) for kind in _classes(tree)}
    classes = {_register(kind): kind._fields for kind in kinds}
    program = bytes(exported.serialize())
    header = {
        "jax": jax.__version__,
        "kernel": kernels.sources() if "@seqjax_" in exported.mlir_module() else None,
        "classes": classes,
        "sha256": hashlib.sha256(program).hexdigest(),
    }
    return MAGIC + json.dumps(header).encode() + b"\n" + program


def load_exported(data: bytes) -> Exported:
    """The function that `export` wrote.

    Nothing of the bytes is executed as Python. The classes of NamedTuples are looked up among the imported modules, so
    import the module of your own class before. Programs that call Python are refused.

    Args:
        data: from `export`.

    Returns:
        An `Exported`, which is called like the function. It has no derivatives.

    Raises:
        ValueError: the bytes are no such function or are damaged; this version of JAX cannot read them; a class is
            unknown; or the program needs a kernel that is not here.
        TypeError: the argument is not bytes.
        ModuleNotFoundError: flatbuffers is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> double = sj.load_exported(sj.export(lambda x: 2 * x, jnp.ones(3), shapes="n"))
        >>> double(jnp.ones(2)).tolist(), double.platforms
        ([2.0, 2.0], ('cpu',))
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            f"expected the bytes of sj.export, got {kind_of(data)}: pathlib.Path(file).read_bytes() reads them"
        )
    header, program = _divided(bytes(data))
    _check_flatbuffers()
    for name, fields in header["classes"].items():
        _register(_class_of(name, fields))
    try:
        exported = jax_export.deserialize(bytearray(program))
        text = exported.mlir_module()
    except Exception as error:  # noqa: BLE001 - a later format fails in any way
        raise ValueError(
            f"expected a function that jax {jax.__version__} reads, got one of jax {header['jax']} "
            f"({_first_line(error)}): export it again, or install that version"
        ) from None
    foreign = sorted({name for name in re.findall(r'custom_call @"?([^\s("]+)', text) if _runs_python(name)})
    if foreign:
        raise ValueError(
            f"expected a function without calls of Python, got {', '.join(foreign)}: export it without them"
        )
    if "@seqjax_" in text and (not kernels.available() or header["kernel"] != kernels.sources()):
        got = "another version of it" if kernels.available() else kernels.status()
        raise ValueError(f"expected the compiled kernel of the export, got {got}: export it again with kernel=False")
    arguments, _ = exported.in_tree.unflatten(list(map(_spec, exported.in_avals)))
    results = exported.out_tree.unflatten(list(map(_spec, exported.out_avals)))
    return Exported(arguments, results, tuple(exported.platforms), jax.jit(exported.call))


def _divided(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the program."""
    try:
        if not data.startswith(MAGIC):
            raise ValueError("they begin with other characters")
        line, _, program = data.removeprefix(MAGIC).partition(b"\n")
        header = json.loads(line)
        if header["sha256"] != hashlib.sha256(program).hexdigest():
            raise ValueError("they are damaged")
        return {"jax": header["jax"], "kernel": header["kernel"], "classes": dict(header["classes"])}, program
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        got = f"{len(data)} other bytes ({_first_line(error)})"
        raise ValueError(f"expected the bytes of sj.export, got {got}: export the function again") from None


def _classes(tree: Any) -> Iterator[Any]:
    """The classes of the NamedTuples in a tree structure.

    Raises:
        TypeError: it contains a container whose class cannot be written.
    """
    data = tree.node_data()
    if data is not None:
        kind = data[0]
        if hasattr(kind, "_fields") and issubclass(kind, tuple):
            yield kind
        elif kind not in CONTAINERS:
            raise TypeError(
                f"expected arguments and results in tuples, lists, dictionaries and NamedTuples, got {kind_of(kind)}: "
                f"close over it, or pass its leaves"
            )
    for child in tree.children():
        yield from _classes(child)


_registered: dict[str, type] = {}


def _register(kind: type) -> str:
    """The name under which a class of NamedTuples is written.

    Raises:
        ValueError: another class has this name.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _registered.setdefault(name, kind) is not kind:
        raise ValueError(f"expected one class {name}, got a second one: define it once per process")
    with contextlib.suppress(ValueError):  # it is registered already, here or by the user
        jax_export.register_namedtuple_serialization(kind, serialized_name=name)
    return name


def _class_of(name: str, fields: Any) -> type:
    """A class of NamedTuples among the imported modules, by its full name.

    Raises:
        ValueError: there is none, or it has other fields.
    """
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]))
        for part in parts[count:]:
            found = getattr(found, "__dict__", {}).get(part)  # `getattr` could run code of a module
        own = getattr(found, "_fields", None)
        if isinstance(found, type) and issubclass(found, tuple) and own is not None:
            if list(own) != fields:
                raise ValueError(
                    f"expected the class {name} with the fields {fields}, got {list(own)}: export the function again"
                )
            return found
    raise ValueError(f"expected the class {name} of an argument or a result, got no such class: import its module")


def _runs_python(name: str) -> bool:
    return "callback" in name or "Partitioning" in name


def _check_arguments(expected: tuple[PyTree, ...], arguments: tuple[PyTree, ...]) -> None:
    """Compares the arguments with the shapes and dtypes of an export."""
    wanted, structure = jax.tree_util.tree_flatten_with_path(expected)
    leaves, got = jax.tree.flatten(arguments)
    if got != structure:
        raise ValueError(f"expected arguments {_shown(expected)}, got {described(arguments)}: pass the same containers")
    sizes: dict[str, int] = {}
    for (path, like), leaf in zip(wanted, leaves, strict=True):
        shape, dtype = jax.numpy.shape(leaf), jax.numpy.result_type(leaf)
        if dtype != like.dtype or not _fits(like.shape, shape, sizes):
            name = f"argument {path[0].idx}{jax.tree_util.keystr(path[1:])}"
            with_sizes = f" with {', '.join(f'{k} = {n}' for k, n in sizes.items())}" if sizes else ""
            raise ValueError(
                f"expected {name} {like.dtype}{_shape(like)}{with_sizes}, got {dtype}{list(shape)}: "
                f"convert it, or export the function for it"
            )


def _fits(wanted: tuple[Any, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is the expected one. Adds the sizes of symbols; JAX checks those that are expressions."""
    if len(wanted) != len(shape):
        return False
    for want, size in zip(wanted, shape, strict=True):
        if is_known(want):
            if want != size:
                return False
        elif str(want).isidentifier() and sizes.setdefault(str(want), size) != size:
            return False
    return True


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _shape(like: Any) -> str:
    return f"[{', '.join(map(str, like.shape))}]"


def _shown(tree: PyTree) -> str:
    leaves = jax.tree.leaves(tree)
    return f"{', '.join(f'{leaf.dtype}{_shape(leaf)}' for leaf in leaves)} in {jax.tree.structure(tree)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'expected the package flatbuffers, with which jax writes an export, got none: pip install "seqjax[export]"'
        ) from None
