"""Autoregressive generation: y_t ~ p(. | h_t), and y_t is the input of the next step.

One sequence is a scan; `jax.vmap` adds the batch. Each sequence has its own key, and each step folds its index into it.
The tokens of a sequence therefore do not depend on the other sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.cell import State
from seqjax.cells.arguments import as_array, as_arrays, check_key, real_number
from seqjax.cells.whole_numbers import whole_number
from seqjax.models.model import Model, ModelParams, check_model
from seqjax.models.pooling import last_valid
from seqjax.sequence._cached_jit import cached_jit
from seqjax.sequence._checks import check_flags
from seqjax.sequence.unroll import unroll


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: y, leaves (batch, steps, ...); the end token is repeated after the end.
        log_probs: log p(y_t | y_{<t}) of the model at temperature 1, without top_k and top_p, in nats (batch, steps);
            zero after the end.
        mask: True up to the end token, inclusive (batch, steps).
        state: the state after all tokens but the last one. To continue, pass this state with the last token as prompt.
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
        steps: the number of tokens to generate.
        key: one random key, of which row b uses `fold_in(key, b)`; or one key per row, (batch,). A row with
            its own key has the same tokens in any batch.
        temperature: 0 selects the likeliest token (greedy), 1 samples from the model.
        top_k: sample only from this many likeliest tokens.
        top_p: sample only from the likeliest tokens whose probabilities together reach this value.
        end: the token that ends a sequence.
        state: the state before the prompt, leaves (batch, ...); by default the initial state.
        mask: the valid steps (batch, time), for prompts of different lengths.

    Returns:
        `Generated`: tokens, log_probs, mask, state.

    Raises:
        ValueError: the prompt is empty, a number is out of range, or a shape does not match.
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
    check_model(model, params)
    prompt = as_arrays("prompt", prompt)
    ending = None if end is None else as_array("end", end)
    leaves = jax.tree.leaves(prompt)
    if not leaves or jnp.ndim(leaves[0]) < 2 or jnp.shape(leaves[0])[1] == 0:
        raise ValueError(
            f"expected a prompt (batch, time, ...) of at least one step, got {[jnp.shape(leaf) for leaf in leaves]}: "
            f"begin with a start token, and tokens[None] makes a batch of one"
        )
    batch, time = jnp.shape(leaves[0])[:2]
    mask = check_flags("mask", mask, batch, time)
    keys = _row_keys(key, batch)
    # The values of a traced mask are unknown, so this check is skipped under jit.
    if mask is not None and not isinstance(mask, Tracer) and not bool(jnp.all(jnp.any(mask, axis=1))):
        raise ValueError("expected at least one valid step in every prompt, got a row whose mask is False throughout")
    # Plain Python values, by which the cached jit compares.
    options = _Options(float(temperature), top_k, top_p)
    return cached_jit(_generate, model, steps, options)(params, _Start(prompt, state, mask, keys), ending)


def stream_tokens(
    model: Model, params: ModelParams, prompt: PyTree, steps: int, key: Array, **options: Any
) -> Iterator[PyTree]:
    """Generates the same tokens as `generate` for one prompt, and yields each one as soon as it is drawn.

    Args:
        model, params, prompt, steps, key: as for `generate`; the prompt is a batch of one, (1, time, ...).
        **options: temperature, top_k and top_p.

    Yields:
        Each token, leaves (...).

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from seqjax.models.generation import stream_tokens
        >>> model = sj.Model(sj.stack([sj.Embedding(5, 4), sj.GRU(4, 8)]), sj.Categorical(8, 5))
        >>> params, prompt = model.init(jax.random.key(0)), jnp.array([[1, 2]])
        >>> whole = sj.generate(model, params, prompt, 6, jax.random.key(1)).tokens[0]
        >>> [int(token) for token in stream_tokens(model, params, prompt, 6, jax.random.key(1))] == whole.tolist()
        True
    """
    _check_options(steps, options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
    start = _Start(prompt, None, None, _row_keys(key, 1))
    # One step per call, with the index of the step as an array: all calls share one compilation.
    run = cached_jit(_generate, model, 1, _Options(**options))
    for step in range(steps):
        generated = run(params, start._replace(step=jnp.asarray(step)), None)
        start = start._replace(prompt=generated.tokens, state=generated.state)
        yield jax.tree.map(lambda leaf: leaf[0, 0], generated.tokens)


class _Options(NamedTuple):
    """The options of sampling."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class _Start(NamedTuple):
    """The prompts, the state before them, their mask, one key per row, and the index of the first step."""

    prompt: PyTree
    state: State | None
    mask: Array | None
    keys: Array
    step: ArrayLike = 0


def _generate(
    model: Model, steps: int, options: _Options, params: ModelParams, start: _Start, end: ArrayLike | None
) -> Generated:
    state, outputs = unroll(model.cell, params.cell, start.prompt, state=start.state, mask=start.mask)
    last, of_head = last_valid(outputs, start.mask), model.head_params(params)

    def one_row(state: State, h: PyTree, key: Array) -> Generated:
        def body(carry: tuple[State, State, PyTree, Array], t: Array) -> tuple[Any, PyTree]:
            # The state of the step before is part of the carry: `Generated.state` must not include the last token.
            _, state, h, ended = carry
            y = model.head.sample(of_head, h, jax.random.fold_in(key, t), **options._asdict())
            if end is not None:
                y = jnp.where(ended, jnp.asarray(end, y.dtype), y)
            log_p = jnp.where(ended, 0, model.head.log_prob(of_head, h, y))
            next_state, next_h = model.cell.step(params.cell, state, y)
            next_ended = ended if end is None else ended | (y == end)
            return (state, next_state, next_h, next_ended), (y, log_p, ~ended)

        first = (state, state, h, jnp.zeros((), bool))
        (before_last, *_), (tokens, log_p, valid) = jax.lax.scan(
            body, first, jnp.asarray(start.step) + jnp.arange(steps)
        )
        return Generated(tokens, log_p, valid, before_last)

    return jax.vmap(one_row)(state, last, start.keys)


def _row_keys(key: Array, batch: int) -> Array:
    key = check_key(key)
    if key.ndim == 0:
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"expected one key or one for each of the {batch} prompts, got keys {key.shape}")
    return key


def _check_options(steps: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    whole_number("steps", steps)
    if not real_number("temperature", temperature) >= 0:  # also true for NaN
        raise ValueError(f"expected temperature of at least 0, got {temperature}: 0 takes the likeliest token")
    if top_k is not None:
        whole_number("top_k", top_k)
    if top_p is not None and not 0 < real_number("top_p", top_p) <= 1:
        raise ValueError(f"expected top_p in (0, 1], got {top_p}: 1 keeps every token")
