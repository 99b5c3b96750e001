"""The same task learnt by several cells, with the score of each beside everything that the microscope sees in it.

A score says which cell is better, and the microscope why: how far its gradients reach, whether its gates use that
reach, and how much of the training was clipping. Every cell gets the same batches, the same key and the same optimiser,
so what differs is the cell.
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
from seqjax.data.batch import Batch
from seqjax.models.heads import Head
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective, every_step
from seqjax.training.fit import Fitted, evaluate, fit

Stream = Callable[[], Iterable[Batch]]


class AblationRow(NamedTuple):
    """What was found of one cell.

    Attributes:
        score: the mean loss on the test stream after training, in nats; lower is better.
        parameters: how many numbers were trained.
        fitted: from `fit`: the parameters, the history, and the reason why training stopped.
        before: the verdict on the untrained cell; None for a cell that carries no state, as are the next three.
        verdict: that on the trained cell.
        exponents: its Lyapunov exponents.
        by_lag: how far its gradients reach.
        gates: its gate statistics by name; empty where the cell names no gate.
        clipping: how clipping acted in training; None where there was no update.
        lengths: the score by position and length, where asked for.
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
    """One row a cell; `print` shows it as a table.

    There, lambda_1 is the largest Lyapunov exponent in nats a step, before and after training; memory is the lag from
    which on a gradient is below a hundredth of what it was; and gates are the mean activations of those in (0, 1).

    Attributes:
        rows: `AblationRow` by the cell's name.
    """

    rows: dict[str, AblationRow]

    def __str__(self) -> str:
        lines = [_line(name, row) for name, row in self.rows.items()]
        columns = [key for key in lines[0] if any(line[key] for line in lines)]
        cells = [columns, *([line[key] or "-" for key in columns] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.rjust, line, widths)) for line in cells]
        return "\n".join([*table, "", *(_words(name, row) for name, row in self.rows.items())])


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
    """Trains each cell on the same batches, scores it on the same test, and looks into it.

    Args:
        cells: by name; each gives outputs that the head reads. None for the vanilla cell, the GRU and the LSTM of the
            head's `hidden_size`, for inputs (batch, time, features).
        head: the readout, the same for all.
        stream: returns the same stream of batches each time that it is called.
        test: returns a finite stream each time that it is called; its first batch is what the cells are watched on.
        steps: updates for each cell.
        key: draws the parameters of each.
        loss, optimizer, clip_norm: as for `fit`.
        lengths: "loss" or "accuracy" adds the score by position and length; None leaves it out.
        sequences: of the first test batch to watch the cells on.
        horizon: the largest lag of the gradients, in steps, as for `verdict`.

    Returns:
        `Ablation`: a row for each cell, in their order.

    Raises:
        ValueError, TypeError: a batch does not fit a cell or the head, `cells` is empty, or the sequences are too short
            to be measured.

    Source: Chung et al. 2014, "Empirical evaluation of gated recurrent neural networks on sequence modeling";
        Jozefowicz, Zaremba and Sutskever 2015, "An empirical exploration of recurrent network architectures".

    Example:
        >>> import itertools, jax, seqjax as sj
        >>> batches = list(itertools.islice(sj.data.adding_problem(jax.random.key(0), batch=16, time=20), 6))
        >>> cells, head = {"vanilla": sj.VanillaRNN(2, 4)}, sj.Gaussian(4, 1, std=1.0)
        >>> options = {"steps": 5, "loss": sj.ManyToOne(), "key": jax.random.key(1)}
        >>> found = sj.analysis.ablation(cells, head, lambda: batches[:5], lambda: batches[5:], **options)
        >>> found.rows["vanilla"].parameters, len(found.rows["vanilla"].clipping.factors)  # 4 * (2 + 4 + 1) + 5
        (33, 5)
    """
    if sequences < 1:
        raise ValueError(f"expected at least 1 of the test's sequences to watch the cells on, got {sequences}")
    probe = _first(test, "test")
    watched = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:sequences], (probe.xs, probe.mask, probe.reset))
    cells = _three_cells(head, _first(stream, "stream")) if cells is None else cells
    if not cells:
        raise ValueError("expected at least one cell to compare, got none: None takes the vanilla cell, GRU and LSTM")
    options = {"loss": loss, "optimizer": optimizer, "clip_norm": clip_norm}
    rows = {}
    for name, cell in cells.items():
        model = Model(cell, head)
        params = model.init(key)
        before = _verdict(cell, params, watched, horizon)  # also, what cannot be measured is refused before training
        fitted = fit(model, stream(), steps=steps, key=key, params=params, **options)
        rows[name] = _row(model, fitted, before, test, watched, loss, clip_norm, lengths, horizon)
    return Ablation(rows)


