"""An algorithm of one's own, TD3, with TorchRL's loss and the train command's data, logging, checkpoints and films.

    PYTHONPATH=examples python -m pmoe_lightning.train --config-dir examples/conf algo=td3 env=Hopper-v5
    PYTHONPATH=examples python -m pmoe_lightning.evaluate --config-dir examples/conf checkpoint=outputs/.../best.ckpt

Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv 1802.09477). It has a deterministic actor,
so no mixture, no estimator and no density; what looks at those leaves itself out. ``examples/conf`` holds its two
options, ``docs/extending.md`` says what each method below is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, AdditiveGaussianModule, TanhModule, ValueOperator
from torchrl.objectives import SoftUpdate, TD3Loss

from pmoe_lightning.algorithms.base import AbstractAlgorithm

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class TD3(AbstractAlgorithm):
    """Steps TorchRL's ``TD3Loss`` on stacks of minibatches [U, B]; actor and targets at every second update.

    Args:
        loss: the loss module, with its value estimator (gamma) set.
        actor: the policy, with its exploration noise.
        lr: learning rate of Adam.
        tau: the targets move by tau (theta - theta_bar).
        policy_delay: updates of the critics for one of the actor.
        policy_description: see ``AbstractAlgorithm``.
    """

    on_policy = False

    def __init__(
        self,
        loss: TD3Loss,
        actor: TensorDictSequential,
        *,
        lr: float = 1e-3,
        tau: float = 0.005,
        policy_delay: int = 2,
        policy_description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(loss, actor, actor, policy_description)
        self.lr, self.policy_delay = lr, policy_delay
        self.target_updater = SoftUpdate(loss, tau=tau)

    def planned_updates(self, data: LightningDataModule) -> float:
        return data.planned_minibatches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.loss.parameters() if p.requires_grad], lr=self.lr)

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        for minibatch in batch.unbind(0):
            out = self.loss(minibatch)
            acts = (self.updates + 1) % self.policy_delay == 0  # counted in checkpoints, so a resumed run is in step
            self.step(out if acts else out.exclude("loss_actor"))
            if acts:
                self.target_updater.step()
            self.record_loss(out.select("loss_actor", "loss_qvalue"))
        self.last_observation = batch.get(self.observation_key)[-1]


def make_td3(
    actor: TensorDictSequential,
    estimator: None,
    *,
    observation_dim: int,
    action_dim: int,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: str = "relu",
    gamma: float = 0.99,
    **arguments: Any,
) -> TD3:
    """TD3 for an actor, with two critics of its own; ``arguments`` are those of ``TD3``."""
    layers = {"num_cells": list(hidden_sizes), "activation_class": ACTIVATIONS[activation]}
    critics = [
        ValueOperator(MLP(observation_dim + action_dim, 1, **layers), in_keys=["observation", "action"])
        for _ in range(2)
    ]
    loss = TD3Loss(actor[:-1], critics, action_spec=actor[-1].spec["action"], loss_function="l2")
    loss.make_value_estimator(gamma=gamma)
    return TD3(loss, actor, **arguments)


def make_deterministic_actor(
    observation_dim: int,
    action_low: Sequence[float],
    action_high: Sequence[float],
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    noise: float = 0.1,
) -> TensorDictSequential:
    """tanh of a network, scaled to the bounds; where it explores, with noise of ``noise`` times half their range."""
    low, high = torch.tensor(action_low), torch.tensor(action_high)
    spec = Bounded(low, high)
    network = MLP(observation_dim, len(low), num_cells=list(hidden_sizes), activation_class=nn.ReLU)
    return TensorDictSequential(
        TensorDictModule(network, ["observation"], ["action"]),
        TanhModule(in_keys=["action"], spec=spec),
        AdditiveGaussianModule(spec, sigma_init=noise, sigma_end=noise, std=(high - low).div(2).tolist()),
    )
