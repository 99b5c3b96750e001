"""An analysis of a padded batch is that of its cut sequences, wherever the padding is.

The padding contains NaN, at the end, at the beginning, at every other step and at random. One row is shorter than the
others, and one is only padding. Resets are at a valid step, and at a padded step before a valid one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import D
from oracles import drawn

import seqjax as sj
from seqjax import analysis

LSTM, N = sj.LSTM(D, 2), 2
SIZE = 2 * N
TIME, VALID, SHORT = 48, 24, 10
STEPS = np.arange(TIME)
GAPS = np.zeros(TIME, bool)
GAPS[np.random.default_rng(3).permutation(TIME)[:VALID]] = True
MASK = np.stack([STEPS < VALID, STEPS >= TIME - VALID, STEPS % 2 == 0, GAPS, STEPS < SHORT, STEPS < 0])
PLACES = ["end", "beginning", "every other step", "gaps", "short", "everywhere"]
EQUALLY_LONG, RAGGED, EMPTY = [0, 1, 2, 3], 4, 5
RESET = np.zeros_like(MASK)
RESET[2, 13] = True  # at a padded step, and acts before step 14
RESET[3, np.flatnonzero(GAPS)[7]] = True


def cut_resets(mask, reset):
    """The resets of the valid steps: each acts before the first valid step from its own on."""
    result, pending = [], False
    for valid, restart in zip(mask, reset, strict=True):
        pending |= restart
        if valid:
            result.append(pending)
            pending = False
    return np.array(result)


@functools.cache
def arguments():
    """Parameters, inputs with NaN in the padding, and states before the first step, in float64."""
    with jax.enable_x64(True):
        params, _ = drawn(LSTM, "float64")
        xs = np.random.default_rng(0).normal(size=(*MASK.shape, D))
        states = np.random.default_rng(1).normal(size=(2, len(MASK), N))
        return params, np.where(MASK[..., None], xs, np.nan), states


def of_batch(analyse):
    """The analysis of the padded batch."""
    params, xs, states = arguments()
    return analyse(LSTM, params, xs, state=sj.LSTMState(*map(jnp.asarray, states)), mask=MASK, reset=RESET)


def of_cut(analyse, rows):
    """The analysis of some rows without their padding, which have the same number of valid steps."""
    params, xs, states = arguments()
    x = np.stack([xs[b, MASK[b]] for b in rows])
    reset = np.stack([cut_resets(MASK[b], RESET[b]) for b in rows])
    return analyse(LSTM, params, x, state=sj.LSTMState(*map(jnp.asarray, states[:, rows])), reset=reset)


def exponents_of_row(result, b, mask):
    names = ("exponents", "low", "high", "split_half", "kaplan_yorke", "entropy_rate", "singular", "steps")
    return {name: getattr(result, name)[b] for name in names}


def gradients_of_row(result, b, mask):
    curves = {name: getattr(result, name)[b] for name in ("log_gradient", "rows_expected", "rows_worst")}
    curves |= {f"part {name}": curve[b] for name, curve in result.rows_parts.items()}
    curves |= {f"gradient {name}": curve[b] for name, curve in result.log_gradient_parts.items()}
    assert all(np.isnan(curve[mask.sum() + 1 :]).all() for curve in curves.values())
    return {name: curve[: mask.sum() + 1] for name, curve in curves.items()}


def path_of_row(result, b, mask):
    curves = {name: getattr(result, name)[b] for name in ("log_true", "log_forget")}
    assert all(np.isnan(curve[mask.sum() + 1 :]).all() for curve in curves.values())
    units = {name: getattr(result, name)[b] for name in ("log_true_units", "log_forget_units")}
    return {name: curve[: mask.sum() + 1] for name, curve in curves.items()} | units


def verdict_of_row(result, b, mask):
    if not hasattr(result, "rows"):
        pytest.skip("the verdict is not given by row")
    row = result.rows[b]
    return {name: getattr(row, name) for name in ("regime", "contracting", "steps", "lag", "block")}


def jacobians_of_row(result, b, mask):
    """The Jacobians from each valid step to the next one, and those by the inputs."""
    products, J = [], np.eye(SIZE)
    for valid, J_t in zip(mask, np.asarray(result.by_state[b]), strict=True):
        J = J_t @ J
        if valid:
            products.append(J)
            J = np.eye(SIZE)
    return {"by state": np.array(products), "by input": result.by_input[b][mask]}


def sensitivity_of_row(result, b, mask):
    return {name: log[b, mask] for name, log in result.log_norm.items()}


# Each analysis, and what is compared of row b, in valid steps.
ANALYSES = {
    "lyapunov_exponents": (analysis.lyapunov_exponents, exponents_of_row),
    "gradient_by_lag": (analysis.gradient_by_lag, gradients_of_row),
    "product_singular_values": (
        analysis.product_singular_values,
        lambda result, b, mask: {"log_values": result.log_values[b]},
    ),
    "jacobian_product": (
        analysis.jacobian_product,
        lambda result, b, mask: {"product": np.exp(result.log_scale[b]) * result.matrix[b]},
    ),
    "step_jacobians": (functools.partial(analysis.step_jacobians, inputs=True), jacobians_of_row),
    "cell_path": (analysis.cell_path, path_of_row),
    "parameter_sensitivity": (analysis.parameter_sensitivity, sensitivity_of_row),
    "random parameter_sensitivity": (functools.partial(analysis.parameter_sensitivity, probes=2), sensitivity_of_row),
    "verdict": (analysis.verdict, verdict_of_row),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_a_padded_row_is_its_cut_sequence(name, x64):
    analyse, of_row = ANALYSES[name]
    padded = of_batch(analyse)
    for rows in (EQUALLY_LONG, [RAGGED]):
        cut = of_cut(analyse, rows)
        for i, b in enumerate(rows):
            expected = of_row(cut, i, np.ones(MASK[b].sum(), bool))
            for part, value in of_row(padded, b, MASK[b]).items():
                where = f"{part} with padding: {PLACES[b]}"
                if isinstance(value, str) or value is None:
                    assert value == expected[part], where
                else:
                    np.testing.assert_allclose(value, expected[part], rtol=1e-8, atol=1e-8, err_msg=where)


# What the row without a valid step has, by analysis.
NOTHING = {
    "lyapunov_exponents": lambda result: np.isnan(result.exponents[EMPTY]).all() and not result.reliable[EMPTY],
    "gradient_by_lag": lambda result: (
        np.isnan(result.rows_expected[EMPTY, 1:]).all() and "sequence 5: no step is valid" in result.reason
    ),
    "product_singular_values": lambda result: np.abs(result.log_values[EMPTY]).max() < 1e-12,
    "jacobian_product": lambda result: (
        np.abs(np.exp(result.log_scale[EMPTY]) * result.matrix[EMPTY] - np.eye(SIZE)).max() < 1e-12
    ),
    "step_jacobians": lambda result: np.array_equal(
        result.by_state[EMPTY], np.broadcast_to(np.eye(SIZE), (TIME, SIZE, SIZE))
    ),
    "cell_path": lambda result: (
        result.log_true[EMPTY, 0] == 0 and np.isnan(result.log_true[EMPTY, 1:]).all() and result.reliable
    ),
    "parameter_sensitivity": lambda result: all(np.isneginf(log[EMPTY]).all() for log in result.log_norm.values()),
    "verdict": lambda result: (
        not hasattr(result, "rows") or (result.rows[EMPTY].regime, result.rows[EMPTY].steps) == ("unknown", 0)
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_row_of_padding_has_no_steps(name, x64):
    assert NOTHING[name](of_batch(ANALYSES[name][0]))


def test_gate_statistics_of_a_padded_batch_are_those_of_all_valid_steps(x64):
    result = of_batch(analysis.gate_statistics)
    alone = [of_cut(sj.gates, rows) for rows in (EQUALLY_LONG, [RAGGED])]
    for name, got in result.items():
        steps = np.concatenate([np.asarray(gates[name]).reshape(-1, N) for gates in alone])
        assert len(steps) == MASK.sum()
        low = -0.9 if name == "candidate" else 0.1
        expected = {
            "mean": steps.mean(),
            "unit_mean": steps.mean(axis=0),
            "saturated_low": (steps < low).mean(),
            "saturated_high": (steps > 0.9).mean(),
            "histogram": np.histogram(steps, got.edges)[0] / steps.size,
        }
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(got, field), value, atol=1e-14, err_msg=f"{name} {field}")


def test_a_reset_after_the_last_valid_step_does_not_change_the_path(x64):
    params, xs, _ = arguments()
    mask, reset = np.array([[1, 1, 0, 1, 0, 0]], bool), np.array([[0, 0, 1, 0, 1, 0]], bool)
    xs = np.where(mask[..., None], xs[:1, :6], np.nan)
    result = analysis.cell_path(LSTM, params, xs, mask=mask, reset=reset)
    alone = analysis.cell_path(LSTM, params, xs[:, mask[0]], reset=np.array([[False, False, True]]))
    np.testing.assert_allclose(result.log_true[:, :4], alone.log_true)
    np.testing.assert_allclose(result.log_forget[:, :4], alone.log_forget)
    assert np.isneginf(alone.log_true[0, 1:]).all()


def test_padded_steps_have_no_share_in_the_gradient_of_the_parameters(x64):
    params, xs, _ = arguments()
    options = dict(loss=lambda outputs: (outputs**2).sum())
    alone = analysis.parameter_sensitivity(LSTM, params, xs[:1, MASK[0]], **options)
    for mask in MASK[EQUALLY_LONG]:
        padded = np.full((1, TIME, D), np.nan)
        padded[0, mask] = xs[0, MASK[0]]
        row = analysis.parameter_sensitivity(LSTM, params, padded, mask=mask[None], **options)
        assert row.reliable, row.reason
        for name, share in row.share.items():
            np.testing.assert_allclose(share[mask], alone.share[name], atol=1e-12)
            np.testing.assert_array_equal(share[~mask], 0)
