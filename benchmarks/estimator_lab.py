"""The estimator laboratory: bias, direction, noise and cost of every gradient estimator, side by side.

    python benchmarks/estimator_lab.py                          # trains the critic it needs first
    python benchmarks/estimator_lab.py --checkpoint last.ckpt   # any checkpoint of algo=sac actor=pmoe
    mlflow run . --env-manager local -e estimator-lab

Three measurements, each of gradients with respect to the parameters of the mixture (see ``gradient_statistics``):

* analytic objectives from constant to many-modal, for K = 1..16 components and A = 1..17 action dimensions, against
  the exact gradient: by quadrature for A <= 2, beyond that by very many draws of ``marginalized``;
* the critics of a SAC run at states its policy visits on HalfCheetah-v5, against very many draws of ``marginalized``;
* the time of one actor step, forward and backward, in units of the unimodal policy's.

A measured cell is one CSV file, so an interrupted run continues where it stopped. At the end: ``estimator_lab.csv``,
the tables, figures, and all of them in MLflow.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from resumable import fill
from tensordict import TensorDict
from torch import Tensor

from pmoe_lightning.estimators import ESTIMATORS as PLAIN
from pmoe_lightning.estimators import (
    AbstractEstimator,
    Frequency,
    GumbelSoftmax,
    HalfReparameterized,
    Implicit,
    Marginalized,
    Objective,
    ObjectiveValue,
    Pathwise,
    ScoreFunction,
)
from pmoe_lightning.estimators.gradient_statistics import GROUPS, cosine, gradient_statistics
from pmoe_lightning.losses import PMOESACLoss
from pmoe_lightning.modules.actors import make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.modules.distributions import TanhGaussianMixture

RESULTS = Path(__file__).parent / "results" / "estimator_lab"
COMPONENTS, ACTION_DIMS, ALPHA = (1, 2, 4, 8, 16), (1, 2, 6, 17), 0.1
STATES, CRITIC_STATES = 8, 64
ELEMENTS = 10_000_000  # of the largest tensor of a cell, which sets the number of draws

#: Written as on the command line: `estimator=<first word> estimator.<the rest>`.
ESTIMATORS: dict[str, AbstractEstimator] = {
    "marginalized": Marginalized(),
    "implicit": Implicit(),
    "half_reparameterized num_samples=1 baseline=none": HalfReparameterized(num_samples=1, baseline="none"),
    "half_reparameterized": HalfReparameterized(),
    "score_function num_samples=1 baseline=none": ScoreFunction(num_samples=1, baseline="none"),
    "score_function baseline=mean": ScoreFunction(baseline="mean"),
    "score_function": ScoreFunction(),
    "gumbel_softmax": GumbelSoftmax(),
    "gumbel_softmax temperature=0.1": GumbelSoftmax(temperature=0.1),
    "gumbel_softmax straight_through=false": GumbelSoftmax(straight_through=False),
    "frequency": Frequency(),
    "frequency backpropagate=all": Frequency(backpropagate="all"),
    "frequency log_prob=mixture": Frequency(log_prob="mixture"),
}
#: And whatever the package has besides that serves several components.
ESTIMATORS |= {name: make() for name, make in PLAIN.items() if name not in ESTIMATORS and make.most_components is None}

Cost = Callable[[Tensor], Tensor]


def bump(action: Tensor, center: float, width: float) -> Tensor:
    """exp(-mean_d (a_d - center)^2 / width)."""
    return (-(action - center).square().mean(-1) / width).exp()


#: What is minimised, besides ALPHA log pi; actions lie in [-1, 1]^A. Means over d keep them alike in every A.
OBJECTIVES: dict[str, Cost] = {
    "constant": lambda a: torch.ones_like(a[..., 0]),
    "linear": lambda a: a.mean(-1),
    "quadratic": lambda a: (a - 0.4).square().mean(-1),
    "smooth_bimodal": lambda a: -bump(a, 0.5, 0.25) - 0.8 * bump(a, -0.5, 0.25),
    "sharp_bimodal": lambda a: -bump(a, 0.6, 0.02) - 0.8 * bump(a, -0.5, 0.03),
    "many_modal": lambda a: 0.5 * (6 * a).cos().mean(-1),
}


class Reference(NamedTuple):
    """The exact gradient by group, and the root mean square error of each."""

    mean: dict[str, Tensor]
    error: dict[str, float]


# -- what is measured --------------------------------------------------------------------------------------------------
def random_policy(num_components: int, action_dim: int) -> TanhGaussianMixture:
    """STATES mixtures with unequal weights and overlapping components."""
    generator = torch.Generator().manual_seed(num_components * 100 + action_dim)
    shape = (STATES, num_components, action_dim)
    logits = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    loc = 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = 0.15 * 4 ** torch.rand(shape, generator=generator, dtype=torch.float64)
    return TanhGaussianMixture(logits, loc, scale)


def soft_objective(cost: Cost) -> Callable[[TanhGaussianMixture], Objective]:
    """cost(a) + ALPHA log pi(a), SAC's objective with Q = -cost."""

    def make_objective(distribution: TanhGaussianMixture) -> Objective:
        def objective(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
            log_prob = log_prob - distribution.log_abs_det_jacobian(u)
            value = cost(distribution.squash(u))
            return ObjectiveValue(ALPHA * log_prob + value, log_prob, -value)

        return objective

    return make_objective


def exact_gradient(distribution: TanhGaussianMixture, cost: Cost) -> Reference:
    """By the trapezoid rule, sum_k w_k h^A sum_z phi(z) c(mu_k + sigma_k z), which converges geometrically; A <= 2."""
    leaves = [
        value.clone().requires_grad_() for value in (distribution.log_weights, distribution.loc, distribution.scale)
    ]
    A = distribution.loc.shape[-1]
    axis = torch.arange(-8.0, 8.05, 0.1, dtype=torch.float64)
    z = torch.stack([side.flatten() for side in torch.meshgrid(*[axis] * A, indexing="ij")], -1)
    mass = 0.1**A * torch.exp(-0.5 * z.square().sum(-1)) / (2 * math.pi) ** (A / 2)
    for state in range(STATES):
        mixture = TanhGaussianMixture(*(leaf[state] for leaf in leaves))
        for k in range(mixture.num_components):
            u = mixture.loc[k] + mixture.scale[k] * z
            value = soft_objective(cost)(mixture)(u, mixture.log_prob_unsquashed(u)).cost
            (mixture.weights[k] * (mass * value).sum()).backward(retain_graph=True)
    means = dict(zip(GROUPS, (leaf.grad for leaf in leaves), strict=True))
    return Reference(means, dict.fromkeys(GROUPS, 0.0))


def drawn_gradient(distribution, make_objective, *, num_samples: int, chunks: int) -> Reference:
    """The mean of ``chunks * num_samples`` draws of ``marginalized``, and its standard error."""
    parts = [
        gradient_statistics(Marginalized(), distribution, make_objective, num_samples=num_samples)
        for _ in range(chunks)
    ]
    means = {group: torch.stack([part[group].mean for part in parts]).mean(0) for group in GROUPS}
    errors = {
        group: math.sqrt(sum(part[group].variance for part in parts) / chunks / (chunks * num_samples))
        for group in GROUPS
    }
    return Reference(means, errors)


def measure(
    distribution: TanhGaussianMixture,
    make_objective: Callable[[TanhGaussianMixture], Objective],
    reference: Reference,
    *,
    num_samples: int,
) -> Iterator[dict]:
    """One row per estimator and group of parameters."""
    num_components = distribution.num_components
    estimators = ESTIMATORS | ({"pathwise": Pathwise()} if num_components == 1 else {})
    states = distribution.batch_shape.numel()
    for name, estimator in estimators.items():
        seen = 0

        def counting(repeated: TanhGaussianMixture) -> Objective:
            objective = make_objective(repeated)

            def count(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
                nonlocal seen
                seen += log_prob.numel()
                return objective(u, log_prob)

            return count

        statistics = gradient_statistics(estimator, distribution, counting, num_samples=num_samples)
        for group in GROUPS if num_components > 1 else GROUPS[1:]:
            measured, exact = statistics[group], reference.mean[group]
            size = float(exact.norm())
            yield {
                "estimator": name,
                "group": group,
                "evaluations": seen / states / num_samples,
                "relative_bias": float((measured.mean - exact).norm()) / size,
                "standard_error": math.hypot(measured.standard_error, reference.error[group]) / size,
                "cosine": cosine(measured.mean, exact),
                "relative_variance": measured.variance / size**2,
                "signal_to_noise": measured.signal_to_noise,
            }


# -- the three measurements --------------------------------------------------------------------------------------------
def analytic_cell(num_components: int, action_dim: int) -> Iterator[dict]:
    """Every objective for one K and A."""
    distribution = random_policy(num_components, action_dim)
    largest = STATES * num_components**2 * action_dim
    num_samples = max(500, min(4000, ELEMENTS // largest))
    for name, cost in OBJECTIVES.items():
        torch.manual_seed(0)
        if action_dim <= 2:
            reference = exact_gradient(distribution, cost)
        else:
            reference = drawn_gradient(distribution, soft_objective(cost), num_samples=num_samples, chunks=20)
        head = {"objective": name, "K": num_components, "A": action_dim}
        for row in measure(distribution, soft_objective(cost), reference, num_samples=num_samples):
            yield head | row


def critic_cell(checkpoint: Path) -> Iterator[dict]:
    """The critics of a SAC run, at states that its own policy visits."""
    loss, states = load_critics(checkpoint)
    with torch.no_grad():
        distribution = loss.actor_network.get_dist(states.copy())

    def make_objective(repeated: TanhGaussianMixture) -> Objective:
        return loss.objective(states, repeated)

    torch.manual_seed(0)
    reference = drawn_gradient(distribution, make_objective, num_samples=200, chunks=100)
    shape = distribution.loc.shape
    for row in measure(distribution, make_objective, reference, num_samples=400):
        yield {"objective": "critic", "K": shape[-2], "A": shape[-1]} | row


def load_critics(checkpoint: Path) -> tuple[PMOESACLoss, TensorDict]:
    """The loss of a SAC checkpoint with its temperature, and a few states from an episode of its policy."""
    from torchrl.envs import ExplorationType, set_exploration_type

    from pmoe_lightning import load_policy, make_env
    from pmoe_lightning.checkpoints.files import read_checkpoint
    from pmoe_lightning.checkpoints.policy import make_critic

    saved = read_checkpoint(checkpoint)
    entry = saved["policy"]
    actor = load_policy(saved).actor
    description = entry["description"]
    loss = PMOESACLoss(actor, [make_critic(description) for _ in range(2)])
    loss.load_state_dict({key.removeprefix("loss."): value for key, value in saved["state_dict"].items()}, strict=False)
    env = make_env(description["env"]["id"], num_envs=16, seed=0)
    torch.manual_seed(0)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        visited = env.rollout(200, actor, break_when_any_done=False)["observation"].flatten(0, 1)
    chosen = visited[torch.randperm(len(visited))[:CRITIC_STATES]]
    return loss, TensorDict(observation=chosen, batch_size=CRITIC_STATES)


def time_cell(rounds: int = 40) -> Iterator[dict]:
    """One actor step at the sizes of HalfCheetah-v5: paired in every round, so that a busy machine cancels out."""
    torch.manual_seed(0)
    states = TensorDict(observation=torch.randn(256, 17), batch_size=256)
    bounds = [-1.0] * 6, [1.0] * 6

    def step_of(actor, estimator: AbstractEstimator) -> Callable[[], None]:
        loss = PMOESACLoss(actor, [make_qvalue_network(17, 6) for _ in range(2)], estimator=estimator)

        def step() -> None:
            loss.zero_grad()
            surrogate = loss.estimate(states)
            surrogate.loss.mean().backward()

        return step

    steps = {"pathwise": step_of(make_gaussian_actor(17, *bounds), Pathwise())}
    for name, estimator in ESTIMATORS.items():
        steps[name] = step_of(make_pmoe_actor(17, *bounds, num_components=4), estimator)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        pairs = zip(taken[3:], seconds["pathwise"][3:], strict=True)
        yield {"objective": "time", "K": 1 if name == "pathwise" else 4, "A": 6, "estimator": name} | {
            "relative_time": median(mine / unimodal for mine, unimodal in pairs)
        }


# -- cells, tables, MLflow ---------------------------------------------------------------------------------------------
def fill_rows(path: Path, rows: Callable[[], Iterator[dict]]) -> None:
    """Measure the rows of a cell unless its file exists."""
    start = time.monotonic()
    if measured := fill(path, lambda: list(rows()), as_csv):
        print(f"{path.stem}: {len(measured)} rows in {time.monotonic() - start:.0f} s", flush=True)


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
    return text.getvalue()


def train_critic(frames: int) -> Path:
    """The checkpoint of a SAC run on HalfCheetah-v5 with a mixture policy; trained once."""
    folder = RESULTS.parent / "runs" / f"estimator_lab-{frames}"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        words = ["algo=sac", "actor=pmoe", "estimator=marginalized", "callbacks=minimal", "logger=none"]
        words += [f"total_frames={frames}", "data.frames_per_epoch=10_000", "seed=1", f"hydra.run.dir={folder}"]
        words.append("resume=auto")
        subprocess.run([sys.executable, "-m", "pmoe_lightning.train", *words], check=True)
    return checkpoint


def collect(results: Path) -> list[dict]:
    """All rows of all cells with the same columns, also written to one file."""
    rows = []
    for path in sorted((results / "cells").glob("*.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (results / "estimator_lab.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return [dict.fromkeys(columns, "") | row for row in rows]


def markdown(rows: list[dict], objective: str, num_components: int, action_dim: int) -> str:
    """The table of one objective: bias, cosine and signal-to-noise by group, and the time of an actor step."""
    times = {row["estimator"]: row["relative_time"] for row in rows if row["objective"] == "time"}
    cells: dict[str, dict[str, dict]] = {}
    for row in rows:
        if (row["objective"], row["K"], row["A"]) == (objective, str(num_components), str(action_dim)):
            cells.setdefault(row["estimator"], {})[row["group"]] = row
    lines = [f"objective {objective}, K = {num_components}, A = {action_dim}", ""]
    lines += ["| estimator | evaluations | relative bias: router, loc, scale | cosine | signal-to-noise | time |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, groups in cells.items():
        shown = [groups[group] for group in GROUPS if group in groups]
        bias = ", ".join(f"{float(r['relative_bias']):.2f} ± {float(r['standard_error']):.2f}" for r in shown)
        angle = ", ".join(f"{float(r['cosine']):.2f}" for r in shown)
        signal = ", ".join(f"{float(r['signal_to_noise']):.2f}" for r in shown)
        taken = f"{float(times[name]):.2f}" if name in times else ""
        lines.append(f"| {name} | {float(shown[0]['evaluations']):g} | {bias} | {angle} | {signal} | {taken} |")
    return "\n".join(lines)


def report(results: Path, rows: list[dict]) -> None:
    """Tables on the screen, figures beside them, everything in one MLflow run."""
    import mlflow
    from estimator_lab_figures import draw_all

    measured = [(int(row["K"]), int(row["A"])) for row in rows if row["objective"] in OBJECTIVES]
    K, A = (4, 6) if (4, 6) in measured else measured[-1]
    tables = [markdown(rows, objective, K, A) for objective in OBJECTIVES]
    (critic,) = {(int(row["K"]), int(row["A"])) for row in rows if row["objective"] == "critic"}
    tables.append(markdown(rows, "critic", *critic))
    (results / "tables.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    figures = draw_all(rows, K, A)
    for name, figure in figures.items():
        figure.savefig(results / f"{name}.png")
    if "MLFLOW_RUN_ID" not in os.environ:  # else `mlflow run` has opened the run already
        mlflow.set_experiment("estimator_lab")
    with mlflow.start_run():
        mlflow.log_artifacts(str(results), "estimator_lab")
        for row in rows:
            if row["objective"] == "time":
                mlflow.log_metric(f"relative_time/{row['estimator'].replace('=', ' ')}", float(row["relative_time"]))
        for name, figure in figures.items():
            mlflow.log_figure(figure, f"figures/{name}.png")
    print(f"\nresults    {results}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of algo=sac actor=pmoe; trained where none is given")
    parser.add_argument("--frames", type=int, default=20_000, help="environment frames to train the critic for")
    parser.add_argument("--components", type=int, nargs="+", default=COMPONENTS, metavar="K")
    parser.add_argument("--action-dims", type=int, nargs="+", default=ACTION_DIMS, metavar="A")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = arguments.results / "cells"
    for num_components in arguments.components:
        for action_dim in arguments.action_dims:
            path = cells / f"K{num_components:02}-A{action_dim:02}.csv"
            fill_rows(path, lambda K=num_components, A=action_dim: analytic_cell(K, A))
    fill_rows(cells / "time.csv", time_cell)
    fill_rows(cells / "critic.csv", lambda: critic_cell(arguments.checkpoint or train_critic(arguments.frames)))
    report(arguments.results, collect(arguments.results))


if __name__ == "__main__":
    main()
