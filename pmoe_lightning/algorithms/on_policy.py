"""What PPO and DAC share: advantages once per rollout, then epochs of shuffled minibatches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.objectives import LossModule

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.limits import PositiveFloat, PositiveInt, UnitInterval, checked
from pmoe_lightning.processes.collectives import largest_over_processes, standardize_over_processes
from pmoe_lightning.updates import OnPolicyUpdate


class OnPolicyAlgorithm(AbstractAlgorithm):
    """Steps a loss on one rollout [N, T] of the present policy.

    Args:
        loss: the loss module; besides its losses it writes ``kl_approx``.
        actor: the policy inside ``loss``.
        policy: what acts: the actor, preceded by the observation normaliser where there is one.
        gamma, lmbda: discount and parameter of the generalised advantage (Schulman et al. 2015, arXiv 1506.02438).
        lr: learning rate of Adam.
        num_epochs: passes over a rollout.
        minibatch_size: transitions per update, over all training processes.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm.
        compile: run the update as a compiled program (``OnPolicyUpdate``); the loss module is its definition.
        target_kl: no further pass over a rollout once the mean of log(pi_old / pi) over a pass exceeds it; ``None``:
            all passes.
        policy_description: see ``AbstractAlgorithm``.
    """

    on_policy = True
    #: What an update needs of a transition, besides the observation.
    minibatch_keys: tuple[str, ...]

    @checked
    def __init__(
        self,
        loss: LossModule,
        actor: TensorDictModuleBase,
        policy: TensorDictModuleBase,
        *,
        gamma: UnitInterval = 0.99,
        lmbda: UnitInterval = 0.95,
        lr: PositiveFloat = 3e-4,
        num_epochs: PositiveInt = 10,
        minibatch_size: PositiveInt = 64,
        max_grad_norm: PositiveFloat = 0.5,
        target_kl: PositiveFloat | None = None,
        compile: bool = False,
        policy_description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(loss, actor, policy, policy_description)
        self.gamma, self.lmbda = gamma, lmbda
        self.lr, self.num_epochs, self.minibatch_size = lr, num_epochs, minibatch_size
        self.max_grad_norm, self.target_kl, self.compiles = max_grad_norm, target_kl, compile
        self.normalizes_advantage: bool = loss.normalize_advantage
        self.update: OnPolicyUpdate | None = None

    @abstractmethod
    def estimate_advantages(self, rollout: TensorDictBase) -> None:
        """Write the advantages, ``value_target`` and ``state_value``; called without gradients."""

    def planned_updates(self, data: Any) -> float:
        return data.total_frames / data.action_repeat * self.num_epochs / self.minibatch_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        return torch.optim.Adam(parameters, lr=self.lr, eps=1e-5, fused=True)

    def check_processes(self, number: int) -> None:
        if self.minibatch_size % number:
            raise ConfigurationError(
                f"algo.minibatch_size={self.minibatch_size} must be a multiple of the {number} processes"
            )

    def on_train_start(self) -> None:
        # With several processes a minibatch is spread over them, and only together they know its mean and deviation.
        self.loss.normalize_advantage = self.normalizes_advantage and self.trainer.world_size == 1
        if self.compiles:
            optimizer = self._optimizer.optimizer
            self.update = OnPolicyUpdate(self.loss, optimizer, max_grad_norm=self.max_grad_norm)

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        with torch.no_grad():
            self.estimate_advantages(batch)
        usable = batch.reshape(-1)
        unusable = batch.get("unusable", None)
        if unusable is not None:
            usable = usable[~unusable.reshape(-1)]
        if len(usable) > 1:  # one alone has no variance
            self.record({"train/explained_variance": _explained_variance(usable)})
        transitions = usable.select(self.observation_key, *self.minibatch_keys)
        if self.trainer.world_size > 1:
            # Every process must take as many steps as the others.
            transitions = transitions[: -largest_over_processes(-len(transitions), transitions.device)]
        if not len(transitions):
            return
        for _ in range(self.num_epochs):
            if self._epoch(transitions):
                break
        self.last_observation = transitions.get(self.observation_key)

    def _epoch(self, transitions: TensorDictBase) -> bool:
        """One shuffled pass; true where the policy has moved too far to go on."""
        shuffled = transitions[torch.randperm(len(transitions), device=transitions.device)]
        size = self.minibatch_size // self.trainer.world_size
        whole = len(shuffled) - len(shuffled) % size
        divergences = []
        if whole > 0:
            divergences += self._steps(shuffled[:whole].view(-1, size), self.update)
        if whole < len(shuffled):
            divergences += self._steps(shuffled[None, whole:], None)  # a compiled update takes one size only
        if self.target_kl is None:
            return False
        exceeded = bool(torch.stack(divergences).mean() > self.target_kl)
        return self.trainer.strategy.reduce_boolean_decision(exceeded, all=False)

    def _steps(self, minibatches: TensorDictBase, update: OnPolicyUpdate | None) -> list[Tensor]:
        """A step for each of the minibatches [U, B]; returns their divergences."""
        if self.normalizes_advantage and self.trainer.world_size > 1:
            for key in self.minibatch_keys:
                if key.startswith("advantage"):
                    minibatches.set(key, standardize_over_processes(minibatches.get(key)))
        if update is not None:
            out = update(minibatches)
            self.record_loss(out, count=len(minibatches))
            self.count_updates(len(minibatches))
            return list(out["kl_approx"])
        divergences = []
        for minibatch in minibatches.unbind(0):
            out = self.loss(minibatch)
            self.step(out, max_grad_norm=self.max_grad_norm)
            self.record_loss(out)
            divergences.append(out["kl_approx"])
        return divergences


def _explained_variance(transitions: TensorDictBase) -> Tensor:
    """1 - Var[value_target - V] / Var[value_target]: one is a perfect critic, zero a constant one."""
    target = transitions["value_target"]
    error = target - transitions["state_value"]
    return 1 - error.var() / target.var().clamp_min(1e-8)
