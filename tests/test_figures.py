"""Figures show the numbers they were given and survive the odd cases of a short or broken run."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from pmoe_lightning import figures


def render(figure: Figure) -> None:
    """Layout and drawing problems appear only here; a warning (for example about overlapping axes) is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=40)


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


EPISODES = [[200.0, -1500.0, 1.0], [400.0, -1200.0, 1.0], [600.0, -300.0, 3.0]]
EVALUATIONS = [[0.0, -1400.0, -1600.0, -1200.0], [300.0, -250.0, -300.0, -200.0], [600.0, -400.0, -500.0, -300.0]]


@pytest.mark.parametrize(
    ("episodes", "evaluations"),
    [([], []), (EPISODES[:1], []), ([], EVALUATIONS[:1]), (EPISODES, [[0.0, -5.0, np.nan, np.nan]])],
)
def test_learning_curve_draws_any_part_of_a_run(episodes, evaluations):
    render(figures.learning_curve(episodes, evaluations))


@pytest.mark.parametrize("states", [1, 5])
def test_action_trajectories_show_every_path_and_its_end(states):
    rng = np.random.default_rng(0)
    paths = rng.uniform(-1, 1, (states, 3, 4, 2))
    figure = figures.action_trajectories(rng.normal(size=(states, 6, 6)), paths, np.full(2, -1.0), np.full(2, 1.0))
    render(figure)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == states
    np.testing.assert_allclose(panels[-1].collections[0].get_offsets(), paths[-1, :, -1])
    np.testing.assert_allclose(panels[-1].lines[0].get_xydata(), paths[-1, 0])


def test_learning_curve_marks_nothing_when_no_evaluation_was_finite():
    figure = figures.learning_curve([], [[0.0, np.nan, np.nan, np.nan]])
    render(figure)
    assert not any(label.startswith("best") for label in labels(figure))


def test_trailing_mean_weights_by_count_and_looks_back_only():
    values, counts = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 1.0, 3.0, 1.0])
    np.testing.assert_allclose(figures.trailing_mean(values, counts, 2), [1.0, 1.5, 3.5, 5.0])
    np.testing.assert_allclose(figures.trailing_mean(values, counts, 1), values)


@pytest.mark.parametrize(("rows", "num_components"), [(1, 4), (50, 1), (50, 12)])
def test_mixture_weights_fill_the_axes(rows, num_components):
    weights = np.random.default_rng(0).dirichlet(np.ones(num_components), rows)
    figure = figures.mixture_weights(np.column_stack([np.arange(1, rows + 1) * 1000.0, weights]))
    render(figure)
    assert len(set(labels(figure))) == num_components
    top = figure.axes[0].collections[-1].get_paths()[0].vertices
    assert top[:, 1].max() == pytest.approx(1.0)
    assert np.ptp(top[:, 0]) > 0


@pytest.mark.parametrize(
    ("num_states", "num_components", "action_dim", "spread"),
    [(1, 1, 1, False), (6, 5, 1, True), (1, 5, 2, True), (4, 1, 17, False), (6, 5, 17, True)],
)
def test_component_modes_places_every_component(num_states, num_components, action_dim, spread):
    random = np.random.default_rng(0)
    low, high = np.full(action_dim, -2.0), np.full(action_dim, 0.5)
    modes = random.uniform(-2.0, 0.5, (num_states, num_components, action_dim))
    weights = random.dirichlet(np.ones(num_components), num_states)
    bars = {"lower": modes - 0.1, "upper": modes + 0.1} if spread else {}
    figure = figures.component_modes(modes, weights, low, high, **bars)
    render(figure)
    assert len(labels(figure)) == num_components
    dots = [dot for axes in figure.axes for c in axes.collections if hasattr(c, "get_sizes") for dot in c.get_offsets()]
    assert len(dots) == num_states * num_components
    up = min(1, action_dim - 1)
    offset = {(round(x), np.round(y, 6)): x - round(x) for x, y in np.asarray(dots)}
    placed = {(state, np.round(mode[up], 6)): mode[0] for state in range(num_states) for mode in modes[state]}
    assert offset.keys() == placed.keys()
    if action_dim > 1:  # as far from the middle of the column as the action from the middle of its range
        slopes = [offset[place] / (action + 0.75) for place, action in placed.items()]
        assert slopes == pytest.approx([slopes[0]] * len(slopes)) and slopes[0] > 0


def test_the_first_action_dimension_goes_across_the_column_of_a_state():
    modes = np.array([[[-2.0, 0.3], [0.5, 0.1]], [[-0.75, 0.2], [-1.375, 0.2]]])
    figure = figures.component_modes(modes, np.full((2, 2), 0.5), np.full(2, -2.0), np.full(2, 0.5))
    first, second = (collection.get_offsets() for collection in figure.axes[0].collections)
    (left, middle), (right, between) = first[:, 0], second[:, 0]
    assert -0.5 < left < 0 < right < 0.5 and left == pytest.approx(-right)
    assert middle == pytest.approx(1.0) and between == pytest.approx(1.0 + left / 2)


def test_dot_areas_grow_with_the_weights():
    modes, weights = np.zeros((1, 2, 2)), np.array([[0.9, 0.1]])
    figure = figures.component_modes(modes, weights, -np.ones(2), np.ones(2))
    heavy, light = (collection.get_sizes()[0] for collection in figure.axes[0].collections)
    assert heavy > 3 * light


def test_colours_of_components_are_distinct():
    for num_components in (1, 8, 9, 20):
        assert len({str(color) for color in figures.component_colors(num_components)}) == num_components


def test_no_figure_is_left_in_pyplot():
    from matplotlib import pyplot

    render(figures.learning_curve(EPISODES, EVALUATIONS))
    assert pyplot.get_fignums() == []


def test_sweep_returns_show_every_run_and_the_mean_of_those_that_ended():
    groups = {"frequency": [(1.0, 4.0), (3.0, 3.0), (np.nan, 2.0)], "marginalized": [(np.nan, np.nan)]}
    figure = figures.sweep_returns(groups)
    render(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(groups)
    best, final, mean = axes.collections[:3]
    assert best.get_offsets()[:, 0].tolist() == [4.0, 3.0, 2.0]
    assert final.get_offsets()[:2, 0].tolist() == [1.0, 3.0]
    assert mean.get_segments()[0][:, 0].tolist() == [2.0, 2.0]
    assert labels(figure) == ["best", "final", "final, mean of seeds"]
