"""The update of PPO and DAC."""

from __future__ import annotations

from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import PPOLoss

from pmoe_lightning.updates.base import AbstractUpdate


class OnPolicyUpdate(AbstractUpdate):
    """An ``AbstractUpdate`` that nothing follows.

    Example:
        >>> update = OnPolicyUpdate(loss, torch.optim.Adam(loss.parameters()), max_grad_norm=0.5)
        >>> out = update(transitions[torch.randperm(2048)].view(32, 64))  # 32 updates
    """

    def required_keys(self) -> list[NestedKey]:
        """What the loss reads of the step itself: shuffled rows are no trajectory to estimate advantages from."""
        keys = [key for key in self.loss.in_keys if not (isinstance(key, tuple) and key[0] == "next")]
        if not isinstance(self.loss, PPOLoss):
            return keys
        named = self.loss.tensor_keys
        scored = getattr(named, "action_unsquashed", None)  # the action itself is scored where it is missing
        return [*(key for key in keys if key != scored), named.advantage, named.value_target]

    def follow(self, module: list[Tensor]) -> None:
        """Nothing."""
