"""How many of four equally good goals does a policy keep? Unimodal baselines and every estimator, side by side.

    python benchmarks/multi_goal.py run                     # every learner, five seeds; resumable cell by cell
    python benchmarks/multi_goal.py run --learners gaussian implicit --seeds 1 2
    python benchmarks/multi_goal.py table                   # the table, and multi_goal.png

Each cell trains ``experiment=multi_goal`` once through the command a user types. The policy then starts 400 times from
the origin itself, the one state where all goals tie, and *draws* its actions; a goal counts as kept if at least 5 % of
these episodes end there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from resumable import fill, finished
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning import load_policy, make_env
from pmoe_lightning.envs.multi_goal import GOALS, LIMIT, goals_reached
from pmoe_lightning.estimators import ESTIMATORS

RESULTS = Path(__file__).parent / "results" / "multi_goal"
EPISODES, KEPT, GRID, SHOWN = 400, 0.05, 48, 40
MIXTURE = ["actor=pmoe", "actor.num_components=8"]
LEARNERS = {
    "gaussian": ["actor=gaussian", "estimator=pathwise"],
    "additive_moe": ["actor=additive_moe", "estimator=pathwise"],
    "mcp": ["actor=mcp", "estimator=pathwise"],
    **{name: [*MIXTURE, f"estimator={name}"] for name, made in ESTIMATORS.items() if made.most_components is None},
}


def train(learner: str, seed: int) -> Path:
    """The checkpoint at the end of one run."""
    folder = RESULTS.parent / "runs" / f"multi_goal-{learner}-{seed}"
    words = ["experiment=multi_goal", *LEARNERS[learner], f"seed={seed}", "callbacks=minimal", "logger=none"]
    words += [f"hydra.run.dir={folder}", "resume=auto"]  # a study that was cut goes on
    subprocess.run([sys.executable, "-m", "pmoe_lightning.train", *words], check=True)
    return folder / "checkpoints" / "last.ckpt"


@torch.no_grad()
def judge(checkpoint: Path) -> dict:
    """Goals reached from the origin by sampling, a few of the paths, and the density of the first action."""
    policy = load_policy(checkpoint)
    env = make_env("MultiGoal-v0", num_envs=EPISODES, seed=0, start_deviation=0.0)
    torch.manual_seed(0)
    root, ended = env.reset(), np.zeros(EPISODES, bool)
    goal, paths = np.full(EPISODES, -1), [[[0.0, 0.0]] for _ in range(SHOWN)]
    with set_exploration_type(ExplorationType.RANDOM):
        while not ended.all():
            step, root = env.step_and_maybe_reset(policy(root))
            position, done = step["next", "observation"].numpy(), step["next", "done"].numpy()[:, 0]
            for i in np.flatnonzero(~ended[:SHOWN]):
                paths[i].append(np.round(position[i], 2).tolist())
            now = done & ~ended
            goal[now] = goals_reached(position[now])
            ended |= done
    distribution = policy.get_dist(TensorDict(observation=torch.zeros(1, 2), batch_size=1))
    axis = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    actions = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    density = distribution.log_prob(actions.unsqueeze(-2)).squeeze(-1).exp()
    counts = [int((goal == i).sum()) for i in range(len(GOALS))]
    shown = {
        "goal": goal[:SHOWN].tolist(),
        "paths": paths,
        "density": [[round(v, 3) for v in r] for r in density.tolist()],
    }
    return {"counts": counts, "kept": sum(count >= KEPT * EPISODES for count in counts), **shown}


def run(learners: list[str], seeds: list[int]) -> None:
    """Fill the missing cells."""
    for seed in seeds:
        for learner in learners:
            cell = RESULTS / f"{learner}-{seed}.json"
            if result := fill(cell, partial(measure, learner, seed)):
                print(f"{cell.stem}: kept {result['kept']} of {len(GOALS)}, {result['counts']}", flush=True)


def measure(learner: str, seed: int) -> dict:
    return {"learner": learner, "seed": seed} | judge(train(learner, seed))


def read() -> dict[str, dict[int, dict]]:
    """Finished cells by learner and seed."""
    found: dict[str, dict[int, dict]] = {}
    for learner in LEARNERS:
        for cell in finished(RESULTS, f"{learner}-*.json"):
            found.setdefault(learner, {})[cell["seed"]] = cell
    return found


def table(found: dict[str, dict[int, dict]]) -> None:
    """Goals kept, seed by seed."""
    print("| learner | goals kept, seed by seed | seeds with all four |")
    print("|---|---|---|")
    for learner, cells in found.items():
        kept = [cells[seed]["kept"] for seed in sorted(cells)]
        print(f"| {learner} | {', '.join(map(str, kept))} | {sum(k == len(GOALS) for k in kept)} of {len(kept)} |")


def draw(found: dict[str, dict[int, dict]], path: Path) -> None:
    """One column per learner, its first seed: density of the first action at the origin, and sampled paths."""
    from matplotlib.figure import Figure

    from pmoe_lightning.evaluation.figures import GREY, PALETTE

    figure = Figure(figsize=(2.1 * len(found), 4.9), dpi=100, layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    figure.suptitle(
        "Four equally good goals: density of the first action at the origin, and paths drawn from the policy"
    )
    for (density_axes, path_axes), (learner, cells) in zip(panels.T, found.items(), strict=True):
        cell = cells[min(cells)]
        density_axes.imshow(np.sqrt(cell["density"]), origin="lower", extent=(-1, 1, -1, 1), cmap="viridis")
        density_axes.set_title(learner.replace("_", "\n"), fontsize=9)
        for goal in GOALS:
            path_axes.add_artist(_circle(goal))
        for points, reached in zip(cell["paths"], cell["goal"], strict=True):
            path_axes.plot(
                *np.array(points).T, color=PALETTE[reached] if reached >= 0 else GREY, linewidth=0.8, alpha=0.8
            )
        path_axes.set_xlim(-LIMIT, LIMIT)
        path_axes.set_ylim(-LIMIT, LIMIT)
        path_axes.set_xlabel(f"{cell['kept']} of {len(GOALS)} kept", fontsize=9)
        for axes in (density_axes, path_axes):
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path)


def _circle(goal: np.ndarray):
    from matplotlib.patches import Circle

    return Circle(tuple(goal), 1.0, facecolor="#E3E3E3", edgecolor="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.learners, arguments.seeds)
    else:
        table(read())
        draw(read(), RESULTS / "multi_goal.png")


if __name__ == "__main__":
    main()
