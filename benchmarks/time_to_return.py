"""Processor time until a policy is good: what a user waits for, whatever a frame costs and however much it teaches.

Every learner trains on HalfCheetah-v5 and is judged every 2,500 frames by the mean return of five deterministic
episodes with seeds of their own. The clock is the processor time of the process, imports and compilation included and
judging left out; it stops at the first mean of 2,000. A learner that is not there after 60,000 frames has the time that
those took. All are held to one core, with one thread.

    python benchmarks/time_to_return.py run --learners gaussian_crossq sbx_crossq --seeds 1 2 3
    python benchmarks/time_to_return.py table

A cell is a learner and a seed, a file of its own, so that an interrupted study goes on where it stopped. A cell takes
between one and ten minutes. The peers are not dependencies of the package: ``pip install -c constraints.txt -e
".[benchmarks]"``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback
from resumable import fill, finished, indented
from speed import ENV, OURS, environment, make_peer

RESULTS = Path(__file__).parent / "results" / "time_to_return"
RUNS = RESULTS.parent / "runs"
GOAL, FRAMES, EVERY, EPISODES, EVALUATION_SEED = 2_000.0, 60_000, 2_500, 5, 10_000
LEARNERS = (*OURS, "sb3", "sbx", "sbx_crossq", "sbx_crossq_wide")
Predict = Callable[[Any], Any]
"""An observation of the environment to a deterministic action."""


class Clock:
    """Stops while the policy is judged, and writes the cell when the goal is reached or all frames are done."""

    def __init__(self, path: str) -> None:
        import gymnasium

        self.path, self.env, self.next, self.judging, self.returns = Path(path), gymnasium.make(ENV), EVERY, 0.0, {}

    def judge(self, frames: int, predict: Predict) -> bool:
        """Whether training is over."""
        if frames < self.next:
            return False
        self.next += EVERY
        start = time.process_time()
        mean = sum(self._episode(predict, EVALUATION_SEED + i) for i in range(EPISODES)) / EPISODES
        self.returns[frames] = mean
        self.judging += time.process_time() - start
        over = mean >= GOAL or frames >= FRAMES
        if over:
            seconds = time.process_time() - self.judging
            cell = {"reached": mean >= GOAL, "frames": frames, "cpu_seconds": seconds, "returns": self.returns}
            self.path.write_text(json.dumps(cell))
        return over

    def _episode(self, predict: Predict, seed: int) -> float:
        observation, _ = self.env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = self.env.step(predict(observation))
            total, done = total + float(reward), terminated or truncated
        return total


class Judge(Callback):
    """A ``Clock`` within our own training."""

    def __init__(self, path: str) -> None:
        self.clock = Clock(path)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        from pmoe_lightning import load_policy

        frames = trainer.datamodule.env_frames
        if frames >= self.clock.next:
            policy = load_policy({"policy": module.policy_state()}, rule="max_weight")
            if self.clock.judge(frames, policy.predict):
                trainer.should_stop = True


def train_ours(learner: str, seed: int, path: Path) -> None:
    from pmoe_lightning.train import main

    folder = RUNS / f"time-to-return-{learner}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a cell that was cut
    sys.argv[1:] = ["experiment=peers_sac", *OURS[learner], f"env.id={ENV}", f"seed={seed}", "logger=none"]
    sys.argv[1:] += ["compile=true", f"total_frames={FRAMES}", f"hydra.run.dir={folder}"]
    sys.argv[1:] += ["+callbacks.judge._target_=time_to_return.Judge", f"+callbacks.judge.path={path}"]
    main()


def train_peer(learner: str, seed: int, path: Path) -> None:
    from stable_baselines3.common.callbacks import BaseCallback

    model, clock = make_peer(learner, "sac", 1, seed), Clock(str(path))

    class Judged(BaseCallback):
        def _on_step(self) -> bool:
            return not clock.judge(self.num_timesteps, lambda x: model.predict(x, deterministic=True)[0])

    model.learn(FRAMES, callback=Judged())


def measure(learner: str, seed: int) -> dict:
    """One cell, by a process of its own."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / f"time-to-return-{learner}-{seed}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "one", learner, str(seed), str(path)]
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return {"learner": learner, "seed": seed, **json.loads(path.read_text())}


def run(learners: list[str], seeds: list[int]) -> None:
    """Fill the missing cells, seed by seed, so that an interrupted study compares what it has."""
    if hasattr(os, "sched_setaffinity"):  # Linux; whatever is started below inherits it
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for seed, learner in product(seeds, learners):
        cell = RESULTS / f"{learner}-{seed}.json"
        if found := fill(cell, partial(measure, learner, seed), indented):
            there = f"there after {found['frames']:,} frames" if found["reached"] else "not there"
            print(f"{cell.stem}: {there}, {found['cpu_seconds']:.0f} processor seconds", flush=True)


def table() -> None:
    """The time of every seed, in minutes, and their median; in brackets where the goal was not reached."""
    found: dict[str, dict[int, dict]] = {}
    for cell in finished(RESULTS):
        found.setdefault(cell["learner"], {})[cell["seed"]] = cell
    print(f"| learner | minutes to {GOAL:,.0f}, seed by seed | median | frames, median | not there |")
    print("|---|---|---|---|---|")
    medians = {learner: median(cell["cpu_seconds"] for cell in cells.values()) for learner, cells in found.items()}
    for learner in sorted(found, key=medians.__getitem__):
        cells = [found[learner][seed] for seed in sorted(found[learner])]
        times = ", ".join("{:.1f}" if cell["reached"] else "({:.1f})" for cell in cells)
        minutes = times.format(*(cell["cpu_seconds"] / 60 for cell in cells))
        frames, missed = median(cell["frames"] for cell in cells), sum(not cell["reached"] for cell in cells)
        print(f"| {learner} | {minutes} | {medians[learner] / 60:.1f} | {frames:,.0f} | {missed} of {len(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="fill the missing cells")
    runner.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    runner.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    commands.add_parser("table", help="print what was measured")
    one = commands.add_parser("one", help="one cell, in this process; used by run")
    for name in ("learner", "seed", "path"):
        one.add_argument(name)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.learners, arguments.seeds)
    elif arguments.command == "table":
        table()
    else:
        train = train_ours if arguments.learner in OURS else train_peer
        train(arguments.learner, int(arguments.seed), Path(arguments.path))


if __name__ == "__main__":
    main()
