"""The parts of a report on a training: how it went, how clipping acted, and how good the model is by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqjax import plots
from seqjax.analysis.by_length import score_by_length
from seqjax.analysis.clipping import clipping_statistics

from .html import figures, pairs, paragraph, section, table
from .sections import drawn


def clipping_section(history: Mapping[str, Any], clip_norm: float | None) -> str:
    """How often and how hard gradients were clipped."""
    title = "Clipping"
    try:
        result = clipping_statistics(history, clip_norm)
    except Exception as error:  # noqa: BLE001 - the rest of the page is of use without it
        return section("clipping", title, paragraph(f"Left out: {error}.", "soft"))
    parts = [
        drawn(
            "clipping",
            plots.clipping,
            result,
            caption="The gradient's norm at every update: what lies above the threshold was scaled down to it.",
        ),
        drawn(
            "factor",
            plots.clipping_factor,
            result,
            caption="The factor on every gradient: at one it passed as it was; a factor that stays low means that "
            "the threshold, and not the learning rate, sets the pace.",
        ),
    ]
    tables = [pairs("Clipping in numbers", clipping_numbers(result))]
    if result.by_leaf:
        rows = [(name, float(np.mean(norms)), float(np.max(norms))) for name, norms in result.by_leaf.items()]
        tables.append(table("Gradient norm by parameter", ("parameter", "mean", "largest"), rows))
    return section("clipping", title, figures(parts), *tables)


def clipping_numbers(result: Any) -> dict[str, Any]:
    """The numbers of `ClippingStatistics` by name."""
    return {
        "threshold": result.clip_norm,
        "updates clipped (share)": result.fraction,
        "mean factor over all updates": result.mean_factor,
        "mean factor over clipped updates": result.mean_cut,
        "smallest factor": result.smallest_factor,
        "longest run of clipped updates": result.longest_run,
        "mean gradient norm": float(np.mean(result.grad_norm)),
        "largest gradient norm": float(np.max(result.grad_norm)),
    }


def learning_section(table_of_run: Mapping[str, np.ndarray], entropy: float) -> str:
    """The learning curve of a character model, beside what a model without memory needs."""
    steps, training, validation = (table_of_run[name] for name in ("step", "train_bits", "validation_bits"))
    read = np.isfinite(validation)
    curves = {"training": (steps, training), "validation": (steps[read], validation[read])}
    caption = (
        f"Bits per character over the training; a model without memory needs {entropy:.3f}. Where validation rises "
        f"while training falls, the model learns its text by heart."
    )
    numbers = {
        "updates": len(steps),
        "bits per character, last training batch": float(training[-1]) if len(training) else float("nan"),
        "bits per character, validation text": float(validation[read][-1]) if read.any() else float("nan"),
        "unigram entropy of the text": entropy,
        "seconds of training": float(table_of_run["seconds"][-1]) if len(steps) else 0.0,
    }
    rows = [(int(step), float(bits)) for step, bits in zip(steps[read], validation[read], strict=True)]
    return section(
        "learning",
        "Learning",
        figures([drawn("learning", plots.learning_curves, curves, caption=caption)]),
        pairs("The training in numbers", numbers),
        table("Validation at every look", ("update", "bits per character"), rows, folded=True),
    )


def score_section(model: Any, params: Any, batches: list[Any]) -> str:
    """The loss by the place in a sequence that begins without a past."""
    try:
        result = score_by_length(model, params, batches)
    except Exception as error:  # noqa: BLE001 - the rest of the page is of use without it
        return section("positions", "Loss by position", paragraph(f"Left out: {error}.", "soft"))
    caption = (
        "The loss of sequences that begin without a past, by position: it falls for as long as the model makes use of "
        "what it has read."
    )
    parts = [drawn("positions", plots.loss_by_position, result, caption=caption)]
    if len(result.length) > 1:
        caption = "The loss of sequences by their length: a rise to the right says that long ones are harder."
        parts.append(drawn("lengths", plots.loss_by_length, result, caption=caption))
    places, scores, counts = (np.asarray(part) for part in result[:3])
    rows = [(int(t), float(score), int(count)) for t, score, count in zip(places, scores, counts, strict=True)]
    numbers = {
        f"mean over sequences of up to {result.split} steps ({result.unit})": float(result.short),
        f"mean over longer ones ({result.unit})": float(result.long),
    }
    head = ("position", f"loss ({result.unit})", "sequences")
    return section(
        "positions",
        "Loss by position",
        figures(parts),
        pairs("Short and long", numbers),
        table("Loss at every position", head, rows, folded=True),
    )
