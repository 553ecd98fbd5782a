"""The double actor-critic for options as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from pmoe_lightning.algorithms.on_policy import OnPolicyAlgorithm
from pmoe_lightning.estimators import AbstractEstimator
from pmoe_lightning.limits import Of, checked, take
from pmoe_lightning.losses import DACLoss
from pmoe_lightning.modules.critics import make_option_value_network
from pmoe_lightning.modules.networks import Activation, HiddenSizes
from pmoe_lightning.modules.option_policies import OptionActor


class DAC(OnPolicyAlgorithm):
    """Steps a ``DACLoss`` on rollouts that hold ``option`` and ``option_previous``; see ``OnPolicyAlgorithm``.

    It has no estimator: options are chosen and scored, so nothing is differentiated through their choice.
    """

    minibatch_keys = (
        "option_previous",
        "option",
        "option_log_prob",
        "action_unsquashed",
        "action_log_prob",
        "advantage_high",
        "advantage_low",
        "value_target",
    )

    def estimate_advantages(self, rollout: TensorDictBase) -> None:
        self.loss.estimate_advantages(rollout, gamma=self.gamma, lmbda=self.lmbda)


@checked
def make_dac(
    actor: OptionActor,
    estimator: AbstractEstimator | None = None,
    *,
    observation_dim: int,
    action_dim: int,
    normalizer: TensorDictModuleBase | None = None,
    hidden_sizes: HiddenSizes = (64, 64),
    activation: Activation = "tanh",
    policy_description: Mapping[str, Any] | None = None,
    **arguments: Annotated[Any, Of(DACLoss), Of(OnPolicyAlgorithm)],
) -> DAC:
    """DAC for an actor with options, with a critic of its own.

    Args:
        actor: the policy, made with ``return_log_prob=True``.
        estimator: not used; taken because every algorithm is given one.
        observation_dim: O.
        action_dim: not used; taken because every algorithm is given it.
        normalizer: writes the entry the actor reads, from ``observation``.
        hidden_sizes, activation: of the critic, initialised orthogonally.
        policy_description: see ``AbstractAlgorithm``.
        **arguments: of ``DACLoss`` (clip_epsilon, entropy_coeff, critic_coeff) and of ``OnPolicyAlgorithm`` (gamma,
            lmbda, lr, num_epochs, minibatch_size, max_grad_norm, target_kl, compile).
    """
    critic = make_option_value_network(
        observation_dim,
        actor.num_options,
        hidden_sizes=hidden_sizes,
        activation=activation,
        observation_key=actor.in_keys[0],
    )
    loss = DACLoss(actor, critic, **take(arguments, DACLoss))
    policy = actor if normalizer is None else TensorDictSequential(normalizer, actor)
    return DAC(loss, actor, policy, policy_description=policy_description, **arguments)
