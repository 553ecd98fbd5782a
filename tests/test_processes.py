"""What training processes share, in real ones: P of them do what one does with all of their data."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_on_policy_update as on_policy
import test_sac_update as sac
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from tensordict import TensorDict
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.estimators import Frequency, Marginalized
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.crossq import make_crossq_network
from pmoe_lightning.processes.collectives import (
    average_over_processes,
    gather_objects,
    largest_over_processes,
    standardize_over_processes,
)
from pmoe_lightning.updates import OnPolicyUpdate, SACUpdate

UPDATES, FEW_UPDATES = 200, 20


class PartOfTheDraws(TorchFunctionMode):
    """Normal and exponential numbers for a minibatch of ``whole`` states, of which a process takes its part."""

    def __init__(self, whole: int, rank: int = 0, parts: int = 1) -> None:
        super().__init__()
        self.whole, self.rank, self.part = whole, rank, whole // parts
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function not in (torch.randn_like, torch.Tensor.exponential_):
            return function(*args, **(kwargs or {}))
        shape = list(args[0].shape)
        axis = shape.index(self.part)
        shape[axis] = self.whole
        drawn = torch.randn(shape, dtype=args[0].dtype, generator=self.generator)
        if function is torch.Tensor.exponential_:
            drawn = torch.empty_like(drawn).exponential_(generator=self.generator)
        own = drawn.narrow(axis, self.rank * self.part, self.part)
        return own if function is torch.randn_like else args[0].copy_(own)


def part(batch: TensorDict, rank: int, parts: int) -> TensorDict:
    """The columns [U, B / P] of the minibatches [U, B] that belong to a process."""
    return torch.stack(batch.unbind(0)).chunk(parts, 1)[rank].contiguous()


def sac_by_lightning(rank: int = 0, parts: int = 1, *, force: str | None = None) -> dict[str, torch.Tensor]:
    """The loss module itself, stepped by Lightning, whose strategy averages the gradients."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(sac.OBSERVATION_DIM, sac.LOW, sac.HIGH, hidden_sizes=(12, 8))
    sizes = {"observation_dim": sac.OBSERVATION_DIM, "action_dim": sac.A, "hidden_sizes": (12, 8)}
    transform = make_hamiltonian_transform(sac.OBSERVATION_DIM, sac.A, force=force) if force else None
    algorithm = make_sac(actor, Marginalized(), action_transform=transform, lr=1e-3, tau=sac.TAU, **sizes)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", devices=parts, max_epochs=1, use_distributed_sampler=False, **quiet)
    batches = part(sac.minibatches(UPDATES), rank, parts).split(20)
    with PartOfTheDraws(sac.B, rank, parts):
        trainer.fit(algorithm, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    assert algorithm.updates == UPDATES
    return dict(algorithm.loss.state_dict())


def crossq_by_lightning(
    rank: int, parts: int, *, hidden_sizes: tuple[int, ...] = (12, 8), compile: bool = False
) -> dict[str, torch.Tensor]:
    """Fifty updates, an actor's turn in every third."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(sac.OBSERVATION_DIM, sac.LOW, sac.HIGH, hidden_sizes=hidden_sizes)
    sizes = {"observation_dim": sac.OBSERVATION_DIM, "action_dim": sac.A, "hidden_sizes": hidden_sizes}
    critic = {"make_critic": partial(make_crossq_network, hidden_sizes=hidden_sizes), "policy_delay": 3}
    algorithm = make_sac(actor, Marginalized(), lr=1e-3, compile=compile, **critic, **sizes)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(accelerator="cpu", devices=parts, max_epochs=1, use_distributed_sampler=False, **quiet)
    batches = part(sac.minibatches(50), rank, parts).split(10)
    trainer.fit(algorithm, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    return dict(algorithm.loss.state_dict())


def crossq_update(rank: int, parts: int) -> dict[str, torch.Tensor]:
    loss, optimizer = sac.make(critic="crossq")
    update = SACUpdate(loss, optimizer, tau=sac.TAU, policy_delay=3, compile=False)
    torch.manual_seed(rank)
    update(part(sac.minibatches(50), rank, parts))
    return dict(loss.state_dict())


def sac_update(rank: int = 0, parts: int = 1, *, force: str | None = None) -> dict[str, torch.Tensor]:
    loss, optimizer = sac.make(force=force)
    update = SACUpdate(loss, optimizer, tau=sac.TAU, compile=False)
    with PartOfTheDraws(sac.B, rank, parts):
        update(part(sac.minibatches(FEW_UPDATES), rank, parts))
    return dict(loss.state_dict())


def ppo_update(rank: int = 0, parts: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    algorithm = on_policy.ppo(Frequency())
    batch = on_policy.transitions(algorithm, FEW_UPDATES * on_policy.B).view(FEW_UPDATES, on_policy.B)
    own = part(batch, rank, parts)
    if parts > 1:
        algorithm.loss.normalize_advantage = False
        own.set("advantage", standardize_over_processes(own.get("advantage")))
    update = OnPolicyUpdate(algorithm.loss, algorithm.configure_optimizers(), max_grad_norm=0.5, compile=False)
    with PartOfTheDraws(on_policy.B, rank, parts):
        update(own)
    return dict(algorithm.loss.state_dict())


TRAININGS = {
    "sac-by-lightning": sac_by_lightning,
    "sac-by-lightning-gated": partial(sac_by_lightning, force="gated"),
    "sac": sac_update,
    "sac-gated": partial(sac_update, force="gated"),
    "ppo": ppo_update,
}


#: A batch of half the size has other statistics, so these only agree with each other.
OF_BATCHES = {"crossq-by-lightning": crossq_by_lightning, "crossq": crossq_update}


def in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # to Lightning: you were started as one of two
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(10.0 * rank)]
    average_over_processes(tensors)
    torch.save(
        {
            "means": tensors,
            "largest": largest_over_processes(3 - rank, None),
            "gathered": gather_objects({"rank": rank}),
            **{name: training(rank, 2) for name, training in (TRAININGS | OF_BATCHES).items()},
        },
        folder / f"{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(in_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_what_processes_share(processes):
    for rank, found in enumerate(processes):
        assert found["means"][0].eq(0.5).all() and found["means"][1] == 5.0 and found["largest"] == 3
        assert found["gathered"] == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [{"rank": 1}])


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_learn_what_one_does_from_all_the_data(name, processes):
    """Bit for bit the same in both, and in float64 to 1e-9 what one process makes of the whole minibatches."""
    first, second = (found[name] for found in processes)
    torch.set_default_dtype(torch.float64)
    try:
        whole = TRAININGS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in whole.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OF_BATCHES)
def test_two_processes_hold_the_same_parameters_and_statistics(name, processes):
    first, second = (found[name] for found in processes)
    assert any("running_var" in key for key in first)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    (counter,) = (value for key, value in first.items() if "num_updates" in key)
    assert counter.tolist() == [50, 50]


def compiled_in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    forms = [crossq_by_lightning(rank, 2, hidden_sizes=(8,), compile=compile) for compile in (True, False)]
    torch.save(forms, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_the_same_parameters_and_statistics_after_compiled_updates(tmp_path):
    """Bit for bit, and, draw for draw, those of the readable form in two processes."""
    mp.spawn(compiled_in_process, (tmp_path,), nprocs=2)
    (first, readable), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, readable[key], rtol=1e-9, atol=1e-9, msg=key)
    (counter,) = (value for key, value in first.items() if "num_updates" in key)
    assert counter.tolist() == [50, 50]
