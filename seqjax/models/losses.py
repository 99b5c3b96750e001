"""Losses and scores: sums and means over the valid steps of a batch of sequences."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqjax.cells.arguments import as_array, check_choice
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
        step_losses: l_t (batch, time), in nats if they are -log p.
        mask: True at valid steps; values at other steps, including NaN, are ignored.
        reduce: "mean" over all valid steps, so that a sequence has a weight proportional to its length; or "sum".
        unit: "bits" divides by ln 2.

    Returns:
        The loss, one number; 0 if no step is valid.

    Raises:
        ValueError: a shape does not match, or an option is unknown.
        TypeError: the mask is not boolean.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
        >>> float(sj.sequence_loss(losses, sj.length_mask([2, 1], 3)))
        2.0
    """
    step_losses = as_array("step_losses", step_losses)
    if step_losses.ndim != 2:
        raise ValueError(f"expected step_losses (batch, time), got {step_losses.shape}: one loss for each step")
    check_choice("reduce", reduce, ("mean", "sum"))
    check_choice("unit", unit, ("nats", "bits"))
    mask = check_flags("mask", mask, *step_losses.shape)
    if mask is None:
        mask = jnp.ones(step_losses.shape, bool)
    # `where` and not a product, because 0 * NaN is NaN.
    total = jnp.sum(jnp.where(mask, step_losses, 0))
    if reduce == "mean":
        total = total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)
    return total / math.log(2) if unit == "bits" else total


def perplexity(log_p: Float[Any, "batch time"], mask: Bool[Any, "batch time"] | None = None) -> Float[Array, ""]:
    """exp(-mean_t log p_t): the number of equally likely choices with the same entropy, per valid step.

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
    return jnp.exp(sequence_loss(-as_array("log_p", log_p), mask))


def bits_per_character(
    log_p: Float[Any, "batch time"], mask: Bool[Any, "batch time"] | None = None
) -> Float[Array, ""]:
    """-mean_t log2 p_t: the code length of a character under the model, in bits.

    Args:
        log_p: log-probabilities (batch, time) in nats, from `log_probs`.
        mask: True at valid steps.

    Returns:
        Bits per valid step.

    Raises:
        ValueError, TypeError: as for `sequence_loss`.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> round(float(sj.bits_per_character(jnp.log(jnp.full((1, 3), 0.25)))), 4)
        2.0
    """
    return sequence_loss(-as_array("log_p", log_p), mask, unit="bits")
