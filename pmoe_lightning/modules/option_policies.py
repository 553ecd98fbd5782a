r"""Policies that act through options: what to do, and when to stop doing it.

    s -> trunk -> master: logits of pi_W(o|s) [*B, K];  termination: logits of beta_o(s) [*B, K];
                  loc, scale of pi_o(a|s) [*B, K, A]

The K options o, the option o' of the step before, and the policy of the option framework (Sutton, Precup and Singh
1999) as two policies of ordinary Markov decision processes (DAC: Zhang and Whiteson 2019, arXiv 1904.12691):

    high MDP: state (s, o'), action o:  pi_H(o|s,o') = (1 - beta_o'(s)) 1[o = o'] + beta_o'(s) pi_W(o|s)
    low MDP:  state (s, o),  action a:  pi_L(a|s,o) = pi_o(a|s)

An episode begins without an option, o' = -1, and then pi_H = pi_W. The option of a step therefore has to reach the next
one: an environment made with ``carry=["option"]`` hands it on as ``option_previous``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn

from pmoe_lightning.limits import MAX_WIDTH, Limit, checked
from pmoe_lightning.modules.actors import MixtureNetwork, Scale, action_bounds
from pmoe_lightning.modules.distributions import TanhBounds, TanhGaussianMixture
from pmoe_lightning.modules.networks import Activation, HiddenSizes, Initialization, initialize

#: An option is one of them, never a mean of several.
OptionRule = Literal["max_weight", "sample_component"]
_HALF_LOG_2PIE = 0.5 * math.log(2 * math.pi * math.e)


@dataclass(frozen=True)
class OptionPolicies:
    """pi_W, beta and every pi_o of a batch of states.

    Args:
        mixture: its weights are pi_W(o|s), its components pi_o(a|s). As a whole it is the policy of a step whose option
            has just ended, or of the first step.
        termination_logits: logit beta_o(s) [*B, K].
    """

    mixture: TanhGaussianMixture
    termination_logits: Float[Tensor, "*B K"]

    def option_log_probs(self, previous: Int[Tensor, "*B"]) -> Float[Tensor, "*B K"]:
        r"""log pi_H(o|s,o') of every option o, where ``previous`` is o', or -1 where there is none.

        Differentiable in pi_W and beta. Computed from log beta and log(1 - beta), so that it stays finite, and so does
        its gradient, when a termination is certain or impossible.
        """
        logits = self.termination_logits.gather(-1, previous.clamp_min(0).unsqueeze(-1))
        is_previous = torch.arange(self.mixture.num_components, device=previous.device) == previous.unsqueeze(-1)
        goes_on = torch.where(is_previous, F.logsigmoid(-logits), -torch.inf)
        starts = F.logsigmoid(logits) + self.mixture.log_weights
        return torch.where(previous.unsqueeze(-1) < 0, self.mixture.log_weights, torch.logaddexp(goes_on, starts))

    def action_log_prob(self, u: Float[Tensor, "*B A"], option: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log pi_o(a(u)|s) of the unsquashed action u, in the units of the environment."""
        log_probs = self.mixture.component_log_prob_unsquashed(u)
        return log_probs.gather(-1, option.unsqueeze(-1)).squeeze(-1) - self.mixture.log_abs_det_jacobian(u)

    def action_entropy(self, option: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        r"""Entropy of pi_o(.|s), of the action normalised to [-1, 1], in nats: exact before tanh, plus one draw.

            H = sum_d log(sigma_d sqrt(2 pi e)) + E_{u ~ pi_o}[sum_d log(1 - tanh(u_d)^2)]

        Unbiased, and so is its gradient.
        """
        scale = self.mixture.take_component(self.mixture.scale, option)
        u = self.mixture.rsample_given(option)
        return (scale.log() + _HALF_LOG_2PIE).sum(-1) + TanhBounds.normalized(u).log_abs_det_jacobian(u)


class OptionNetwork(nn.Module):
    """A ``MixtureNetwork``, whose router is the master policy, with one more head on its trunk: the terminations.

    Arguments as those of ``MixtureNetwork``; the master policy always trains the trunk.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        num_options: int,
        hidden_sizes: HiddenSizes,
        activation: Activation,
        scale: Scale,
        initialization: Initialization,
    ) -> None:
        super().__init__()
        self.mixture = MixtureNetwork(
            observation_dim,
            action_dim,
            num_components=num_options,
            hidden_sizes=hidden_sizes,
            activation=activation,
            router="attached",
            scale=scale,
            initialization=initialization,
        )
        self.termination = nn.Linear(hidden_sizes[-1], num_options)
        initialize(self.termination, initialization, gain=0.01)

    def forward(
        self, observation: Float[Tensor, "*B O"]
    ) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*B K A"], Float[Tensor, "*B K A"], Float[Tensor, "*B K"]]:
        """Logits of pi_W [*B, K], loc and scale [*B, K, A], and logits of beta [*B, K] at the observation [*B, O]."""
        features = self.mixture.trunk(observation)
        return *self.mixture.heads(features), self.termination(features)


class OptionActor(TensorDictModuleBase):
    """Reads an observation and ``option_previous`` int64 [*B, 1], writes ``option`` int64 [*B, 1] and ``action``.

    It draws o ~ pi_H and a ~ pi_o. Without exploration (TorchRL's exploration type) the action is the squashed mean of
    an option, which the rule ``max_weight`` takes where pi_H is largest and ``sample_component`` draws from pi_H. By
    ``max_weight`` an option only ends where another one is likelier than its going on, so a policy whose options last
    long may never change them. With ``return_log_prob`` it also writes ``action_unsquashed`` [*B, A],
    ``action_log_prob`` = log pi_L and ``option_log_prob`` = log pi_H [*B].
    """

    def __init__(
        self,
        network: OptionNetwork,
        low: Tensor,
        high: Tensor,
        *,
        deterministic: OptionRule,
        observation_key: str,
        return_log_prob: bool,
    ) -> None:
        super().__init__()
        self.network, self.deterministic, self.return_log_prob = network, deterministic, return_log_prob
        self.default_interaction_type = InteractionType.RANDOM
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.in_keys = [observation_key, "option_previous"]
        self.out_keys = ["option", "action"]
        if return_log_prob:
            self.out_keys += ["action_unsquashed", "action_log_prob", "option_log_prob"]

    @property
    def num_options(self) -> int:
        """K."""
        return self.network.mixture.num_components

    def get_dist(self, tensordict: TensorDictBase) -> OptionPolicies:
        """The policies at the observations of the tensordict; needs no ``option_previous``."""
        mixture_logits, loc, scale, termination_logits = self.network(tensordict.get(self.in_keys[0]))
        mixture = TanhGaussianMixture(mixture_logits, loc, scale, self.low, self.high, deterministic=self.deterministic)
        return OptionPolicies(mixture, termination_logits)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        policies, previous = self.get_dist(tensordict), tensordict.get("option_previous").squeeze(-1)
        mixture, log_probs = policies.mixture, policies.option_log_probs(previous)
        kind = interaction_type() or self.default_interaction_type
        explores = kind is InteractionType.RANDOM
        draws = explores or (kind is InteractionType.DETERMINISTIC and self.deterministic == "sample_component")
        # With Gumbel noise the largest log-probability is a draw.
        noise = log_probs.new_empty(log_probs.shape).exponential_().log() if draws else 0.0
        option = (log_probs.detach() - noise).argmax(-1)
        u = mixture.rsample_given(option) if explores else mixture.take_component(mixture.loc, option)
        tensordict.update({"option": option.unsqueeze(-1), "action": mixture.squash(u)})
        if self.return_log_prob:
            option_log_prob = log_probs.gather(-1, option.unsqueeze(-1)).squeeze(-1)
            tensordict.update({"action_unsquashed": u, "option_log_prob": option_log_prob})
            tensordict.set("action_log_prob", policies.action_log_prob(u, option))
        return tensordict


@checked
def make_option_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    num_options: Annotated[int, Limit(low=2, high=MAX_WIDTH)] = 4,
    hidden_sizes: HiddenSizes = (64, 64),
    activation: Activation = "tanh",
    scale: Scale = "state_independent",
    initialization: Initialization = "orthogonal",
    deterministic: OptionRule = "max_weight",
    return_log_prob: bool = False,
    observation_key: str = "observation",
) -> OptionActor:
    """An actor with K options on one trunk, for ``DACLoss``. The shared trunk is this project's choice.

    Args:
        observation_dim: O.
        action_low, action_high: the action bounds [A].
        num_options: K; a single option has nothing to end for.
        hidden_sizes, activation, scale, initialization: see ``MixtureNetwork``.
        deterministic: the option in evaluation: ``max_weight`` is the likeliest, ``sample_component`` draws it; the
            action is its mean.
        return_log_prob: see ``OptionActor``.
        observation_key: entry the policy reads, beside ``option_previous``.

    Raises:
        ValueError: an unknown switch, fewer than two options, or bounds that are not finite or not ordered.

    Example:
        >>> actor = make_option_actor(17, [-1.0] * 6, [1.0] * 6)
        >>> first = torch.full((5, 1), -1)
        >>> state = TensorDict(observation=torch.randn(5, 17), option_previous=first, batch_size=5)
        >>> actor(state)["option"].shape
        torch.Size([5, 1])
    """
    low, high = action_bounds(action_low, action_high)
    network = OptionNetwork(
        observation_dim,
        low.numel(),
        num_options=num_options,
        hidden_sizes=hidden_sizes,
        activation=activation,
        scale=scale,
        initialization=initialization,
    )
    return OptionActor(
        network,
        low,
        high,
        deterministic=deterministic,
        observation_key=observation_key,
        return_log_prob=return_log_prob,
    )
