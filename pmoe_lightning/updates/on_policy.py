"""The update of PPO and DAC."""

from __future__ import annotations

from torch import Tensor

from pmoe_lightning.updates.base import AbstractUpdate


class OnPolicyUpdate(AbstractUpdate):
    """An ``AbstractUpdate`` that nothing follows.

    Example:
        >>> update = OnPolicyUpdate(loss, torch.optim.Adam(loss.parameters()), max_grad_norm=0.5)
        >>> out = update(transitions[torch.randperm(2048)].view(32, 64))  # 32 updates
    """

    def follow(self, module: list[Tensor]) -> None:
        """Nothing."""
