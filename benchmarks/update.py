"""Milliseconds and memory of one SAC update: readable, compiled, and the matrix products alone.

All are taken in turns in one process and in its CPU time, so that a busy machine slows all of them. The floor
multiplies matrices of the sizes, layouts and number formats that the update itself multiplies, and does nothing else.
Memory is what an update allocates at most at once, beside parameters, optimizer state and minibatch.

    python benchmarks/update.py table       # every actor, estimator, transform and precision at HalfCheetah's sizes
    python benchmarks/update.py critics     # plain critics and CrossQ's, whose actor learns at every third update
    python benchmarks/update.py growth      # with K, the width of the networks and the batch; one figure each

Each row compiles for about a minute the first time. Results: benchmarks/results/update/.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pmoe_lightning.algorithms import SAC, make_sac
from pmoe_lightning.estimators import ESTIMATORS
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.actors import make_additive_moe_actor, make_gaussian_actor, make_mcp_actor, make_pmoe_actor
from pmoe_lightning.modules.crossq import make_crossq_network
from pmoe_lightning.modules.networks import set_matmul_precision
from pmoe_lightning.updates import SACUpdate

RESULTS = Path(__file__).parent / "results" / "update"
OBSERVATION_DIM, ACTION_DIM = 17, 6  # HalfCheetah-v5
ACTORS = {
    "gaussian": make_gaussian_actor,
    "pmoe": make_pmoe_actor,
    "additive_moe": make_additive_moe_actor,
    "mcp": make_mcp_actor,
}
#: With what goes with them by default.
CRITICS: dict[str, dict[str, Any]] = {
    "plain": {},
    "crossq": {"make_critic": make_crossq_network, "lr": 1e-3, "betas": (0.5, 0.999), "policy_delay": 3},
}
GROWTH = {
    "components": (1, 2, 4, 8, 16, 32),
    "width": (64, 128, 256, 512, 1024),
    "batch": (64, 128, 256, 512, 1024, 2048, 4096),
}


class Case(NamedTuple):
    """One row."""

    actor: str = "pmoe"
    estimator: str = "frequency"
    precision: str = "float32"
    force: str = ""  # of the Hamiltonian transform; "" is none
    components: int = 4
    width: int = 256
    batch: int = 256
    critic: str = "plain"


def table_cases() -> list[Case]:
    cases = [Case(actor, "pathwise", components=1) for actor in ACTORS if actor != "pmoe"]
    cases += [Case("pmoe", name) for name, estimator in ESTIMATORS.items() if estimator.most_components is None]
    gaussian = Case("gaussian", "pathwise", components=1)
    others = [{"force": "raw"}, {"force": "normalized"}, {"force": "gated"}, {"precision": "bf16-hidden"}]
    return cases + [case._replace(**other) for other in others for case in (gaussian, Case())]


def critic_cases() -> list[Case]:
    actors = [Case("gaussian", "pathwise", components=1), Case(), Case(estimator="marginalized")]
    return [case._replace(critic=critic) for case in actors for critic in CRITICS]


def make(case: Case) -> SAC:
    """The algorithm of a row, with the same initial networks at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": (case.width, case.width)}
    components = {"num_components": case.components} if case.actor == "pmoe" else {}
    bounds = [-1.0] * ACTION_DIM, [1.0] * ACTION_DIM
    actor = ACTORS[case.actor](OBSERVATION_DIM, *bounds, **sizes, **components)
    dims = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM}
    transform = make_hamiltonian_transform(*dims.values(), force=case.force) if case.force else None
    critic = CRITICS[case.critic]
    return make_sac(actor, ESTIMATORS[case.estimator](), action_transform=transform, **dims, **sizes, **critic)


def minibatches(updates: int, batch: int) -> TensorDict:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(updates, batch, *shape)

    flag = torch.zeros(updates, batch, 1, dtype=torch.bool)
    after = {"observation": normal(OBSERVATION_DIM), "reward": normal(1)}
    after |= {"terminated": flag, "truncated": flag, "done": flag}
    root = {"observation": normal(OBSERVATION_DIM), "action": normal(ACTION_DIM).tanh()}
    return TensorDict({**root, "next": TensorDict(after, [updates, batch])}, [updates, batch])


