"""One training process or two on the same machine: frames per second, and the time to a return.

    python benchmarks/scaling.py run --rounds 3      # one thread each, in turns
    python benchmarks/scaling.py table

The clock starts when the first frames are done, start-up and compilation left out. All numbers of the configuration but
``data.num_envs`` are of all processes together (docs/configuration.md), so both learn the same task with the same
minibatches, and a second process can only save time. Results: ``results/scaling/scaling.csv``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback
from speed import append, environment

RESULTS = Path(__file__).parent / "results" / "scaling"
MEASURED = ("frames_per_second", "seconds", "frames")


class Task(NamedTuple):
    """What is trained in how many environments, the frames before the clock starts, and the mean return to reach."""

    words: list[str]
    num_envs: int
    warm_up: int
    enough: float


TASKS = {
    "PPO, HalfCheetah-v5": Task(
        ["experiment=peers_ppo", "env.id=HalfCheetah-v5", "total_frames=200000"],
        8,
        8_192,
        500.0,
    ),
    "SAC, Pendulum-v1": Task(
        ["experiment=pendulum_sac", "callbacks=minimal", "callbacks.metrics.every_frames=1000"],
        2,
        2_000,
        -250.0,
    ),
}


class Pace(Callback):
    """Writes frames, seconds and the latest mean return of training whenever metrics are reported."""

    def __init__(self, path: str) -> None:
        self.path, self.reported = path, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # The metrics callback stands in front of this one.
        episodes = next(callback.episodes for callback in trainer.callbacks if hasattr(callback, "episodes"))
        if trainer.is_global_zero and len(episodes) > self.reported:
            self.reported = len(episodes)
            frames, mean, _ = episodes[-1]
            with open(self.path, "a") as file:
                file.write(f"{frames} {time.perf_counter()} {mean}\n")


def measure(task: Task, devices: int) -> dict[str, float]:
    """One training; the time and the frames to the return are infinite where it is not reached."""
    path = RESULTS.parent / "runs" / f"pace-{time.time_ns()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [*task.words, "actor=gaussian", "logger=none", "compile=true"]
    words += ["trainer.accelerator=cpu", f"trainer.devices={devices}", f"hydra.run.dir={path}.run"]
    words.append(f"data.num_envs={task.num_envs // devices}")  # of each process, unlike all other numbers
    words += ["+callbacks.pace._target_=scaling.Pace", f"+callbacks.pace.path={path}"]
    command = [sys.executable, "-m", "pmoe_lightning.train", *words]
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
    rows = [row for row in rows if row[0] >= task.warm_up]
    (first_frames, start, _), (last_frames, end, _) = rows[0], rows[-1]
    reached = next(((now - start, frames) for frames, now, mean in rows if mean >= task.enough), (float("inf"),) * 2)
    return {
        "frames_per_second": (last_frames - first_frames) / (end - start),
        "seconds": reached[0],
        "frames": reached[1],
    }


def run(rounds: int, names: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for i in range(rounds):
        for name in names:
            for devices in (1, 2):
                row = {"task": name, "devices": devices, "round": i, **measure(TASKS[name], devices)}
                append(RESULTS / "scaling.csv", [row])
                print(row, flush=True)


def table() -> None:
    """Medians over the rounds."""
    cells: dict[tuple[str, str], list[dict]] = defaultdict(list)
    with (RESULTS / "scaling.csv").open() as file:
        for row in csv.DictReader(file):
            cells[row["task"], row["devices"]].append(row)
    print("| task | processes | rounds | frames per second | seconds to the return | frames to it |")
    print("|---|---|---|---|---|---|")
    for (task, devices), rows in cells.items():
        speed, seconds, frames = (statistics.median(float(row[key]) for row in rows) for key in MEASURED)
        reach = f"{task}, to {TASKS[task].enough:.0f}"
        print(f"| {reach} | {devices} | {len(rows)} | {speed:,.0f} | {seconds:,.0f} | {frames:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--rounds", type=int, default=3)
    running.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        table()
    else:
        run(arguments.rounds, arguments.tasks)


if __name__ == "__main__":
    main()
