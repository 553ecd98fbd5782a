"""Acting within a limit: draw several candidates, drop the costly ones, take the best of the rest."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor

from pmoe_lightning.modules.borrowed import Borrowed
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.safe.constraint import CostConstraint, SafeValues


def choose_safe(reward: Float[Tensor, "M *B"], cost: Float[Tensor, "M *B"], limit: float) -> Int[Tensor, "*B"]:
    """The candidate with the highest reward of those whose cost is within the limit; if none is, the least costly."""
    safe = cost <= limit
    best = reward.masked_fill(~safe, -math.inf).argmax(0)
    return torch.where(safe.any(0), best, cost.argmin(0))


class SafePolicy(TensorDictModuleBase):
    """Acts by the candidate of a policy that ``choose_safe`` takes: ``observation`` [*B, O] -> ``action`` [*B, A].

    When exploring, all M candidates are draws of the policy, evolved where it ends with an action transform. Otherwise
    the first is the policy's deterministic action, so the action can still be random: what repeats it is the seed.

    Args:
        policy: what proposes.
        values: what predicts reward and cost; where the policy ends with an action transform, its ``qvalue``.
        constraint: M and the limit.
        low, high: the action bounds [A]; the values are of actions normalised to [-1, 1].
        observation_key: the only entry that the policy reads.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        values: SafeValues,
        constraint: CostConstraint,
        low: Tensor,
        high: Tensor,
        *,
        observation_key: str = "observation",
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [observation_key], ["action"]
        self.policy, self.constraint = policy, constraint
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self._judges = Borrowed(values)
        if not any(module is values for module in policy.modules()):
            # A part in one place: who puts other tensors into the parts would meet those of a second place as the own.
            self.values = values
        self.default_interaction_type = InteractionType.RANDOM

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict.get(self.in_keys[0])
        explores = (interaction_type() or self.default_interaction_type) is InteractionType.RANDOM
        drawn = self.constraint.num_candidates - (not explores)
        proposals = [] if explores else [self._propose(observation, 1, InteractionType.DETERMINISTIC)]
        if drawn:
            proposals.append(self._propose(observation, drawn, InteractionType.RANDOM))
        candidates = torch.cat(proposals)
        normalized = TanhBounds(self.low, self.high).normalize(candidates)
        chosen = choose_safe(*self._judges.module.predict(observation, normalized), self.constraint.limit)
        places = chosen.unsqueeze(0).unsqueeze(-1).expand(1, *candidates.shape[1:])
        return tensordict.set("action", candidates.gather(0, places).squeeze(0))

    def _propose(self, observation: Tensor, number: int, kind: InteractionType) -> Float[Tensor, "M *B A"]:
        states = observation.expand(number, *observation.shape)
        with set_interaction_type(kind):
            return self.policy(TensorDict({self.in_keys[0]: states}, batch_size=states.shape[:-1])).get("action")
