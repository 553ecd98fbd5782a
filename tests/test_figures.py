"""Figures show the numbers they were given and survive the odd cases of a short or broken run."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from pmoe_lightning.evaluation import figures


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


def test_learning_curve_names_the_rule():
    assert "evaluation by rule best_value, mean" in labels(figures.learning_curve([], EVALUATIONS, rule="best_value"))
    assert "evaluation, mean" in labels(figures.learning_curve([], EVALUATIONS))


@pytest.mark.parametrize(("rows", "num_components"), [(1, 4), (50, 1), (50, 12)])
def test_mixture_weights_fill_the_axes(rows, num_components):
    weights = np.random.default_rng(0).dirichlet(np.ones(num_components), rows)
    frames = np.arange(1, rows + 1) * 1000.0
    figure = figures.mixture_weights(np.column_stack([frames, weights]), weights, np.zeros(rows))
    render(figure)
    assert len(set(labels(figure))) == num_components
    for axes in figure.axes[:2]:
        top = axes.collections[-1].get_paths()[0].vertices
        assert top[:, 1].max() == pytest.approx(1.0)
        assert np.ptp(top[:, 0]) > 0


def test_specialisation_tells_equal_mean_weights_apart():
    """The same mean weights: of a router that ignores the state, then of one that gives each state to one component."""
    weights, heaviest = [[1000.0, 0.5, 0.5], [2000.0, 0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]
    figure = figures.mixture_weights(weights, heaviest, [np.log(2), 0.0])
    render(figure)
    _, leads, specialisation = figure.axes
    np.testing.assert_allclose(specialisation.lines[0].get_ydata(), [0.0, np.log(2)], atol=1e-9)
    assert specialisation.lines[1].get_ydata()[0] == pytest.approx(np.log(2))  # its bound
    assert {1.0, 0.5} <= set(leads.collections[0].get_paths()[0].vertices[:, 1])


def test_what_was_not_measured_is_not_drawn():
    nothing = [[np.nan, np.nan], [0.3, 0.7]]
    figure = figures.mixture_weights([[1000.0, 0.5, 0.5], [2000.0, 0.3, 0.7]], nothing, [np.nan, 0.1])
    render(figure)
    figure = figures.mixture_weights([[1000.0, 0.5, 0.5]], nothing[:1], [np.nan])
    render(figure)


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
    shown = labels(figure)
    assert shown[:num_components] == [f"component {k}" for k in range(num_components)]
    assert ("± one standard deviation" in shown) == spread and "the component that acts" not in shown
    assert len(figure.axes) == min(action_dim, 4)
    for axes in figure.axes:
        d = int(axes.get_ylabel().split()[1]) if action_dim > 1 else 0
        dots = [collection.get_offsets() for collection in axes.collections if hasattr(collection, "get_sizes")]
        assert len(dots) == num_components
        for k, offsets in enumerate(np.asarray(dots)):
            np.testing.assert_array_equal(offsets[:, 0].round(), np.arange(num_states))
            np.testing.assert_allclose(offsets[:, 1], modes[:, k, d])


def test_the_action_dimensions_in_which_components_differ_most_are_drawn():
    modes = np.zeros((3, 2, 6))
    modes[:, 0, [5, 1, 2, 4]] = [1.0, 0.5, 0.4, 0.3]
    modes[:, 0, 0] = 0.8  # of a range ten times as wide
    high = np.array([10.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    figure = figures.component_modes(modes, np.full((3, 2), 0.5), -high, high)
    render(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["action 1", "action 2", "action 4", "action 5"]
    assert "4 of 6 action dimensions" in figure.get_suptitle()


def test_states_are_named_and_the_acting_component_is_ringed():
    modes = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]])
    states, acting = ["step 0", "step 99"], np.array([1, 0])
    figure = figures.component_modes(
        modes, np.full((2, 2), 0.5), -np.ones(2), np.ones(2), states=states, acting=acting, title="On the way"
    )
    render(figure)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == states
    assert figure.get_suptitle() == "On the way" and "the component that acts" in labels(figure)
    for d, axes in enumerate(figure.axes):
        first, second, ring = (collection.get_offsets() for collection in axes.collections)
        np.testing.assert_allclose(ring, [second[0], first[1]])
        np.testing.assert_allclose(ring[:, 1], modes[[0, 1], acting, d])


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


def test_sweep_returns_show_every_run_and_the_interval_over_seeds():
    groups = {"frequency": [(1.0, 4.0), (3.0, 3.0), (np.nan, 2.0)], "marginalized": [(np.nan, np.nan)]}
    intervals = {"frequency": (-10.7, 14.7), "marginalized": (np.nan, np.nan)}
    figure = figures.sweep_returns(groups, intervals)
    render(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(groups)
    best, final = axes.collections[:2]
    assert best.get_offsets()[:, 0].tolist() == [4.0, 3.0, 2.0]
    assert final.get_offsets()[:2, 0].tolist() == [1.0, 3.0]
    mean, interval = axes.lines[:2]
    assert mean.get_xdata().tolist() == [2.0] and list(interval.get_xdata()) == [-10.7, 14.7]
    said = ["best of a run", "last of a run", "mean of the last", "its 95 % interval over seeds (Student's t)"]
    assert labels(figure) == said
