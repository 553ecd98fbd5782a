"""The figures of the estimator laboratory, from the rows of its CSV file."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pmoe_lightning.evaluation.figures import GREY, PALETTE

GROUPS = ("router", "loc", "scale")
#: One colour per family, one line style and marker per variant of it.
FAMILIES = {
    "marginalized": PALETTE[0],
    "implicit": PALETTE[4],
    "half_reparameterized": PALETTE[2],
    "score_function": PALETTE[7],
    "gumbel_softmax": PALETTE[1],
    "frequency": PALETTE[3],
    "pathwise": GREY,
}
STYLES, MARKERS = ("-", "--", ":"), ("o", "s", "^")

Row = dict[str, str]


def draw_all(rows: list[Row], num_components: int, action_dim: int) -> dict[str, Figure]:
    """Every figure by name; where one of K and A is fixed, it is to these."""
    K, A = str(num_components), str(action_dim)
    figures = {"bias": bias_by_objective(rows, K, A)}
    figures["noise_by_action_dim"] = noise_along(rows, "A", "action dimensions", lambda row: row["K"] == K)
    figures["noise_by_components"] = noise_along(rows, "K", "components", lambda row: row["A"] == A)
    if any(row["objective"] == "critic" for row in rows):
        figures["critic"] = noise_against_time(rows)
    return figures


def bias_by_objective(rows: list[Row], num_components: str, action_dim: str) -> Figure:
    """Relative bias of every estimator for every objective; grey where it is within two standard errors of zero."""
    rows = [row for row in rows if (row["K"], row["A"]) == (num_components, action_dim) and row["group"] in GROUPS]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    objectives = [name for name in dict.fromkeys(row["objective"] for row in rows) if name != "critic"]
    figure = Figure(figsize=(13.0, 0.9 + 0.42 * len(names)), dpi=100, layout="constrained")
    figure.suptitle(
        f"Relative bias |E g - exact| / |exact|, K = {num_components}, A = {action_dim} (grey: not told from zero)"
    )
    for axes, group in zip(figure.subplots(1, 3, sharey=True), GROUPS, strict=True):
        values, shown = np.full((2, len(names), len(objectives)), math.nan)
        for row in rows:
            if row["group"] == group and row["objective"] in objectives:
                at = names.index(row["estimator"]), objectives.index(row["objective"])
                shown[at] = bias = float(row["relative_bias"])
                values[at] = bias if bias > 2 * float(row["standard_error"]) else math.nan
        axes.set_facecolor("#EDEDED")
        axes.imshow(np.log10(np.maximum(values, 1e-2)), cmap="OrRd", vmin=-1.3, vmax=1.0, aspect="auto")
        for (i, j), bias in np.ndenumerate(shown):
            told = not math.isnan(values[i, j])
            color = "white" if told and bias > 2 else "black" if told else GREY
            axes.text(j, i, f"{bias:.2g}", ha="center", va="center", fontsize=8, color=color)
        axes.set_title(group, fontsize=11)
        axes.set_xticks(range(len(objectives)), [name.replace("_", "\n") for name in objectives], fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.tick_params(length=0)
    return figure


def noise_along(rows: list[Row], key: str, label: str, chosen: Callable[[Row], bool]) -> Figure:
    """Signal-to-noise of one estimate on the smooth bimodal objective, against K or A."""
    figure = Figure(figsize=(13.0, 5.4), dpi=100, layout="constrained")
    figure.suptitle(f"Signal-to-noise |E g| / sqrt(tr Var g) of one estimate, smooth bimodal objective, by {label}")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["objective"] == "smooth_bimodal" and row["group"] == group and chosen(row):
                lines.setdefault(row["estimator"], []).append((int(row[key]), float(row["signal_to_noise"])))
        for name, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            color, style, marker = _look(name, list(lines))
            axes.plot(x, np.maximum(y, 1e-3), style, color=color, marker=marker, markersize=5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
        axes.set_title(group, fontsize=11)
        axes.set_xlabel(label)
        _declutter(axes)
    panels[0].set_ylabel("signal-to-noise (higher is better)")
    _legend(figure)
    return figure


def noise_against_time(rows: list[Row]) -> Figure:
    """What an actor step costs and what it brings, with the critics of a real run; a hollow marker is a biased one."""
    times = {row["estimator"]: float(row["relative_time"]) for row in rows if row["objective"] == "time"}
    figure = Figure(figsize=(13.0, 5.4), dpi=100, layout="constrained")
    figure.suptitle(
        "SAC's critics on HalfCheetah-v5: signal-to-noise of one estimate against the time of an actor step"
    )
    panels = figure.subplots(1, 3, sharex=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        found = [row for row in rows if row["objective"] == "critic" and row["group"] == group]
        for row in found:
            name = row["estimator"]
            biased = float(row["relative_bias"]) > max(0.1, 3 * float(row["standard_error"]))
            color, _, marker = _look(name, [row["estimator"] for row in found])
            face = "none" if biased else color
            signal = max(float(row["signal_to_noise"]), 1e-3)
            axes.scatter(
                times[name], signal, s=80, marker=marker, facecolors=face, edgecolors=color, linewidths=1.8, label=name
            )
        axes.set_yscale("log")
        axes.set_title(group, fontsize=11)
        axes.set_xlabel("time of an actor step, unimodal = 1")
        _declutter(axes)
    panels[0].set_ylabel("signal-to-noise (hollow: biased)")
    _legend(figure)
    return figure


def _look(name: str, names: list[str]) -> tuple[str, str, str]:
    """Colour, line style and marker of an estimator."""
    family = name.split(" ")[0]
    variant = [other for other in names if other.split(" ")[0] == family].index(name) % len(STYLES)
    return FAMILIES[family], STYLES[variant], MARKERS[variant]


def _legend(figure: Figure) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _declutter(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
