"""Steps per second of processor time of every family of environments, bare and through the program.

Bare is the simulator's own loop of step and reset; through the program is ``step_into``, as the collector calls it. One
environment, one thread, random actions drawn beforehand, both in turns in one process. A family whose package is
missing is left out. EnvPool, where it is installed, is measured on Gymnasium's tasks beside ``make_env``, in the
processor time of all threads.

    python benchmarks/environments.py

Results: benchmarks/results/environments.csv, and where EnvPool is, benchmarks/results/envpool.csv.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pmoe_lightning.envs import AbstractEnvironment, make_dm_control, make_env

RESULTS = Path(__file__).parent / "results"
SECONDS, ROUNDS = 0.5, 5
FAMILIES: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {},
    "MultiGoalMaze-v0": {},
    "dm_control cheetah-run": {"task": "cheetah-run"},
    "dm_control cheetah-run, action_repeat=4": {"task": "cheetah-run", "action_repeat": 4},
    "pybullet_envs_gymnasium:HopperBulletEnv-v0": {},
    "gymnasium_robotics:PointMaze_UMaze-v3": {},
    "gymnasium_robotics:AntMaze_UMaze-v5": {},
    "gymnasium_robotics:FetchPush-v4": {},
    "gymnasium_robotics:AdroitHandDoor-v1": {},
    "metaworld:Meta-World/MT1": {"env_name": "reach-v3"},
}
POOLED = ("HalfCheetah-v5", "Hopper-v5", "Ant-v5")


def make(id: str, arguments: dict[str, Any]) -> AbstractEnvironment:
    if "task" in arguments:
        return make_dm_control(**arguments, seed=0)
    return make_env(id, seed=0, **arguments)


def bare(env: Any, acts: np.ndarray, is_suite: bool, repeat: int) -> Iterator[int]:
    """Steps of the simulator alone."""
    env.reset()
    while True:
        for act in acts:
            if is_suite:
                for _ in range(repeat):
                    if env.step(act).last():
                        env.reset()
            else:
                *_, terminated, truncated, _ = env.step(act)
                if terminated or truncated:
                    env.reset()
            yield repeat


def program(env: AbstractEnvironment, acts: np.ndarray) -> Iterator[int]:
    """Steps as the collector takes them."""
    outcome, root = env.empty_outcome(), env.empty_root()
    env.reset()
    while True:
        for act in acts:
            env.step_into(act[None], {}, outcome, root)
            yield env.action_repeat


def rate(steps: Iterator[int]) -> float:
    begun, taken = time.process_time(), 0
    while (passed := time.process_time() - begun) < SECONDS:
        taken += sum(next(steps) for _ in range(20))
    return taken / passed


def measure(id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds in turns, and whether the state can be captured."""
    inner, env = make(id, arguments), make(id, arguments)
    low, high = env._action_low, env._action_high
    acts = np.random.default_rng(0).uniform(low, high, (1000, len(low))).astype(np.float32)
    ways = [bare(inner.envs[0], acts, "task" in arguments, env.action_repeat), program(env, acts)]
    rates = [[rate(way) for way in ways] for _ in range(ROUNDS)]
    alone, through = (statistics.median(column) for column in zip(*rates, strict=True))
    state = env.simulator_state()
    env.close(), inner.close()
    sizes = {"observation": env.entries["observation"].shape[0], "action": len(low)}
    return {"id": id, **sizes, "bare": round(alone), "program": round(through), "exact": "not_captured" not in state}


def beside_envpool(task: str, num_envs: int, threads: int) -> dict[str, Any]:
    """Frames per second of processor time with a batch of actions that are ready."""
    import envpool

    pool = envpool.make_gymnasium(task, num_envs=num_envs, num_threads=threads, seed=0)
    ours = make_env(task, num_envs=num_envs, seed=0)
    space = pool.action_space
    acts = np.random.default_rng(0).uniform(space.low, space.high, (200, num_envs, *space.shape))
    single, outcome, root = acts.astype(np.float32), ours.empty_outcome(), ours.empty_root()
    pool.reset(), ours.reset()

    def pooled() -> Iterator[int]:
        while True:
            for act in acts:
                pool.step(act)
                yield num_envs

    def batched() -> Iterator[int]:
        while True:
            for act in single:
                ours.step_into(act, {}, outcome, root)
                yield num_envs

    ways = [pooled(), batched()]
    rates = [[rate(way) for way in ways] for _ in range(ROUNDS)]
    theirs, mine = (statistics.median(column) for column in zip(*rates, strict=True))
    return {"task": task, "num_envs": num_envs, "threads": threads, "envpool": round(theirs), "make_env": round(mine)}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def is_installed(id: str, arguments: dict[str, Any]) -> bool:
    module = "dm_control" if "task" in arguments else id.rpartition(":")[0]
    return not module or find_spec(module) is not None


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for id, arguments in FAMILIES.items():
        if is_installed(id, arguments):
            rows.append(measure(id, arguments))
            print(rows[-1], flush=True)
    write("environments.csv", rows)
    if find_spec("envpool") is not None:
        pooled = [beside_envpool(task, *sizes) for task in POOLED for sizes in ((1, 1), (16, 1), (16, 2))]
        write("envpool.csv", pooled)
        print(*pooled, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
