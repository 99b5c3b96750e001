"""A finished training run of the command line, opened in Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqjax.models.model import Model, ModelParams


class LoadedRun(NamedTuple):
    """What a run folder of `seqjax train` holds.

    Attributes:
        model: an embedding, recurrent layers, and a softmax over the characters.
        params: its parameters at the last checkpoint.
        vocabulary: the characters, in the order of their tokens, for `sj.data.encode` and `sj.data.decode`.
        history: the columns of metrics.csv by name, (updates,) each; losses in nats per character, NaN where an update
            has no value.
    """

    model: Model
    params: ModelParams
    vocabulary: str
    history: dict[str, np.ndarray]


def load_run(path: str | os.PathLike[str]) -> LoadedRun:
    """Opens the folder of a run of `seqjax train`.

    The cell and its parameters are `model.cell` and `params.cell`: analyse them, or store them with `sj.save`.

    Args:
        path: the folder, such as "runs/a".

    Returns:
        `LoadedRun`: the model, its parameters at the last checkpoint that can be read, the vocabulary, and the history.

    Raises:
        RunError: the folder is no run of this version, or it has no finished checkpoint.
        ModuleNotFoundError: orbax is not installed.

    Example:
        >>> import seqjax as sj
        >>> sj.load_run("runs/none")
        Traceback (most recent call last):
        ...
        seqjax.command.run_folder.RunError: expected the folder of a run, got runs/none, which is not there: ...
    """
    # Not at the top of the file: `seqjax` exports this function, and the command line reads the cells that it exports.
    from seqjax.command.run_folder import Run, restore

    run = Run.open(Path(path))
    try:
        model, state = restore(run)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'expected orbax to read the checkpoints of {path}, got no {error.name}: pip install "seqjax[cli]"'
        ) from None
    return LoadedRun(model, state.params, run.corpus.vocabulary, run.metrics())
