"""Products of embedded tokens: W E[x] + b becomes a row of the table E W^T + b.

The table is computed once per pass, and a row is read for each step. So the input half of a network on tokens needs no
product, forward or backward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr

from seqjax.sequence._partition.program import (
    Dependencies,
    Env,
    Eqn,
    Read,
    Rule,
    Var,
    can_regroup,
    contracted_axis,
    copy_value,
    inexact,
    is_product,
    retrace,
)

LARGEST = 2**21  # numbers of a table; a larger one would not stay in a cache


def with_tables(program: ClosedJaxpr, n_params: int, n_state: int, steps: int) -> ClosedJaxpr:
    """The program of a loop with products of tables in place of products of their rows.

    Args:
        program: the normalized program, (params.., state.., x..) -> (new_state.., outputs..).
        n_params, n_state: the numbers of leaves of its parameters and of its state.
        steps: batch times time. The product of a whole table saves work only if the table has fewer rows.
    """
    depends = Dependencies(program, n_params, n_state)
    rows = {e.outvars[0]: e for e in depends.eqns if _is_row(e, depends)}
    rules: dict[int, Rule] = {}
    for e in depends.eqns:
        if not is_product(e, 1, 2) or e.invars[0] not in rows or not depends.only_on_params(e.invars[1]):
            continue
        row, out = rows[e.invars[0]], e.outvars[0]
        count = row.invars[0].aval.shape[0]
        if 2 * count <= steps and count * out.aval.size <= LARGEST and can_regroup(out):
            bias = depends.added_params(out)
            rules[id(e)] = _row_of_product(e, row, None if bias is None else bias[1])
            if bias is not None:
                rules[id(bias[0])] = copy_value(out, bias[0])
    return retrace(program, depends.in_params_first_order(), rules) if rules else program


def _is_row(e: Eqn, depends: Dependencies) -> bool:
    """Whether an equation reads one row of a matrix of parameters, and the input alone decides which."""
    return is_lookup(e) and depends.only_on_params(e.invars[0]) and not depends.on_state(e.outvars[0])


def is_lookup(e: Eqn) -> bool:
    """Whether an equation reads one row of a matrix, or NaN for a number that no row has."""
    if e.primitive.name != "gather":
        return False
    table, axes, fill = e.invars[0].aval, e.params["dimension_numbers"], e.params["fill_value"]
    # The product of NaN with any weights is NaN again. By default XLA fills with NaN.
    is_filled = e.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and (fill is None or np.isnan(fill))
    is_row = table.ndim == 2 and tuple(axes.collapsed_slice_dims) == (0,) and e.invars[1].aval.shape == (1,)
    return is_filled and is_row and tuple(e.params["slice_sizes"]) == (1, table.shape[1]) and inexact(table)


def _row_of_product(e: Eqn, row: Eqn, bias: Var | None) -> Rule:
    def run(env: Env, read: Read) -> None:
        E, W = read(row.invars[0]), read(e.invars[1])
        options: dict[str, Any] = {name: e.params[name] for name in ("precision", "preferred_element_type")}
        table = lax.dot_general(E, W, (((1,), (contracted_axis(e, 1),)), ((), ())), **options)
        if bias is not None:
            table = table + read(bias)[None]
        axes, mode, fill = (row.params[name] for name in ("dimension_numbers", "mode", "fill_value"))
        index, size = read(row.invars[1]), (1, table.shape[1])
        env[e.outvars[0]] = lax.gather(table, index, axes, size, mode=mode, fill_value=fill)

    return run
