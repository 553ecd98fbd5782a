"""Several training processes: what an update has to share between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, by one reduction of all of them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def standardize_over_processes(values: Tensor) -> Tensor:
    """Each row of ``values`` [U, ...] minus the mean and over the standard deviation of all processes' rows."""
    rows = values.flatten(1)
    count = rows.shape[1] * dist.get_world_size()
    mean = rows.sum(1, keepdim=True)
    dist.all_reduce(mean)
    rows = rows - mean / count
    squares = rows.square().sum(1, keepdim=True)
    dist.all_reduce(squares)
    return (rows / (squares / (count - 1)).sqrt().clamp_min(1e-6)).view_as(values)


def largest_over_processes(number: int, device: torch.device | None) -> int:
    """The largest of the processes' numbers; ``device`` is one that the processes can communicate from."""
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes by rank in the first process, and this process's alone in any other."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or [value]
