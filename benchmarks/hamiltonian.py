"""What the Hamiltonian transform costs, and what it brings to soft actor-critic.

    python benchmarks/hamiltonian.py cost                     # per update and per environment step, beside no transform
    python benchmarks/hamiltonian.py cost --compiled          # both as compiled graphs; compiling takes minutes
    python benchmarks/hamiltonian.py gain <checkpoint>        # Q gain against step size on a trained critic
    python benchmarks/hamiltonian.py run                      # every cell of ``learning``; resumable cell by cell
    python benchmarks/hamiltonian.py run --envs Pendulum-v1 --learners gaussian gaussian_raw --seeds 1
    python benchmarks/hamiltonian.py run --checkout <folder> --label before      # the package of another checkout
    python benchmarks/hamiltonian.py table                    # its table
    python benchmarks/hamiltonian.py first                    # the table and figure of the first comparison

Each cell of ``run`` trains SAC once through the command a user types, for 50,000 frames, with networks of 128-128 and
minibatches of 128 to make five seeds affordable, and judges the last policy by ten deterministic episodes with seeds of
their own; a finished cell is one JSON file. The first comparison, of 30,000 frames of Hopper-v5, was made with an
actor's gradient that lacked the curvature of the critics (see docs/hamiltonian.md); its cells are kept as they were.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product as cartesian
from pathlib import Path
from typing import NamedTuple

import torch
from resumable import fill, finished, indented
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type
from update import Products, readable_form

from pmoe_lightning import load_policy, make_env, make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.algorithms import SAC, make_sac
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.policy import make_critic, policy_entry
from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.estimators import Frequency, Pathwise
from pmoe_lightning.evaluation.statistics import student_t_interval
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.safe.constraint import CostConstraint
from pmoe_lightning.updates import SACUpdate

RESULTS = Path(__file__).parent / "results" / "hamiltonian"
LEARNING = RESULTS / "learning"
ENVS, FRAMES, EPISODES, EVALUATION_SEED = ("Pendulum-v1", "Hopper-v5", "HalfCheetah-v5"), 50_000, 10, 10_000
ACTORS = {"gaussian": ["actor=gaussian", "estimator=pathwise"], "pmoe": ["actor=pmoe", "estimator=frequency"]}
FORCES = ("raw", "normalized", "gated")
TRANSFORMS = {"": "none"} | {f"_{force}": f"hamiltonian_{force}" for force in FORCES}
SIZES = ["algo.hidden_sizes=[128,128]", "data.batch_size=128"]
LEARNERS = {
    f"{actor}{suffix}": [*words, f"action_transform={transform}", *SIZES]
    for actor, words in ACTORS.items()
    for suffix, transform in TRANSFORMS.items()
}
OBSERVATIONS, ACTIONS, BATCH = 17, 6, 256
UPDATES, STEPS = 4, 20  # timed at once


# -- cost --------------------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """One row: SAC in the sizes of HalfCheetah-v5; no transform for 0 steps."""

    actor: str
    force: str = "raw"
    steps: int = 0
    safe: bool = False


#: Each is compared with the first of its list.
COMPARISONS = [
    *([Case(actor), *(Case(actor, "gated", steps) for steps in (1, 3, 5))] for actor in ("gaussian", "pmoe")),
    [Case("gaussian"), Case("gaussian", safe=True), Case("gaussian", "gated", 3, safe=True)],
]
Timed = Callable[[], None]


def learner(case: Case) -> SAC:
    torch.manual_seed(0)
    make, estimator = (make_gaussian_actor, Pathwise()) if case.actor == "gaussian" else (make_pmoe_actor, Frequency())
    transform = make_hamiltonian_transform(OBSERVATIONS, ACTIONS, force=case.force, num_leapfrog_steps=case.steps)
    return make_sac(
        make(OBSERVATIONS, [-1.0] * ACTIONS, [1.0] * ACTIONS),
        estimator,
        observation_dim=OBSERVATIONS,
        action_dim=ACTIONS,
        action_transform=transform if case.steps else None,
        constraint=CostConstraint() if case.safe else None,
    )


def minibatches() -> TensorDict:
    size = [UPDATES, BATCH]
    flags = {name: torch.zeros(*size, 1, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
    after = {"observation": torch.randn(*size, OBSERVATIONS), "reward": torch.randn(*size, 1), **flags}
    after["cost"] = torch.zeros(*size, 1)
    root = {"observation": torch.randn(*size, OBSERVATIONS), "action": torch.rand(*size, ACTIONS) * 2 - 1}
    return TensorDict({**root, "next": TensorDict(after, size)}, size)


def updating(algorithm: SAC, compiled: bool) -> Timed:
    """What takes ``UPDATES`` updates."""
    if compiled:
        update = SACUpdate(algorithm.loss, algorithm.configure_optimizers(), tau=algorithm.tau)
    else:
        update = readable_form(algorithm)
    return partial(update, minibatches())


def stepping(algorithm: SAC, compiled: bool) -> Timed:
    """What takes ``STEPS`` steps of one environment, as training does."""
    env = make_env("HalfCheetah-v5", num_envs=1, seed=0)
    frames = {"frames_per_batch": STEPS, "total_frames": -1}
    settings = {"track_traj_ids": False, "use_buffers": False, "auto_register_policy_transforms": False}
    return RolloutCollector(env, algorithm.policy, **frames, **settings, compile=compiled).rollout


def operations(update: Timed) -> float:
    """Of one update's matrix products."""
    with Products() as products:
        update()
    return products.operations / UPDATES


