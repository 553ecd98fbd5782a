"""Soft actor-critic under a constraint on cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import SafeProbabilisticTensorDictSequential

from pmoe_lightning.hamiltonian import ActionValue, EvolveAction
from pmoe_lightning.losses.sac import PMOESACLoss
from pmoe_lightning.modules.critics import KnownProducts, Products, QValueEnsemble
from pmoe_lightning.safe.candidates import SafePolicy
from pmoe_lightning.safe.constraint import CostConstraint, SafeValues, constrained_value


class SafeSACLoss(PMOESACLoss):
    r"""A ``PMOESACLoss`` whose actor also pays for cost, at a price that the constraint sets; see ``safe``.

        loss_cost       = sum_j (Q_c,j(s, a) - y_c)^2
                    y_c = c + gamma_c (1 - terminated) max_j Qbar_c,j(s', a')
        loss_actor      = estimate of E_{a ~ pi}[alpha log pi(a|s) - (min_i Q_r,i(s, a) - nu max_j Q_c,j(s, a))]
        loss_multiplier = -nu ((1 - gamma_c) mean y_c - d)

    a' is the draw that the reward's target uses. y_c predicts the cost of the present policy after the one step that
    was taken; its mean over the minibatch is what the multiplier compares with the limit, so states count as often as
    they are in the replay buffer. At nu = 0 the multiplier is not pushed further down (ascent on the dual): a softplus
    would go on shrinking while all is safe, and need as long to return. Adam's momentum carries the parameter a few of
    its steps below zero, where nu is zero.

    Each loss reaches exactly its own parameters. The minibatch needs ("next", "cost") [*B, 1].

    Args:
        actor_network, qvalue_network: as for ``PMOESACLoss``.
        cost_network: critics of the cost, of the architecture of the critics of the reward, CrossQ's too.
        constraint: limit, discount and the multiplier's start.
        **arguments: of ``PMOESACLoss``.

    Output keys: also ``loss_cost``, ``loss_multiplier``, ``multiplier`` (nu) and ``predicted_cost``, the left side of
    the constraint: (1 - gamma_c) mean y_c, a cost per environment step.

    Raises:
        ValueError: ``reduction="none"``, with which there is no mean cost.

    Source: this project's definition. Multipliers learned beside the policy are common: Ray et al. (2019, "Benchmarking
    Safe Exploration in Deep Reinforcement Learning") compare such methods.
    """

    critics = ("qvalue_network", "cost_network")
    cost_network: TensorDictModule
    cost_network_params: TensorDictParams
    target_cost_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: SafeProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        cost_network: Sequence[TensorDictModule],
        constraint: CostConstraint,
        **arguments: Any,
    ) -> None:
        if arguments.get("reduction") == "none":
            raise ValueError("a constraint on the mean cost needs a reduction: use reduction='mean'")
        super().__init__(actor_network, qvalue_network, **arguments)
        self.constraint = constraint
        networks = list(cost_network)
        self.convert_to_functional(networks, "cost_network", len(networks), create_target_params=self.delay_qvalue)
        self.multiplier = nn.Parameter(torch.full_like(self.log_alpha.detach(), constraint.multiplier_init))
        self.out_keys = [*self.out_keys, "loss_cost", "loss_multiplier", "multiplier", "predicted_cost"]

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        self._in_keys.append(("next", "cost"))

    @property
    def nu(self) -> Tensor:
        """The price of cost, not negative, without a gradient."""
        return self.multiplier.detach().clamp_min(0.0)

    def actor_value_and_products(
        self,
        tensordict: TensorDictBase,
        action: Float[Tensor, "*S A"],
        known: Mapping[str, KnownProducts] | None = None,
    ) -> tuple[Float[Tensor, "*S"], dict[str, Products]]:
        costs, of_cost = self._frozen_qvalues("cost_network", tensordict, action, known)
        value, of_reward = super().actor_value_and_products(tensordict, action, known)
        return value - self.nu * costs.max(0).values, of_reward | of_cost

    def action_value(self, tensordict: TensorDictBase) -> ActionValue:
        cost = self.frozen_value(tensordict, self.cost_network_params)
        return constrained_value(super().action_value(tensordict), cost, self.nu)

    def parameter_groups(self, *, lr_actor: float, lr_qvalue: float, lr_alpha: float) -> list[dict[str, Any]]:
        """Also the critics of the cost, at the rate of the others, and the multiplier, at that of the constraint."""
        critics = {"params": list(self.cost_network_params.parameters()), "lr": lr_qvalue, "name": "cost"}
        multiplier = {"params": [self.multiplier], "lr": self.constraint.lr_multiplier, "name": "multiplier"}
        groups = super().parameter_groups(lr_actor=lr_actor, lr_qvalue=lr_qvalue, lr_alpha=lr_alpha)
        return [*groups, critics, multiplier]

    def acting_values(self) -> SafeValues:
        cost = QValueEnsemble(self.qvalue_network.module, self.cost_network_params)
        return SafeValues(cast(QValueEnsemble, super().acting_values()), cost, self.multiplier)

    def acting_policy(self, actor: TensorDictModuleBase) -> SafePolicy:
        """``PMOESACLoss.acting_policy`` as the proposer of a ``SafePolicy``, with the live critics of both kinds."""
        policy = super().acting_policy(actor)
        evolves = isinstance(policy[-1], EvolveAction)
        values = cast(SafeValues, policy[-1].qvalue) if evolves else self.acting_values()
        bounds = self.action_low, self.action_high
        return SafePolicy(policy, values, self.constraint, *bounds, observation_key=self.qvalue_network.in_keys[0])

    @torch.no_grad()
    def cost_target(self, tensordict: TensorDictBase, next_values: Float[Tensor, "Q *B"]) -> Float[Tensor, "*B"]:
        """y_c with the cost values of the action that follows."""
        following, gamma = tensordict.get("next"), self.constraint.gamma
        steps = tensordict.get(self.value_estimator.tensor_keys.steps_to_next_obs, None)
        discount = gamma if steps is None else gamma ** steps.squeeze(-1)
        goes_on = ~following.get("terminated").squeeze(-1)
        return following.get("cost").squeeze(-1) + discount * goes_on * next_values.max(0).values

    def _of_critics(self, tensordict: TensorDictBase) -> tuple[dict[str, Any], Float[Tensor, "*B A"]]:
        entries, next_action = super()._of_critics(tensordict)
        values = self.critic_values(tensordict, next_action, "cost_network")
        target = self.cost_target(tensordict, values.next)
        weights = self._maybe_get_priority_weight(tensordict)
        loss_cost = (values.here - target).square().sum(0)
        predicted_cost = (1 - self.constraint.gamma) * target.mean()
        excess = predicted_cost - self.constraint.cost_limit
        moves = (self.multiplier.detach() > 0) | (excess > 0)
        of_cost = {
            "loss_cost": self._reduce_loss(loss_cost, tensordict=tensordict, weights=weights),
            "loss_multiplier": -self.multiplier * excess * moves,
            "multiplier": self.nu,
            "predicted_cost": predicted_cost,
        }
        return entries | of_cost | {"statistics": entries["statistics"] | values.statistics}, next_action
