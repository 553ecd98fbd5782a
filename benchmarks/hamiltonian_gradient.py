"""Whether the actor's gradient through the Hamiltonian transform is that of its loss, and what it costs.

    python benchmarks/hamiltonian_gradient.py measure quadratic fitted                    # analytic, and relu critics
    python benchmarks/hamiltonian_gradient.py measure Pendulum-v1=<checkpoint> Hopper-v5=<checkpoint>
    python benchmarks/hamiltonian_gradient.py measure quadratic_4 --estimators marginalized score_function
    python benchmarks/hamiltonian_gradient.py cost                                        # of one update
    python benchmarks/hamiltonian_gradient.py table                                       # of docs/hamiltonian.md

``measure`` takes the slope of soft actor-critic's loss along a random direction of the means, in several states, once
by the estimator's gradient and twice by central differences with common random numbers (``directional_slopes``). Rows
are added to ``results/hamiltonian/gradient.csv`` as they are finished, and those that are there are not measured again.
The critics are: Q = -2 (a - 0.3)^2 (with ``_4``, at mixtures of four components); two of 64-64 relu units fitted to it;
those of a checkpoint, at its policy and in the states that it visits. Rows of ``--label before`` were measured with the
package as it was when dQ/da entered the leapfrog as a constant.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from hamiltonian import UPDATES, Case, fastest, learner, updating
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning import load_policy, make_env, make_gaussian_actor
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.policy import make_critic, policy_entry
from pmoe_lightning.estimators import ESTIMATORS as PLAIN
from pmoe_lightning.estimators import Frequency
from pmoe_lightning.estimators.gradient_statistics import DirectionalSlopes, cosine, directional_slopes
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.losses import PMOESACLoss
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.modules.distributions import TanhGaussianMixture

RESULTS = Path(__file__).parent / "results" / "hamiltonian" / "gradient.csv"
FORCES, ALPHAS, STEP_SIZES = ("raw", "normalized", "gated"), (0.02, 0.1, 0.5), (0.05, 0.02, 0.15)
STATES, DRAWS_AT_ONCE = 24, 500
ESTIMATORS = {name: make() for name, make in PLAIN.items()} | {"frequency_all": Frequency(backpropagate="all")}


class Situation(NamedTuple):
    """States, the policy there, and critics."""

    observation: Tensor
    policy: TanhGaussianMixture
    critics: list[TensorDictModule]
    draws: int


# -- critics and states ------------------------------------------------------------------------------------------------
class Quadratic(nn.Module):
    """Q = -2 (a - 0.3)^2."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return -2 * (action - 0.3).square() + self.offset


