"""Autoregressive generation: y_t ~ p(. | h_t), and y_t is the input of the next step.

One sequence is a scan, and `jax.vmap` makes it a batch. Each sequence has a key of its own, and each step folds its
number into it, so what a sequence says does not depend on its neighbours.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.cell import State
from seqjax.models.model import Model, ModelParams
from seqjax.models.pooling import last_valid
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence._checks import check_flags
from seqjax.sequence.unroll import unroll


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: y, leaves (batch, steps, ...); the end token after an end.
        log_probs: log p(y_t | what came before) under the model itself, at temperature 1 and uncut, in nats
            (batch, steps); zero after an end.
        mask: True up to and with the end token (batch, steps).
        state: the state that has read everything but the last token: to go on, prompt with the last token from here.
    """

    tokens: PyTree
    log_probs: Float[Array, "batch steps"]
    mask: Bool[Array, "batch steps"]
    state: State


def generate(
    model: Model,
    params: ModelParams,
    prompt: PyTree,
    steps: int,
    key: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
) -> Generated:
    """Continues each prompt by `steps` tokens: y_t ~ p(. | h_t), h_t = step(h_{t-1}, y_{t-1}).

    Args:
        model: a cell whose input is what its head samples, such as tokens.
        params: the model's parameters.
        prompt: leaves (batch, time, ...), at least one valid step each.
        steps: how many tokens to add.
        key: one random key, of which row b uses `fold_in(key, b)`; or one key for each row, (batch,), which are used as
            they are, so that a row says the same in any batch.
        temperature: 0 takes the likeliest token (greedy), 1 samples from the model.
        top_k: sample among this many of the likeliest tokens.
        top_p: sample among the likeliest tokens that together reach this probability.
        end: a token after which a sequence has ended.
        state: the state before the prompt, leaves (batch, ...); by default the initial one.
        mask: valid steps of prompts of different lengths.

    Returns:
        `Generated`: tokens, log_probs, mask, state.

    Raises:
        ValueError: the prompt is empty, a number is out of range, or a shape does not fit.
        TypeError: as for `unroll`.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> model = sj.Model(sj.stack([sj.Embedding(5, 4), sj.GRU(4, 8)]), sj.Categorical(8, 5))
        >>> params = model.init(jax.random.key(0))
        >>> prompt = jnp.array([[1, 2], [3, 4]])
        >>> sj.generate(model, params, prompt, 6, jax.random.key(1), top_k=3).tokens.shape
        (2, 6)
    """
    _check_options(steps, temperature, top_k, top_p)
    leaves = jax.tree.leaves(prompt)
    if not leaves or jnp.ndim(leaves[0]) < 2 or jnp.shape(leaves[0])[1] == 0:
        raise ValueError(
            f"expected a prompt (batch, time, ...) of at least one step, got {[jnp.shape(leaf) for leaf in leaves]}: "
            f"begin with a start token, and tokens[None] makes a batch of one"
        )
    batch, time = jnp.shape(leaves[0])[:2]
    mask = check_flags("mask", mask, batch, time)
    keys = _row_keys(key, batch)
    if mask is not None and not isinstance(mask, Tracer) and not bool(jnp.all(jnp.any(mask, axis=1))):
        raise ValueError("expected at least one valid step in every prompt, got a row whose mask is False throughout")
    options = (("temperature", float(temperature)), ("top_k", top_k), ("top_p", top_p))
    return compiled(_generate, model, steps, options)(params, prompt, keys, end, state, mask)


def _generate(
    model: Model,
    steps: int,
    options: tuple[tuple[str, Any], ...],
    params: ModelParams,
    prompt: PyTree,
    keys: Array,
    end: Any,
    state: State | None,
    mask: Any,
) -> Generated:
    state, outputs = unroll(model.cell, params.cell, prompt, state=state, mask=mask)
    first = last_valid(outputs, mask)

    def one(state: State, h: PyTree, key: Array) -> Generated:
        def body(carry: tuple[State, State, PyTree, Array], t: Array) -> tuple[Any, PyTree]:
            _, state, h, ended = carry
            y = model.head.sample(params.head, h, jax.random.fold_in(key, t), **dict(options))
            if end is not None:
                y = jnp.where(ended, jnp.asarray(end, y.dtype), y)
            log_p = jnp.where(ended, 0, model.head.log_prob(params.head, h, y))
            next_state, next_h = model.cell.step(params.cell, state, y)
            now_ended = ended if end is None else ended | (y == end)
            return (state, next_state, next_h, now_ended), (y, log_p, ~ended)

        start = (state, state, h, jnp.zeros((), bool))
        (before_last, *_), (tokens, log_p, valid) = jax.lax.scan(body, start, jnp.arange(steps))
        return Generated(tokens, log_p, valid, before_last)

    return jax.vmap(one)(state, first, keys)


def _row_keys(key: Array, batch: int) -> Array:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"expected one key or one for each of the {batch} prompts, got keys {key.shape}")
    return key


def _check_options(steps: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if steps < 1:
        raise ValueError(f"expected at least 1 step to generate, got {steps}")
    if not temperature >= 0:
        raise ValueError(f"expected temperature of at least 0, got {temperature}: 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"expected top_k of at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"expected top_p in (0, 1], got {top_p}: 1 keeps every token")
