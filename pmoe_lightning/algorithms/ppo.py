"""Proximal policy optimisation as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.modules import SafeProbabilisticTensorDictSequential
from torchrl.objectives.value import GAE

from pmoe_lightning.algorithms.on_policy import OnPolicyAlgorithm
from pmoe_lightning.estimators import AbstractEstimator, Frequency, Marginalized
from pmoe_lightning.limits import NonNegativeFloat, Of, PositiveFloat, checked, take
from pmoe_lightning.losses import PMOEPPOLoss
from pmoe_lightning.modules.actors import MixtureActor
from pmoe_lightning.modules.critics import make_qvalue_network, make_value_network
from pmoe_lightning.modules.networks import Activation, HiddenSizes


class PPO(OnPolicyAlgorithm):
    """Steps a ``PMOEPPOLoss`` on rollouts; see ``OnPolicyAlgorithm``."""

    minibatch_keys = ("action", "action_unsquashed", "action_log_prob", "advantage", "value_target")

    def __init__(
        self,
        loss: PMOEPPOLoss,
        actor: SafeProbabilisticTensorDictSequential,
        policy: TensorDictModuleBase,
        **arguments: Annotated[Any, Of(OnPolicyAlgorithm)],
    ) -> None:
        super().__init__(loss, actor, policy, **arguments)
        self.advantage = GAE(gamma=self.gamma, lmbda=self.lmbda, value_network=loss.critic_network)

    @property
    def estimator(self) -> AbstractEstimator:
        return self.loss.estimator

    def estimate_advantages(self, rollout: TensorDictBase) -> None:
        self.advantage(rollout)

    def action_values(self) -> list[dict[str, Tensor]]:
        if self.loss.routing is None:
            return []
        return [dict(self.loss.qvalue_network_params.data.flatten_keys(".").clone().items())]


@checked
def make_ppo(
    actor: SafeProbabilisticTensorDictSequential,
    estimator: AbstractEstimator,
    *,
    observation_dim: int,
    action_dim: int,
    normalizer: TensorDictModuleBase | None = None,
    hidden_sizes: HiddenSizes = (64, 64),
    activation: Activation = "tanh",
    clip_epsilon: PositiveFloat = 0.2,
    entropy_coeff: NonNegativeFloat = 0.0,
    critic_coeff: NonNegativeFloat = 0.5,
    policy_description: Mapping[str, Any] | None = None,
    **arguments: Annotated[Any, Of(PMOEPPOLoss), Of(OnPolicyAlgorithm)],
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
        clip_epsilon: how far a ratio of probabilities may move from 1.
        entropy_coeff, critic_coeff: weights of these losses, see ``PMOEPPOLoss``.
        policy_description: see ``AbstractAlgorithm``.
        **arguments: of ``PMOEPPOLoss`` (qvalue_coeff) and of ``OnPolicyAlgorithm`` (gamma, lmbda, lr, num_epochs,
            minibatch_size, max_grad_norm, target_kl, compile).

    Raises:
        ValueError: the estimator cannot serve the actor's distribution.
    """
    routing = estimator if isinstance(estimator, Frequency) and _has_several(actor) else None
    sizes: dict[str, Any] = {"hidden_sizes": hidden_sizes, "activation": activation, "initialization": "orthogonal"}
    sizes["observation_key"] = actor.in_keys[0]
    loss = PMOEPPOLoss(
        actor,
        make_value_network(observation_dim, **sizes),
        make_qvalue_network(observation_dim, action_dim, **sizes) if routing is not None else None,
        estimator=Marginalized() if isinstance(estimator, Frequency) else estimator,
        routing=routing,
        clip_epsilon=clip_epsilon,
        entropy_coeff=entropy_coeff,
        critic_coeff=critic_coeff,
        normalize_advantage=True,
        log_explained_variance=False,
        **take(arguments, PMOEPPOLoss),
    )
    policy = actor if normalizer is None else TensorDictSequential(normalizer, actor)
    return PPO(loss, actor, policy, policy_description=policy_description, **arguments)


def _has_several(actor: SafeProbabilisticTensorDictSequential) -> bool:
    """Whether there is something to route; an actor that does not say how many components it has may have several."""
    return not isinstance(actor, MixtureActor) or actor.num_components > 1
