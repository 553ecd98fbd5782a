"""Learning side by side with Stable-Baselines3 and SBX: same task, sizes, frames, seeds and evaluation.

Each cell (algorithm, task, learner, seed) trains once and is judged by the mean return of ten deterministic episodes
with seeds of their own. A finished cell is one JSON file, so an interrupted run continues where it stopped:

    python benchmarks/peers.py run --algo sac --learner sb3 --seeds 1 2 3 4 5
    python benchmarks/peers.py run --algo sac --learner gaussian --seeds 1 2 3 4 5
    python benchmarks/peers.py run --algo sac --learner gaussian_bf16 --env Pendulum-v1
    python benchmarks/peers.py table

Learners: ``sb3`` (Stable-Baselines3), ``sbx`` (its JAX form), ``sbx_crossq`` (SBX's CrossQ, critics of 256 units),
``gaussian`` (ours, one component), ``pmoe`` (ours, four components), ``gaussian_crossq`` and ``pmoe_crossq`` (with
CrossQ's critics), and three forms of ``gaussian`` that are to learn the same: ``gaussian_readable`` (never compiled),
``gaussian_compiled``, ``gaussian_bf16`` (compiled, hidden products in bfloat16).
The peers are not dependencies of the package: ``pip install -c constraints.txt -e ".[benchmarks]"``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from resumable import fill, finished, indented

#: How long is trained, by algorithm and task.
FRAMES = {
    ("sac", "HalfCheetah-v5"): 50_000,
    ("ppo", "HalfCheetah-v5"): 200_000,
    ("sac", "Pendulum-v1"): 5_000,
}
EPISODES = 10
EVALUATION_SEED = 10_000
# How a mixture can act besides by max_weight, the mean of its likeliest component.
OTHER_RULES = ("sample_component", "best_value", "sample")
OURS = {
    "gaussian": ["actor=gaussian"],
    "pmoe": ["actor=pmoe"],
    "gaussian_crossq": ["actor=gaussian", "critic=crossq"],
    "pmoe_crossq": ["actor=pmoe", "estimator=marginalized", "critic=crossq"],
    "gaussian_readable": ["actor=gaussian", "compile=false"],
    "gaussian_compiled": ["actor=gaussian", "compile=true"],
    "gaussian_bf16": ["actor=gaussian", "compile=true", "matmul_precision=bf16-hidden"],
}
PEERS = ("sb3", "sbx", "sbx_crossq")
RESULTS = Path(__file__).parent / "results" / "peers"
# 97.5 % quantile of Student's t with n - 1 degrees of freedom, by the number of seeds n.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def train_peer(algo: str, learner: str, env_id: str, seed: int) -> dict:
    """Train and evaluate a peer with its own defaults, which are the sizes ours uses too."""
    import gymnasium as gym
    import numpy as np
    import torch
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    if learner == "sb3":
        import stable_baselines3 as library
    else:
        import sbx as library
    torch.set_num_threads(1)
    env = DummyVecEnv([lambda: Monitor(gym.make(env_id))])
    if algo == "sac":
        widths = {"policy_kwargs": {"net_arch": {"pi": [256, 256], "qf": [256, 256]}}} if "crossq" in learner else {}
        make = library.CrossQ if "crossq" in learner else library.SAC
        model = make("MlpPolicy", env, learning_starts=1000, seed=seed, device="cpu", **widths)
    else:
        env = VecNormalize(env)
        model = library.PPO("MlpPolicy", env, seed=seed, device="cpu")
    model.learn(FRAMES[algo, env_id])

    returns, judge = [], gym.make(env_id)
    for episode in range(EPISODES):
        observation, _ = judge.reset(seed=EVALUATION_SEED + episode)
        total, done = 0.0, False
        while not done:
            if algo == "ppo":
                observation = env.normalize_obs(observation)
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = judge.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return {"mean": float(np.mean(returns)), "returns": returns, "version": library.__version__}


def train_ours(algo: str, learner: str, env_id: str, seed: int) -> dict:
    """Train and evaluate through the commands a user types."""
    folder = RESULTS.parent / "runs" / f"{algo}-{env_id}-{learner}-{seed}"
    command = [sys.executable, "-m", "pmoe_lightning.train", f"experiment=peers_{algo}", *OURS[learner]]
    command += [f"env.id={env_id}", f"seed={seed}", f"total_frames={FRAMES[algo, env_id]}", f"hydra.run.dir={folder}"]
    command += ["logger=none", "resume=auto"]  # a study that was cut goes on
    subprocess.run(command, check=True)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    answer = judge(checkpoint, "max_weight")
    result = {"mean": answer["mean"], "returns": answer["returns"]}
    if learner == "pmoe":
        result["other_rules"] = {rule: judge(checkpoint, rule)["mean"] for rule in OTHER_RULES}
    return result


def judge(checkpoint: Path, rule: str) -> dict:
    """What the command ``evaluate`` says of a checkpoint that acts by a rule."""
    command = [sys.executable, "-m", "pmoe_lightning.evaluate", f"checkpoint={checkpoint}", f"rule={rule}"]
    command += [f"episodes={EPISODES}", f"seed={EVALUATION_SEED}", "video=false", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(algo: str, learner: str, env_id: str, seeds: list[int]) -> None:
    """Fill the missing cells of one learner."""
    for seed in seeds:
        cell = RESULTS / f"{algo}-{env_id}-{learner}-{seed}.json"
        if result := fill(cell, partial(measure, algo, learner, env_id, seed), indented):
            print(f"{cell.stem}: {result['mean']:.0f} in {result['wall_seconds']:.0f} s", flush=True)


def measure(algo: str, learner: str, env_id: str, seed: int) -> dict:
    """One cell, timed."""
    start, cpu = time.monotonic(), time.process_time()
    result = (train_peer if learner in PEERS else train_ours)(algo, learner, env_id, seed)
    cpu_seconds = time.process_time() - cpu if learner in PEERS else None
    times = {"wall_seconds": time.monotonic() - start, "cpu_seconds": cpu_seconds}
    head = {"algo": algo, "learner": learner, "env": env_id, "seed": seed, "frames": FRAMES[algo, env_id]}
    return head | result | times


def table() -> None:
    """Print every seed and the mean with its 95 % interval over seeds (Student's t)."""
    rows: dict[tuple[str, str, str], dict[int, float]] = {}
    for data in finished(RESULTS):
        means = {"": data["mean"]}
        if "other_rules" in data:
            means = {", max_weight": data["mean"]} | {f", {rule}": mean for rule, mean in data["other_rules"].items()}
        for rule, mean in means.items():
            rows.setdefault((data["env"], data["algo"], data["learner"] + rule), {})[data["seed"]] = mean
    print("| task | algorithm | frames | learner | seeds (mean of 10 episodes each) | mean | 95 % interval |")
    print("|---|---|---|---|---|---|---|")
    for (env_id, algo, learner), cells in sorted(rows.items()):
        values = [cells[seed] for seed in sorted(cells)]
        n, mean = len(values), sum(values) / len(values)
        half = math.nan
        if n > 1:
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
            half = STUDENT_T[n] * deviation / math.sqrt(n)
        seeds = ", ".join(f"{value:.0f}" for value in values)
        interval = f"{mean - half:.0f} to {mean + half:.0f}"
        print(f"| {env_id} | {algo} | {FRAMES[algo, env_id]:,} | {learner} | {seeds} | {mean:.0f} | {interval} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--algo", choices=sorted({algo for algo, _ in FRAMES}), required=True)
    runner.add_argument("--learner", choices=[*PEERS, *OURS], required=True)
    runner.add_argument("--env", choices=sorted({env_id for _, env_id in FRAMES}), default="HalfCheetah-v5")
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        if (arguments.algo, arguments.env) not in FRAMES:
            parser.error(f"{arguments.algo} is not compared on {arguments.env}")
        if arguments.algo == "ppo" and "crossq" in arguments.learner:
            parser.error(f"{arguments.learner} is of sac alone")
        run(arguments.algo, arguments.learner, arguments.env, arguments.seeds)
    else:
        table()


if __name__ == "__main__":
    main()
