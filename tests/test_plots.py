"""Figures: each draws the numbers that it was given, says what its axes are, and says what it cannot draw."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from plot_results import (
    CLIPPING,
    DOWN,
    EVERY,
    GATES,
    INF,
    NAN,
    TEN,
    draw,
    exponents,
    lag_result,
    line,
    matrix,
    remarks,
    scores,
    spectrum,
)

import seqjax as sj
from seqjax import plots
from seqjax.analysis.cell_gradient_path import cell_path
from seqjax.analysis.clipping import clipping_statistics
from seqjax.analysis.fixed_point_search import fixed_points
from seqjax.plots.canvas import COLOURS, GREY, format_power, note_missing


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_names_its_axes_and_draws_all_that_it_is_given(name):
    plot, result, _ = EVERY[name]
    ax = draw(plot, result)
    assert ax.get_title(loc="left")
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert "finite" not in remarks(ax)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_finite_is_left_out_with_a_remark(name):
    plot, _, result = EVERY[name]  # warnings are errors in this suite
    assert "finite" in remarks(draw(plot, result))


def test_the_list_above_holds_every_figure():
    public = {name for name in vars(plots) if not name.startswith("_") and callable(getattr(plots, name))}
    assert public - {"principal_plane"} == set(EVERY) | {"cell_path"}


def test_without_axes_a_figure_of_its_own_is_made():
    from matplotlib import pyplot

    ax = plots.gradient_by_lag(DOWN)
    assert pyplot.gca() is ax
    pyplot.close("all")


def test_gradients_are_drawn_in_powers_of_ten_with_threshold_and_horizon():
    ax = draw(plots.gradient_by_lag, DOWN)
    np.testing.assert_allclose(line(ax, "expected"), [[0, 1, 2, 3], [0, -1, -2, -3]])
    np.testing.assert_allclose(line(ax, "worst case")[1], (np.array([0, -1, -2, -3]) * TEN + 1) / TEN)
    np.testing.assert_allclose(line(ax, "threshold 0.01")[1], -2)
    np.testing.assert_allclose(line(ax, "horizon, 2 steps")[0], 2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("lag (steps)", "gradient norm (factor)")


def test_without_a_horizon_none_is_marked():
    assert not [line for line in draw(plots.gradient_by_lag, DOWN._replace(horizon=INF)).lines if "hor" in str(line)]


def test_lags_that_no_float_can_hold_are_drawn():
    ax = draw(plots.gradient_by_lag, lag_result([0, -2000 * TEN, -4000 * TEN]))
    np.testing.assert_allclose(line(ax, "expected")[1], [0, -2000, -4000])
    assert "10⁻⁴⁰⁰⁰" in [tick.get_text() for tick in ax.get_yticklabels()]


def test_runs_are_told_apart_by_colour_and_by_dashes():
    names = [str(n) for n in range(16)]
    ax = draw(plots.gradients_by_lag, dict.fromkeys(names, DOWN))
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines if line.get_label() in names}
    assert len(looks) == 16
    np.testing.assert_allclose(line(ax, "7"), [[0, 1, 2, 3], [0, -1, -2, -3]])


def test_the_heat_map_has_a_column_for_a_time_and_a_row_for_a_lag():
    table = np.array([[[0, -1], [0, -3]], [[0, NAN], [0, -5]]]) * TEN
    both = DOWN._replace(table=table, lags=np.arange(2), times=np.array([[4, 8]] * 2))
    (mesh,) = draw(plots.gradient_heat_map, both).collections
    np.testing.assert_allclose(mesh.get_array(), [[0, 0], [-1, -4]])
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [2, 6, 10])  # around the times 4 and 8


def test_the_heat_map_has_only_the_sequences_with_the_times_of_the_longest():
    table = np.array([[[0, -1], [0, -3]], [[0, NAN], [0, -5]], [[0, -7], [0, -5]]]) * TEN
    times = np.array([[4, 8], [0, 3], [4, 8]])
    mixed = DOWN._replace(table=table, lags=np.arange(2), times=times)
    (mesh,) = draw(plots.gradient_heat_map, mixed).collections
    np.testing.assert_allclose(mesh.get_array(), [[0, 0], [-4, -4]])


def test_the_heat_map_of_a_single_time_is_one_column():
    one = DOWN._replace(table=DOWN.table[:, :1], times=np.array([[7]]))
    (mesh,) = draw(plots.gradient_heat_map, one).collections
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [6.5, 7.5])


def test_the_gradient_of_the_loss_is_that_of_the_state_and_of_its_fields():
    ax = draw(plots.loss_gradient, DOWN)
    np.testing.assert_allclose(line(ax, "whole state"), [[0, 1, 2, 3], [0, -1, -2, -3]])
    np.testing.assert_allclose(line(ax, "c")[1], line(ax, "whole state")[1] - 2 / TEN)


def test_the_cell_path_draws_truth_and_forget_gates():
    cell = sj.LSTM(2, 3)
    xs = jax.random.normal(jax.random.key(1), (2, 6, 2))
    result = cell_path(cell, cell.init(jax.random.key(0)), xs)
    ax = draw(plots.cell_path, result)
    np.testing.assert_allclose(line(ax, "all paths")[1], np.mean(result.log_true, 0) / TEN, rtol=1e-6)
    np.testing.assert_allclose(line(ax, "forget gates only")[1], np.mean(result.log_forget, 0) / TEN, rtol=1e-6)


def test_singular_values_are_drawn_by_time_or_those_of_one_time_in_order():
    values = np.exp(TEN * np.array([[[0.0, -1, -2], [-1, -2, -3]]]))
    ax = draw(plots.singular_values, spectrum(matrix(values), [3, 9]))
    for name, expected in (("largest", [0, -1]), ("middle", [-1, -2]), ("smallest", [-2, -3])):
        np.testing.assert_allclose(line(ax, name), [[3, 9], expected], atol=1e-12)
    ax = draw(plots.singular_values, spectrum(matrix(values[:, :1]), [3]))
    np.testing.assert_allclose(line(ax, "time step 3"), [[1, 2, 3], [0, -1, -2]], atol=1e-12)


def test_products_are_drawn_by_their_length():
    ax = draw(plots.product_singular_values, EVERY["product_singular_values"][1])
    np.testing.assert_allclose(line(ax, "largest"), [[1, 4], [-1, -4]])
    np.testing.assert_allclose(line(ax, "number 2"), [[1, 4], [-2, -8]])


def test_eigenvalues_lie_in_the_plane_with_the_unit_circle():
    ax = draw(plots.eigenvalues, matrix([0.5j, -0.5j, 2]))
    inside, outside = (dots.get_offsets() for dots in ax.collections)
    np.testing.assert_allclose(inside, [[0, 0.5], [0, -0.5]])
    np.testing.assert_allclose(outside, [[2, 0]])
    np.testing.assert_allclose(np.hypot(*line(ax, "unit circle")), 1)
    assert ax.get_aspect() == 1


def test_exponents_are_drawn_with_their_intervals_and_on_their_way():
    result = exponents([0.1, -0.2])
    ax = draw(plots.lyapunov_spectrum, result)
    np.testing.assert_allclose(line(ax, "mean over sequences"), [[1, 2], [0.1, -0.2]])
    (bars,) = ax.collections
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[-0.1, 0.3], [-0.4, 0.0]], atol=1e-12)
    ax = draw(plots.lyapunov_convergence, result)
    np.testing.assert_allclose(line(ax, "number 1"), [[10, 20], [0.2, 0.1]])
    assert [line.get_label() for line in ax.lines] == ["number 1", "number 2"]


def test_gates_are_drawn_unit_by_unit():
    ax = draw(plots.gate_saturation, GATES)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[0.1, 0.3], [0.2, 0.4]])
    ax = draw(plots.time_constants, GATES)
    np.testing.assert_allclose(line(ax, "forget")[1], [0, 2])
    ax = draw(plots.gate_histogram, GATES)
    values, edges, _ = ax.patches[1].get_data()
    np.testing.assert_allclose(values, np.linspace(0, 0.1, 20))
    np.testing.assert_allclose(edges, np.linspace(-1, 1, 21))  # a candidate is a value from -1 to 1, and not a gate


def test_paths_and_fixed_points_are_seen_in_the_plane_of_largest_variance():
    found = fixed_points(sj.VanillaRNN(1, 1), sj.VanillaParams(jnp.eye(1), 2 * jnp.eye(1), jnp.zeros(1)), count=64)
    states = jnp.linspace(-1.0, 2.0, 7)[None, :, None]
    ax = draw(plots.state_portrait, states, found)
    path = ax.lines[0].get_xdata()
    np.testing.assert_allclose(np.abs(path), np.abs(np.linspace(-1.5, 1.5, 7)), atol=1e-6)
    kinds = {dots.get_label(): dots.get_offsets()[:, 0] for dots in ax.collections}
    np.testing.assert_allclose(sorted(np.abs(kinds["stable"])), [0.957504 - 0.5, 0.957504 + 0.5], atol=1e-5)
    np.testing.assert_allclose(np.abs(kinds["unstable"]), 0.5, atol=1e-5)
    assert "100 % of the variance" in ax.get_xlabel()


def test_the_principal_plane_is_that_of_the_covariance():
    states = np.random.default_rng(0).normal(size=(3, 50, 4)) * [3.0, 0.1, 2.0, 0.2]
    mean, plane, share = plots.principal_plane(states)
    rows = np.asarray(states, np.float64).reshape(-1, 4)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    np.testing.assert_allclose(mean, rows.mean(0))
    np.testing.assert_allclose(np.abs(plane @ vectors[:, ::-1][:, :2]), np.eye(2), atol=1e-6)
    np.testing.assert_allclose(share, values[::-1][:2] / values.sum())


def test_scores_are_drawn_by_position_and_by_length():
    ax = draw(plots.loss_by_position, scores([3, 2, 1]))
    np.testing.assert_allclose(ax.lines[0].get_data(), [[1, 2, 3], [3, 2, 1]])
    assert ax.get_ylabel() == "loss (nats)"
    ax = draw(plots.loss_by_length, scores([3, 2, 1]))
    np.testing.assert_allclose(ax.lines[0].get_data(), [[1, 2, 3], [6, 4, 2]])
    assert [line.get_label() for line in ax.lines[1:]] == ["up to 2 steps, mean 3.5", "longer, mean 4.5"]


def test_clipping_shows_norms_threshold_and_factors():
    ax = draw(plots.clipping, CLIPPING)
    np.testing.assert_allclose(line(ax, "gradient norm"), [[1, 2, 3], [-1, 1, 0]])
    np.testing.assert_allclose(line(ax, "clipped"), [[2], [1]])
    np.testing.assert_allclose(line(ax, "threshold 1")[1], 0)
    np.testing.assert_allclose(draw(plots.clipping_factor, CLIPPING).lines[0].get_ydata(), [1, 0.1, 1])
    free = draw(plots.clipping, clipping_statistics({"grad_norm": [1.0, 2.0]}, None))
    assert [line.get_label() for line in free.lines] == ["gradient norm"]


@pytest.mark.parametrize("background", ["#ffffff", "#15181c"])
def test_colours_stand_out_from_white_and_from_black(background):
    def luminance(colour):
        rgb = np.array(colors.to_rgb(colour))
        return np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for colour in (*COLOURS, GREY):
        low, high = sorted([luminance(colour), luminance(background)])
        assert (high + 0.05) / (low + 0.05) > 3, colour


def test_remarks_count_what_is_missing():
    ax = Figure().subplots()
    note_missing(ax, np.array([1.0, NAN]), np.array([[INF]]))
    note_missing(ax, np.array([NAN, NAN]))
    note_missing(ax)
    note_missing(ax, np.array([1.0]))
    assert [text.get_text() for text in ax.texts] == [
        "2 of 3 values are not finite and not drawn",
        "none of the 2 values is finite",
        "there is nothing to draw",
    ]


def test_powers_of_ten_are_written_out():
    texts = ["10⁻⁴⁰⁰⁰", "10⁻⁴", "0.01", "1", "10", "1000", "10¹²"]
    assert [format_power(v) for v in (-4000, -4, -2, 0, 1, 3, 12)] == texts


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'expected matplotlib for figures, got no .*: pip install "seqjax\['):
        plots.gradient_by_lag(DOWN)


def test_importing_seqjax_imports_no_matplotlib():
    code = "import sys, seqjax, seqjax.plots, seqjax.reports; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
