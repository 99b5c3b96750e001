"""The character model that the command trains, from its settings to its score, without terminal or files.

`seqjax.command.run_folder` stores a run in a folder, and `seqjax.command.cli` is the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqjax.cells.embedding import Embedding
from seqjax.cells.registry import exported_cells
from seqjax.cells.stack import stack
from seqjax.data.text import windows
from seqjax.models.generation import stream_tokens
from seqjax.models.heads import Categorical
from seqjax.models.model import Model, ModelParams, log_probs
from seqjax.training._devices import Devices, on_one_device
from seqjax.training.fit import evaluate
from seqjax.training.loop import Metrics, TrainState, clipped, start, updates

CELLS = exported_cells()
if TYPE_CHECKING:
    CellName = str
else:
    CellName = Literal[tuple(CELLS)]  # the choices that the command line shows


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides the text that determines the result of a training run."""

    text: Path | None = None
    """A UTF-8 file to learn; by default the topics of the Python manual."""
    cell: CellName = "lstm"
    """The recurrent cell."""
    embedding: int = 64
    """Length of a character's vector."""
    hidden: int = 256
    """Hidden units of each layer."""
    layers: int = 1
    """Recurrent layers."""
    window: int = 128
    """Steps through which the gradient flows; the state itself is carried on."""
    batch: int = 32
    """Places of the text that are read side by side."""
    steps: int | None = None
    """Updates in all; 600 where neither steps nor minutes is given."""
    minutes: float | None = None
    """Minutes of training in all."""
    learning_rate: float = 2e-3
    """Of Adam."""
    clip_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    seed: int = 0
    """Of the parameters at the start."""
    validate_every: int = 50
    """Updates between two looks at the validation text."""
    checkpoint_every: int = 100
    """Updates between two checkpoints on disk."""
    accumulate: int = 1
    """Parts of a batch whose gradients are computed one after another, to save memory."""
    rematerialize_every: int | None = None
    """Steps between two states that are saved for the gradient, to save memory; all states by default."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of states and products; the parameters stay in float32."""

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"expected cell to be one of {', '.join(CELLS)}, got {self.cell!r}")
        for name in (
            "embedding",
            "hidden",
            "layers",
            "window",
            "batch",
            "validate_every",
            "checkpoint_every",
            "accumulate",
            "rematerialize_every",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"expected accumulate to divide the batch of {self.batch} rows, got {self.accumulate}")
        for name in ("learning_rate", "clip_norm", "minutes", "steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected {name} to be a positive number, got {value}")

    @property
    def last_step(self) -> int | None:
        """The number of updates, or None if only the minutes limit the training."""
        return 600 if self.steps is None and self.minutes is None else self.steps

    def finished(self, step: int, seconds: float) -> bool:
        """Whether the steps or the minutes are over after so many updates and seconds of training."""
        out_of_time = self.minutes is not None and seconds >= 60 * self.minutes
        return out_of_time or (self.last_step is not None and step >= self.last_step)


def build(settings: Settings, vocabulary: str) -> Model:
    """Embedding, recurrent layers, and a softmax over the vocabulary."""
    kind = CELLS[settings.cell]
    below = [settings.embedding] + [settings.hidden] * (settings.layers - 1)
    layers = [kind(size, settings.hidden) for size in below]
    head = Categorical(settings.hidden, len(vocabulary))
    return Model(stack([Embedding(len(vocabulary), settings.embedding), *layers]), head)


adam = functools.lru_cache(optax.adam)  # optax.adam(r) != optax.adam(r), so a new object would compile the update again


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam with gradient clipping."""
    return clipped(adam(settings.learning_rate), settings.clip_norm)


def first_state(settings: Settings, model: Model) -> TrainState:
    """The training state before the first update.

    It already carries the cell's initial state, so it has the same tree as every later training state.
    """
    state = start(model, optimizer(settings), jax.random.key(settings.seed))
    rows = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (settings.batch, *leaf.shape)),
        model.cell.initial_state(state.params.cell),
    )
    return state._replace(carried=rows)


def train(
    settings: Settings, model: Model, tokens: np.ndarray, state: TrainState, devices: Devices = None
) -> Iterator[tuple[TrainState, Metrics]]:
    """The updates after `state`, up to the last step of the settings, or endless if they set none."""
    done = int(state.step)
    stream = windows(tokens, settings.batch, settings.window, skip=done)
    left = None if settings.last_step is None else max(settings.last_step - done, 0)
    return updates(
        model,
        itertools.islice(stream, left),
        state,
        optimizer=optimizer(settings),
        clip_norm=settings.clip_norm,
        devices=devices,
        accumulate=settings.accumulate,
        checkpoint_every=settings.rematerialize_every,
        compute_dtype=None if settings.compute_dtype == "float32" else settings.compute_dtype,
    )


def mean_loss(
    settings: Settings, model: Model, params: ModelParams, tokens: np.ndarray, devices: Devices = None
) -> float:
    """The mean loss in nats per character, on a text in `batch` rows as in training, or in one row if it is short.

    The devices share the rows; of a short text every process reads the row.
    """
    enough = (len(tokens) - 1) // settings.batch >= settings.window
    batch, window = (settings.batch, settings.window) if enough else (1, min(settings.window, len(tokens) - 1))
    if not enough:
        params, devices = on_one_device(params), None
    return evaluate(model, params, windows(tokens, batch, window, passes=1), devices=devices)


def log_probability(model: Model, params: ModelParams, tokens: np.ndarray, chunk: int = 1024) -> float:
    """log p(x_{2:T} | x_1) of a whole text in nats, with the state carried from chunk to chunk."""

    @jax.jit
    def read(state, xs, ys, mask):
        state, log_p = log_probs(model, params, xs[None], ys[None], state=state, mask=mask[None])
        return state, log_p.sum()

    state, total = None, 0.0
    for at in range(0, len(tokens) - 1, chunk):
        xs, ys = tokens[at : at + chunk], tokens[at + 1 : at + chunk + 1]
        xs, valid = xs[: len(ys)], len(ys)
        padding = (0, chunk - valid)
        state, part = read(state, np.pad(xs, padding), np.pad(ys, padding), np.arange(chunk) < valid)
        total += float(part)
    return total


def sample(
    model: Model, params: ModelParams, prompt: np.ndarray, length: int, seed: int, **options: Any
) -> Iterator[int]:
    """The tokens that `generate` draws after a prompt with `jax.random.key(seed)`, one at a time.

    Args:
        model, params: from `build`.
        prompt: tokens (time,).
        length: the number of tokens.
        seed: of the sampling.
        **options: temperature, top_k and top_p, as for `generate`.
    """
    row = np.asarray(prompt, np.int32)[None]
    return map(int, stream_tokens(model, params, row, length, jax.random.key(seed), **options))
