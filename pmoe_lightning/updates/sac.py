"""One minibatch of SAC as a graph of tensors: losses, gradients, Adam, and the targets that follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.objectives import SACLoss

from pmoe_lightning.updates.base import AbstractUpdate, Turn


class SACUpdate(AbstractUpdate):
    r"""An ``AbstractUpdate`` after which the target critics follow, as ``SoftUpdate`` makes them, where there are any.

    Every gradient is taken at the old parameters, then the groups of the optimizer are stepped, then

        Qbar <- Qbar + tau (Q - Qbar)

    With a policy delay D the actor and the temperature have a turn in every D-th update: the D-th, the 2 D-th and so
    on. The others evaluate and step the critics alone, and are a program of their own.

    Args:
        loss: a ``PMOESACLoss`` with its value estimator (gamma) set.
        optimizer, compile: as in ``AbstractUpdate``.
        tau: see above.
        policy_delay: D.

    Example:
        >>> update = SACUpdate(loss, torch.optim.Adam(loss.parameters()), tau=0.005)
        >>> out = update(buffer.sample(16 * 256).view(16, 256))  # 16 updates
    """

    def __init__(
        self, loss: SACLoss, optimizer: torch.optim.Adam, *, tau: float, policy_delay: int = 1, compile: bool = True
    ) -> None:
        everything = tuple(range(len(optimizer.param_groups)))
        turns = [Turn(loss, everything)]
        if policy_delay > 1:
            late = {id(parameter) for parameter in loss.delayed_parameters()}
            groups = enumerate(optimizer.param_groups)
            of_critics = tuple(i for i, group in groups if late.isdisjoint(map(id, group["params"])))
            turns.append(Turn(loss.critic_losses, of_critics))
        super().__init__(loss, optimizer, turns=turns, statistics=loss.statistics(), compile=compile)
        self.tau, self.policy_delay = tau, policy_delay
        followers = [name for name, _ in loss.named_children() if name.startswith("target_")]
        self._targets = [i for name in followers for i in self._positions_of(loss, name)]
        self._sources = [i for name in followers for i in self._positions_of(loss, name.removeprefix("target_"))]

    def turn_of(self, update: int) -> int:
        return 0 if (update + 1) % self.policy_delay == 0 else 1

    def _positions_of(self, loss: SACLoss, name: str) -> list[int]:
        flat = dict(getattr(loss, name).flatten_keys().items())
        return self.positions(flat[key] for key in sorted(flat))

    def follow(self, module: list[Tensor]) -> None:
        for target, source in zip(self._targets, self._sources, strict=True):
            module[target].lerp_(module[source], self.tau)
