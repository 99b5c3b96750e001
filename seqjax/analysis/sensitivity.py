"""How the parameters reach a state, and which steps the weight gradient comes from.

A state depends on the parameters through all earlier steps: S_t = ds_t/dtheta = J_t S_{t-1} + dF_t/dtheta. Where S_t
settles, the recurrence forgets; where it grows, a small change of the parameters changes everything that follows.

S_t has a column of n numbers for every parameter. All are pushed forward side by side, each with a power of two of its
own, so none overflows and none vanishes; where there are too many, random combinations of them, whose mean square is
the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from seqjax.analysis._flow import Driven, driven, flat_step
from seqjax.analysis._gradient_share import gradient_shares
from seqjax.analysis._leaves import floating_leaves, with_leaves
from seqjax.analysis._scaled import common_scale, rescaled_rows, times_power
from seqjax.cell import Cell, Params, State
from seqjax.sequence._cached_jit import compiled
from seqjax.sequence.unroll import unroll

EXACT = 2**18  # entries of one S_t, up to which every column is pushed
PROBES = 16
AT_ONCE = 2**24  # entries of all S_t that are pushed together


class ParameterSensitivity(NamedTuple):
    """How the parameters reach the states; parameters are named by their place, such as "W_hh" or "0.W_hh".

    Attributes:
        log_norm: for each leaf ln |ds_t/dtheta|_F, (batch, time), in nats: change of the state for each unit of change
            of the parameters; minus infinity where the state does not depend on them.
        share: for each leaf (time,), each step's part of the loss's gradient g = sum_t g_t, <g_t, g> / |g|^2, negative
            where a step works against the sum; it adds up to 1, or is 0 throughout where g is. None without a loss.
        exact: whether every column was pushed.
        probes: how many random combinations of columns stand for a leaf, 0 where exact. The error of `log_norm` has a
            standard deviation of at most 1 / sqrt(2 probes).
        reliable: whether all of it is finite, or minus infinity.
        reason: why not.
    """

    log_norm: dict[str, Float[np.ndarray, "batch time"]]
    share: dict[str, Float[np.ndarray, " time"]] | None
    exact: bool
    probes: int
    reliable: bool
    reason: str


def parameter_sensitivity(
    cell: Cell,
    params: Params,
    xs: PyTree,
    *,
    loss: Callable[[PyTree], Array] | None = None,
    probes: int | None = None,
    key: Array | None = None,
    state: State | None = None,
    mask: Bool[Any, "batch time"] | None = None,
    reset: Bool[Any, "batch time"] | None = None,
) -> ParameterSensitivity:
    """ln |ds_t/dtheta|_F for every step and leaf of the parameters, and each step's share of the weight gradient.

        S_t = J_t S_{t-1} + dF(s_{t-1}, x_t)/dtheta      |S_t|_F^2 = E |S_t z|^2,  z ~ N(0, I)

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`. A learned initial state counts as a parameter, also of
            every step that is reset to it.
        loss: from the outputs, leaves (batch, time, ...), to one number, as for `weight_gradients_by_step`.
        probes: how many random z for each leaf; by default none, every column being pushed, where one S_t has at most
            a quarter of a million entries, and otherwise 16.
        key: draws them; `jax.random.key(0)` by default.

    Returns:
        `ParameterSensitivity`.

    Raises:
        ValueError: there is no step or no parameter, `probes` is not positive, or a shape does not fit.
        TypeError: a dtype does not fit, or the state cannot be differentiated.

    Source: Williams and Zipser 1989, "A learning algorithm for continually running fully recurrent neural networks",
        whose real-time recurrent learning carries S_t.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.5 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> last = lambda outputs: outputs[:, -1].sum()
        >>> found = sj.analysis.parameter_sensitivity(cell, params, jnp.ones((1, 3, 1)), loss=last)
        >>> jnp.exp(found.log_norm["b_h"][0]).round(4).tolist()  # sum of 0.5^(t - k) over k = 1..t
        [1.0, 1.5, 1.75]
        >>> found.share["b_h"].round(4).tolist()  # 1/7, 2/7, 4/7
        [0.1429, 0.2857, 0.5714]
    """
    if probes is not None and (isinstance(probes, bool) or not hasattr(probes, "__index__") or probes < 1):
        raise ValueError(f"expected a positive number of probes, got {probes!r}: None chooses")
    driven(cell, params, xs, state, mask, reset)  # dF/dtheta is pulled back, and S_t is pushed forward
    given = driven(cell, params, xs, state, mask, reset, backward=True)
    names = list(floating_leaves(params))
    if not given.time or not names:
        missing = "parameter" if given.time else "step"
        raise ValueError(f"expected at least one {missing}, got none: no state depends on one")
    if state is None:
        given = _starting_anew(given)
    size = sum(leaf.size for leaf in floating_leaves(params).values())
    if probes is None and given.size * size > EXACT:
        probes = PROBES
    key = jax.random.key(0) if key is None else key
    mean_square, exponent = compiled(_pushed, cell, int(probes or 0))(given, key)
    with np.errstate(divide="ignore"):
        log_norm = np.log(np.asarray(mean_square, np.float64)) / 2 + np.asarray(exponent) * math.log(2)
    share = None
    if loss is not None:
        outputs = unroll(cell, params, xs, state=state, mask=mask, reset=reset)[1]
        share = dict(zip(names, gradient_shares(cell, given, jax.grad(loss)(outputs)), strict=True))
    log_norm = {name: log_norm[..., i] for i, name in enumerate(names)}
    bad = [f"|ds/d{name}| is not finite" for name, values in log_norm.items() if not (values < np.inf).all()]
    bad += [f"the gradient by {name} is not finite" for name, values in (share or {}).items() if np.isnan(values).any()]
    return ParameterSensitivity(log_norm, share, probes is None, int(probes or 0), not bad, "; ".join(bad))


def _starting_anew(given: Driven) -> Driven:
    """The same with a reset before the first step, so that a learned initial state is a parameter of that step."""
    xs, mask, reset = given.inputs
    first = jnp.broadcast_to(jnp.arange(given.time)[None] == 0, (given.batch, given.time))
    return given._replace(inputs=(xs, mask, first if reset is None else reset | first))


def _pushed(cell: Cell, probes: int, given: Driven, key: Array) -> tuple[Array, Array]:
    """|S_t|_F^2 of each leaf, a number and the exponent of the power of four that scales it, (batch, time, leaves)."""
    step, leaves = flat_step(cell, given.params), list(floating_leaves(given.params).values())
    rows = [probes or leaf.size for leaf in leaves]
    ends = np.cumsum([0, *rows])
    keys = jax.random.split(key, len(leaves))
    directions = [jax.random.normal(k, (probes, *leaf.shape), leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]

    def at_step(v: Array, at: PyTree) -> Callable[[list[Array]], Array]:
        return lambda leaves: step(with_leaves(given.params, leaves), v, at)

    def every_column(v: Array, at: PyTree) -> Array:
        _, pull = jax.vjp(at_step(v, at), leaves)
        (by_leaf,) = jax.vmap(pull)(jnp.eye(v.size, dtype=v.dtype))
        return jnp.concatenate([d.reshape(v.size, -1).astype(v.dtype) for d in by_leaf], axis=1).T

    def combinations(v: Array, at: PyTree) -> Array:
        _, push = jax.linearize(at_step(v, at), leaves)
        zeros = [jnp.zeros_like(leaf) for leaf in leaves]
        pushed = [jax.vmap(lambda z, i=i: push([*zeros[:i], z, *zeros[i + 1 :]]))(z) for i, z in enumerate(directions)]
        return jnp.concatenate(pushed)

    def one(v: Array, inputs: PyTree) -> tuple[Array, Array]:
        def advance(carry: tuple[Array, Array, Array], at: PyTree) -> tuple[tuple[Array, Array, Array], PyTree]:
            v, S, exponent = carry
            added = combinations(v, at) if probes else every_column(v, at)
            after, push = jax.linearize(lambda s: step(given.params, s, at), v)
            S, added, exponent = common_scale(jax.vmap(push)(S), exponent, added, jnp.zeros_like(exponent))
            S, exponent = rescaled_rows(S + added, exponent)
            squares = [_mean_square(S[a:b], exponent[a:b], probes) for a, b in itertools.pairwise(ends)]
            return (after, S, exponent), jax.tree.map(lambda *leaves: jnp.stack(leaves), *squares)

        start = v, jnp.zeros((int(ends[-1]), v.size), v.dtype), jnp.zeros(int(ends[-1]), jnp.int32)
        return jax.lax.scan(advance, start, inputs)[1]

    together = min(given.batch, max(1, AT_ONCE // (int(ends[-1]) * given.size)))
    return jax.lax.map(lambda one_of: one(*one_of), (given.first, given.inputs), batch_size=together)


def _mean_square(S: Array, exponent: Array, probes: int) -> tuple[Array, Array]:
    """Of rows with scales of their own: the sum of their squares, or its mean over probes, and its scale."""
    there = jnp.any(S != 0, axis=1)
    largest = jnp.max(jnp.where(there, exponent, jnp.iinfo(jnp.int32).min))
    largest = jnp.where(jnp.any(there), largest, 0)
    return jnp.sum(times_power(S, jnp.where(there, exponent - largest, 0)) ** 2) / max(1, probes), largest
