"""Trains several cells on the same task and compares their scores, gradients, gates and clipping.

The score shows which cell is better. The analyses show why: how far the gradients reach, whether the gates use that
reach, and how often clipping acted. Every cell gets the same batches, the same key and the same optimizer, so only the
cell differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from seqjax.analysis.by_length import Score, ScoreByLength, score_by_length
from seqjax.analysis.clipping import ClippingStatistics, clipping_statistics
from seqjax.analysis.gates import GateStatistics, gate_statistics
from seqjax.analysis.gradient_flow import GradientByLag
from seqjax.analysis.lyapunov import LyapunovExponents
from seqjax.analysis.verdicts import Verdict, verdict
from seqjax.cell import Cell
from seqjax.cells.gru import GRU
from seqjax.cells.lstm import LSTM
from seqjax.cells.vanilla import VanillaRNN
from seqjax.cells.whole_numbers import whole_number
from seqjax.data.batch import Batch
from seqjax.models.heads import Head
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective, every_step
from seqjax.sequence._declared import declared
from seqjax.sequence._masked_step import Inputs
from seqjax.training.fit import Fitted, evaluate, fit

Stream = Callable[[], Iterable[Batch]]


class AblationRow(NamedTuple):
    """The results of one cell.

    Attributes:
        score: the mean loss on the test stream after training, in nats; lower is better.
        parameters: the number of trained parameters.
        fitted: the result of `fit`: the parameters, the history, and the reason why training stopped.
        before: the verdict on the untrained cell; this and the next three are None for a cell without a state.
        verdict: the verdict on the trained cell.
        exponents: its Lyapunov exponents.
        by_lag: its gradient norms by lag.
        gates: its gate statistics by name; empty for a cell without a method `gates`.
        clipping: the statistics of clipping in training; None if there was no update.
        lengths: the score by position and length; None if it was not requested.
    """

    score: float
    parameters: int
    fitted: Fitted
    before: Verdict | None
    verdict: Verdict | None
    exponents: LyapunovExponents | None
    by_lag: GradientByLag | None
    gates: dict[str, GateStatistics]
    clipping: ClippingStatistics | None
    lengths: ScoreByLength | None


class Ablation(NamedTuple):
    """One row per cell; `print` shows a table.

    In the table, lambda_1 is the largest Lyapunov exponent in nats per step, before and after training. Memory is the
    lag from which a gradient stays below a hundredth of its first norm. Gates are the mean activations of the gates in
    (0, 1).

    Attributes:
        rows: `AblationRow` by the name of the cell.
    """

    rows: dict[str, AblationRow]

    def __str__(self) -> str:
        lines = [_line(name, row) for name, row in self.rows.items()]
        columns = [key for key in lines[0] if any(line[key] for line in lines)]
        cells = [columns, *([line[key] or "-" for key in columns] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.rjust, line, widths)) for line in cells]
        return "\n".join([*table, "", *(_summary(name, row) for name, row in self.rows.items())])


def ablation(
    cells: Mapping[str, Cell] | None,
    head: Head,
    stream: Stream,
    test: Stream,
    *,
    steps: int,
    key: Array,
    loss: Objective = every_step,
    optimizer: optax.GradientTransformation | None = None,
    clip_norm: float | None = 1.0,
    lengths: Score | None = None,
    sequences: int = 8,
    horizon: int | None = None,
) -> Ablation:
    """Trains each cell on the same batches, and scores and analyses it on the same test stream.

    Args:
        cells: by name; the head reads their outputs. None means the vanilla cell, the GRU and the LSTM with the head's
            `hidden_size`, for inputs (batch, time, features).
        head: the readout of every cell.
        stream: returns the same stream of batches at every call.
        test: returns a finite stream at every call. The cells are analysed on its first batch.
        steps: the number of updates for each cell.
        key: for drawing the parameters of each cell.
        loss, optimizer, clip_norm: as for `fit`.
        lengths: "loss" or "accuracy" adds the score by position and length; None does not.
        sequences: the number of sequences of the first test batch for the analyses.
        horizon: the largest lag of the gradients, in steps, as for `verdict`.

    Returns:
        `Ablation`, with one row per cell in their order.

    Raises:
        ValueError, TypeError: a batch does not match a cell or the head, `cells` is empty, or the sequences are too
            short for the analyses.

    Source: Chung et al. 2014, "Empirical evaluation of gated recurrent neural networks on sequence modeling";
        Jozefowicz, Zaremba and Sutskever 2015, "An empirical exploration of recurrent network architectures".

    Example:
        >>> import itertools, jax, seqjax as sj
        >>> batches = list(itertools.islice(sj.data.adding_problem(jax.random.key(0), batch=16, time=20), 6))
        >>> cells, head = {"vanilla": sj.VanillaRNN(2, 4)}, sj.Gaussian(4, 1, std=1.0)
        >>> options = {"steps": 5, "loss": sj.ManyToOne(), "key": jax.random.key(1)}
        >>> result = sj.analysis.ablation(cells, head, lambda: batches[:5], lambda: batches[5:], **options)
        >>> result.rows["vanilla"].parameters, len(result.rows["vanilla"].clipping.factors)  # 4 * (2 + 4 + 1) + 5
        (33, 5)
    """
    whole_number("sequences", sequences, expected="at least 1 of the test's sequences to analyse the cells on")
    first = _first_batch(test, "test")
    inputs = Inputs(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[:sequences], (first.xs, first.mask, first.reset)))
    cells = _default_cells(head, _first_batch(stream, "stream")) if cells is None else cells
    if not cells:
        raise ValueError("expected at least one cell to compare, got none: None means the vanilla cell, GRU and LSTM")
    options = {"loss": loss, "optimizer": optimizer, "clip_norm": clip_norm}
    task = _Task(test, inputs, options, lengths, horizon)
    rows = {}
    for name, cell in cells.items():
        model = Model(cell, head)
        params = model.init(key)  # as `fit` would, but the untrained cell is needed first
        before = _verdict(cell, params, inputs, horizon)  # before training, so that bad sequences fail early
        fitted = fit(model, stream(), steps=steps, key=key, params=params, **options)
        rows[name] = _row(model, fitted, before, task)
    return Ablation(rows)


class _Task(NamedTuple):
    """What all cells are measured on.

    Attributes:
        test: the stream of the score.
        inputs: the sequences of the verdict and of the gates.
        options: of the training.
        lengths: the score by length; None leaves it out.
        horizon: of the verdict.
    """

    test: Stream
    inputs: Inputs
    options: dict[str, Any]
    lengths: Score | None
    horizon: int | None


def _row(model: Model, fitted: Fitted, before: Verdict | None, task: _Task) -> AblationRow:
    test, inputs, options, lengths, horizon = task
    cell, params = model.cell, fitted.params
    after, loss = _verdict(cell, params, inputs, horizon), options["loss"]
    flags = {"mask": inputs.mask, "reset": inputs.reset}
    return AblationRow(
        score=evaluate(model, params, test(), loss=loss),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        fitted=fitted,
        before=before,
        verdict=after,
        exponents=None if after is None else after.exponents,
        by_lag=None if after is None else after.by_lag,
        gates=gate_statistics(cell, params.cell, inputs.x, **flags) if declared(cell, "gates") is not None else {},
        clipping=clipping_statistics(fitted.history, options["clip_norm"]) if fitted.history["loss"].size else None,
        lengths=None if lengths is None else score_by_length(model, params, test(), score=lengths, loss=loss),
    )


def _first_batch(stream: Stream, name: str) -> Batch:
    if not callable(stream):
        raise TypeError(
            f"expected {name} to return a new stream each time that it is called, got {type(stream).__name__}: "
            f"lambda: batches, so that every cell sees the same ones"
        )
    for batch in stream():
        return batch
    raise ValueError(f"expected {name}() to give at least one batch, got none: is the stream already used up?")


def _default_cells(head: Head, batch: Batch) -> dict[str, Cell]:
    leaves = jax.tree.leaves(batch.xs)
    n = getattr(head, "hidden_size", None)
    if n is None or len(leaves) != 1 or leaves[0].ndim != 3:
        raise ValueError(
            f"expected inputs (batch, time, features) and a head with a hidden_size to make three cells for, got "
            f'{[leaf.shape for leaf in leaves]} and {head!r}: name them, {{"lstm": sj.stack([...]), ...}}'
        )
    d = leaves[0].shape[2]
    return {"vanilla": VanillaRNN(d, n), "gru": GRU(d, n), "lstm": LSTM(d, n)}


def _verdict(cell: Cell, params: ModelParams, inputs: Inputs, horizon: int | None) -> Verdict | None:
    """The verdict on a cell; None for a cell without a state, such as an embedding."""
    if not jax.tree.leaves(jax.eval_shape(cell.initial_state, params.cell)):
        return None
    return verdict(cell, params.cell, inputs.x, horizon=horizon, mask=inputs.mask, reset=inputs.reset)


def _line(name: str, row: AblationRow) -> dict[str, str]:
    """The columns of one row; an empty string for a missing value."""
    clipping, lengths = row.clipping, row.lengths
    unit = "" if lengths is None else f" ({lengths.unit})"
    return {
        "cell": name,
        "parameters": f"{row.parameters:,}",
        "score (nats)": f"{row.score:.4f}",
        f"short{unit}": "" if lengths is None else f"{lengths.short:.4f}",
        f"long{unit}": "" if lengths is None or math.isnan(lengths.long) else f"{lengths.long:.4f}",
        "regime": "" if row.verdict is None else row.verdict.regime,
        "lambda_1 before": "" if row.before is None else f"{row.before.exponents.mean[0]:+.3f}",
        "lambda_1 after": "" if row.exponents is None else f"{row.exponents.mean[0]:+.3f}",
        "memory (steps)": "" if row.by_lag is None else _steps(row.by_lag),
        "clipped": "" if clipping is None else f"{clipping.fraction:.0%}",
        "gates": " ".join(f"{name} {gate.mean:.2f}" for name, gate in row.gates.items() if gate.edges[0] == 0),
    }


def _steps(by_lag: GradientByLag) -> str:
    return f"{by_lag.horizon:.0f}" if math.isfinite(by_lag.horizon) else f"> {int(np.max(by_lag.lags))}"


def _summary(name: str, row: AblationRow) -> str:
    stopped = row.fitted.reason if row.fitted.reason.startswith("not finite") else ""
    summary = "" if row.verdict is None else row.verdict.summary
    return f"{name}: {'; '.join(part for part in (stopped and f'training stopped, {stopped}', summary) if part)}"