def _row(
    model: Model,
    fitted: Fitted,
    before: Verdict | None,
    test: Stream,
    watched: tuple[Any, ...],
    loss: Objective,
    clip_norm: float | None,
    lengths: Score | None,
    horizon: int | None,
) -> AblationRow:
    cell, params = model.cell, fitted.params
    xs, mask, reset = watched
    found = _verdict(cell, params, watched, horizon)
    return AblationRow(
        score=evaluate(model, params, test(), loss=loss),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        fitted=fitted,
        before=before,
        verdict=found,
        exponents=None if found is None else found.exponents,
        by_lag=None if found is None else found.by_lag,
        gates=gate_statistics(cell, params.cell, xs, mask=mask, reset=reset) if hasattr(cell, "gates") else {},
        clipping=clipping_statistics(fitted.history, clip_norm) if fitted.history["loss"].size else None,
        lengths=None if lengths is None else score_by_length(model, params, test(), score=lengths, loss=loss),
    )


def _first(stream: Stream, name: str) -> Batch:
    if not callable(stream):
        raise TypeError(
            f"expected {name} to return a new stream each time that it is called, got {type(stream).__name__}: "
            f"lambda: batches, so that every cell sees the same ones"
        )
    for batch in stream():
        return batch
    raise ValueError(f"expected {name}() to give at least one batch, got none: is it a stream that was used up?")


def _three_cells(head: Any, batch: Batch) -> dict[str, Any]:
    leaves = jax.tree.leaves(batch.xs)
    n = getattr(head, "hidden_size", None)
    if n is None or len(leaves) != 1 or leaves[0].ndim != 3:
        raise ValueError(
            f"expected inputs (batch, time, features) and a head with a hidden_size to make three cells for, got "
            f'{[leaf.shape for leaf in leaves]} and {head!r}: name them, {{"lstm": sj.stack([...]), ...}}'
        )
    d = leaves[0].shape[2]
    return {"vanilla": VanillaRNN(d, n), "gru": GRU(d, n), "lstm": LSTM(d, n)}


def _verdict(cell: Cell, params: ModelParams, watched: tuple[Any, ...], horizon: int | None) -> Verdict | None:
    if not jax.tree.leaves(jax.eval_shape(cell.initial_state, params.cell)):
        return None
    xs, mask, reset = watched
    return verdict(cell, params.cell, xs, horizon=horizon, mask=mask, reset=reset)


def _line(name: str, row: AblationRow) -> dict[str, str]:
    """The columns of one row; an empty string where there is nothing."""
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
        "gates": " ".join(f"{gate} {found.mean:.2f}" for gate, found in row.gates.items() if found.edges[0] == 0),
    }


def _steps(by_lag: GradientByLag) -> str:
    return f"{by_lag.horizon:.0f}" if math.isfinite(by_lag.horizon) else f"> {int(np.max(by_lag.lags))}"


def _words(name: str, row: AblationRow) -> str:
    stopped = row.fitted.reason if row.fitted.reason.startswith("not finite") else ""
    summary = "" if row.verdict is None else row.verdict.summary
    return f"{name}: {'; '.join(part for part in (stopped and f'training stopped, {stopped}', summary) if part)}"
