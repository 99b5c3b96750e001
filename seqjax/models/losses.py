"""Sequence losses and scores: sums and means over the valid steps of a batch of sequences."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.cell import State
from seqjax.models.model import Model, ModelParams, log_probs
from seqjax.sequence._checks import check_flags


def sequence_loss(
    step_losses: Float[Any, "batch time"],
    mask: Bool[Any, "batch time"] | None = None,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    unit: Literal["nats", "bits"] = "nats",
) -> Float[Array, ""]:
    """L = sum_t l_t over the valid steps of all sequences, or its mean over these steps.

    Args:
        step_losses: l_t (batch, time), in nats where they are -log p.
        mask: True at valid steps; what stands elsewhere, NaN included, is not read.
        reduce: "mean" over valid steps, so that long sequences weigh more than short ones; or "sum".
        unit: "bits" divides by ln 2.

    Returns:
        The loss, one number; the mean of no valid step at all is 0.

    Raises:
        ValueError: a shape or an option does not fit.
        TypeError: the mask is not boolean.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
        >>> float(sj.sequence_loss(losses, sj.length_mask([2, 1], 3)))
        2.0
    """
    step_losses = jnp.asarray(step_losses)
    if step_losses.ndim != 2:
        raise ValueError(f"expected step_losses (batch, time), got {step_losses.shape}: one loss for each step")
    if reduce not in ("mean", "sum") or unit not in ("nats", "bits"):
        raise ValueError(f'expected reduce "mean" or "sum" and unit "nats" or "bits", got {reduce!r} and {unit!r}')
    mask = check_flags("mask", mask, *step_losses.shape)
    if mask is None:
        mask = jnp.ones(step_losses.shape, bool)
    total = jnp.sum(jnp.where(mask, step_losses, 0))
    if reduce == "mean":
        total = total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)
    return total / math.log(2) if unit == "bits" else total


def sequence_log_prob(
    model: Model,
    params: ModelParams,
    xs: PyTree,
    targets: PyTree,
    *,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> Float[Array, " batch"]:
    """log p(y_{1:T} | x_{1:T}) = sum_t log p(y_t | x_{<=t}) of each sequence.

    For a text, xs = tokens[:, :-1] and targets = tokens[:, 1:] give log p(x_{2:T} | x_1); put a start token in front
    for log p(x_{1:T}).

    Args:
        model, params, xs, targets, state, mask, reset: as for `log_probs`.

    Returns:
        The log-probability of each sequence (batch,), in nats.

    Raises:
        ValueError, TypeError: as for `log_probs`.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(4, 2), sj.GRU(2, 3)]), sj.Categorical(3, 4))
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
        >>> tokens = jnp.array([[0, 1, 2, 3]])
        >>> round(float(sj.sequence_log_prob(model, params, tokens[:, :-1], tokens[:, 1:])[0]), 4)  # -3 ln 4
        -4.1589
    """
    _, log_p = log_probs(model, params, xs, targets, state=state, mask=mask, reset=reset)
    return jnp.sum(log_p, axis=1)


def perplexity(log_p: Float[Any, "batch time"], mask: Bool[Any, "batch time"] | None = None) -> Float[Array, ""]:
    """exp(-mean_t log p_t): how many equally likely choices the model is as unsure as, at a valid step.

    Args:
        log_p: log-probabilities (batch, time) in nats, from `log_probs`.
        mask: True at valid steps.

    Returns:
        The perplexity, at least 1 for a categorical readout.

    Raises:
        ValueError, TypeError: as for `sequence_loss`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> round(float(sj.perplexity(jnp.log(jnp.full((1, 3), 0.25)))), 4)
        4.0
    """
    return jnp.exp(sequence_loss(-jnp.asarray(log_p), mask))


def bits_per_character(
    log_p: Float[Any, "batch time"], mask: Bool[Any, "batch time"] | None = None
) -> Float[Array, ""]:
    """-mean_t log2 p_t: the length of the model's code for a token, for a model of characters.

    Args:
        log_p: log-probabilities (batch, time) in nats, from `log_probs`.
        mask: True at valid steps.

    Returns:
        Bits for each valid step.

    Raises:
        ValueError, TypeError: as for `sequence_loss`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> round(float(sj.bits_per_character(jnp.log(jnp.full((1, 3), 0.25)))), 4)
        2.0
    """
    return sequence_loss(-jnp.asarray(log_p), mask, unit="bits")
