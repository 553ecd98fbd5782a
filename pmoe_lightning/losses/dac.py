"""The double actor-critic: two policies of one option policy, each with its own clipped objective."""

from __future__ import annotations

import torch
from jaxtyping import Float
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.objectives import LossModule
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from pmoe_lightning.limits import NonNegativeFloat, PositiveFloat, checked
from pmoe_lightning.modules.option_policies import OptionActor, OptionPolicies


class DACLoss(LossModule):
    r"""DAC (Zhang and Whiteson 2019, arXiv 1904.12691) by clipped policy gradients (Schulman et al. 2017).

        loss_objective_high = -min(ratio A_H, clip(ratio, 1 - eps, 1 + eps) A_H),  ratio = pi_H / pi_H,old of (o|s,o')
        loss_objective_low  = the same with A_L and pi_L(a|s,o)
        loss_critic         = critic_coeff (q(s, o) - value_target)^2
        loss_entropy        = -entropy_coeff (H(pi_H(.|s,o')) + H(pi_L(.|s,o)))

    The high objective reaches the master policy, the terminations and the trunk; the low one the Gaussian of the option
    taken and the trunk; the critic's loss the critic alone.

    From the paper: the two augmented MDPs (see ``modules.option_policies``), the reward of the environment in both, one
    critic for both, v_L(s,o) = q(s,o) and v_H(s,o') = sum_o pi_H(o|s,o') q(s,o), and PPO for both policies. Written
    without the authors' program at hand, and so this project's own: the regression of q at the option taken on the low
    MDP's target; one minibatch and one optimizer for both policies; the value of the state that follows a step (see
    ``estimate_advantages``); an entropy bonus for both policies; advantages that are normalised per minibatch, each
    policy's by themselves; Gaussians squashed into the action bounds. The low ratio scores the stored
    ``action_unsquashed``, for the reason given in ``PMOEPPOLoss``.

    Args:
        actor_network: an ``OptionActor`` made with ``return_log_prob=True``.
        critic_network: writes ``option_value`` [*B, K].
        clip_epsilon: eps, how far a ratio may move from 1.
        entropy_coeff, critic_coeff: weights of these losses.
        normalize_advantage: see above.
    """

    actor_network: OptionActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    critic_network: TensorDictModule
    critic_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    @checked
    def __init__(
        self,
        actor_network: OptionActor,
        critic_network: TensorDictModule,
        *,
        clip_epsilon: PositiveFloat = 0.2,
        entropy_coeff: NonNegativeFloat = 0.0,
        critic_coeff: NonNegativeFloat = 0.5,
        normalize_advantage: bool = True,
    ) -> None:
        super().__init__()
        self.convert_to_functional(actor_network, "actor_network")
        self.convert_to_functional(critic_network, "critic_network")
        self.clip_epsilon, self.entropy_coeff, self.critic_coeff = clip_epsilon, entropy_coeff, critic_coeff
        self.normalize_advantage = normalize_advantage
        stored = ["option_previous", "option", "action_unsquashed", "option_log_prob", "action_log_prob"]
        estimated = ["advantage_high", "advantage_low", "value_target"]
        self.in_keys = [actor_network.in_keys[0], *stored, *estimated]
        losses = ["loss_objective_high", "loss_objective_low", "loss_critic", "loss_entropy"]
        self.out_keys = [*losses, "entropy_high", "entropy_low", "termination", "kl_approx"]

    def policies(self, tensordict: TensorDictBase) -> OptionPolicies:
        """pi_W, beta and every pi_o at the observations of the tensordict."""
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            return self.actor_network.get_dist(tensordict)

    def option_values(self, tensordict: TensorDictBase) -> Float[Tensor, "*B K"]:
        """q(s, o) of every option at the observations of the tensordict."""
        with self.critic_network_params.to_module(self.critic_network, preserve_module_state=False):
            return self.critic_network(tensordict.select(*self.critic_network.in_keys)).get("option_value")

    @torch.no_grad()
    def estimate_advantages(self, rollout: TensorDictBase, *, gamma: float, lmbda: float) -> None:
        r"""Generalised advantages (Schulman et al. 2015, arXiv 1506.02438) of both MDPs for a rollout [N, T].

            delta_H = r + gamma (1 - terminated) v_H(s', o) - v_H(s, o')
            delta_L = r + gamma (1 - terminated) v_H(s', o) - q(s, o)
            A_t     = delta_t + gamma lmbda (1 - done) A_{t+1}, each for itself

        A state of the low MDP contains the option of its own step, which is drawn only after the step before has ended.
        The value of what follows is therefore its expectation over that option, E[q(s', o'')] = v_H(s', o), in both
        MDPs. It exists wherever a rollout or an episode is cut, and it spares A_L the noise of the next draw.

        Writes ``advantage_high``, ``advantage_low``, ``state_value`` = q(s, o) and ``value_target`` = A_L + q(s, o),
        each [N, T, 1]. Nothing is differentiated.
        """
        following, option = rollout.get("next"), rollout.get("option")
        values = self.option_values(rollout)
        taken = values.gather(-1, option)
        high = self._high_value(rollout, rollout.get("option_previous"), values)
        after = self._high_value(following, option, self.option_values(following))
        outcome = [following.get(key) for key in ("reward", "done", "terminated")]
        for name, value in (("high", high), ("low", taken)):
            advantage, _ = vec_generalized_advantage_estimate(gamma, lmbda, value, after, *outcome)
            rollout.set(f"advantage_{name}", advantage)
        rollout.set("state_value", taken).set("value_target", rollout.get("advantage_low") + taken)

    def _high_value(self, states: TensorDictBase, previous: Tensor, values: Tensor) -> Float[Tensor, "*B 1"]:
        """v_H(s, o') = sum_o pi_H(o|s,o') q(s, o)."""
        probabilities = self.policies(states).option_log_probs(previous.squeeze(-1)).exp()
        return (probabilities * values).sum(-1, keepdim=True)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        policies, option = self.policies(tensordict), tensordict.get("option")
        previous = tensordict.get("option_previous").squeeze(-1)
        option_log_probs = policies.option_log_probs(previous)
        log_ratios = {
            "high": option_log_probs.gather(-1, option).squeeze(-1) - tensordict.get("option_log_prob"),
            "low": policies.action_log_prob(tensordict.get("action_unsquashed"), option.squeeze(-1))
            - tensordict.get("action_log_prob"),
        }
        entropy_high = -(option_log_probs.exp() * option_log_probs).sum(-1).mean()
        entropy_low = policies.action_entropy(option.squeeze(-1)).mean()
        error = self.option_values(tensordict).gather(-1, option) - tensordict.get("value_target")
        out = {
            f"loss_objective_{name}": self._clipped(log_ratio, tensordict.get(f"advantage_{name}").squeeze(-1))
            for name, log_ratio in log_ratios.items()
        }
        out["loss_critic"] = self.critic_coeff * error.square().mean()
        out["loss_entropy"] = -self.entropy_coeff * (entropy_high + entropy_low)
        out |= {"entropy_high": entropy_high.detach(), "entropy_low": entropy_low.detach()}
        out["termination"] = _mean_termination(policies.termination_logits, previous).detach()
        out["kl_approx"] = -sum(log_ratios.values()).mean().detach()
        return TensorDict(out, batch_size=[])

    def _clipped(self, log_ratio: Float[Tensor, "*B"], advantage: Float[Tensor, "*B"]) -> Float[Tensor, ""]:
        """-mean min(ratio A, clip(ratio) A)."""
        if self.normalize_advantage and advantage.numel() > 1:  # a single one has no deviation
            advantage = (advantage - advantage.mean()) / advantage.std().clamp_min(1e-6)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
        return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def _mean_termination(logits: Float[Tensor, "*B K"], previous: Tensor) -> Float[Tensor, ""]:
    """Mean of beta_o'(s) over the states that have an o'; zero where none has."""
    has_one = previous >= 0
    beta = logits.sigmoid().gather(-1, previous.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (beta * has_one).sum() / has_one.sum().clamp_min(1)
