"""The recurrent cells that seqjax exports, for the command line, benchmarks and tests."""

from __future__ import annotations

import dataclasses


def exported_cells() -> dict[str, type]:
    """The cells of `seqjax` that have an input size and a hidden size, by the name of their module.

    A new cell needs one file in `seqjax/cells` and one line of export in `seqjax/__init__.py`. Then it is listed here.

    Returns:
        Classes by name; their first two arguments are input_size and hidden_size.

    Example:
        >>> from seqjax.cells.registry import exported_cells
        >>> {"gru", "lstm", "vanilla"} <= set(exported_cells())
        True
    """
    import seqjax  # not at the top of the file, because seqjax imports this package

    classes = [value for value in vars(seqjax).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return {
        kind.__module__.rpartition(".")[2]: kind
        for kind in classes
        if kind.__module__.startswith("seqjax.cells.")
        and {"input_size", "hidden_size"} <= {field.name for field in dataclasses.fields(kind)}
    }
