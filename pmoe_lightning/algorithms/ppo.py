"""Proximal policy optimisation as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.modules import SafeProbabilisticTensorDictSequential
from torchrl.objectives.value import GAE

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.critics import make_qvalue_network, make_value_network
from pmoe_lightning.estimators import AbstractEstimator, Frequency, Marginalized
from pmoe_lightning.losses import PMOEPPOLoss


class PPO(AbstractAlgorithm):
    """Steps a ``PMOEPPOLoss`` on one rollout [N, T]: GAE, then epochs of shuffled minibatches.

    Args:
        loss: the loss module.
        actor: the policy inside ``loss``.
        policy: what acts: the actor, preceded by the observation normaliser where there is one.
        gamma, lmbda: discount and GAE parameter (Schulman et al. 2015, arXiv 1506.02438).
        lr: learning rate of Adam.
        num_epochs: passes over a rollout.
        minibatch_size: transitions per update.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm.
        target_kl: no further pass over a rollout once the mean of log(pi_old / pi) over a pass exceeds it; ``None``:
            all passes.
        policy_description: see ``AbstractAlgorithm``.
    """

    def __init__(
        self,
        loss: PMOEPPOLoss,
        actor: SafeProbabilisticTensorDictSequential,
        policy: TensorDictModuleBase,
        *,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        lr: float = 3e-4,
        num_epochs: int = 10,
        minibatch_size: int = 64,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        policy_description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(loss, actor, policy, policy_description)
        self.advantage = GAE(gamma=gamma, lmbda=lmbda, value_network=loss.critic_network)
        self.lr, self.num_epochs, self.minibatch_size = lr, num_epochs, minibatch_size
        self.max_grad_norm, self.target_kl = max_grad_norm, target_kl

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        return torch.optim.Adam(parameters, lr=self.lr, eps=1e-5, fused=True)

    def action_values(self) -> list[dict[str, Tensor]]:
        if self.loss.routing is None:
            return []
        return [dict(self.loss.qvalue_network_params.data.flatten_keys(".").clone().items())]

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        with torch.no_grad():
            self.advantage(batch)
        self.record({"train/explained_variance": _explained_variance(batch)})
        transitions = batch.reshape(-1).select(*self._minibatch_keys())
        for _ in range(self.num_epochs):
            if self._epoch(transitions):
                break
        self.last_observation = transitions.get(self.observation_key)

    def _minibatch_keys(self) -> list[str]:
        keys = ["action", "action_unsquashed", "action_log_prob", "advantage", "value_target"]
        return [self.observation_key, *keys]

    def _epoch(self, transitions: TensorDictBase) -> bool:
        """One shuffled pass; true where the policy has moved too far to go on."""
        permutation = torch.randperm(len(transitions), device=transitions.device)
        divergences = []
        for indices in permutation.split(self.minibatch_size):
            out = self.loss(transitions[indices])
            self.step(out, max_grad_norm=self.max_grad_norm)
            self.record_loss(out)
            divergences.append(out["kl_approx"])
        if self.target_kl is None:
            return False
        exceeded = bool(torch.stack(divergences).mean() > self.target_kl)
        return self.trainer.strategy.reduce_boolean_decision(exceeded, all=False)


def _explained_variance(batch: TensorDictBase) -> Tensor:
    """1 - Var[value_target - V] / Var[value_target]: one is a perfect critic, zero a constant one."""
    target, error = batch["value_target"], batch["value_target"] - batch["state_value"]
    return 1 - error.var() / target.var().clamp_min(1e-8)


def make_ppo(
    actor: SafeProbabilisticTensorDictSequential,
    estimator: AbstractEstimator,
    *,
    observation_dim: int,
    action_dim: int,
    normalizer: TensorDictModuleBase | None = None,
    hidden_sizes: Sequence[int] = (64, 64),
    activation: str = "tanh",
    lr: float = 3e-4,
    gamma: float = 0.99,
    lmbda: float = 0.95,
    clip_epsilon: float = 0.2,
    entropy_coeff: float = 0.0,
    critic_coeff: float = 0.5,
    qvalue_coeff: float = 1.0,
    num_epochs: int = 10,
    minibatch_size: int = 64,
    max_grad_norm: float = 0.5,
    target_kl: float | None = None,
    policy_description: Mapping[str, Any] | None = None,
) -> PPO:
    """PPO for an actor, with a critic of its own.

    The ``frequency`` estimator makes it PMOE-PPO: the frequency loss trains the router, with an action-value network to
    rank the components, and the entropy bonus keeps its unbiased gradient. Every other estimator estimates the gradient
    of the entropy bonus.

    Args:
        actor: the policy, made with ``return_log_prob=True``.
        estimator: see above.
        observation_dim, action_dim: O and A.
        normalizer: writes the entry the actor reads, from ``observation``.
        hidden_sizes, activation: of the critics, initialised orthogonally.
        clip_epsilon, entropy_coeff, critic_coeff, qvalue_coeff: see ``PMOEPPOLoss``.
        lr, gamma, lmbda, num_epochs, minibatch_size, max_grad_norm, target_kl: see ``PPO``.
        policy_description: see ``AbstractAlgorithm``.

    Raises:
        ValueError: the estimator cannot serve the actor's number of components.
    """
    num_components = actor[0].module.num_components
    estimator.check(num_components)
    routing = estimator if isinstance(estimator, Frequency) and num_components > 1 else None
    sizes = {"hidden_sizes": hidden_sizes, "activation": activation, "initialization": "orthogonal"}
    sizes["observation_key"] = actor.in_keys[0]
    loss = PMOEPPOLoss(
        actor,
        make_value_network(observation_dim, **sizes),
        make_qvalue_network(observation_dim, action_dim, **sizes) if routing is not None else None,
        estimator=Marginalized() if isinstance(estimator, Frequency) else estimator,
        routing=routing,
        qvalue_coeff=qvalue_coeff,
        clip_epsilon=clip_epsilon,
        entropy_coeff=entropy_coeff,
        critic_coeff=critic_coeff,
        normalize_advantage=True,
        log_explained_variance=False,
    )
    policy = actor if normalizer is None else TensorDictSequential(normalizer, actor)
    return PPO(
        loss,
        actor,
        policy,
        gamma=gamma,
        lmbda=lmbda,
        lr=lr,
        num_epochs=num_epochs,
        minibatch_size=minibatch_size,
        max_grad_norm=max_grad_norm,
        target_kl=target_kl,
        policy_description=policy_description,
    )
