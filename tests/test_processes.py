"""What training processes share, in real ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_on_policy_update import B, ppo, transitions

from pmoe_lightning.estimators import Pathwise
from pmoe_lightning.updates import OnPolicyUpdate
from pmoe_lightning.updates.processes import average_over_processes


def in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(10.0 * rank)]
    average_over_processes(tensors)
    torch.manual_seed(0)
    algorithm = ppo(Pathwise())
    torch.manual_seed(rank)  # the same network, but experience of its own
    update = OnPolicyUpdate(algorithm.loss, algorithm.configure_optimizers(), max_grad_norm=0.5, compile=False)
    update(transitions(algorithm).view(-1, B))
    state = [value.detach().clone() for value in algorithm.loss.parameters()]
    torch.save({"means": tensors, "state": state}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    mp.spawn(in_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["means"][0].eq(0.5).all() and first["means"][1] == 5.0
    for mine, other in zip(first["state"], second["state"], strict=True):
        assert torch.equal(mine, other)
