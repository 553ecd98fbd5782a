"""PPO with a mixture beside PPO with one Gaussian: the same seeds, tasks and frames.

    python benchmarks/ppo_mixture.py run                                   # every cell; resumable cell by cell
    python benchmarks/ppo_mixture.py run --envs Hopper-v5 --learners gaussian marginalized --seeds 1 2 3
    python benchmarks/ppo_mixture.py table

A cell is one training run of 200,000 frames through the command a user types. What it is compared by is the training
return over the whole run: the mean over twenty intervals of 10,000 frames of the mean return of the episodes that
ended in them, which drawn actions earned and no rule of acting distorts. The last policy is judged besides by ten
episodes of each rule, and the rule is chosen on four episodes with other seeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median

from resumable import fill, finished, processor_seconds

from pmoe_lightning import load_policy, make_env
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.evaluation.episodes import evaluate_policy
from pmoe_lightning.evaluation.statistics import student_t_interval

RESULTS = Path(__file__).parent / "results" / "ppo_mixture"
ENVS, FRAMES, INTERVAL = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"), 200_000, 10_000
LEARNERS = {
    "gaussian": ["actor=gaussian", "estimator=pathwise"],
    "marginalized": ["actor=pmoe", "estimator=marginalized"],
    "frequency": ["actor=pmoe", "estimator=frequency"],
}
#: By how many episodes, from which seed, a rule is chosen and judged.
CHOICE, JUDGEMENT = (4, 20_000), (10, 10_000)
RULES = ("mean", "max_weight")


def train(env: str, learner: str, seed: int) -> Path:
    """The checkpoint at the end of one run."""
    folder = (RESULTS.parent / "runs" / f"ppo_mixture-{env}-{learner}-{seed}").resolve()
    words = ["algo=ppo", f"env.id={env}", *LEARNERS[learner], f"seed={seed}", f"total_frames={FRAMES}"]
    words += ["callbacks=minimal", f"callbacks.metrics.every_frames={INTERVAL}", "logger=none", "compile=true"]
    words += ["resume=auto", f"hydra.run.dir={folder}"]
    subprocess.run([sys.executable, "-m", "pmoe_lightning.train", *words], check=True, stdout=subprocess.DEVNULL)
    return folder / "checkpoints" / "last.ckpt"


def judge(content: dict, env: str, rule: str | None, episodes: int, seed: int) -> list[float]:
    """Returns of whole episodes that act by a rule; None draws."""
    policy = load_policy(content) if rule is None else load_policy(content, rule=rule)
    with closing(make_env(env, num_envs=episodes, seed=seed)) as judging:
        found = evaluate_policy(policy, judging, episodes=episodes, seed=seed, sample=rule is None)
    return [round(value, 1) for value in found.returns]


def measure(env: str, learner: str, seed: int) -> dict:
    before = processor_seconds()
    content = read_checkpoint(train(env, learner, seed))
    seconds = processor_seconds() - before
    rules = ("max_weight",) if learner == "gaussian" else RULES  # one component is its own mean
    rows = content["callbacks"]["MetricsLogger"]["episodes"].tolist()
    return {
        **{"env": env, "learner": learner, "seed": seed, "frames": FRAMES, "cpu_seconds": round(seconds)},
        "training": [round(mean_return, 1) for _, mean_return, _ in rows],
        "choice": {rule: judge(content, env, rule, *CHOICE) for rule in rules},
        "returns": {rule: judge(content, env, rule, *JUDGEMENT) for rule in rules},
        "sampled": judge(content, env, None, *JUDGEMENT),
    }


def run(envs: list[str], learners: list[str], seeds: list[int]) -> None:
    """Fill the missing cells, seed by seed, so that an interrupted study compares what it has."""
    for seed, env, learner in product(seeds, envs, learners):
        cell = RESULTS / f"{env}-{learner}-{seed}.json"
        if found := fill(cell, partial(measure, env, learner, seed)):
            print(
                f"{cell.stem}: {fmean(found['training']):.0f} in {found['cpu_seconds']} processor seconds", flush=True
            )


def reported(cell: dict) -> float:
    """Mean return of the episodes that judge, by the rule that was better on the episodes that choose."""
    rule = max(cell["choice"], key=lambda rule: fmean(cell["choice"][rule]))
    return fmean(cell["returns"][rule])


#: What is compared, by name: each is a number of one cell.
MEASURES = {
    "training, whole run": lambda cell: fmean(cell["training"]),
    "training, last fifth": lambda cell: fmean(cell["training"][-len(cell["training"]) // 5 :]),
    "reported, rule chosen": reported,
    "reported, mean": lambda cell: fmean(cell["returns"].get("mean", cell["returns"]["max_weight"])),
    "reported, max_weight": lambda cell: fmean(cell["returns"]["max_weight"]),
    "drawn": lambda cell: fmean(cell["sampled"]),
}


def table() -> None:
    """Mean and median over seeds, and the difference to one Gaussian of the same seed with its 95 % interval (t)."""
    cells = {(cell["env"], cell["learner"], cell["seed"]): cell for cell in finished(RESULTS)}
    print("| task | measure | learner | seeds | mean | median | less one Gaussian, by pairs | of its mean |")
    print("|---|---|---|---|---|---|---|---|")
    for env, (name, value), learner in product(ENVS, MEASURES.items(), LEARNERS):
        values = {key[2]: value(cell) for key, cell in sorted(cells.items()) if key[:2] == (env, learner)}
        pairs = {seed: value(cells[env, "gaussian", seed]) for seed in values if (env, "gaussian", seed) in cells}
        if not values:
            continue
        found = list(values.values())
        row = f"| {env} | {name} | {learner} | {len(found)} | {fmean(found):.0f} | {median(found):.0f} |"
        if learner != "gaussian" and len(pairs) > 1:
            differences = [values[seed] - plain for seed, plain in pairs.items()]
            low, high = student_t_interval(differences)
            row += (
                f" {fmean(differences):+.0f} ({low:+.0f} to {high:+.0f}) | {low / fmean(pairs.values()):+.1%} or more |"
            )
        else:
            row += " | |"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--envs", nargs="+", choices=ENVS, default=list(ENVS))
    runner.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=["gaussian", "marginalized"])
    runner.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 31)))
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.envs, arguments.learners, arguments.seeds)
    else:
        table()


if __name__ == "__main__":
    main()