def fastest(functions: list[Timed], rounds: int = 15) -> list[float]:
    """Least CPU milliseconds of a call, over rounds in which all take turns."""
    best = [float("inf")] * len(functions)
    for round_ in range(rounds + 1):  # the first is a warm-up
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            if round_:
                best[i] = min(best[i], 1e3 * (time.process_time() - start))
    return best


def cost(compiled: bool) -> None:
    """Print one row per case: its update and its environment step beside those of no transform."""
    warnings.filterwarnings("ignore", message="No target network updater")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print("| actor, force | L | products (GFLOP) | ratio | update (ms) | ratio | step (ms) | more by (ms) |")
    print("|---|---|---|---|---|---|---|---|")
    for cases in COMPARISONS:
        products = [operations(updating(learner(case), compiled=False)) for case in cases]
        updates = fastest([updating(learner(case), compiled) for case in cases])
        steps = fastest([stepping(learner(case), compiled) for case in cases])
        for case, product, update, step in zip(cases, products, updates, steps, strict=True):
            words = [case.actor, *([case.force] if case.steps else []), *(["safe"] if case.safe else [])]
            row = f"| {', '.join(words)} | {case.steps} | {product / 1e9:.2f} | {product / products[0]:.2f} "
            row += f"| {update / UPDATES:.1f} | {update / updates[0]:.2f} "
            print(f"{row}| {step / STEPS:.2f} | {(step - steps[0]) / STEPS:+.2f} |", flush=True)


