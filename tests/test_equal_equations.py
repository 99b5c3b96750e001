"""Equal equations of a step are computed once, also if the step calls the same function twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from seqjax.sequence._partition.normalize import share_equal
from seqjax.sequence._partition.program import Dependencies, inline


def names_after_sharing(function, *arguments):
    program = inline(jax.make_jaxpr(function)(*arguments))
    return [e.primitive.name for e in share_equal(program, Dependencies(program, 1, 1)).jaxpr.eqns]


def test_equal_products_and_what_follows_them_are_computed_once():
    W, h = jnp.ones((3, 3)), jnp.ones(3)

    def twice(W, h):
        return jnp.tanh(W @ h), jax.nn.sigmoid(W @ h) * jnp.tanh(W @ h)

    names = names_after_sharing(twice, W, h)
    assert [names.count(name) for name in ("dot_general", "tanh", "logistic", "mul")] == [1, 1, 1, 1]


def test_equations_that_differ_in_an_operand_a_number_or_an_option_are_not_shared():
    W, h = jnp.ones((3, 3)), jnp.ones(3)

    def different(W, h):
        return W @ h, W.T @ h, 2 * h, 3 * h, h[:2], h[1:]

    names = names_after_sharing(different, W, h)
    assert [names.count(name) for name in ("dot_general", "mul", "slice")] == [2, 2, 2]
