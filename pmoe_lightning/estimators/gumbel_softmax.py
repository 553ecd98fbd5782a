"""A relaxed choice of the component."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate
from pmoe_lightning.limits import Flag, PositiveFloat, checked
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer


class GumbelSoftmax(AbstractEstimator):
    r"""The one-hot choice becomes a softmax with Gumbel noise.

        loss = cost(u, log pi(u)),    u = sum_k y_k u_k,    y = softmax((log w + g) / temperature),
        u_k = mu_k + sigma_k eps_k,   g_k ~ Gumbel(0, 1)

    Biased for K > 1, one critic evaluation; Jang et al. (2017, arXiv 1611.01144), Maddison et al. (2017, arXiv
    1611.00712). The relaxed action lies *between* the modes, where the policy never acts. With ``straight_through`` the
    action is that of argmax_k y_k, an exact draw from the policy, and only the gradient is relaxed. Without it log pi,
    which SAC's temperature regulates, is far below that of the policy's draws. A low temperature has less bias and more
    variance.

    Args:
        temperature: lower: less bias, more variance.
        final_temperature: reached at the end of training, on a geometric path; None keeps ``temperature``.
        straight_through: act by the winner and relax the gradient alone; without it, act between the modes, too.

    Raises:
        ValueError: a temperature that is not finite and positive.
    """

    asks: frozenset[Offer] = frozenset({"draws", "weights", "component_draws"})
    annealed: ClassVar[tuple[str, ...]] = ("temperature",)

    @checked
    def __init__(
        self,
        *,
        temperature: PositiveFloat = 1.0,
        final_temperature: PositiveFloat | None = None,
        straight_through: Flag = True,
    ) -> None:
        if not straight_through:  # the density of a sum of draws is known where they are diagonal Gaussians
            self.asks = self.asks | {"component_modes", "diagonal_scales"}
        # A tensor, because a compiled update would be compiled anew for every number.
        self.temperature, self.straight_through = torch.tensor(temperature), straight_through
        self._initial_temperature, self._final_temperature = temperature, final_temperature

    def anneal(self, progress: float) -> None:
        if self._final_temperature is not None:
            ratio = self._final_temperature / self._initial_temperature
            self.temperature = torch.tensor(self._initial_temperature * ratio**progress)

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        # Once after every change, and not in every update: a device would wait for it.
        self.temperature = self.temperature.to(distribution.log_weights.device)
        u, choice = self._relaxed_draw(distribution)
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        evaluation = evaluation.scored(lambda: self._log_density(distribution, u.detach(), choice))
        diagnostics = {**evaluation.diagnostics, "gumbel_temperature": self.temperature}
        return Surrogate(evaluation.cost, evaluation.log_prob.detach(), {}, diagnostics)

    def _relaxed_draw(self, distribution: MixtureDistribution) -> tuple[Float[Tensor, "*B A"], Float[Tensor, "*B K"]]:
        components = distribution.rsample_components().movedim(0, -2)
        gumbel = -torch.empty_like(distribution.log_weights).exponential_().log()
        choice = ((distribution.log_weights + gumbel) / self.temperature).softmax(-1)
        if not self.straight_through:
            return (choice.unsqueeze(-1) * components).sum(-2), choice
        # The value is the winner's own, exactly; what is added is zero and carries the gradient of the choice.
        winner = distribution.take_component(components, choice.argmax(-1))
        relaxation = choice - choice.detach()
        return winner + (relaxation.unsqueeze(-1) * components.detach()).sum(-2), choice

    def _log_density(
        self, distribution: MixtureDistribution, u: Float[Tensor, "*B A"], choice: Float[Tensor, "*B K"]
    ) -> Float[Tensor, "*B"]:
        """Of the draw: that of the policy, or where the choice is relaxed, of u = sum_k y_k u_k given y."""
        if self.straight_through:
            return distribution.log_prob_unsquashed(u)
        y = choice.unsqueeze(-1)
        loc, scale = (y * distribution.loc).sum(-2), (y * distribution.scale).square().sum(-2).sqrt()
        return Normal(loc, scale, validate_args=False).log_prob(u).sum(-1)
