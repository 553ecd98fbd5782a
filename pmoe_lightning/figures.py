"""Figures of a run, as pure functions from numbers to matplotlib figures.

No function touches pyplot or any global state, so figures can be drawn in a training process without a display
and from several threads. Save one with ``figure.savefig("curve.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

#: Okabe & Ito (2008): eight colours that stay distinct under the common colour-vision deficiencies.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
GREY = "#7F7F7F"


def component_colors(num_components: int) -> list:
    """Colours of K components: the palette, or an even walk through cividis where the palette is too short."""
    if num_components <= len(PALETTE):
        return list(PALETTE[:num_components])
    return list(colormaps["cividis"](np.linspace(0.0, 1.0, num_components)))


def learning_curve(
    episodes: Sequence[Sequence[float]],
    evaluations: Sequence[Sequence[float]],
    *,
    title: str = "Learning curve",
) -> Figure:
    """Return against environment frames, while training and in evaluation.

    Args:
        episodes: rows (env_frames, mean return, number of episodes), one per logging interval.
        evaluations: rows (env_frames, mean return, low, high); low and high bound the mean with 95 % confidence
            and may be nan.
        title: text above the axes.

    Either may be empty. The line through the training returns is a trailing mean over 5 % of the intervals, at least
    three, weighted by the number of episodes; it looks back only.
    """
    figure, axes = _figure(title, "environment frames", "undiscounted return per episode")
    if len(episodes):
        frames, returns, counts = np.asarray(episodes, dtype=float).T
        axes.scatter(frames, returns, s=11, color=GREY, alpha=0.5, linewidths=0, label="training episodes")
        smooth = trailing_mean(returns, counts, max(3, len(returns) // 20))
        axes.plot(frames, smooth, color=PALETTE[1], linewidth=1.8, label="training, trailing mean")
    if len(evaluations):
        frames, mean, low, high = np.asarray(evaluations, dtype=float).T
        axes.plot(frames, mean, color=PALETTE[0], linewidth=2.2, marker="o", markersize=3.5, label="evaluation, mean")
        axes.fill_between(frames, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label="its 95 % interval")
        _mark_best(axes, frames, mean)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def sweep_returns(
    groups: Mapping[str, Sequence[Sequence[float]]], *, title: str = "Evaluation return of every run of the sweep"
) -> Figure:
    """Final and best evaluation returns of runs, one row per configuration and within it one height per run.

    Args:
        groups: name of the configuration to rows (final, best), one per run; either may be nan.
        title: text above the axes.
    """
    figure, axes = _figure(title, "undiscounted return per episode, mean of the evaluation", "")
    figure.set_size_inches(9.0, 2.0 + 0.5 * len(groups))
    for row, runs in enumerate(groups.values()):
        final, best = np.asarray(runs, dtype=float).T
        heights = row + 0.5 * (np.arange(len(runs)) + 0.5) / len(runs) - 0.25
        drawn = final[np.isfinite(final)]
        axes.scatter(best, heights, s=60, facecolors="none", edgecolors=PALETTE[1], label="best")
        axes.scatter(final, heights, s=28, color=PALETTE[0], label="final")
        axes.vlines(
            drawn.mean() if len(drawn) else [], row - 0.38, row + 0.38, PALETTE[0], label="final, mean of seeds"
        )
    axes.set_yticks(range(len(groups)), labels=list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[:3], names[:3], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def mixture_weights(
    history: Sequence[Sequence[float]], *, title: str = "Mean weight of each mixture component"
) -> Figure:
    """Stacked areas of the mean component weights against environment frames.

    Args:
        history: rows (env_frames, w_1, ..., w_K) with weights that sum to one.
        title: text above the axes.
    """
    figure, axes = _figure(title, "environment frames", "mean weight over recent states")
    table = np.asarray(history, dtype=float)
    frames, weights = table[:, 0], table[:, 1:]
    if len(frames) == 1:  # an area needs two points
        frames, weights = np.array([0.0, max(frames[0], 1.0)]), np.repeat(weights, 2, axis=0)
    num_components = weights.shape[1]
    labels = [f"component {k}" for k in range(num_components)]
    colors = component_colors(num_components)
    axes.stackplot(frames, weights.T, colors=colors, labels=labels, edgecolor="white", linewidth=0.8, alpha=0.9)
    axes.set_xlim(frames[0], frames[-1])
    axes.set_ylim(0.0, 1.0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)  # in the order of the areas
    return figure


def component_modes(
    modes: np.ndarray,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    lower: np.ndarray | None = None,
    upper: np.ndarray | None = None,
    title: str = "Action of each component in a few states (dot area: weight, bars: ± one scale)",
) -> Figure:
    """Where the components of the mixture act in a few states; the area of a dot is the weight of its component.

    Every state has a column. With two or more action dimensions the first goes across the column and the second up;
    with one the components stand side by side. All in one axes: a panel per state takes several times as long to draw.

    Args:
        modes: squashed component modes [S, K, A] for S states.
        weights: component weights [S, K].
        low, high: action bounds [A].
        lower, upper: ends of the drawn spread of each component [S, K, A], for example the squashed loc -/+ scale.
        title: text above the axes.
    """
    num_states, num_components, action_dim = modes.shape
    up = min(1, action_dim - 1)  # the action dimension that goes up
    column = np.arange(num_states)[:, None]
    spread = {} if lower is None else {"vertical": (lower[..., up], upper[..., up])}
    if action_dim == 1:
        figure, axes = _figure(title, "state", "action")
        x = column + np.linspace(-0.2, 0.2, num_components)
    else:
        label = f"state; across its column: action dimension 0, from {low[0]:g} to {high[0]:g}"
        figure, axes = _figure(title, label, "action dimension 1")

        def across(action: np.ndarray) -> np.ndarray:
            return column + 0.86 * ((action[..., 0] - low[0]) / (high[0] - low[0]) - 0.5)

        x = across(modes)
        if lower is not None:
            spread["horizontal"] = (across(lower), across(upper))
    figure.set_size_inches(10.0, 3.8)
    _draw_components(axes, x, modes[..., up], weights, **spread)
    axes.set_xticks(column[:, 0], [str(state + 1) for state in range(num_states)])
    axes.set_xticks(column[1:, 0] - 0.5, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(True, which="minor", color=GREY, linewidth=1.0)
    axes.set_xlim(-0.5, num_states - 0.5)
    _bound_axis(axes.set_ylim, low[up], high[up])
    handles, names = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=min(num_components, 6), frameon=False, fontsize=9
    )
    for handle in legend.legend_handles:
        handle.set_sizes([45.0])
    return figure


def action_trajectories(
    values: np.ndarray,
    paths: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    title: str = "Action value in a few states, and the trajectories of actions over it (dots: where they end)",
) -> Figure:
    """Trajectories of two-dimensional actions over the action value, one panel per state.

    Args:
        values: Q [S, G, G] at the centres of G x G equal cells of the action box; rows are action dimension 1.
        paths: actions [S, N, L + 1, 2], from the draw to where it was evolved to.
        low, high: action bounds [2].
        title: text above the panels.
    """
    columns = min(len(values), 4)
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(1.2 + 2.9 * columns, 0.9 + 2.9 * rows), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(rows, columns, squeeze=False)
    for state, axes in enumerate(panels.flat):
        if state >= len(values):
            axes.set_visible(False)
            continue
        extent = (low[0], high[0], low[1], high[1])
        image = axes.imshow(values[state], origin="lower", extent=extent, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axes, shrink=0.8)
        for path in paths[state]:
            axes.plot(*path.T, color="black", linewidth=2.4, alpha=0.7)
            axes.plot(*path.T, color="white", linewidth=1.0)
        axes.scatter(*paths[state, :, -1].T, s=18, color=PALETTE[3], edgecolors="white", linewidths=0.6, zorder=3)
        axes.set_title(f"state {state + 1}", fontsize=10)
        axes.set_xlabel("action dimension 0")
        axes.set_ylabel("action dimension 1")
        _bound_axis(axes.set_xlim, low[0], high[0])
        _bound_axis(axes.set_ylim, low[1], high[1])
    return figure


def trailing_mean(values: np.ndarray, counts: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values up to each position, each weighted by its count.

    Args:
        values, counts: arrays [n]; counts are positive.
        window: number of positions that enter, fewer at the start.
    """
    total = np.concatenate([[0.0], np.cumsum(values * counts)])
    number = np.concatenate([[0.0], np.cumsum(counts)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (number[end] - number[start])


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.0, 5.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _declutter(axes)
    return figure, axes


def _declutter(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def _mark_best(axes: Axes, frames: np.ndarray, mean: np.ndarray) -> None:
    if not np.isfinite(mean).any():
        return
    best = int(np.nanargmax(mean))
    label = f"best {mean[best]:,.0f} at {frames[best]:,.0f} frames"
    axes.plot(
        frames[best], mean[best], "*", color=PALETTE[3], markersize=15, markeredgecolor="white", zorder=5, label=label
    )


def _draw_components(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    *,
    vertical: tuple[np.ndarray, np.ndarray] | None = None,
    horizontal: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Dots at (x, y) [S, K] with thin bars for the spread of each component."""
    for k, color in enumerate(component_colors(weights.shape[1])):
        bars = {"colors": color, "alpha": 0.45, "linewidth": 1.2, "zorder": 2}
        if vertical is not None:
            axes.vlines(x[:, k], vertical[0][:, k], vertical[1][:, k], **bars)
        if horizontal is not None:
            axes.hlines(y[:, k], horizontal[0][:, k], horizontal[1][:, k], **bars)
        area = 6.0 + 260.0 * weights[:, k]
        axes.scatter(
            x[:, k], y[:, k], s=area, color=color, alpha=0.85, edgecolors="white", linewidths=0.7, zorder=3,
            label=f"component {k}",
        )  # fmt: skip


def _bound_axis(set_limits, low: float, high: float) -> None:
    margin = 0.06 * (high - low)
    set_limits(low - margin, high + margin)
