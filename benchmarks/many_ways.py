"""How many of equally good ways do learners keep, and at what price? One table for SAC with every kind of policy.

    python benchmarks/many_ways.py run                                     # every cell; resumable cell by cell
    python benchmarks/many_ways.py run --tasks MultiGoal-v0 --learners gaussian flow --seeds 1 2
    python benchmarks/many_ways.py table
    python benchmarks/many_ways.py figure                                  # price against modes kept

A cell is one training run of twice the budget of its task, through the command a user types. Its policy is kept at ten
points of the budget and at twice the budget, and each is measured by ``measure_modes``: 400 episodes from the exact
start with drawn actions. What a learner gives up is counted from the best mean return that any cell of the task had
within its budget, drawn or by its rule: so a policy with one way, and no noise, gives up nothing.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean

from resumable import fill, finished, indented, processor_seconds

from pmoe_lightning import make_env
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.policy import build_critics, build_policy, policy_entry
from pmoe_lightning.evaluation.mode_episodes import EPISODES, measure_modes

RESULTS = Path(__file__).parent / "results" / "many_ways"
POINTS, JUDGEMENT_SEED = 10, 3_000_000
#: Of every task: its environment, its budget of frames, and how many modes it has.
TASKS = {
    "MultiGoal-v0": (["env.id=MultiGoal-v0"], 8_000, 4),
    "maze-simple": (["env.id=MultiGoalMaze-v0", "+env.level=simple", "+env.frame_skip=5"], 16_000, 4),
    "maze-medium": (["env.id=MultiGoalMaze-v0", "+env.level=medium", "+env.frame_skip=5"], 32_000, 4),
    "TwoRoutes-v0": (["env.id=TwoRoutes-v0", "+env.frame_skip=5"], 16_000, 2),
}
#: In the mazes 1e-3 is unstable.
RATES = {"MultiGoal-v0": "1e-3"}
GAUSSIAN, MIXTURE = ["actor=gaussian", "estimator=pathwise"], ["actor=pmoe", "actor.num_components=8"]
LATENT_TARGET = math.log(0.8 * math.sqrt(2))  # for two action dimensions, DrAC's of the mazes
LEARNERS = {
    "gaussian": GAUSSIAN,
    "gaussian_0": [*GAUSSIAN, "algo.target_entropy=0"],
    "gaussian_0.5": [*GAUSSIAN, "algo.target_entropy=0.5"],
    "gaussian_1": [*GAUSSIAN, "algo.target_entropy=1"],
    "marginalized": [*MIXTURE, "estimator=marginalized"],
    "frequency": [*MIXTURE, "estimator=frequency"],
    "latent": ["actor=latent", "estimator=pathwise", f"algo.target_entropy={LATENT_TARGET:.4f}"],
    "flow": ["actor=flow", "estimator=pathwise", "compile=false"],  # its splines take minutes to compile
}


def train(task: str, learner: str, seed: int, frames: int) -> list[Path]:
    """The checkpoints at ten points of the budget and at twice the budget: each is the first from there on."""
    environment, *_ = TASKS[task]
    folder = (RESULTS.parent / "runs" / f"many_ways-{task}-{learner}-{seed}-{frames}").resolve()
    words = ["algo=sac", *environment, *LEARNERS[learner], f"algo.lr={RATES.get(task, '3e-4')}", f"seed={seed}"]
    words += ["algo.hidden_sizes=[64,64]", "data.batch_size=128", f"total_frames={2 * frames}"]
    words += [f"data.frames_per_epoch={frames // POINTS}", "callbacks=minimal", "logger=none"]
    point = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": f"{folder}/points"}
    point |= {"filename": "'{epoch:02d}'", "save_top_k": "-1", "save_weights_only": "true"}
    words += [f"+callbacks.points.{key}={value}" for key, value in point.items()]
    words += [f"hydra.run.dir={folder}", "resume=auto"]  # a study that was cut goes on
    subprocess.run([sys.executable, "-m", "pmoe_lightning.train", *words], check=True, stdout=subprocess.DEVNULL)
    kept = {policy_entry(read_checkpoint(path))["env_frames"]: path for path in Path(folder, "points").glob("*.ckpt")}
    due = [frames * i // POINTS for i in range(1, POINTS + 1)] + [2 * frames]
    return [kept[min(at for at in kept if at >= point)] for point in due]


@cache  # the warm-up of random actions may be longer than the first points
def judge(checkpoint: Path, episodes: int) -> dict:
    """What ``measure_modes`` says of the policy of a checkpoint."""
    entry = policy_entry(read_checkpoint(checkpoint))
    environment = entry["description"]["env"]
    report = measure_modes(
        build_policy(entry),
        partial(make_env, environment["id"], **environment["kwargs"]),
        episodes=episodes,
        seed=JUDGEMENT_SEED,
        critics=build_critics(entry),
        alpha=entry["alpha"],
    )
    assert report is not None, "every task here names its modes"
    measures = {name: round(value, 4) for name, value in report.measures.items() if math.isfinite(value)}
    return {"frames": entry["env_frames"], "counts": list(report.counts), **measures}


def measure(task: str, learner: str, seed: int, frames: int, episodes: int) -> dict:
    before = processor_seconds()
    points = train(task, learner, seed, frames)
    head = {"task": task, "learner": learner, "seed": seed, "frames": frames, "episodes": episodes}
    head["cpu_seconds"] = round(processor_seconds() - before)
    return head | {"points": [judge(point, episodes) for point in points]}


def run(
    tasks: list[str], learners: list[str], seeds: list[int], frames: int | None, episodes: int, folder: Path
) -> None:
    """Fill the missing cells, seed by seed, so that an interrupted study compares what it has."""
    for seed, task, learner in product(seeds, tasks, learners):
        budget = frames or TASKS[task][1]
        cell = folder / f"{task}-{learner}-{seed}.json"
        if found := fill(cell, partial(measure, task, learner, seed, budget, episodes), indented):
            *_, at_budget, at_twice = found["points"]
            kept = f"kept {at_budget['kept']:.0f}, at twice the budget {at_twice['kept']:.0f}"
            print(f"{cell.stem}: {kept} of {TASKS[task][2]}, in {found['cpu_seconds']} processor seconds", flush=True)


def read(folder: Path) -> dict[tuple[str, str], dict[int, dict]]:
    """Finished cells by task and learner, then by seed."""
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for cell in finished(folder):
        found.setdefault((cell["task"], cell["learner"]), {})[cell["seed"]] = cell
    order = list(product(TASKS, LEARNERS))
    return {key: dict(sorted(found[key].items())) for key in order if key in found}


def best_return(found: dict[tuple[str, str], dict[int, dict]], task: str) -> float:
    """The best mean return on the task of any cell within its budget: of the draws, or of the rule."""
    points = [p for key, cells in found.items() if key[0] == task for c in cells.values() for p in c["points"][:POINTS]]
    return max(value for p in points for value in (p["return_sampled"], p["return_sampled"] - p["price"]))


def table(folder: Path) -> None:
    """Kept, success, score, drawn return and what is given up, seed by seed, at the budget and at twice the budget."""
    found = read(folder)
    names = "kept at ten points and at twice the budget"
    print(
        f"| task | learner | seed | {names} | success | score | drawn return | given up | price | alpha | gap / alpha |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (task, learner), cells in found.items():
        best = best_return(found, task)
        for seed, cell in cells.items():
            *points, twice = cell["points"]
            kept = " ".join(f"{point['kept']:.0f}" for point in points) + f", {twice['kept']:.0f}"
            pairs = [(points[-1].get(name), twice.get(name)) for name in ("success", "score", "return_sampled")]
            pairs += [tuple(best - point["return_sampled"] for point in (points[-1], twice))]
            pairs += [(points[-1].get(name), twice.get(name)) for name in ("price", "alpha", "gap_over_alpha")]
            said = [", ".join("-" if value is None else f"{value:.2f}" for value in pair) for pair in pairs]
            print(f"| {task} | {learner} | {seed} | {kept} | {' | '.join(said)} |")
    print("\n| task | learner | seeds that keep all, at the budget | at twice | mean given up, at the budget |")
    print("|---|---|---|---|---|")
    for (task, learner), cells in found.items():
        modes, best = TASKS[task][2], best_return(found, task)
        number, twice = (sum(cell["points"][i]["kept"] == modes for cell in cells.values()) for i in (POINTS - 1, -1))
        lost = fmean(best - cell["points"][POINTS - 1]["return_sampled"] for cell in cells.values())
        print(f"| {task} | {learner} | {number} of {len(cells)} | {twice} of {len(cells)} | {lost:.2f} |")


def figure(folder: Path, path: Path) -> None:
    """Price against modes kept: a panel for each task, a point for each seed at its budget."""
    from matplotlib.figure import Figure

    found = read(folder)
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    page = Figure(figsize=(max(9.0, 3.4 * len(tasks)), 4.6), dpi=100, layout="constrained")
    for axes, task in zip(page.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        best = best_return(found, task)
        for i, learner in enumerate(LEARNERS):
            points = [cell["points"][POINTS - 1] for cell in found.get((task, learner), {}).values()]
            kept = [point["kept"] + 0.06 * (i - len(LEARNERS) / 2) for point in points]  # so that none hides another
            lost = [best - point["return_sampled"] for point in points]
            axes.scatter(kept, lost, s=28, color=f"C{i}", label=learner, alpha=0.8)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("modes kept")
        axes.set_xticks(range(TASKS[task][2] + 1))
        axes.invert_yaxis()
    axes = page.axes[0]
    axes.set_ylabel("given up: best return less that of the draws")
    page.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(LEARNERS), fontsize=8)
    page.suptitle("Price against modes kept: all ways at no cost is the upper right corner")
    page.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    runner.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    runner.add_argument("--frames", type=int, help="another budget, for all tasks")
    runner.add_argument("--episodes", type=int, default=EPISODES)
    commands.add_parser("table")
    commands.add_parser("figure")
    arguments = parser.parse_args()
    if arguments.command == "run":
        given = (arguments.tasks, arguments.learners, arguments.seeds, arguments.frames, arguments.episodes)
        run(*given, arguments.results)
    elif arguments.command == "table":
        table(arguments.results)
    else:
        figure(arguments.results, arguments.results / "many_ways.png")


if __name__ == "__main__":
    main()
