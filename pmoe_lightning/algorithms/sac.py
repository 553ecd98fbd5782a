"""Soft actor-critic as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.modules import SafeProbabilisticTensorDictSequential
from torchrl.objectives import SoftUpdate

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.estimators import AbstractEstimator
from pmoe_lightning.hamiltonian import HamiltonianTransform
from pmoe_lightning.limits import FiniteFloat, Limit, Of, PositiveFloat, PositiveInt, UnitInterval, checked
from pmoe_lightning.losses import PMOESACLoss, SafeSACLoss
from pmoe_lightning.modules.actors import MixtureActor
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.modules.encoders import PixelEncoder
from pmoe_lightning.modules.mixture import missing
from pmoe_lightning.modules.networks import Activation, HiddenSizes
from pmoe_lightning.processes.collectives import average_over_processes
from pmoe_lightning.safe.constraint import CostConstraint
from pmoe_lightning.updates import SACUpdate


class SAC(AbstractAlgorithm):
    """Steps a ``PMOESACLoss`` on stacks of minibatches [U, B] and lets the target critics follow.

    ``compile`` runs the same mathematics as one compiled graph (``updates/sac.py``); the loss module is its definition.

    One Adam with the parameter groups of the loss: its losses touch disjoint parameters, so one backward pass of their
    sum equals one of each. The actor therefore sees the critics as they were before this step.

    Args:
        loss: the loss module, with its value estimator (gamma) set.
        actor: the policy inside ``loss``.
        normalizer: writes the entry the actor reads, from ``observation``; None where that is the observation.
        encoder: the one inside ``loss``, which writes the observation from ``pixels``; None where there is none.
        lr: learning rate of all three groups.
        lr_actor, lr_qvalue, lr_alpha: that of one group; None is ``lr``.
        betas: of Adam.
        tau: the target critics, where there are any, move by tau (Q - Qbar) after every update.
        policy_delay: updates of the critics for one of the actor and the temperature, which is the last of them.
            Counted by ``updates``, which is in every checkpoint.
        compile: see above.
        policy_description: see ``AbstractAlgorithm``.
    """

    on_policy = False

    @checked
    def __init__(
        self,
        loss: PMOESACLoss,
        actor: SafeProbabilisticTensorDictSequential,
        *,
        normalizer: TensorDictModuleBase | None = None,
        encoder: PixelEncoder | None = None,
        lr: PositiveFloat = 3e-4,
        lr_actor: PositiveFloat | None = None,
        lr_qvalue: PositiveFloat | None = None,
        lr_alpha: PositiveFloat | None = None,
        betas: Sequence[Annotated[float, Limit(low=0, high=1, high_included=False)]] = (0.9, 0.999),
        tau: UnitInterval = 0.005,
        policy_delay: PositiveInt = 1,
        compile: bool = False,
        policy_description: Mapping[str, Any] | None = None,
    ) -> None:
        policy = loss.acting_policy(actor)
        written, before = policy.out_keys, [part for part in (encoder, normalizer) if part is not None]
        policy = TensorDictSequential(*before, policy) if before else policy
        if encoder is not None:  # the observation stays within: it changes with every update
            policy.select_out_keys(*written)
        super().__init__(loss, actor, policy, policy_description)
        rates = (lr_actor, lr_qvalue, lr_alpha)
        self.lr_actor, self.lr_qvalue, self.lr_alpha = (lr if rate is None else rate for rate in rates)
        self.tau, self.policy_delay, self.compiles = tau, policy_delay, compile
        if len(betas) != 2:
            raise ConfigurationError(f"SAC: betas={betas!r} must be two numbers, such as (0.9, 0.999)")
        self.betas = float(betas[0]), float(betas[1])  # Adam refuses whole numbers
        self.target_updater = SoftUpdate(loss, tau=tau) if loss.delay_qvalue else None
        self.update: SACUpdate | None = None

    @property
    def last_observation(self) -> Tensor | None:
        """The observations of the last minibatch; those that pixels stand for, as they are encoded now."""
        if self._last is None or not self.loss.encodes or self._last.ndim == 2:
            return self._last
        with torch.no_grad():
            return self.loss.encoded(TensorDict(pixels=self._last, batch_size=len(self._last))).get("observation")

    @last_observation.setter
    def last_observation(self, value: Tensor | None) -> None:
        self._last = value

    @property
    def estimator(self) -> AbstractEstimator:
        return self.loss.estimator

    @property
    def action_transform(self) -> HamiltonianTransform | None:
        return self.loss.action_transform

    def planned_updates(self, data: Any) -> float:
        return data.planned_minibatches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rates = {"lr_actor": self.lr_actor, "lr_qvalue": self.lr_qvalue, "lr_alpha": self.lr_alpha}
        return torch.optim.Adam(self.loss.parameter_groups(**rates), betas=self.betas, fused=True)

    @property
    def alpha(self) -> float:
        return self.loss.log_alpha.exp().item()

    def action_values(self) -> list[dict[str, Tensor]]:
        stacked = self.loss.qvalue_network_params.data.flatten_keys(".")
        return [dict(stacked[i].clone().items()) for i in range(self.loss.num_qvalue_nets)]

    def on_train_start(self) -> None:
        if self.compiles:
            optimizer = self._optimizer.optimizer
            self.update = SACUpdate(self.loss, optimizer, tau=self.tau, policy_delay=self.policy_delay)

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        if self.update is not None:
            for name, values in self.update(batch, self.updates).items():
                self.record_loss({name: values}, count=len(values))
            self.count_updates(len(batch))
        else:
            for minibatch in batch.unbind(0):
                acts = (self.updates + 1) % self.policy_delay == 0
                out = self.loss(minibatch) if acts else self.loss.critic_losses(minibatch)
                self.step(out)
                if self.target_updater is not None:
                    self.target_updater.step()
                self.record_loss(out.exclude("statistics"))
        self.last_observation = batch.get("pixels" if self.loss.encodes else self.observation_key)[-1]

    def differentiate(self, total: Tensor, statistics: TensorDictBase | None) -> None:
        if self.trainer.world_size == 1:
            return super().differentiate(total, statistics)
        # Lightning's wrapper would wait for gradients of an actor whose turn it is not, and knows no statistics.
        model: Any = self.trainer.strategy.model
        with model.no_sync():
            self.manual_backward(total)
        gradients = [parameter.grad for parameter in self._trained_parameters() if parameter.grad is not None]
        average_over_processes([*gradients, *({} if statistics is None else statistics).values()])


@checked
def make_sac(
    actor: SafeProbabilisticTensorDictSequential,
    estimator: AbstractEstimator,
    *,
    observation_dim: int,
    action_dim: int,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    make_critic: Callable[..., TensorDictModule] | None = None,
    gamma: UnitInterval = 0.99,
    alpha_init: PositiveFloat = 1.0,
    target_entropy: FiniteFloat | None = None,
    action_transform: HamiltonianTransform | None = None,
    constraint: CostConstraint | None = None,
    encoder: PixelEncoder | None = None,
    policy_description: Mapping[str, Any] | None = None,
    **arguments: Annotated[Any, Of(SAC)],
) -> SAC:
    """SAC for an actor, with two critics of its own.

    Args:
        actor: the policy.
        estimator: the gradient estimator of the actor loss.
        observation_dim, action_dim: O and A.
        hidden_sizes, activation: of the critics, where ``make_critic`` does not know better.
        make_critic: called with O, A and ``observation_key`` for each of them; None: ``make_qvalue_network``. With
            ``make_crossq_network`` go lr=1e-3, betas=(0.5, 0.999) and policy_delay=3.
        gamma: discount per environment step.
        alpha_init: initial temperature.
        target_entropy: in nats; ``None`` is -A. For an actor without a density the target of its diversity
            (``modules.latent``), log(beta sqrt A); ``None`` is beta = 1/2.
        action_transform: evolves actions, see ``PMOESACLoss``; its parameters learn with the actor's.
        encoder: makes the observation of ``pixels``, see ``PMOESACLoss``; O is then what it makes.
        constraint: limits the cost, see ``SafeSACLoss``, with two critics of the cost besides.
        policy_description: see ``AbstractAlgorithm``.
        **arguments: of ``SAC``: normalizer, lr, lr_actor, lr_qvalue, lr_alpha, betas, tau, policy_delay, compile.

    Raises:
        ValueError: the estimator cannot serve the actor's distribution.
    """

    if make_critic is None:
        make_critic = partial(make_qvalue_network, hidden_sizes=hidden_sizes, activation=activation)

    def make_critics() -> list[TensorDictModule]:
        return [make_critic(observation_dim, action_dim, observation_key=actor.in_keys[0]) for _ in range(2)]

    of_loss: dict[str, Any] = {
        "estimator": estimator,
        "action_transform": action_transform,
        "encoder": encoder,
        "alpha_init": alpha_init,
        "target_entropy": float(_usual_target(actor, action_dim) if target_entropy is None else target_entropy),
    }
    if constraint is None:
        loss = PMOESACLoss(actor, make_critics(), **of_loss)
    else:
        loss = SafeSACLoss(actor, make_critics(), make_critics(), constraint, **of_loss)
    loss.make_value_estimator(gamma=gamma)
    return SAC(loss, actor, encoder=encoder, policy_description=policy_description, **arguments)


def _usual_target(actor: SafeProbabilisticTensorDictSequential, action_dim: int) -> float:
    """What the temperature holds unless it is told: an entropy of -A, or of an actor without one its diversity."""
    if isinstance(actor, MixtureActor) and missing(actor.distribution_class, {"draws"}):
        return math.log(0.5 * math.sqrt(action_dim))
    return -action_dim
