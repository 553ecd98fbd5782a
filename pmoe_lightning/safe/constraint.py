r"""Acting within a limit on cost: the constraint, the value that pays for it, a policy that drops costly candidates.

With c_t the cost of step t, d the limit per step and gamma_c the cost's own discount, the problem is

    maximise E[sum_t gamma^t r_t]    subject to    (1 - gamma_c) E[sum_t gamma_c^t c_t] <= d

Its Lagrangian has a multiplier nu >= 0. The actor maximises Q_r - nu Q_c, and so does an action transform; nu rises
while the predicted cost is above the limit and falls to zero below it (``losses.SafeSACLoss``). Acting draws several
candidates, drops those with Q_c(s, a) > d / (1 - gamma_c), and takes of the rest the one with the highest Q_r, or the
least costly where none is left (``SafePolicy``).

Source: this project's definition. Xu & Fekri (2021, arXiv 2103.12020) say in their abstract that evolved actions allow
"discarding potentially unsafe actions", and no more of it was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pmoe_lightning.hamiltonian import ActionValue
from pmoe_lightning.hamiltonian.transform import Pullback
from pmoe_lightning.limits import Limit, NonNegativeFloat, check_arguments
from pmoe_lightning.modules.critics import QValueEnsemble


@dataclass(frozen=True)
class CostConstraint:
    """What is allowed, and how it is enforced.

    Args:
        cost_limit: d, the mean cost per environment step that is allowed: 0.025 is a cost of 25 in an episode of 1000.
        gamma: gamma_c, the discount of the cost per environment step; with 1 the cost would be summed without end.
        lr_multiplier: learning rate of nu.
        multiplier_init: nu at the start, the price of cost in units of reward.
        num_candidates: actions drawn before each step, of which too costly ones are dropped.

    Raises:
        ValueError: a number out of range.
    """

    cost_limit: NonNegativeFloat = 0.025
    gamma: Annotated[float, Limit(low=0, high=1, high_included=False)] = 0.99
    lr_multiplier: NonNegativeFloat = 1e-3
    multiplier_init: NonNegativeFloat = 0.0
    num_candidates: Annotated[int, Limit(low=1, high=1000)] = 8

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))

    @property
    def limit(self) -> float:
        """d / (1 - gamma_c): what Q_c may be."""
        return self.cost_limit / (1 - self.gamma)


def constrained_value(reward: ActionValue, cost: ActionValue, multiplier: Tensor) -> ActionValue:
    """Q_r,i - nu max_j Q_c,j for every critic i of the reward, with its derivative: what a transform climbs."""

    def evaluate(action: Tensor) -> tuple[Tensor, Pullback]:
        values, pullback_reward = reward(action)
        costs, pullback_cost = cost(action)
        worst, which = costs.max(0)
        critics = torch.arange(len(costs), device=costs.device).view(-1, *[1] * which.ndim)

        def pullback(cotangent: Tensor) -> Tensor:
            of_cost = pullback_cost((critics == which).to(costs.dtype) * cotangent.sum(0))
            return pullback_reward(cotangent) - multiplier * of_cost

        return values - multiplier * worst, pullback

    return evaluate


class SafeValues(nn.Module):
    """Critics of reward and of cost with the multiplier: an observation [*B, O] -> ``constrained_value`` there.

    Holds what it is given, not copies: those of a loss stay the loss's own.

    Args:
        reward, cost: critics.
        multiplier: nu, [].
    """

    def __init__(self, reward: QValueEnsemble, cost: QValueEnsemble, multiplier: nn.Parameter) -> None:
        super().__init__()
        self.reward, self.cost, self.multiplier = reward, cost, multiplier

    def forward(self, observation: Float[Tensor, "*B O"]) -> ActionValue:
        nu = self.multiplier.detach().clamp_min(0.0)
        return constrained_value(self.reward(observation), self.cost(observation), nu)

    def predict(
        self, observation: Float[Tensor, "*B O"], action: Float[Tensor, "*S A"]
    ) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
        """min_i Q_r,i and max_j Q_c,j: the lower estimate of what is wanted, the higher of what is not."""
        return self.reward(observation)(action)[0].min(0).values, self.cost(observation)(action)[0].max(0).values
