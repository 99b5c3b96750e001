"""The pairs: a cell of seqjax, and the unroll of the cell's own library with the same parameters.

Each builder imports its library when it is called, so the other cells still run if a library is not installed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import seqjax as sj
from benchmarks.any_cell import cells
from benchmarks.peers.measure import MODULES
from benchmarks.peers.rows import Row
from seqjax.cells.registry import exported_cells


class Pair(NamedTuple):
    """A cell of seqjax and the unroll of its own library, with the same parameters."""

    cell: Any
    params: Any  # in the tree of the cell
    own_params: Any  # in the tree of the library
    own_unroll: Callable[[Any, jax.Array], jax.Array]  # (own_params, xs) to the outputs (batch, time, hidden)
    to_cell_params: Callable[[Any], Any]  # own parameters, or their gradient, in the tree of the cell's parameters


def build_linen(name: str, row: Row, kind: str) -> Pair:
    import flax.linen as nn

    module = getattr(nn, kind)(row.hidden)
    cell = sj.from_linen(module, row.features)
    params = draw_params(cell, name, row)
    own_params = {"params": {"cell": params["params"]}}
    return Pair(cell, params, own_params, nn.RNN(module).apply, lambda own: {"params": own["params"]["cell"]})


def build_nnx(name: str, row: Row, kind: str) -> Pair:
    from flax import nnx

    make_cell = getattr(nnx, kind)
    cell = sj.from_nnx(make_cell, row.features, row.hidden)
    params = draw_params(cell, name, row)
    module = nnx.RNN(make_cell(row.features, row.hidden, rngs=nnx.Rngs(0)))
    structure, own_params, rest = nnx.split(module, nnx.Param, ...)
    nnx.replace_by_pure_dict(own_params, {"cell": params})

    def own_unroll(own_params, xs):
        return nnx.merge(structure, own_params, rest, copy=True)(xs)  # a copy, because the call changes the RNN's key

    return Pair(cell, params, own_params, own_unroll, lambda own: nnx.to_pure_dict(own)["cell"])


def build_equinox(name: str, row: Row, kind: str) -> Pair:
    import equinox as eqx

    cell = sj.from_equinox(getattr(eqx.nn, kind), row.features, row.hidden)
    params = draw_params(cell, name, row)
    zero = jnp.zeros(row.hidden)
    first = (zero, zero) if kind == "LSTMCell" else zero

    def own_unroll(module, xs):
        def step(state, x):
            state = module(x, state)
            return state, jax.tree.leaves(state)[0]

        return jax.vmap(lambda x: jax.lax.scan(step, first, x)[1])(xs)

    return Pair(cell, params, params, own_unroll, lambda own: own)


def build_haiku(name: str, row: Row) -> Pair:
    import haiku as hk

    cell = cells.HaikuLSTM(row.features, row.hidden)
    params = draw_params(cell, name, row)

    def network(xs):
        core = hk.LSTM(row.hidden)
        outputs, _ = hk.dynamic_unroll(core, xs.swapaxes(0, 1), core.initial_state(xs.shape[0]))
        return outputs.swapaxes(0, 1)

    return Pair(cell, params, params, hk.without_apply_rng(hk.transform(network)).apply, lambda own: own)


def build_user(name: str, row: Row, kind: type) -> Pair:
    cell = kind(row.features, row.hidden)
    params = draw_params(cell, name, row)

    def own_unroll(params, xs):
        def scan(xs):
            return jax.lax.scan(partial(cell.step, params), cell.initial_state(params), xs)[1]

        return jax.vmap(scan)(xs)

    return Pair(cell, params, params, own_unroll, lambda own: own)


class Entry(NamedTuple):
    """A cell of the benchmark."""

    title: str
    own: str  # the name of its own unroll
    package: str
    build: Callable[[str, Row], Pair]


def _linen(kind: str) -> Entry:
    return Entry(f"flax linen {kind}", "nn.RNN", "flax", partial(build_linen, kind=kind))


def _nnx(kind: str) -> Entry:
    return Entry(f"flax nnx {kind}", "nnx.RNN", "flax", partial(build_nnx, kind=kind))


def _equinox(kind: str) -> Entry:
    return Entry(f"equinox {kind}", "lax.scan under vmap", "equinox", partial(build_equinox, kind=kind))


def _user(title: str, kind: type) -> Entry:
    return Entry(title, "lax.scan under vmap", "jax", partial(build_user, kind=kind))


CELLS = {
    "linen-lstm": _linen("LSTMCell"),
    "linen-gru": _linen("GRUCell"),
    "linen-optimized-lstm": _linen("OptimizedLSTMCell"),
    "nnx-lstm": _nnx("LSTMCell"),
    "nnx-gru": _nnx("GRUCell"),
    "equinox-lstm": _equinox("LSTMCell"),
    "equinox-gru": _equinox("GRUCell"),
    "haiku-lstm": Entry("haiku LSTM", "hk.dynamic_unroll", "dm-haiku", build_haiku),
    "peephole": _user("peephole LSTM", cells.Peephole),
    "coupled": _user("LSTM with coupled gates, i = 1 - f", cells.Coupled),
    "layer-norm": _user("LSTM with layer normalization", cells.LayerNorm),
    "leaky": _user("Leaky, the cell of the README", cells.Leaky),
    **{name: _user(f"sj.{kind.__name__}", kind) for name, kind in exported_cells().items()},
}


def installed_cells(names: list[str]) -> list[str]:
    """The cells whose library is installed; prints the names of the others."""
    present = []
    for name in names:
        package = CELLS[name].package
        if find_spec(MODULES.get(package, package)):
            present.append(name)
        else:
            print(f"{name} is left out: {package} is not installed", flush=True)
    return present


def draw_params(cell: Any, name: str, row: Row) -> Any:
    """Draws matrices uniform in +-1/sqrt(hidden), and adds such noise to the initial vectors of the cell.

    No bias is zero and no gain is one, so a misplaced parameter changes the outputs.
    """
    rng, bound = np.random.default_rng([zlib.crc32(name.encode()), *row]), row.hidden**-0.5

    def draw(leaf):
        noise = rng.uniform(-bound, bound, leaf.shape).astype("float32")
        return jnp.asarray(noise) if leaf.ndim > 1 else leaf + noise

    return jax.tree.map(draw, cell.init(jax.random.key(0)))