# -- gain --------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def gain(checkpoint: str, states: int = 1200) -> None:
    """Print what one trajectory of three steps does to actions drawn by a trained SAC policy without a transform."""
    from pmoe_lightning.modules.critics import stacked_qvalue_at

    content = read_checkpoint(checkpoint)
    entry, alpha = policy_entry(content), content["state_dict"]["loss.log_alpha"].exp()
    description, policy = entry["description"], load_policy(content)
    sizes = description["observation_dim"], len(description["action_low"])
    critics = [make_critic(description) for _ in entry["action_values"]]
    for critic, weights in zip(critics, entry["action_values"], strict=True):
        critic.load_state_dict(weights)
    torch.manual_seed(0)
    env = make_env(description["env"]["id"], num_envs=8, seed=5)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(states // 8, policy, break_when_any_done=False)
    observation = rollout["observation"].reshape(-1, sizes[0])
    distribution = policy.get_dist(TensorDict({"observation": observation}, [len(observation)]))
    parameters = TensorDict.from_modules(*critics, as_module=True)["module"]
    state = {"observation": observation, "qvalue": stacked_qvalue_at(critics[0].module, parameters, observation)}
    state |= {"bounds": TanhBounds.normalized(observation), "alpha": alpha}
    u = distribution.rsample_unsquashed()
    log_prob = distribution.log_prob_unsquashed(u)
    print("| force | magnitude | step size | Q gain | moved | change of energy | acceptance | rejected |")
    print("|---|---|---|---|---|---|---|---|")
    for force, magnitude in (("raw", None), ("normalized", 1.0), ("normalized", 5.0), ("normalized", 20.0)):
        for step_size in (0.01, 0.02, 0.05, 0.1, 0.2):
            strength = {} if magnitude is None else {"magnitude": magnitude}
            transform = make_hamiltonian_transform(*sizes, force=force, step_size=step_size, **strength)
            evolution = transform(u, log_prob, transform.sample_momentum(u), **state)
            found = {
                k.removeprefix("hamiltonian_"): v for k, v in transform.diagnose(u, evolution, state["bounds"]).items()
            }
            change = evolution.energy_error[~evolution.stays].mean()
            row = (
                f"| {force} | {magnitude or '-'} | {step_size} | {found['qvalue_gain']:+.3f} | {found['distance']:.2f} "
            )
            print(f"{row}| {change:+.2f} | {found['acceptance']:.2f} | {found['rejected']:.3f} |", flush=True)


# -- learning ----------------------------------------------------------------------------------------------------------
def train(env: str, learner: str, seed: int, label: str, checkout: str) -> dict:
    """Train, and judge the policy at the end, through the commands a user types."""
    folder = (RESULTS.parent / "runs" / f"hamiltonian-{label}-{env}-{learner}-{seed}").resolve()
    words = ["algo=sac", f"env.id={env}", f"total_frames={FRAMES}", f"seed={seed}", *LEARNERS[learner]]
    words += ["callbacks=minimal", "logger=none", "compile=true", "resume=auto", f"hydra.run.dir={folder}"]
    own = Path(checkout).resolve() / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    start = time.monotonic()
    subprocess.run([python, "-m", "pmoe_lightning.train", *words], check=True, cwd=checkout)
    seconds = time.monotonic() - start
    judge = [python, "-m", "pmoe_lightning.evaluate", f"checkpoint={folder / 'checkpoints' / 'last.ckpt'}"]
    judge += [f"episodes={EPISODES}", f"seed={EVALUATION_SEED}", "video=false", "--json"]
    answer = json.loads(subprocess.run(judge, check=True, capture_output=True, text=True, cwd=checkout).stdout)
    return {"mean": answer["mean"], "returns": answer["returns"], "seconds": seconds}


def measure(env: str, learner: str, seed: int, label: str, checkout: str) -> dict:
    head = {"label": label, "learner": learner, "seed": seed, "env": env, "frames": FRAMES}
    return head | train(env, learner, seed, label, checkout)


def run(envs: list[str], learners: list[str], seeds: list[int], label: str, checkout: str) -> None:
    """Fill the missing cells, seed by seed, so that an interrupted study compares what it has."""
    for env, seed, learner in cartesian(envs, seeds, learners):
        cell = LEARNING / f"{label}-{env}-{learner}-{seed}.json"
        if result := fill(cell, partial(measure, env, learner, seed, label, checkout), indented):
            print(f"{cell.stem}: {result['mean']:.0f} in {result['seconds']:.0f} s", flush=True)


Cells = dict[str, dict[int, dict]]


def read(folder: Path, env: str, label: str | None = None) -> Cells:
    """Finished cells by learner and seed."""
    found: Cells = {}
    for cell in finished(folder):
        if (cell["env"], cell.get("label")) == (env, label):
            found.setdefault(cell["learner"], {})[cell["seed"]] = cell
    return {learner: found[learner] for learner in LEARNERS if learner in found}


def table(found: Cells, plain: Cells, title: str) -> None:
    """Every seed, the mean and the difference to no transform, each with its 95 % interval over seeds (Student's t)."""
    print(f"\n| learner | {title}: return, seed by seed | mean | 95 % interval | against no transform |")
    print("|---|---|---|---|---|")
    for learner, cells in found.items():
        values = {seed: cells[seed]["mean"] for seed in sorted(cells)}
        without = plain.get(learner.split("_")[0], {})
        pairs = [value - without[seed]["mean"] for seed, value in values.items() if seed in without]
        versus = ""
        if "_" in learner and len(pairs) > 1:
            versus = f"{sum(pairs) / len(pairs):+.0f} ({interval(pairs)})"
        seeds = ", ".join(f"{value:.0f}" for value in values.values())
        mean = sum(values.values()) / len(values)
        print(f"| {learner} | {seeds} | {mean:.0f} | {interval(list(values.values()))} | {versus} |")


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return "one seed"
    low, high = student_t_interval(values)
    return f"{low:.0f} to {high:.0f}"


def draw(found: Cells, path: Path) -> None:
    """A dot per seed, a bar for their mean."""
    from matplotlib.figure import Figure

    from pmoe_lightning.evaluation.figures import PALETTE

    figure = Figure(figsize=(8.0, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for position, (learner, cells) in enumerate(found.items()):
        values = [cells[seed]["mean"] for seed in sorted(cells)]
        color = PALETTE[0] if learner.startswith("gaussian") else PALETTE[1]
        axes.bar(position, sum(values) / len(values), color=color, alpha=0.35, width=0.6)
        axes.scatter([position] * len(values), values, color=color, zorder=3)
    axes.set_xticks(range(len(found)), [learner.replace("_", "\n") for learner in found])
    axes.set_ylabel("mean return of ten deterministic episodes")
    axes.set_title("Hopper-v5 after 30,000 frames of SAC: one dot per seed, bars at the mean")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cost").add_argument("--compiled", action="store_true")
    commands.add_parser("gain").add_argument("checkpoint")
    runner = commands.add_parser("run")
    runner.add_argument("--envs", nargs="+", choices=ENVS, default=list(ENVS))
    gaussian = [f"gaussian{suffix}" for suffix in TRANSFORMS]
    runner.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=gaussian)
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    runner.add_argument("--label", default="after", help="the cells' names begin with it")
    runner.add_argument("--checkout", default=".", help="a folder with a package and, if it has one, its .venv")
    commands.add_parser("table")
    commands.add_parser("first")
    arguments = parser.parse_args()
    if arguments.command == "cost":
        cost(arguments.compiled)
    elif arguments.command == "gain":
        gain(arguments.checkpoint)
    elif arguments.command == "run":
        run(arguments.envs, arguments.learners, arguments.seeds, arguments.label, arguments.checkout)
    elif arguments.command == "table":
        for env, label in cartesian(ENVS, ("before", "after")):
            if found := read(LEARNING, env, label):
                table(found, read(LEARNING, env, "after"), f"{env}, {FRAMES:,} frames, {label}")
    else:
        found = read(RESULTS, "Hopper-v5")
        table(found, found, "Hopper-v5, 30,000 frames")
        draw(found, RESULTS / "hamiltonian.png")


if __name__ == "__main__":
    main()
