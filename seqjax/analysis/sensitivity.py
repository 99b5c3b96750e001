"""The derivatives of the states with respect to the parameters, and the share of each step in the weight gradient.

A state depends on the parameters through all earlier steps: S_t = ds_t/dtheta = J_t S_{t-1} + dF_t/dtheta. If S_t stays
bounded, the recurrence forgets. If it grows, a small change of the parameters changes all later states.

S_t has a column of n numbers for every parameter. All columns are pushed forward together, each with its own power of
two as a scale, so none overflows or underflows. If there are too many columns, random combinations of them are pushed
instead, which have the same mean square.
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

from seqjax.analysis._flow import Sequences, check_arguments, flat_map
from seqjax.analysis._gradient_share import gradient_shares
from seqjax.analysis._leaves import floating_leaves, with_leaves
from seqjax.analysis._scaled import rescale_rows, scale_by_power, to_common_scale
from seqjax.cell import Cell, Params, State
from seqjax.cells.whole_numbers import whole_number
from seqjax.sequence._cached_jit import precise_jit
from seqjax.sequence._devices import for_automatic_axes
from seqjax.sequence.unroll import unroll

EXACT = 2**18  # the largest S_t, in entries, for which every column is pushed by default: 1 MB in float32
PROBES = 16
AT_ONCE = 2**24  # entries of the S_t of all sequences that are pushed in one batch, 64 MB in float32


class ParameterSensitivity(NamedTuple):
    """Norms of ds_t/dtheta by leaf of the parameters; leaves are named by their path, such as "W_hh" or "0.W_hh".

    Attributes:
        log_norm: for each leaf ln |ds_t/dtheta|_F, (batch, time), in nats; minus infinity if the state does not depend
            on the leaf.
        share: for each leaf (time,), the share <g_t, g> / |g|^2 of each step in the loss gradient g = sum_t g_t. It
            is negative if a step opposes the sum. The shares sum to 1, or all are 0 if g is. None without a loss.
        exact: whether every column was pushed.
        probes: the number of random combinations of columns for each leaf; 0 if exact. The error of `log_norm` has a
            standard deviation of at most 1 / sqrt(2 probes).
        reliable: whether all numbers are finite or minus infinity.
        reason: which numbers are not, or empty.
    """

    log_norm: dict[str, Float[np.ndarray, "batch time"]]
    share: dict[str, Float[np.ndarray, " time"]] | None
    exact: bool
    probes: int
    reliable: bool
    reason: str

    def __str__(self) -> str:
        time = next(iter(self.log_norm.values())).shape[1]
        how = "every column" if self.exact else f"{self.probes} random combinations of the columns"
        lines = [f"log10 |ds_t/dtheta| after 1 and after {time} steps, means over the batch, from {how}"]
        for name, log in self.log_norm.items():
            first, last = log[:, [0, -1]].mean(axis=0) / math.log(10)
            lines.append(f"  {name}: {first:.4g}, {last:.4g}")
        lines.append("reliable" if self.reliable else f"not reliable: {self.reason}")
        return "\n".join(lines)


@for_automatic_axes
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
    """ln |ds_t/dtheta|_F for every step and leaf of the parameters, and each step's share in the weight gradient.

        S_t = J_t S_{t-1} + dF(s_{t-1}, x_t)/dtheta      |S_t|_F^2 = E |S_t z|^2,  z ~ N(0, I)

    Args:
        cell, params, xs, state, mask, reset: as for `unroll`. A learned initial state is a parameter of the first step,
            and of every step with a reset.
        loss: maps the outputs, leaves (batch, time, ...), to one number, as for `weight_gradients_by_step`.
        probes: the number of random z for each leaf. By default every column is pushed if S_t has at most 2^18
            entries, and otherwise 16 probes are.
        key: for drawing the probes; `jax.random.key(0)` by default.

    Returns:
        `ParameterSensitivity`.

    Raises:
        ValueError: there is no step or no parameter, `probes` is not positive, or a shape does not match.
        TypeError: a dtype does not match, or the state cannot be differentiated.

    Source: Williams and Zipser 1989, "A learning algorithm for continually running fully recurrent neural networks",
        in which real-time recurrent learning computes S_t.

    Example:
        >>> import jax.numpy as jnp, seqjax as sj
        >>> cell = sj.VanillaRNN(1, 1, activation="identity")
        >>> params = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.5 * jnp.eye(1), b_h=jnp.zeros(1))
        >>> last = lambda outputs: outputs[:, -1].sum()
        >>> result = sj.analysis.parameter_sensitivity(cell, params, jnp.ones((1, 3, 1)), loss=last)
        >>> jnp.exp(result.log_norm["b_h"][0]).round(4).tolist()  # sum of 0.5^(t - k) over k = 1..t
        [1.0, 1.5, 1.75]
        >>> result.share["b_h"].round(4).tolist()  # 1/7, 2/7, 4/7
        [0.1429, 0.2857, 0.5714]
    """
    if probes is not None:
        probes = whole_number("probes", probes, hint="None chooses", expected="a positive number of probes")
    # Twice, because S_t needs a forward-mode derivative of the step, and dF/dtheta a reverse-mode one.
    check_arguments(cell, params, xs, state, mask, reset)
    analysed, sequences = check_arguments(cell, params, xs, state, mask, reset, backward=True)
    names = list(floating_leaves(params))
    if not sequences.time or not names:
        missing = "parameter" if sequences.time else "step"
        raise ValueError(f"expected at least one {missing}, got none: no state depends on one")
    # A state that the caller passes does not depend on the parameters.
    if state is None:
        sequences = _with_first_reset(sequences)
    size = sum(leaf.size for leaf in floating_leaves(params).values())
    if probes is None and sequences.size * size > EXACT:
        probes = PROBES
    key = jax.random.key(0) if key is None else key
    mean_square, exponent = precise_jit(_squared_norms, analysed, probes or 0)(sequences, key)
    with np.errstate(divide="ignore"):
        # ln sqrt(m 4^e) = ln(m) / 2 + e ln 2
        log_norm = np.log(np.asarray(mean_square, np.float64)) / 2 + np.asarray(exponent) * math.log(2)
    share = None
    if loss is not None:
        outputs = unroll(cell, params, xs, state=state, mask=mask, reset=reset)[1]
        share = dict(zip(names, gradient_shares(analysed, sequences, jax.grad(loss)(outputs)), strict=True))
    log_norm = {name: log_norm[..., i] for i, name in enumerate(names)}
    bad = [f"|ds/d{name}| is not finite" for name, values in log_norm.items() if not (values < np.inf).all()]
    bad += [f"the gradient by {name} is not finite" for name, values in (share or {}).items() if np.isnan(values).any()]
    return ParameterSensitivity(log_norm, share, probes is None, probes or 0, not bad, "; ".join(bad))


def _with_first_reset(sequences: Sequences) -> Sequences:
    """Adds a reset before the first step, so that a learned initial state is a parameter of that step."""
    reset = sequences.inputs.reset
    first = jnp.broadcast_to(jnp.arange(sequences.time)[None] == 0, (sequences.batch, sequences.time))
    return sequences._replace(inputs=sequences.inputs._replace(reset=first if reset is None else reset | first))


def _squared_norms(cell: Cell, probes: int, sequences: Sequences, key: Array) -> tuple[Array, Array]:
    """|S_t|_F^2 of each leaf as numbers and exponents of powers of four, (batch, time, leaves) each."""
    flat, leaves = flat_map(cell, sequences.params), list(floating_leaves(sequences.params).values())
    rows = [probes or leaf.size for leaf in leaves]
    ends = np.cumsum([0, *rows])
    keys = jax.random.split(key, len(leaves))
    directions = [jax.random.normal(k, (probes, *leaf.shape), leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]

    def at_step(v: Array, at: PyTree) -> Callable[[list[Array]], Array]:
        return lambda leaves: flat.step(with_leaves(sequences.params, leaves), v, at)

    def every_column(v: Array, at: PyTree) -> Array:
        # n pulls give all columns of dF/dtheta, and there are usually far fewer states than parameters.
        _, pull = jax.vjp(at_step(v, at), leaves)
        (by_leaf,) = jax.vmap(pull)(jnp.eye(v.size, dtype=v.dtype))
        return jnp.concatenate([d.reshape(v.size, -1).astype(v.dtype) for d in by_leaf], axis=1).T

    def combinations(v: Array, at: PyTree) -> Array:
        _, push = jax.linearize(at_step(v, at), leaves)
        zeros = [jnp.zeros_like(leaf) for leaf in leaves]
        pushed = [jax.vmap(lambda z, i=i: push([*zeros[:i], z, *zeros[i + 1 :]]))(z) for i, z in enumerate(directions)]
        return jnp.concatenate(pushed)

    def one_sequence(v: Array, inputs: PyTree) -> tuple[Array, Array]:
        def advance(carry: tuple[Array, Array, Array], at: PyTree) -> tuple[tuple[Array, Array, Array], PyTree]:
            v, S, exponent = carry
            added = combinations(v, at) if probes else every_column(v, at)
            after, push = jax.linearize(lambda s: flat.step(sequences.params, s, at), v)
            S, added, exponent = to_common_scale(jax.vmap(push)(S), exponent, added, jnp.zeros_like(exponent))
            S, exponent = rescale_rows(S + added, exponent)
            squares = [_mean_square(S[a:b], exponent[a:b], probes) for a, b in itertools.pairwise(ends)]
            return (after, S, exponent), jax.tree.map(lambda *leaves: jnp.stack(leaves), *squares)

        start = v, jnp.zeros((int(ends[-1]), v.size), v.dtype), jnp.zeros(int(ends[-1]), jnp.int32)
        return jax.lax.scan(advance, start, inputs)[1]

    batch_size = min(sequences.batch, max(1, AT_ONCE // (int(ends[-1]) * sequences.size)))
    return jax.lax.map(lambda each: one_sequence(*each), (sequences.first, sequences.inputs), batch_size=batch_size)


def _mean_square(S: Array, exponent: Array, probes: int) -> tuple[Array, Array]:
    """The sum of the squares of rows with separate scales, or its mean over the probes, and its common scale."""
    nonzero = jnp.any(S != 0, axis=1)
    largest = jnp.max(jnp.where(nonzero, exponent, jnp.iinfo(jnp.int32).min))
    largest = jnp.where(jnp.any(nonzero), largest, 0)
    return jnp.sum(scale_by_power(S, jnp.where(nonzero, exponent - largest, 0)) ** 2) / max(1, probes), largest
