"""SAC's critics compared by learning: plain, CrossQ's and with layer normalisation, for one Gaussian and a mixture.

    python benchmarks/critics.py run                                     # every cell; resumable cell by cell
    python benchmarks/critics.py run --envs HalfCheetah-v5 --learners gaussian_crossq --seeds 1 2 --frames 15000
    python benchmarks/critics.py table

A cell is one training run through the command a user types, with the defaults of its critic. After so many frames it is
judged by ten deterministic episodes with seeds of their own, and by the area under the curve: the mean over intervals
of 2,500 frames of the mean training return of the episodes that ended in them. The longer of two cells goes on where
the shorter one ended, which is the run that was longer from the start. Processor seconds are those of the whole
command, compiling included, so that a busy neighbour counts for little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median

from resumable import fill, finished, indented, processor_seconds

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.evaluation.statistics import student_t_interval

RESULTS = Path(__file__).parent / "results" / "critics"
RUNS = RESULTS.parent / "runs"
ENVS, FRAMES, INTERVAL = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"), (15_000, 50_000), 2_500
EPISODES, EVALUATION_SEED = 10, 10_000
ACTORS = {"gaussian": ["actor=gaussian", "estimator=pathwise"], "pmoe": ["actor=pmoe", "estimator=marginalized"]}
CRITICS = {
    "plain": ["critic=plain"],
    "crossq": ["critic=crossq"],
    "layer_norm": ["critic=layer_norm", "algo.lr=1e-3", "data.normalize_observation=true"],
}
LEARNERS = {f"{actor}_{critic}": [*ACTORS[actor], *CRITICS[critic]] for actor, critic in product(ACTORS, CRITICS)}


def command(module: str, *words: str) -> str:
    """What the command prints."""
    return subprocess.run([sys.executable, "-m", module, *words], check=True, capture_output=True, text=True).stdout


def measure(env: str, learner: str, seed: int, frames: int) -> dict:
    folder = (RUNS / f"critics-{env}-{learner}-{seed}").resolve()
    last, before = folder / "checkpoints" / "last.ckpt", processor_seconds()
    words = ["algo=sac", f"env.id={env}", *LEARNERS[learner], f"seed={seed}", f"total_frames={frames}"]
    words += ["callbacks=minimal", f"callbacks.metrics.every_frames={INTERVAL}", "logger=none", "compile=true"]
    words += ["resume=auto", f"hydra.run.dir={folder}"]
    command("pmoe_lightning.train", *words)
    seconds = processor_seconds() - before
    judge = [f"checkpoint={last}", f"episodes={EPISODES}", f"seed={EVALUATION_SEED}", "video=false", "--json"]
    judged = json.loads(command("pmoe_lightning.evaluate", *judge))
    head = {"env": env, "learner": learner, "seed": seed, "frames": frames, "cpu_seconds": round(seconds, 1)}
    rows = read_checkpoint(last)["callbacks"]["MetricsLogger"]["episodes"].tolist()
    return head | {
        "mean": judged["mean"],
        "returns": judged["returns"],
        "training": [[int(at), round(mean_return, 1)] for at, mean_return, _ in rows],
    }


def run(envs: list[str], learners: list[str], seeds: list[int], frames: list[int]) -> None:
    """Fill the missing cells, seed by seed, so that an interrupted study compares what it has."""
    for seed, env, learner, number in product(seeds, envs, learners, sorted(frames)):
        cell = RESULTS / f"{env}-{learner}-{seed}-{number}.json"
        if found := fill(cell, partial(measure, env, learner, seed, number), indented):
            print(f"{cell.stem}: {found['mean']:.0f} in {found['cpu_seconds']:.0f} processor seconds", flush=True)


def table() -> None:
    """Every seed, median, mean and its 95 % interval over seeds (Student's t), and the median area under the curve."""
    found: dict[tuple[str, int, str], dict[int, dict]] = {}
    for cell in finished(RESULTS):
        found.setdefault((cell["env"], cell["frames"], cell["learner"]), {})[cell["seed"]] = cell
    print("| task | frames | learner | return, seed by seed | median | mean | 95 % interval | area, median |")
    print("|---|---|---|---|---|---|---|---|")
    for (env, frames, learner), cells in sorted(found.items()):
        values = [cells[seed]["mean"] for seed in sorted(cells)]
        area = median(fmean(value for _, value in cell["training"]) for cell in cells.values())
        interval = "{:.0f} to {:.0f}".format(*student_t_interval(values)) if len(values) > 1 else "one seed"
        row = [env, f"{frames:,}", learner, ", ".join(f"{value:.0f}" for value in values), f"{median(values):.0f}"]
        print(f"| {' | '.join(row)} | {fmean(values):.0f} | {interval} | {area:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--envs", nargs="+", choices=ENVS, default=list(ENVS))
    runner.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    runner.add_argument("--frames", type=int, nargs="+", default=list(FRAMES))
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.envs, arguments.learners, arguments.seeds, arguments.frames)
    else:
        table()


if __name__ == "__main__":
    main()
