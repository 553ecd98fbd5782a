"""A relaxed choice of the component."""

from __future__ import annotations

from typing import ClassVar

import torch

from pmoe_lightning.distributions import TanhGaussianMixture
from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate


class GumbelSoftmax(AbstractEstimator):
    r"""The one-hot choice becomes a softmax with Gumbel noise.

        loss = cost(u, log pi(u)),    u = sum_k y_k u_k,    y = softmax((log w + g) / temperature),
        u_k = mu_k + sigma_k eps_k,   g_k ~ Gumbel(0, 1)

    Biased for K > 1, one critic evaluation; Jang et al. (2017, arXiv 1611.01144), Maddison et al. (2017, arXiv
    1611.00712). The relaxed action lies *between* the modes, where the policy never acts. With ``straight_through`` the
    action is that of argmax_k y_k, an exact draw from the policy, and only the gradient is relaxed. A low temperature
    has less bias and more variance.

    Args:
        temperature: > 0.
        final_temperature: reached at the end of training, on a geometric path; None keeps ``temperature``.
        straight_through: see above.

    Raises:
        ValueError: a temperature that is not finite and positive.
    """

    annealed: ClassVar[tuple[str, ...]] = ("temperature",)

    def __init__(
        self, *, temperature: float = 1.0, final_temperature: float | None = None, straight_through: bool = True
    ) -> None:
        for name, value in (("temperature", temperature), ("final_temperature", final_temperature)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"estimator gumbel_softmax: {name} must be finite and positive, not {value}")
        # A tensor, because a compiled update would be compiled anew for every number.
        self.temperature, self.straight_through = torch.tensor(temperature), straight_through
        self._initial_temperature, self._final_temperature = temperature, final_temperature

    def anneal(self, progress: float) -> None:
        if self._final_temperature is not None:
            ratio = self._final_temperature / self._initial_temperature
            self.temperature = torch.tensor(self._initial_temperature * ratio**progress)

    def __call__(self, distribution: TanhGaussianMixture, objective: Objective) -> Surrogate:
        u = self._relaxed_draw(distribution)
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        diagnostics = {**evaluation.diagnostics, "gumbel_temperature": self.temperature.to(u.device)}
        return Surrogate(evaluation.cost, evaluation.log_prob.detach(), {}, diagnostics)

    def _relaxed_draw(self, distribution: TanhGaussianMixture) -> torch.Tensor:
        components = distribution.rsample_components().movedim(0, -2)
        gumbel = -torch.empty_like(distribution.log_weights).exponential_().log()
        choice = ((distribution.log_weights + gumbel) / self.temperature).softmax(-1)
        if not self.straight_through:
            return (choice.unsqueeze(-1) * components).sum(-2)
        # The value is the winner's own, exactly; what is added is zero and carries the gradient of the choice.
        winner = distribution.take_component(components, choice.argmax(-1))
        relaxation = choice - choice.detach()
        return winner + (relaxation.unsqueeze(-1) * components.detach()).sum(-2)
