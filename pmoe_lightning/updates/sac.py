"""One minibatch of SAC as a graph of tensors: losses, gradients, Adam, and the targets that follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.objectives import SACLoss

from pmoe_lightning.updates.base import AbstractUpdate


class SACUpdate(AbstractUpdate):
    r"""An ``AbstractUpdate`` after which the target critics follow, as ``SoftUpdate`` makes them.

    Every gradient is taken at the old parameters, then every group of the optimizer is stepped, then

        Qbar <- Qbar + tau (Q - Qbar)

    Args:
        loss: with its value estimator (gamma) set.
        optimizer, compile: as in ``AbstractUpdate``.
        tau: see above.

    Example:
        >>> update = SACUpdate(loss, torch.optim.Adam(loss.parameters()), tau=0.005)
        >>> out = update(buffer.sample(16 * 256).view(16, 256))  # 16 updates
    """

    def __init__(self, loss: SACLoss, optimizer: torch.optim.Adam, *, tau: float, compile: bool = True) -> None:
        super().__init__(loss, optimizer, compile=compile)
        self.tau = tau
        followers = [name for name, _ in loss.named_children() if name.startswith("target_")]
        self._targets = [i for name in followers for i in self._positions_of(loss, name)]
        self._sources = [i for name in followers for i in self._positions_of(loss, name.removeprefix("target_"))]

    def _positions_of(self, loss: SACLoss, name: str) -> list[int]:
        flat = dict(getattr(loss, name).flatten_keys().items())
        return self.positions(flat[key] for key in sorted(flat))

    def follow(self, module: list[Tensor]) -> None:
        for target, source in zip(self._targets, self._sources, strict=True):
            module[target].lerp_(module[source], self.tau)
