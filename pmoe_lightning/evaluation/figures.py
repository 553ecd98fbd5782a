"""Figures of a run, as pure functions from numbers to matplotlib figures.

No function touches pyplot or any global state, so figures can be drawn in a training process without a display
and from several threads. Save one with ``figure.savefig("curve.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

#: Okabe & Ito (2008): eight colours that stay distinct under the common colour-vision deficiencies.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
GREY = "#7F7F7F"
_OVER_SEEDS = "its 95 % interval over seeds (Student's t)"


def component_colors(num_components: int) -> list:
    """Colours of K components: the palette, or an even walk through cividis where the palette is too short."""
    if num_components <= len(PALETTE):
        return list(PALETTE[:num_components])
    return list(colormaps["cividis"](np.linspace(0.0, 1.0, num_components)))


def learning_curve(
    episodes: Sequence[Sequence[float]],
    evaluations: Sequence[Sequence[float]],
    *,
    rule: str | None = None,
    title: str = "Learning curve",
) -> Figure:
    """Return against environment frames, while training and in evaluation.

    Args:
        episodes: rows (env_frames, mean return, number of episodes), one per logging interval.
        evaluations: rows (env_frames, mean return, low, high); low and high bound the mean with 95 % confidence
            and may be nan.
        rule: how the mixture acted in the evaluations, for the legend.
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
        judged = "evaluation, mean" if rule is None else f"evaluation by rule {rule}, mean"
        axes.plot(frames, mean, color=PALETTE[0], linewidth=2.2, marker="o", markersize=3.5, label=judged)
        interval = "its 95 % interval over episodes"
        axes.fill_between(frames, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label=interval)
        _mark_best(axes, frames, mean)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def sweep_returns(
    groups: Mapping[str, Sequence[Sequence[float]]],
    intervals: Mapping[str, tuple[float, float]],
    *,
    title: str = "Evaluation return of every run of the sweep",
) -> Figure:
    """Final and best evaluation returns of runs, one row per configuration and within it one height per run.

    Args:
        groups: name of the configuration to rows (final, best), one per run; either may be nan.
        intervals: name of the configuration to the 95 % interval of its mean final return over runs; nan where there
            is none.
        title: text above the axes.
    """
    figure, axes = _figure(title, "undiscounted return per episode, mean of the evaluation", "")
    figure.set_size_inches(9.0, 2.0 + 0.6 * len(groups))
    for row, (name, runs) in enumerate(groups.items()):
        final, best = np.asarray(runs, dtype=float).T
        heights = row + 0.4 * (np.arange(len(runs)) + 0.5) / len(runs) - 0.3
        drawn = final[np.isfinite(final)]
        axes.scatter(best, heights, s=60, facecolors="none", edgecolors=PALETTE[1], label="best of a run")
        axes.scatter(final, heights, s=28, color=PALETTE[0], label="last of a run")
        mean, low, high = (drawn.mean(), *intervals[name]) if len(drawn) else (np.nan,) * 3
        axes.plot(mean, row + 0.26, "D", color=PALETTE[3], markersize=6, label="mean of the last")
        axes.plot([low, high], [row + 0.26] * 2, "|-", color=PALETTE[3], markersize=10, linewidth=2, label=_OVER_SEEDS)
    axes.set_yticks(range(len(groups)), labels=list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(False, axis="y")
    for border in range(1, len(groups)):
        axes.axhline(border - 0.5, color="#E3E3E3", linewidth=0.8)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[:4], names[:4], loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def mixture_weights(
    weights: Sequence[Sequence[float]],
    heaviest: Sequence[Sequence[float]],
    router_entropy: Sequence[float],
    *,
    title: str = "How the mixture shares states between its components",
) -> Figure:
    """Mean weights, who leads where, and how much the choice of a component depends on the state.

    A router that ignores the state and one that gives every state to one component can have the same mean weights. The
    second panel and the third tell them apart.

    Args:
        weights: rows (env_frames, w_1, ..., w_K): the mean weights over a batch of states, which sum to one.
        heaviest: rows (h_1, ..., h_K): the shares of these states in which a component has the largest weight.
        router_entropy: mean entropy of the weights in a state, in nats.
        title: text above the axes.

    The last two are nan where they were not measured.
    """
    table, shares, entropy = (np.asarray(values, dtype=float) for values in (weights, heaviest, router_entropy))
    frames, mean = table[:, 0], table[:, 1:]
    if len(frames) == 1:  # an area needs two points
        frames = np.array([0.0, max(frames[0], 1.0)])
        mean, shares, entropy = (np.repeat(values, 2, axis=0) for values in (mean, shares, entropy))
    figure = Figure(figsize=(9.0, 8.0), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(2, 2, 1.5))
    legend = _stack_components(panels[0], frames, mean, "mean weight")
    measured = np.isfinite(shares).all(1)
    _stack_components(panels[1], frames[measured], shares[measured], "share of states where it\nhas the largest weight")
    _draw_information(panels[2], frames, mean, entropy)
    panels[2].set_xlabel("environment frames")
    panels[2].set_xlim(frames[0], frames[-1])
    panels[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*legend, loc="outside right upper", frameon=False)
    return figure


def component_modes(
    modes: np.ndarray,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    states: Sequence[str] | None = None,
    acting: np.ndarray | None = None,
    lower: np.ndarray | None = None,
    upper: np.ndarray | None = None,
    title: str = "What each component would do",
) -> Figure:
    """What the components of a mixture would do in a few states: a column per state, a row per action dimension.

    Within a column the components stand side by side; the area of a dot is the weight of its component, a bar its
    spread, and a ring marks the one that acts. Of many action dimensions the four are drawn in which the components
    differ most.

    Args:
        modes: squashed component modes [S, K, A] for S states.
        weights: component weights [S, K].
        low, high: action bounds [A].
        states: what to call the states; they are numbered otherwise.
        acting: the component that acts in each state [S], or nothing where that is not known.
        lower, upper: ends of the drawn spread of each component [S, K, A], for example the squashed loc -/+ scale.
        title: text above the panels.
    """
    num_states, num_components, action_dim = modes.shape
    dimensions = _telling_dimensions(modes, weights, high - low)
    if len(dimensions) < action_dim:
        title += f"\n(the {len(dimensions)} of {action_dim} action dimensions in which they differ most)"
    figure = Figure(figsize=(11.0, 1.6 + 1.5 * len(dimensions)), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(len(dimensions), 1, sharex=True, squeeze=False)[:, 0]
    column = np.arange(num_states)[:, None]
    x = column + np.linspace(-0.3, 0.3, num_components) if num_components > 1 else column.astype(float)
    for axes, d in zip(panels, dimensions, strict=True):
        _declutter(axes)
        spread = None if lower is None or upper is None else (lower[..., d], upper[..., d])
        _draw_components(axes, x, modes[..., d], weights, spread, acting)
        axes.set_ylabel(f"action {d}" if action_dim > 1 else "action")
        axes.grid(False, axis="x")
        for border in column[1:, 0] - 0.5:
            axes.axvline(border, color="#D0D0D0", linewidth=1.0)
        _bound_axis(axes.set_ylim, low[d], high[d])
    panels[-1].set_xlim(-0.5, num_states - 0.5)
    panels[-1].set_xticks(column[:, 0], states or [f"state {state + 1}" for state in range(num_states)])
    _explain_components(figure, panels[0], spread=lower is not None, acting=acting is not None)
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


def _stack_components(axes: Axes, frames: np.ndarray, shares: np.ndarray, label: str) -> tuple[list, list[str]]:
    """Shares [n, K] as areas upon each other; returns handles and names in the order of the areas from the top."""
    num_components = shares.shape[1]
    names = [f"component {k}" for k in range(num_components)]
    colors = component_colors(num_components)
    areas = axes.stackplot(frames, shares.T, colors=colors, labels=names, edgecolor="white", linewidth=0.8, alpha=0.9)
    _declutter(axes)
    axes.set_ylabel(label)
    axes.set_ylim(0.0, 1.0)
    return areas[::-1], names[::-1]


def _draw_information(axes: Axes, frames: np.ndarray, mean: np.ndarray, entropy: np.ndarray) -> None:
    """Mutual information of state and component, H(mean w) - mean H(w), below its bound log K."""
    safe = np.clip(mean, 1e-12, 1.0)
    information = -(safe * np.log(safe)).sum(1) - entropy
    axes.plot(frames, np.maximum(information, 0.0), color=PALETTE[3], linewidth=2.0)
    bound = np.log(mean.shape[1])
    axes.axhline(bound, color=GREY, linestyle="--", linewidth=1.0)
    said = f"log {mean.shape[1]}: each state has one component, all are used" if bound else "one component"
    axes.annotate(said, (1.0, bound), (-2, -3), axes.get_yaxis_transform(), "offset points", ha="right", va="top",
                  fontsize=8, color=GREY)  # fmt: skip
    _declutter(axes)
    axes.set_ylabel("specialisation:\nI(state; component),\nnats (0: none)")
    axes.set_ylim(0.0, 1.08 * bound if bound else 1.0)


def _telling_dimensions(modes: np.ndarray, weights: np.ndarray, span: np.ndarray, at_most: int = 4) -> np.ndarray:
    """The action dimensions in which the modes [S, K, A] differ most, by weighted standard deviation; in order."""
    mean = (weights[..., None] * modes).sum(1, keepdims=True)
    deviation = np.sqrt((weights[..., None] * (modes - mean) ** 2).sum(1)).mean(0) / span
    return np.sort(np.argsort(-deviation, kind="stable")[:at_most])


def _draw_components(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    spread: tuple[np.ndarray, np.ndarray] | None,
    acting: np.ndarray | None,
) -> None:
    """Dots at (x, y) [S, K] with thin bars for the spread of each component, and a ring around the acting one."""
    for k, color in enumerate(component_colors(weights.shape[1])):
        if spread is not None:
            axes.vlines(x[:, k], spread[0][:, k], spread[1][:, k], colors=color, alpha=0.45, linewidth=2.0, zorder=2)
        axes.scatter(
            x[:, k], y[:, k], s=_dot_area(weights[:, k]), color=color, alpha=0.85, edgecolors="white", linewidths=0.7,
            zorder=3, label=f"component {k}",
        )  # fmt: skip
    if acting is not None:
        rows = np.arange(len(x))
        axes.scatter(
            x[rows, acting], y[rows, acting], s=_dot_area(weights[rows, acting]) + 90.0, facecolors="none",
            edgecolors="black", linewidths=1.4, zorder=4,
        )  # fmt: skip


def _dot_area(weight: Any) -> Any:
    """In square points, of one weight or of an array."""
    return 10.0 + 200.0 * weight


def _explain_components(figure: Figure, axes: Axes, *, spread: bool, acting: bool) -> None:
    """The legend: colours, and what area, bar and ring mean."""
    handles, names = axes.get_legend_handles_labels()
    colours = figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    for handle in colours.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([45.0])
    dots = [Line2D([], [], linestyle="", marker="o", color=GREY, markersize=_dot_area(w) ** 0.5) for w in (0.1, 0.9)]
    signs = {"weight 0.1": dots[0], "weight 0.9": dots[1]}
    if spread:
        signs["± one standard deviation"] = Line2D([], [], color=GREY, alpha=0.6, linewidth=2.0)
    if acting:
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.4}
        signs["the component that acts"] = Line2D([], [], linestyle="", marker="o", markersize=11, **ring)
    figure.legend(
        list(signs.values()), list(signs), loc="outside lower center", ncols=len(signs), frameon=False, fontsize=9
    )


def _bound_axis(set_limits, low: float, high: float) -> None:
    margin = 0.06 * (high - low)
    set_limits(low - margin, high + margin)
