"""Figures of many ways: what a policy draws first, where its paths lead, and how many modes it keeps over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import EngFormatter, MaxNLocator

from pmoe_lightning.evaluation.figures import GREY, PALETTE, component_colors


def drawn_ways(
    picture: np.ndarray,
    plane: Sequence[float],
    paths: Sequence[np.ndarray],
    ended_in: Sequence[int],
    *,
    num_modes: int,
    density: np.ndarray | None = None,
    low: Sequence[float] = (-1.0, -1.0),
    high: Sequence[float] = (1.0, 1.0),
    title: str = "Where drawn actions lead",
) -> Figure:
    """Density of the first action, and drawn paths over the map, in the colour of the mode in which each ended.

    Args:
        picture: the map, uint8 [H, W, 3].
        plane: (left, right, bottom, top) of the picture.
        paths: positions [T_i, 2] along every episode.
        ended_in: the mode of every episode, -1 for none.
        num_modes: N.
        density: of the first action [G, G] over the action box, rows are dimension 1; no panel without it.
        low, high: action bounds [2].
        title: text above the panels.
    """
    left, right, bottom, top = plane
    panels = 1 if density is None else 2
    width = 4.6 * (right - left) / (top - bottom)
    figure = Figure(figsize=(width + 4.6 * (panels - 1) + 0.4, 5.6), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if density is not None:
        _draw_density(axes[0], density, low, high)
    _draw_paths(axes[-1], picture, plane, paths, ended_in, num_modes)
    counts = [list(ended_in).count(mode) for mode in range(num_modes)]
    colors = component_colors(num_modes)
    lines = [Line2D([], [], color=color, linewidth=2.0) for color in colors]
    names = [f"mode {mode}: {count}" for mode, count in enumerate(counts)]
    if missed := len(ended_in) - sum(counts):
        lines, names = [*lines, Line2D([], [], color=GREY, linewidth=2.0)], [*names, f"none: {missed}"]
    figure.legend(lines, names, loc="outside lower center", ncols=5 if panels > 1 else 3, frameon=False, fontsize=9)
    return figure


def modes_over_frames(
    frames: Sequence[float],
    measures: Mapping[str, Sequence[float]],
    *,
    num_modes: int,
    title: str = "Modes kept over the run",
) -> Figure:
    """Modes kept, and below their score, success and balance, against environment frames.

    Args:
        frames: of every measurement, [n].
        measures: values [n] by name; ``kept``, ``score``, ``success`` and ``balance`` are drawn, nan where unknown.
        num_modes: N.
        title: text above the panels.
    """
    figure = Figure(figsize=(9.0, 6.0), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(frames, measures["kept"], color=PALETTE[0], linewidth=2.0, marker="o", markersize=5, clip_on=False)
    above.set_ylim(0, num_modes)
    above.set_ylabel(f"modes kept, of {num_modes}")
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    for name, color, marker in zip(("success", "score", "balance"), PALETTE[1:], "s^D", strict=False):
        below.plot(
            frames, measures[name], color=color, linewidth=1.8, marker=marker, markersize=4, label=name, clip_on=False
        )
    below.set_ylim(0.0, 1.0)
    below.set_ylabel("of drawn episodes")
    below.set_xlabel("environment frames")
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#E3E3E3", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_density(axes: Axes, density: np.ndarray, low: Sequence[float], high: Sequence[float]) -> None:
    """The square root, so that modes of small weight are seen beside sharp ones."""
    extent = (low[0], high[0], low[1], high[1])
    axes.imshow(np.sqrt(density), origin="lower", extent=extent, cmap="viridis", vmin=0.0)
    axes.set_title("density of the first action (square root)", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("action dimension 0")
    axes.set_ylabel("action dimension 1")


def _draw_paths(
    axes: Axes,
    picture: np.ndarray,
    plane: Sequence[float],
    paths: Sequence[np.ndarray],
    ended_in: Sequence[int],
    num_modes: int,
) -> None:
    left, right, bottom, top = plane
    axes.imshow(picture, extent=(left, right, bottom, top))
    colors = component_colors(num_modes)
    for path, mode in zip(paths, ended_in, strict=True):
        axes.plot(*path.T, color=colors[mode] if mode >= 0 else GREY, linewidth=0.9, alpha=0.75)
    axes.add_artist(Circle(tuple(paths[0][0]), 0.025 * (plane[1] - plane[0]), color="black", zorder=3))
    axes.set_xlim(plane[0], plane[1])
    axes.set_ylim(plane[2], plane[3])
    axes.set_title(f"{len(paths)} paths of drawn actions (dot: start)", fontsize=10)
    axes.set_xlabel("x")
    axes.set_ylabel("y")
