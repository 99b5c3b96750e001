"""`fit_many`: an ensemble of networks, over seeds and settings of the optimiser, trained as one program."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from seqjax.data.batch import Batch, check_batch
from seqjax.data.history import LEAF_PREFIX, leaf_names
from seqjax.models.model import Model, ModelParams
from seqjax.models.objectives import Objective, every_step
from seqjax.sequence._cached_jit import cached_jit
from seqjax.training._devices import Devices, by_rows, everywhere, mesh_of
from seqjax.training._gradient import AT_ONCE
from seqjax.training._validated import validated
from seqjax.training.fit import Fitted, evaluator_of
from seqjax.training.loop import Metrics, TrainState, update_once, with_clipping

Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class FittedMany:
    """What `fit_many` returns. `found[i]` is the `Fitted` of one network.

    Attributes:
        params: the trained parameters, leaves (networks, ...).
        history: as that of `Fitted`, each array (networks, updates) or (networks, evaluations).
        state: the training states, leaves (networks, ...).
        reasons: for each network why its training stopped: "steps", "stream" (no batch was left), or "not finite at
            step N", after which its parameters stay those before that step.
    """

    params: ModelParams
    history: dict[str, Any]
    state: TrainState
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.reasons)

    def __getitem__(self, i: int) -> Fitted:
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected a network from 0 to {len(self) - 1}, got {i}")
        params, state = jax.tree.map(lambda leaf: leaf[i], (self.params, self.state))
        return Fitted(params, {name: values[i] for name, values in self.history.items()}, state, self.reasons[i])

    def __str__(self) -> str:
        loss = self.history["loss"]
        lines = [f"{len(self)} networks, {loss.shape[1]} updates each"]
        if loss.shape[1]:
            last = np.where(np.isfinite(loss[:, -1]), loss[:, -1], np.inf)
            order = [int(i) for i in np.argsort(last, kind="stable")]
            lines.append(
                f"  loss at the last update: {last[order[0]]:.4g} (network {order[0]}) at best, "
                f"{np.median(last):.4g} in the median"
            )
        failed = [f"{i} ({reason})" for i, reason in enumerate(self.reasons) if reason.startswith("not finite")]
        return "\n".join(lines + ([f"  stopped early: network {', '.join(failed)}"] if failed else []))


def fit_many(
    model: Model,
    stream: Iterable[Batch],
    *,
    keys: Array,
    steps: int | None = None,
    optimizer: Make = optax.adam,
    settings: Mapping[str, Any] | None = None,
    clip_norm: float | None = 1.0,
    loss: Objective = every_step,
    validation: Callable[[], Iterable[Batch]] | None = None,
    validate_every: int = 100,
    devices: Devices = None,
) -> FittedMany:
    """Trains many networks on the same batches, as one compiled program: theta_i <- theta_i + optimizer_i(g_i).

    A network whose loss, gradient or parameters are not finite keeps what it had before, and the others go on.

    Args:
        model: the cell and its head.
        stream: batches of `seqjax.data`, or any iterable of `Batch`.
        keys: one random key for each network, (networks,): it draws the parameters, and the noise of a cell that draws
            some.
        steps: the number of updates; by default until the stream ends.
        optimizer: a function of the settings that returns an optax transformation.
        settings: its arguments by name, each a number, or an array (networks,) with one for each network; by default
            a learning rate of 1e-3.
        clip_norm: the largest norm of the gradient; None does not clip.
        loss, validation, validate_every: as for `fit`.
        devices: share the networks: `jax.devices()`. No device waits for a sum over the others.

    Returns:
        `FittedMany`: the parameters, the history, the states and the reasons.

    Raises:
        ValueError: `keys` is not a row of keys, a setting has another number of networks, the devices do not divide the
            networks evenly, or a batch does not fit.
        TypeError: the stream yields something that is not a `Batch`.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.GRU(2, 8), sj.Gaussian(8, 1, std=1.0))
        >>> stream = sj.data.adding_problem(jax.random.key(0), batch=16, time=10)
        >>> keys, rates = jax.random.split(jax.random.key(1), 3), jnp.array([1e-4, 1e-3, 1e-2])
        >>> found = sj.fit_many(
        ...     model, stream, keys=keys, steps=20, settings={"learning_rate": rates}, loss=sj.ManyToOne())
        >>> found.history["loss"].shape, len(found), found[2].reason
        ((3, 20), 3, 'steps')
    """
    if steps is not None and steps < 0:
        raise ValueError(f"expected steps of at least 0, got {steps}")
    count = _networks(keys)
    settings = {name: _one_each(name, value, count) for name, value in (settings or {"learning_rate": 1e-3}).items()}
    mesh = mesh_of(devices)
    if mesh is not None and count % mesh.size:
        raise ValueError(
            f"expected networks that {mesh.size} devices divide evenly, got {count}: other keys or devices"
        )
    keys, settings = by_rows(mesh, (keys, settings))
    state = cached_jit(_start, model, optimizer, clip_norm)(keys, settings)
    failed, rows, validations, evaluator = by_rows(mesh, jnp.full(count, -1)), [], [], evaluator_of(model, loss)
    limit = float("inf") if clip_norm is None else float(clip_norm)
    update_all = cached_jit(_update_all, model, optimizer, clip_norm, loss, limit)

    def updates(state: TrainState) -> Iterator[tuple[TrainState, Metrics]]:
        nonlocal failed
        for batch in stream if steps is None else itertools.islice(stream, steps):
            state = state._replace(carried=check_batch(batch, state.carried))
            data = everywhere(mesh, (batch.xs, batch.targets, batch.mask, batch.reset))
            jax.block_until_ready(failed)  # a call holds its temporaries from its launch on
            state, failed, metrics = update_all(state, failed, settings, data, keys)
            yield state, metrics

    def validate(params: ModelParams) -> Array:
        batches = list(validation() if validation is not None else ())
        return jax.vmap(lambda one: evaluator(one, everywhere(mesh, batches)))(params)

    run = validated(
        updates(state),
        is_last=lambda number, _: number == steps,
        validate=None if validation is None else validate,
        validate_every=validate_every,
    )
    for update in run:
        state = update.state
        rows.append({"step": np.full(count, update.number)} | update.metrics.row())
        if update.validation is not None:
            validations.append({"validation_step": np.full(count, update.number), "validation": update.validation})
    ended = "steps" if len(rows) == steps else "stream"
    reasons = tuple(ended if at < 0 else f"not finite at step {at}" for at in failed.tolist())
    leaves = leaf_names(jax.tree.map(lambda leaf: leaf[0], state.params))
    names = ["step", *Metrics._fields[:-1], *(f"{LEAF_PREFIX}{name}" for name in leaves)]
    history = _columns(names, count, rows) | _columns(["validation_step", "validation"], count, validations)
    return FittedMany(state.params, history, state, reasons)


def _networks(keys: Array) -> int:
    is_typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if keys.ndim != (1 if is_typed else 2) or not keys.shape[0]:
        raise ValueError(f"expected one key for each network, got {keys.shape}: jax.random.split(jax.random.key(0), 8)")
    return keys.shape[0]


def _one_each(name: str, value: Any, count: int) -> Array:
    value = jnp.asarray(value)
    if value.ndim and value.shape[0] != count:
        raise ValueError(f"expected {name} to be a number or one for each of {count} networks, got {value.shape}")
    return value if value.ndim else jnp.full(count, value)


def _start(model: Model, make: Make, clip_norm: float | None, keys: Array, settings: Mapping[str, Array]) -> TrainState:
    def one(key: Array, setting: dict[str, Array]) -> TrainState:
        params = model.init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, _made(make, clip_norm, setting).init(params), None)

    return jax.vmap(one)(keys, dict(settings))


def _made(make: Make, clip_norm: float | None, setting: Mapping[str, Array]) -> optax.GradientTransformation:
    return with_clipping(make(**setting), clip_norm)


def _update_all(
    model: Model,
    make: Make,
    clip_norm: float | None,
    loss: Objective,
    limit: float,
    state: TrainState,
    failed: Array,
    settings: Mapping[str, Array],
    data: tuple[PyTree, ...],
    keys: Array,
) -> tuple[TrainState, Array, Metrics]:
    def one(state: TrainState, failed: Array, setting: dict[str, Array], key: Array) -> Any:
        optimizer = _made(make, clip_norm, setting)
        new, metrics = update_once(model, optimizer, loss, limit, AT_ONCE, state, data, key)
        good = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm) & jnp.isfinite(metrics.param_norm)
        goes_on = good & (failed < 0)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(goes_on, new, old))
        params, slots = keep((new.params, new.optimizer), (state.params, state.optimizer))
        failed = jnp.where((failed < 0) & ~good, new.step, failed)
        return TrainState(new.step, params, slots, new.carried), failed, metrics

    return jax.vmap(one)(state, failed, dict(settings), keys)


def _columns(names: list[str], count: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Arrays (networks, rows) by name."""
    table = jax.device_get(rows)
    return {name: np.stack([row[name] for row in table], axis=1) if table else np.zeros((count, 0)) for name in names}
