"""Errors of a cell's own code, explained in one sentence with the cell's name and the line of the user's source."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import jax
import jaxlib
import jaxtyping
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from seqjax.cell import PACKAGE, Cell, Params, layers, line_of
from seqjax.sequence._parameter_checks import described, differences_from_init, name_of

FILES = (jax.__file__, jaxlib.__file__, jaxtyping.__file__)
# Folders whose code is not the user's.
NOT_THE_USERS = (PACKAGE, *(os.path.dirname(os.path.abspath(f or "")) + os.sep for f in FILES))
INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
UNORDERED = "use ordered=False, because jax.vmap runs the rows of a batch together"


class errors_of_step:
    """A context manager that explains an error of a cell's own code: `with errors_of_step(cell):`.

    Use it around the tracing of the step, and around a transformation of the step by `jax.vmap` or `jax.lax.scan`.

    Args:
        cell: the cell whose step is traced.
        params: its parameters, to compare them with those of `cell.init` after an error.
        x: one input of the step, as arrays or shapes, to name its shape in the message.
        method: the method of the cell that runs.
        only: the type of the errors to explain. The cell's code can raise any error while it is traced. Afterwards,
            while its program runs, only an `UnexpectedTracerError` is due to the cell.

    Raises:
        Exception: the error that `explain_step_error` returns.
    """

    def __init__(
        self,
        cell: Cell,
        params: Params = None,
        x: PyTree = None,
        *,
        method: str = "step",
        only: type[Exception] = Exception,
    ) -> None:
        self._arguments, self._method, self._only = (cell, params, x), method, only

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self._only):
            cell, params, x = self._arguments
            explained = explain_step_error(cell, error, params, x, method=self._method)
            if explained is not error:
                raise explained from error


def explain_step_error(
    cell: Cell, error: Exception, params: Params = None, x: PyTree = None, *, method: str = "step"
) -> Exception:
    """Explains an error of a cell's step in one sentence that names the cell and the user's line.

    Args:
        cell: the cell whose step raised.
        error: the error that it raised.
        params, x, method: as for `errors_of_step`.

    Returns:
        `error` itself if its message has this form already. Otherwise an error of the same type, or of its nearest base
        class that accepts a message, or a RuntimeError.
    """
    if error.args and str(error.args[0]).startswith("expected "):
        return error
    raising = _raising_cell(cell, error)
    name, line = f"{name_of(raising)}.{method}", user_line(error)
    text = next(iter(str(error).splitlines()), "").strip().rstrip(".:")
    if isinstance(error, jax.errors.UnexpectedTracerError):
        line = line or line_of(getattr(raising, method, None))
        got = f"a value of an earlier trace{f' at {line}' if line else ''}"
    else:
        got = f"{type(error).__name__}{f' at {line}' if line else ''}{f', {text}' if text else ''}"
    wanted, fix, not_traceable = _likely_cause(error, x, method)
    # Code that JAX cannot trace is wrong with any parameters.
    other = None if not_traceable else next(differences_from_init(cell, params), None)
    if other is not None:
        path, own, instead = other
        message = (
            f"expected {name} to get parameters like those of {name_of(cell)}.init, {path} {own}, got {instead}, "
            f"with which it raises {got}: cell.init(key) draws the parameters of this cell"
        )
    else:
        message = f"expected {name} {wanted}, got {got}{f': {fix}' if fix else ''}"
    return _of_the_same_type(error, message)


def _likely_cause(error: Exception, x: PyTree, method: str) -> tuple[str, str | None, bool]:
    """What is expected of the step, the likely fix if the error tells it, and whether JAX could not trace the step."""
    text, errors = str(error), jax.errors
    traceable = "to be traceable by JAX"
    if isinstance(error, errors.UnexpectedTracerError):
        fix = "carry what a later step needs in the state, and return what you want to see as the output"
        return "to keep no traced value outside its state", fix, True
    if "ordered" in text and "vmap" in text:
        return "to have no ordered side effects", UNORDERED, True
    if isinstance(error, errors.TracerBoolConversionError | errors.NonConcreteBooleanIndexError):
        return traceable, "use jnp.where or jax.lax.cond instead of a Python if or while", True
    if isinstance(error, errors.TracerArrayConversionError):
        return traceable, "use jax.numpy instead of numpy", True
    if isinstance(error, errors.ConcretizationTypeError | errors.TracerIntegerConversionError):
        return traceable, "a size or a Python number cannot depend on the state or the input", True
    if "Indexer must have integer" in text:
        return "to index with whole numbers", "convert the index with .astype(int), or pass whole numbers in xs", False
    if "dtype promotion" in text:
        return "to compute in the dtype of its state", "cast the input, x.astype(state.dtype)", False
    if method != "step":
        return "to return the state of one example", None, False
    wanted = "to run on one example at one time" + ("" if x is None else f", x {described(x, of='')}")
    shapes = re.search(r"shape|axis|axes|dimension|ndim|rank|subscript|broadcast|unpack|indices", text)
    return wanted, "sj.unroll adds the batch axis with jax.vmap" if shapes else None, False


def _raising_cell(cell: Cell, error: Exception) -> Any:
    """The innermost layer of a stack, or cell inside a learned state, whose code raised; otherwise the cell."""
    found, cells = cell, {id(inner): inner for inner in _nested(cell)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = cells.get(id(frame.f_locals.get("self")), found)
    return found


def _nested(cell: Cell) -> Iterator[Any]:
    yield cell
    for inner in layers(cell):
        yield from _nested(inner)


def _of_the_same_type(error: Exception, message: str) -> Exception:
    for kind in type(error).__mro__:
        if not issubclass(kind, Exception) or issubclass(kind, StopIteration):
            continue  # a StopIteration would silently end a generator that calls this
        if kind is Exception and type(error) is not Exception:
            break
        with contextlib.suppress(Exception):
            new = kind.__new__(kind, message)  # without __init__, because that of JAX's errors expects a tracer
            if new.args == (message,) and (str(new) == message or kind is KeyError):  # a KeyError quotes its message
                return new
    return RuntimeError(message)


def user_line(error: BaseException | TracebackType | None) -> str | None:
    """The last line of the user's own code that led to an error, as "file:line"; None if there is none.

    Frames of JAX and seqjax are not the user's. Frames of other installed packages count only if there are no others.

    Args:
        error: an error, or a traceback.
    """
    if isinstance(error, BaseException):
        # If an operation fails under a transformation, JAX stores its line in the cause of the error.
        cause = error.__cause__
        before = cause if type(cause).__name__ == "JaxStackTraceBeforeTransformation" else None
        lines = [user_line(found.__traceback__) for found in (before, error) if found is not None]
        # A leaked tracer fails far from its origin, and only the message tells the line that created it.
        created = re.search(r"value was created on line (\S+?:\d+)", str(error))
        lines.append(created and created[1])
        return next(filter(None, lines), None)
    frames = [frame for frame in traceback.extract_tb(error) if not frame.filename.startswith(("<@", "<frozen"))]
    frames = [frame for frame in frames if not os.path.abspath(frame.filename).startswith(NOT_THE_USERS)]
    own = [frame for frame in frames if not os.path.abspath(frame.filename).startswith(INSTALLED)]
    return next((f"{frame.filename}:{frame.lineno}" for frame in reversed(own or frames)), None)


def check_effects(cell: Cell, program: ClosedJaxpr) -> None:
    """Checks that the program of a step has no ordered side effects, which `jax.vmap` does not support.

    Args:
        cell: the cell.
        program: the step, traced by `jax.make_jaxpr`.

    Raises:
        ValueError: the step calls `io_callback` with `ordered=True`.
    """

    def ordered(effects: Iterable[object]) -> bool:
        # By name, because the class is private to JAX.
        return any(type(effect).__name__ == "OrderedIOEffect" for effect in effects)

    if not ordered(program.effects):
        return
    found = next((eqn for eqn in program.jaxpr.eqns if ordered(eqn.effects)), None)
    source = None if found is None else found.source_info.traceback
    line = None if source is None else user_line(source.as_python_traceback())
    raise ValueError(
        f"expected {name_of(cell)}.step to have no ordered side effects, got {found.primitive if found else 'one'}"
        f"{f' at {line}' if line else ''}: {UNORDERED}"
    )
