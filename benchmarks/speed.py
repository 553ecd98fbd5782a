"""Speed side by side: environment frames per second of training, end to end, each learner in a process of its own.

Every learner trains on the same task with the same sizes and the same number of updates per frame (those of
Stable-Baselines3's defaults), on one core, because JAX does not heed being asked for one thread. It notes its process
CPU time and wall-clock time every few hundred frames. Learners take turns, round by round, so that a busy machine slows
all of them. What is compared is the median over the windows of all rounds, start-up and compilation left out; the
interval is that of the rounds' medians.

    python benchmarks/speed.py run --algo ppo --num-envs 1 8 --rounds 5
    python benchmarks/speed.py run --algo sac --learners gaussian sb3 --rounds 3
    python benchmarks/speed.py run --algo ppo --script cleanrl=../cleanrl/cleanrl/ppo_continuous_action.py
    python benchmarks/speed.py table

Learners: ``gaussian`` and ``pmoe`` (ours, as a user starts them), the same with ``matmul_precision=bf16-hidden`` and,
for SAC, with ``float32-onednn`` and ``critic=crossq``; ``sb3`` (Stable-Baselines3), ``sbx`` (its JAX form),
``sbx_crossq`` and ``sbx_crossq_wide`` (SBX's CrossQ with critics of 256 units and of its own 1,024), ``torchrl``
(``torchrl_recipe.py``), and scripts in the manner of CleanRL, given by path, which are timed from outside: the
difference between a long and a short run.
The peers are not dependencies of the package: ``pip install -c constraints.txt -e ".[benchmarks]"``.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed"
ENV = "HalfCheetah-v5"
OURS = {
    "gaussian": ["actor=gaussian"],
    "pmoe": ["actor=pmoe"],
    "gaussian_bf16": ["actor=gaussian", "matmul_precision=bf16-hidden"],
    "pmoe_bf16": ["actor=pmoe", "matmul_precision=bf16-hidden"],
    "gaussian_onednn": ["actor=gaussian", "matmul_precision=float32-onednn"],
    "gaussian_crossq": ["actor=gaussian", "critic=crossq"],
    "pmoe_crossq": ["actor=pmoe", "estimator=marginalized", "critic=crossq"],
    "gaussian_crossq_onednn": ["actor=gaussian", "critic=crossq", "matmul_precision=float32-onednn"],
}
PEERS = ("sb3", "sbx", "sbx_crossq", "sbx_crossq_wide")
LEARNERS = (*OURS, *PEERS, "torchrl")
#: Those that only SAC has.
OF_SAC = {name for name in LEARNERS if "crossq" in name or "onednn" in name}
FRAMES = {"ppo": 24_576, "sac": 4_000}
WINDOW = {"ppo": 2048, "sac": 500}
#: Before these frames there are random actions, compilation and first uses.
WARM_UP = {"ppo": 8_192, "sac": 1_500}


class Marks(Callback):
    """Writes frames, process CPU seconds and wall-clock seconds to a file, every so many frames."""

    def __init__(self, path: str, every_frames: int) -> None:
        self.path, self.every_frames, self.next = path, every_frames, every_frames

    def mark(self, frames: int) -> None:
        if frames >= self.next:
            with open(self.path, "a") as file:
                file.write(f"{frames} {time.process_time()} {time.perf_counter()}\n")
            self.next += self.every_frames

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.mark(trainer.datamodule.env_frames)


def ours(algo: str, learner: str, num_envs: int, marks: Path) -> None:
    """Train as a user would, with the callbacks and the logger off and the marks on."""
    from pmoe_lightning.train import main

    shutil.rmtree(marks.with_suffix(""), ignore_errors=True)  # of a measurement that was cut
    sys.argv[1:] = [f"experiment=peers_{algo}", *OURS[learner], f"env.id={ENV}", "logger=none", "compile=true"]
    sys.argv[1:] += [f"data.num_envs={num_envs}", f"total_frames={FRAMES[algo]}"]
    sys.argv[1:] += [f"hydra.run.dir={marks.with_suffix('')}", "+callbacks.marks._target_=speed.Marks"]
    sys.argv[1:] += [f"+callbacks.marks.path={marks}", f"+callbacks.marks.every_frames={WINDOW[algo]}"]
    main()


def make_peer(learner: str, algo: str, num_envs: int, seed: int | None = None) -> Any:
    """A model of Stable-Baselines3 or SBX, which share their interface, with its defaults."""
    import gymnasium
    import torch
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    if learner == "sb3":
        import stable_baselines3 as library
    else:
        import sbx as library
    torch.set_num_threads(1)
    env: Any = DummyVecEnv([lambda: gymnasium.make(ENV)] * num_envs)
    if algo == "ppo":
        sizes = {"n_steps": 2048 // num_envs, "batch_size": 64, "n_epochs": 10}
        return library.PPO("MlpPolicy", VecNormalize(env), seed=seed, **sizes)
    # One update per frame, as with one environment.
    arguments: dict[str, Any] = {"learning_starts": 1000, "gradient_steps": num_envs, "seed": seed}
    if learner == "sbx_crossq":
        arguments["policy_kwargs"] = {"net_arch": {"pi": [256, 256], "qf": [256, 256]}}
    return (library.CrossQ if "crossq" in learner else library.SAC)("MlpPolicy", env, **arguments)


def stable_baselines(learner: str, algo: str, num_envs: int, marks: Path) -> None:
    """Train a model of Stable-Baselines3 or SBX."""
    from stable_baselines3.common.callbacks import BaseCallback

    recorder = Marks(str(marks), WINDOW[algo])

    class Recorder(BaseCallback):
        def _on_step(self) -> bool:
            recorder.mark(self.num_timesteps if algo == "sac" else 0)
            return True

        def _on_rollout_start(self) -> None:
            recorder.mark(self.num_timesteps)

    make_peer(learner, algo, num_envs).learn(FRAMES[algo], callback=Recorder())


def train_one(algo: str, learner: str, num_envs: int, marks: Path) -> None:
    if learner in PEERS:
        stable_baselines(learner, algo, num_envs, marks)
    elif learner == "torchrl":
        import torchrl_recipe

        torchrl_recipe.train(algo, ENV, num_envs, FRAMES[algo], Marks(str(marks), WINDOW[algo]).mark)
    else:
        ours(algo, learner, num_envs, marks)


def windows(marks: Path, algo: str) -> list[dict[str, float]]:
    """Seconds per frame of every window behind the warm-up."""
    rows = [[float(word) for word in line.split()] for line in marks.read_text().splitlines()]
    rows = [row for row in rows if row[0] >= WARM_UP[algo]]
    return [
        {"frames": b[0], "cpu": (b[1] - a[1]) / (b[0] - a[0]), "wall": (b[2] - a[2]) / (b[0] - a[0])}
        for a, b in zip(rows, rows[1:], strict=False)
    ]


def time_script(script: str, algo: str, num_envs: int) -> dict[str, float]:
    """Seconds per frame of a script in CleanRL's manner: a long run less a short one."""
    spent = []
    for frames in (WARM_UP[algo], FRAMES[algo]):
        command = [sys.executable, script, "--env-id", ENV, "--total-timesteps", str(frames)]
        command += ["--num-envs", str(num_envs)] if algo == "ppo" else ["--learning-starts", "1000"]
        command += ["--num-steps", str(2048 // num_envs)] if algo == "ppo" else []
        wall = time.perf_counter()
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        spent.append((usage.ru_utime + usage.ru_stime, time.perf_counter() - wall))
    frames = FRAMES[algo] - WARM_UP[algo]
    (cpu, wall), (longer_cpu, longer_wall) = spent
    return {"frames": FRAMES[algo], "cpu": (longer_cpu - cpu) / frames, "wall": (longer_wall - wall) / frames}


def environment() -> dict[str, str]:
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    xla = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | single | xla | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def run(arguments: argparse.Namespace) -> None:
    """Add rounds to what was measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "sched_setaffinity"):  # Linux; whatever is started below inherits it
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    scripts = dict(pair.split("=", 1) for pair in arguments.script)
    first = 1 + max((int(row["round"]) for row in measured()), default=-1)
    for i in range(first, first + arguments.rounds):
        for num_envs in arguments.num_envs:
            for learner in (*arguments.learners, *scripts):
                name = f"{arguments.algo}-{learner}-{num_envs}-{time.time_ns()}"
                marks = RESULTS.parent / "runs" / f"{name}.marks"
                marks.parent.mkdir(parents=True, exist_ok=True)
                if learner in scripts:
                    rows = [time_script(scripts[learner], arguments.algo, num_envs)]
                else:
                    command = [sys.executable, __file__, "one", arguments.algo, learner, str(num_envs), str(marks)]
                    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
                    rows = windows(marks, arguments.algo)
                head = {"algo": arguments.algo, "learner": learner, "num_envs": num_envs, "round": i}
                append(RESULTS / "speed.csv", [head | row for row in rows])
                cpu = statistics.median(row["cpu"] for row in rows)
                print(f"{name}: {1 / cpu:,.0f} frames per CPU second", flush=True)


def measured() -> list[dict[str, str]]:
    """The rows of earlier runs."""
    path = RESULTS / "speed.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table() -> None:
    """Median frames per second, the interval of the rounds' medians, and the ratio to Stable-Baselines3."""
    cells: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in measured():
        key = (row["algo"], int(row["num_envs"]), row["learner"])
        cells[key][row["round"]].append((float(row["cpu"]), float(row["wall"])))
    print("| algorithm | environments | learner | frames per CPU second | rounds | frames per second | of sb3 |")
    print("|---|---|---|---|---|---|---|")
    medians = {
        key: statistics.median(cpu for rows in rounds.values() for cpu, _ in rows) for key, rounds in cells.items()
    }
    for key, rounds in sorted(cells.items(), key=lambda cell: (cell[0][:2], medians[cell[0]])):
        per_round = sorted(1 / statistics.median(cpu for cpu, _ in rows) for rows in rounds.values())
        wall = statistics.median(wall for rows in rounds.values() for _, wall in rows)
        reference = medians.get((*key[:2], "sb3"))
        ratio = f"{reference / medians[key]:.2f}" if reference else ""
        interval = f"{per_round[0]:,.0f} to {per_round[-1]:,.0f} ({len(per_round)})"
        print(f"| {key[0]} | {key[1]} | {key[2]} | {1 / medians[key]:,.0f} | {interval} | {1 / wall:,.0f} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="measure")
    runner.add_argument("--algo", choices=sorted(FRAMES), required=True)
    runner.add_argument("--num-envs", type=int, nargs="+", default=[1])
    runner.add_argument("--learners", nargs="*", choices=LEARNERS)
    runner.add_argument("--script", nargs="*", default=[], metavar="NAME=PATH")
    runner.add_argument("--rounds", type=int, default=3)
    commands.add_parser("table", help="print what was measured")
    one = commands.add_parser("one", help="train once, in this process; used by run")
    for name in ("algo", "learner", "num_envs", "marks"):
        one.add_argument(name)
    arguments = parser.parse_args()
    if arguments.command == "run":
        if arguments.learners is None:
            arguments.learners = [name for name in LEARNERS if arguments.algo == "sac" or name not in OF_SAC]
        if arguments.algo != "sac" and (wrong := OF_SAC.intersection(arguments.learners)):
            parser.error(f"{', '.join(sorted(wrong))}: of SAC alone")
        run(arguments)
    elif arguments.command == "table":
        table()
    else:
        train_one(arguments.algo, arguments.learner, int(arguments.num_envs), Path(arguments.marks))


if __name__ == "__main__":
    main()
