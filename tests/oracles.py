"""Second implementations, in plain Python, without scan, vmap or where: what the library is compared with.

The forward pass is a loop over rows and steps, in which a masked step is not run at all. The backward pass is written
out by hand: the same steps in reverse order, with the derivatives of one step as the only thing that JAX does.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import seqjax as sj

BATCH, TIME = 2, 6
MASK = np.array([[1, 0, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]], bool)
RESET = np.array([[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 1, 0]], bool)
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-5, "float64": 1e-10}


class Looped(NamedTuple):
    """What the loop gives: as `unroll`, and as `trajectory`."""

    final: Any
    outputs: Any
    states: Any


@functools.cache
def parts(cell):
    """The step, the initial state, and what pulls a gradient back through each; compiled one by one."""

    def pull(params, state, x, d_state, d_output):
        return jax.vjp(cell.step, params, state, x)[1]((d_state, d_output))

    def pull_start(params, d_state):
        return jax.vjp(cell.initial_state, params)[1](d_state)[0]

    return tuple(map(jax.jit, (cell.step, cell.initial_state, pull, pull_start)))


def loop(cell, params, xs, state=None, mask=None, reset=None, reverse=False):
    """`unroll` and `trajectory` by hand."""
    step, start, _, _ = parts(cell)
    zero = jax.tree.map(np.zeros_like, step(params, start(params), xs[0, 0])[1])
    rows, times = [], list(range(xs.shape[1]))
    for b in range(len(xs)):
        happened = events(cell, params, xs, b, state, mask, reset, reverse)
        states = {t: after for t, _, after, _ in happened}  # the state after a reset is overwritten by the step's
        outputs = {t: zero if output is None else output for t, _, _, output in happened}
        order = [*times, None] if reverse else [None, *times]
        final = states[order[0 if reverse else -1]]
        rows.append(Looped(final, pile([outputs[t] for t in times]), pile([states[t] for t in order])))
    return pile(rows)


def events(cell, params, xs, b, state=None, mask=None, reset=None, reverse=False):
    """What happens to row b, in order: (t, state before, state after, output).

    The first entry, at t = None, and every reset have no state before; the first and every held step have no output.
    """
    step, start, _, _ = parts(cell)
    s = start(params) if state is None else row(state, b)
    happened = [(None, None, s, None)]
    time = xs.shape[1]
    for t in range(time - 1, -1, -1) if reverse else range(time):
        if reset is not None and reset[b, t]:
            s = start(params)
            happened.append((t, None, s, None))
        if mask is None or mask[b, t]:
            before = s
            s, output = step(params, before, xs[b, t])
            happened.append((t, before, s, output))
        else:
            happened.append((t, s, s, None))
    return happened


def backward(cell, params, xs, d_final, d_outputs, window=None, **options):
    """Backpropagation through time by hand: gradients by params at each step, by inputs, and by the first states.

    With a window k, every output is traced back on its own, through its own step and the k - 1 before it.
    """
    _, _, pull, pull_start = parts(cell)
    time, given = xs.shape[1], options.get("state") is not None
    d_params = [jax.tree.map(np.zeros_like, params) for _ in range(time)]
    d_xs, d_first = np.zeros_like(xs), []

    def back(b, happened, delta, d_output, steps):
        for t, before, _, output in reversed(happened):
            if before is None:
                at = 0 if t is None else t
                if t is not None or not given:
                    d_params[at] = add(d_params[at], pull_start(params, delta))
                    delta = jax.tree.map(np.zeros_like, delta)
                continue
            if steps == 0:
                return jax.tree.map(np.zeros_like, delta)
            steps -= 1
            if output is not None:
                d_p, delta, d_x = pull(params, before, xs[b, t], delta, d_output(t))
                d_params[t] = add(d_params[t], d_p)
                d_xs[b, t] += d_x
        return delta

    for b in range(len(xs)):
        happened = events(cell, params, xs, b, **options)
        if window is None:
            d_first.append(back(b, happened, row(d_final, b), lambda t: row(d_outputs, b, t), time))  # noqa: B023
            continue
        for end in range(time):
            only = [e for e in happened if e[0] is None or e[0] <= end]
            zero, end_gradient = jax.tree.map(np.zeros_like, row((d_final, d_outputs), b)), row(d_outputs, b, end)
            back(b, only, zero[0], lambda t: end_gradient if t == end else row(zero[1], t), window)  # noqa: B023
    return d_params, d_xs, pile(d_first) if given and d_first else None


def looped(cell, params, xs, **options):
    """(final state, outputs), and the gradient of `weighted` of both: by params, inputs and given state."""
    final, outputs, _ = loop(cell, params, xs, **options)
    d_params, d_xs, d_state = backward(cell, params, xs, *weighted_gradient((final, outputs)), **options)
    d_params = functools.reduce(add, d_params)
    return (final, outputs), (d_params, d_xs) if d_state is None else (d_params, d_xs, d_state)


@functools.partial(jax.jit, static_argnames=("cell", "reverse"))
def scanned(cell, params, xs, state=None, mask=None, reset=None, reverse=False):
    """The same of `sj.unroll`, with the gradient by `jax.grad`."""

    def value(params, xs, state):
        result = sj.unroll(cell, params, xs, state=state, mask=mask, reset=reset, reverse=reverse)
        return weighted(result), result

    by = (0, 1) if state is None else (0, 1, 2)
    (_, result), gradient = jax.value_and_grad(value, argnums=by, has_aux=True)(params, xs, state)
    return result, gradient


def weighted(tree):
    """A number that depends on every entry of a tree, each with a weight of its own and a curvature."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        leaf = leaf.astype(float).ravel()
        total = total + jnp.sum(np.cos(np.arange(leaf.size)).astype(leaf.dtype) * leaf + leaf * leaf)
    return total


def weighted_gradient(tree):
    """Its gradient, in closed form."""

    def one(leaf):
        return (np.cos(np.arange(leaf.size)).reshape(leaf.shape) + 2 * leaf).astype(leaf.dtype)

    return jax.tree.map(one, tree)


def row(tree, *index):
    """Row b of a batch, or step t of it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def pile(trees):
    """Stacks trees along a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def add(a, b):
    """The sum of two trees."""
    return jax.tree.map(np.add, a, b)


def drawn(cell, dtype, batch=BATCH, time=TIME, seed=0):
    """Parameters, none of them zero, and inputs, in a dtype."""
    with jax.enable_x64(False):
        shapes = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((batch, time, *cell.input_shape), dtype)
    return like(shapes, dtype, seed), like(xs, dtype, seed + 1)


def drawn_states(cell, params, batch=BATCH, seed=2):
    """A random state for each row of a batch, of the parameters' dtype."""
    one = jax.eval_shape(cell.initial_state, params)
    batched = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype), one)
    return like(batched, jax.tree.leaves(one)[0].dtype, seed)


def like(tree, dtype, seed):
    """A random tree of the same shapes."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * generator.normal(size=leaf.shape), dtype), tree)


def assert_close(got, expected):
    """Same structure, same dtypes, and entries that agree to the precision of the coarsest of them."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    tolerance = max(TOLERANCE[str(leaf.dtype)] for leaf in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), tolerance, tolerance, err_msg=where)