def quadratic(num_components: int = 1) -> Situation:
    keys = {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
    return Situation(*_policies(num_components), [TensorDictModule(Quadratic(), **keys) for _ in range(2)], 40_000)


def fitted() -> Situation:
    critics, target = [], Quadratic()
    for seed in range(2):
        torch.manual_seed(seed)
        critic = make_qvalue_network(1, 1, hidden_sizes=(64, 64))
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
        for _ in range(3000):
            state, action = torch.zeros(256, 1), 2 * torch.rand(256, 1) - 1
            error = (critic.module(state, action) - target(state, action).detach()).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        critics.append(critic)
    return Situation(*_policies(1), critics, 8_000)


def _policies(num_components: int) -> tuple[Tensor, TanhGaussianMixture]:
    """Components of scale 0.3, a fifth apart and of different weight, around nine means."""
    places = torch.arange(num_components) - (num_components - 1) / 2
    loc = torch.linspace(-0.8, 0.8, 9).view(9, 1, 1) + 0.2 * places.view(-1, 1)
    logits = (0.5 * places).expand(9, num_components)
    return torch.zeros(9, 1), TanhGaussianMixture(logits, loc, torch.full_like(loc, 0.3))


@torch.no_grad()
def of_checkpoint(path: str) -> Situation:
    content = read_checkpoint(path)
    entry, policy = policy_entry(content), load_policy(content)
    description = entry["description"]
    critics = [make_critic(description) for _ in entry["action_values"]]
    for critic, weights in zip(critics, entry["action_values"], strict=True):
        critic.load_state_dict(weights)
    torch.manual_seed(0)
    env = make_env(description["env"]["id"], num_envs=8, seed=5)
    with set_exploration_type(ExplorationType.RANDOM):
        visited = env.rollout(200, policy, break_when_any_done=False)["observation"].reshape(
            -1, description["observation_dim"]
        )
    observation = visited[torch.randperm(len(visited))[:STATES]]
    distribution = policy.get_dist(TensorDict({"observation": observation}, [STATES]))
    parts = distribution.log_weights, distribution.loc, distribution.scale
    return Situation(observation, TanhGaussianMixture(*parts), critics, 8_000)


# -- measuring ---------------------------------------------------------------------------------------------------------
def slopes(situation: Situation, estimator: str, force: str | None, alpha: float, step_size: float) -> dict:
    """The columns of one row that are measured; without a force, those of the plain loss."""
    torch.manual_seed(0)
    sizes = situation.observation.shape[-1], situation.policy.loc.shape[-1]
    transform = None if force is None else make_hamiltonian_transform(*sizes, force=force, step_size=step_size)
    actor = make_gaussian_actor(sizes[0], [-1.0] * sizes[1], [1.0] * sizes[1])
    parts = {"estimator": ESTIMATORS[estimator], "action_transform": transform, "alpha_init": alpha}
    loss = PMOESACLoss(actor, situation.critics, target_entropy=-float(sizes[1]), **parts)
    states = TensorDict({"observation": situation.observation}, situation.observation.shape[:1])

    def make_objective(repeated: TanhGaussianMixture):
        return loss.objective(states, repeated)

    direction = torch.randn_like(situation.policy.loc)
    direction = direction / direction.square().sum((-1, -2), keepdim=True).sqrt()
    found = [
        directional_slopes(
            loss.estimator, situation.policy, make_objective, num_samples=DRAWS_AT_ONCE, direction=direction
        )
        for _ in range(situation.draws // DRAWS_AT_ONCE)
    ]
    return summary(found) | energy(loss, states, situation.policy)


def summary(found: list[DirectionalSlopes]) -> dict:
    """The estimate beside the difference over all states; the errors are those of chunks of draws."""
    estimates, differences, controls = (
        torch.stack([getattr(slopes, name) for slopes in found]).double()
        for name in ("estimate", "difference", "control")
    )
    estimate, difference, control = (values.mean(0) for values in (estimates, differences, controls))
    length = difference.square().sum()
    means = DirectionalSlopes(estimate, torch.zeros_like(estimate), difference, control)
    error = ((estimates.var(0) + differences.var(0)) / len(found)).sqrt()
    return {
        "ratio": float((estimate * difference).sum() / length),
        "cosine": cosine(estimate, difference),
        "cosine_control": cosine(control, difference),
        "wrong_signs": means.wrong_signs,
        "wrong_signs_control": means.wrong_signs_control,
        # The largest distance in standard errors of the two together, beyond 3 % of the difference.
        "worst": float((((estimate - difference).abs() - 0.03 * difference.abs()) / error).max()),
        "variance": float(torch.stack([slopes.variance for slopes in found]).mean()),
    }


@torch.no_grad()
def energy(loss: PMOESACLoss, states: TensorDict, policy: TanhGaussianMixture) -> dict:
    """Mean |H_L - H_0| in nats, and the share of trajectories that are rejected."""
    transform, number = loss.action_transform, 1000
    if transform is None:
        return {}
    repeated = policy.expand((number, *policy.batch_shape))
    u = repeated.rsample_unsquashed()
    evolution = transform(u, u[..., 0], transform.sample_momentum(u), **loss.state_of(states, repeated))
    error = evolution.energy_error.abs().masked_fill(evolution.stays, 0.0)
    return {"energy_error": float(error.mean()), "rejected": float(evolution.stays.double().mean())}


ANALYTIC = {"quadratic": quadratic, "quadratic_4": partial(quadratic, 4), "fitted": fitted}
COLUMNS = ["label", "critic", "estimator", "force", "alpha", "step_size", "ratio", "cosine", "cosine_control"]
COLUMNS += ["wrong_signs", "wrong_signs_control", "worst", "variance", "energy_error", "rejected"]
KEY = COLUMNS[:6]


def measure(critics: list[str], estimators: list[str], forces: list[str], label: str) -> None:
    """Fill the missing rows. A force of ``none`` is the loss without a transform, whose variance is the unit."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message="No target network updater")
    done = {tuple(row[name] for name in KEY) for row in read()}
    for critic in critics:
        name, _, path = critic.partition("=")
        situation = of_checkpoint(path) if path else ANALYTIC[name]()
        settings = [("none", 0.0), *((force, step_size) for step_size in STEP_SIZES for force in forces)]
        for estimator, (force, step_size), alpha in product(estimators, settings, ALPHAS):
            row = dict(zip(KEY, (label, name, estimator, force, str(alpha), str(step_size)), strict=True))
            if tuple(row.values()) in done:
                continue
            found = slopes(situation, estimator, None if force == "none" else force, alpha, step_size)
            row |= {column: f"{value:.4g}" for column, value in found.items()}
            write(row)
            print(", ".join(row.values()), flush=True)


def read() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write(row: dict[str, str]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


# -- tables ------------------------------------------------------------------------------------------------------------
def table(label: str, estimator: str) -> None:
    """One line per critic, force and temperature; the three step sizes stand beside each other."""
    rows = {tuple(row[name] for name in KEY[1:]): row for row in read() if row["label"] == label}
    print(f"| critic | force | alpha | {' | '.join(f'eps {step_size}' for step_size in sorted(STEP_SIZES))} |")
    print("|---|---|---|---|---|---|")
    critics = dict.fromkeys(key[0] for key in rows)
    for critic, force, alpha in product(critics, FORCES, map(str, ALPHAS)):
        plain = rows.get((critic, estimator, "none", alpha, "0.0"))
        cells = [rows.get((critic, estimator, force, alpha, str(step_size))) for step_size in sorted(STEP_SIZES)]
        if plain and any(cells):
            print(f"| {critic} | {force} | {alpha} | {' | '.join(words(cell, plain) for cell in cells)} |")


def words(row: dict[str, str] | None, plain: dict[str, str]) -> str:
    """ratio, cosine (control), share of wrong signs (control), variance in units of the plain loss's, energy error."""
    if row is None:
        return ""
    values = {name: float(row[name]) for name in COLUMNS[6:]}
    noise = values["variance"] / float(plain["variance"])
    signs = f"{100 * values['wrong_signs']:.0f} ({100 * values['wrong_signs_control']:.0f}) %"
    cosines = f"{values['cosine']:.2f} ({values['cosine_control']:.2f})"
    return f"{values['ratio']:.2f}, {cosines}, {signs}, x {noise:.2g}, {values['energy_error']:.2g}"


def cost() -> None:
    """CPU time of one update with each force beside that of one without, interleaved."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message="No target network updater")
    cases = [Case("gaussian"), *(Case("gaussian", force, 3) for force in FORCES)]
    cases += [Case("pmoe"), *(Case("pmoe", force, 3) for force in FORCES)]
    times = fastest([updating(learner(case), compiled=False) for case in cases])
    print("| actor | force | update (ms) | ratio |\n|---|---|---|---|")
    plain = {case.actor: time for case, time in zip(cases, times, strict=True) if not case.steps}
    for case, time in zip(cases, times, strict=True):
        force = case.force if case.steps else "none"
        print(f"| {case.actor} | {force} | {time / UPDATES:.1f} | {time / plain[case.actor]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring, tables = commands.add_parser("measure"), commands.add_parser("table")
    commands.add_parser("cost")
    measuring.add_argument("critics", nargs="+", help="quadratic, fitted, or NAME=<checkpoint>")
    measuring.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=["pathwise"])
    measuring.add_argument("--forces", nargs="+", choices=FORCES, default=list(FORCES))
    for command in (measuring, tables):
        command.add_argument("--label", default="after")
    tables.add_argument("--estimator", choices=list(ESTIMATORS), default="pathwise")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.critics, arguments.estimators, arguments.forces, arguments.label)
    elif arguments.command == "table":
        table(arguments.label, arguments.estimator)
    else:
        cost()


if __name__ == "__main__":
    main()
