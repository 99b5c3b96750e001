"""The sections of a report on a training: the learning curve, clipping, and the loss by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from seqjax import plots
from seqjax.analysis.by_length import ScoreByLength, score_by_length
from seqjax.analysis.clipping import clipping_statistics

from .html import columns, figures, pairs, paragraph, section, table
from .sections import drawn

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from seqjax.analysis.clipping import ClippingStatistics
    from seqjax.data.batch import Batch
    from seqjax.models.model import Model, ModelParams
else:  # needed only in annotations
    ArrayLike = ClippingStatistics = Batch = Model = ModelParams = Any


def clipping_section(history: Mapping[str, ArrayLike], clip_norm: float | None) -> str:
    """How often gradients were clipped, and by how much."""
    title = "Clipping"
    try:
        result = clipping_statistics(history, clip_norm)
    except Exception as error:  # noqa: BLE001 - the page is useful without this section
        return section("clipping", title, paragraph(f"Left out: {error}.", "soft"))
    parts = [
        drawn(
            "clipping",
            plots.clipping,
            result,
            caption="The gradient norm at every update. A gradient above the threshold was scaled down to it.",
        ),
        drawn(
            "factor",
            plots.clipping_factor,
            result,
            caption="The factor is one if the gradient was not clipped. If it is low all the time, the threshold "
            "determines the size of the updates, and not only the learning rate.",
        ),
    ]
    tables = [pairs("Clipping in numbers", clipping_numbers(result))]
    if result.by_leaf:
        rows = [(name, float(np.mean(norms)), float(np.max(norms))) for name, norms in result.by_leaf.items()]
        tables.append(table("Gradient norm by parameter", ("parameter", "mean", "largest"), rows, folded=True))
    gist = f"{result.fraction:.0%} of {len(result.grad_norm)} updates were clipped."
    return section("clipping", title, figures(parts), *tables, gist=gist)


def clipping_numbers(result: ClippingStatistics) -> dict[str, Any]:
    """The numbers of `ClippingStatistics` by name."""
    return {
        "threshold": result.clip_norm,
        "clipped updates (share)": result.fraction,
        "mean factor over all updates": result.mean_factor,
        "mean factor over clipped updates": result.mean_cut,
        "smallest factor": result.smallest_factor,
        "longest run of clipped updates": result.longest_run,
        "mean gradient norm": float(np.mean(result.grad_norm)),
        "largest gradient norm": float(np.max(result.grad_norm)),
    }


def validation_bits(history: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The updates after which the validation loss was computed, and its value in bits per character."""
    bits = history["validation"] / np.log(2)  # the history is in nats
    computed = np.isfinite(bits)  # rows of other updates are NaN
    return history["step"][computed], bits[computed]


def learning_section(history: Mapping[str, np.ndarray]) -> str:
    """The learning curve of a character model, from the columns of metrics.csv."""
    steps, training = history["step"], history["loss"] / np.log(2)
    validation_steps, validation = validation_bits(history)
    curves = {"training": (steps, training), "validation": (validation_steps, validation)}
    caption = "If the validation curve rises while the training curve falls, the model overfits."
    numbers = {
        "updates": len(steps),
        "bits per character, last training batch": float(training[-1]) if len(training) else float("nan"),
        "seconds of training": float(history["seconds"][-1]) if len(steps) else 0.0,
    }
    rows = [(int(step), float(bits)) for step, bits in zip(validation_steps, validation, strict=True)]
    gist = ""
    if len(validation):
        gist = f"{validation[0]:.2f} bits per character after {validation_steps[0]:.0f} updates, "
        gist += f"{validation[-1]:.2f} after {validation_steps[-1]:.0f}."
    return section(
        "learning",
        "Learning",
        columns(
            drawn("learning", plots.learning_curves, curves, caption=caption),
            pairs("The training in numbers", numbers)
            + table("Validation during the training", ("update", "bits per character"), rows, folded=True),
        ),
        gist=gist,
        opened=True,
    )


def score_section(model: Model, params: ModelParams, batches: list[Batch]) -> str:
    """The loss by position in bits per character, in sequences that start from the initial state."""
    try:
        result = in_bits(score_by_length(model, params, batches))
    except Exception as error:  # noqa: BLE001 - the page is useful without this section
        return section("positions", "Loss by position", paragraph(f"Left out: {error}.", "soft"))
    caption = (
        "In sequences that start from the initial state, the loss falls up to the number of steps that the model can "
        "make use of."
    )
    parts = [drawn("positions", plots.loss_by_position, result, caption=caption)]
    values = result.position, result.by_position, result.position_count
    rows = [(int(t), float(score), int(count)) for t, score, count in zip(*values, strict=True)]
    head = ("position", result.unit, "sequences")
    first, last = (float(result.by_position[at].mean()) for at in (slice(0, 1), slice(-16, None)))
    return section(
        "positions",
        "Loss by position",
        figures(parts),
        table("Loss at every position", head, rows, folded=True),
        gist=f"{first:.2f} bits per character at the first step, {last:.2f} at the last ones.",
    )


def in_bits(result: ScoreByLength) -> ScoreByLength:
    """The scores in bits per character instead of nats."""
    names = ("by_position", "by_length", "short", "long")
    bits = {name: getattr(result, name) / np.log(2) for name in names}
    return result._replace(unit="bits per character", **bits)