class Products(TorchDispatchMode):
    """Collects the factors of every matrix product that is taken inside, as random matrices of the same layout."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.multiplications: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, of_onednn = torch.ops.aten, torch.ops.pmoe_lightning.product.default
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, of_onednn):
            self.factors.append(tuple(torch.randn_like(x) for x in args[-2:]))
            self.multiplications.append(func if func is of_onednn else torch.matmul)
        return func(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return sum(2 * first.numel() * second.shape[-1] for first, second in self.factors)

    def replay(self, updates: int) -> None:
        for _ in range(updates):
            for multiply, factors in zip(self.multiplications, self.factors, strict=True):
                multiply(*factors)


def readable_form(algorithm: SAC) -> Callable[[TensorDict], None]:
    """What takes an update for each of the minibatches."""
    optimizer = algorithm.configure_optimizers()

    def update(batch: TensorDict) -> None:
        for number, minibatch in enumerate(batch.unbind(0), 1):
            acts = number % algorithm.policy_delay == 0
            out = algorithm.loss(minibatch) if acts else algorithm.loss.critic_losses(minibatch)
            optimizer.zero_grad()
            sum(value for name, value in out.items() if name.startswith("loss_")).backward()
            optimizer.step()
            if algorithm.target_updater is None:
                algorithm.loss.take_statistics(out.get("statistics"))
            else:
                algorithm.target_updater.step()

    return update


def peak_memory(update: Callable[[], None]) -> float:
    """MiB that the call holds at its peak, of what it allocates itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        update()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**20


class Timed(NamedTuple):
    """One row, ready to be timed."""

    case: Case
    updates: int  # of one call
    forms: dict[str, Callable[[], None]]
    compile_seconds: float

    def milliseconds(self, form: str) -> float:
        """CPU time of one update, in one call."""
        set_matmul_precision(self.case.precision)
        start = time.process_time()
        self.forms[form]()
        return (time.process_time() - start) / self.updates * 1000


def prepare(case: Case) -> Timed:
    set_matmul_precision(case.precision)
    algorithm, counted, readable = make(case), make(case), readable_form(make(case))
    turn = algorithm.policy_delay
    turns = max(1, 16 * 256 // case.batch // turn)
    batch, delays = minibatches(turns * turn, case.batch), {"tau": 0.005, "policy_delay": turn}
    update = SACUpdate(algorithm.loss, algorithm.configure_optimizers(), **delays)
    start = time.process_time()
    update(batch[:turn])
    seconds = time.process_time() - start
    with Products() as products:
        SACUpdate(counted.loss, counted.configure_optimizers(), **delays, compile=False)(batch[:turn])
    forms = {"readable": partial(readable, batch), "compiled": partial(update, batch)}
    return Timed(case, turns * turn, forms | {"floor": partial(products.replay, turns)}, seconds)


def measure(rows: list[Timed], rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds per update of the three, their ratios, and the memory of the first two."""
    times = [{form: [] for form in row.forms} for row in rows]
    for _ in range(rounds + 1):  # the first is a warm-up
        for row, own in zip(rows, times, strict=True):
            for form, values in own.items():
                values.append(row.milliseconds(form))
    medians = [{form: statistics.median(values[1:]) for form, values in own.items()} for own in times]
    return list(map(_summary, rows, medians))


def _summary(row: Timed, medians: dict[str, float]) -> dict[str, Any]:
    set_matmul_precision(row.case.precision)
    found = row.case._asdict() | {f"{form}_ms": value for form, value in medians.items()}
    for form, other in (("readable", "compiled"), ("compiled", "floor")):
        found[f"{form}/{other}"] = medians[form] / medians[other]
    for form in ("readable", "compiled"):
        found[f"{form}_MiB"] = peak_memory(row.forms[form])
    return found | {"compile_s": row.compile_seconds}


def growth_cases(name: str) -> Iterator[Case]:
    for value in GROWTH[name]:
        yield Case()._replace(**{name: value})


def run(name: str, cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Measure the rows in turns, print and write them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = measure([prepare(case) for case in cases], rounds)
    for row in rows:
        print("  ".join(f"{key} {f'{value:.2f}' if isinstance(value, float) else value}" for key, value in row.items()))
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return rows


def draw(name: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    forms = {"ms": ("readable", "compiled", "floor"), "MiB": ("readable", "compiled")}
    labels = ("milliseconds per update", "MiB allocated by an update")
    for axes, (unit, names), label in zip(figure.subplots(1, 2), forms.items(), labels, strict=True):
        for form in names:
            axes.plot([row[name] for row in rows], [row[f"{form}_{unit}"] for row in rows], "o-", label=form)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xticks([row[name] for row in rows], [row[name] for row in rows])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(RESULTS / f"growth_{name}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "critics", "growth"])
    parser.add_argument("--over", choices=list(GROWTH), nargs="+", default=list(GROWTH))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="No target network updater")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    if arguments.what != "growth":
        run(arguments.what, {"table": table_cases, "critics": critic_cases}[arguments.what](), arguments.rounds)
        return
    for name in arguments.over:
        draw(name, run(f"growth_{name}", list(growth_cases(name)), arguments.rounds))


if __name__ == "__main__":
    main()
