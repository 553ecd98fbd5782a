"""Plain reparameterisation, for one component."""

from __future__ import annotations

from pmoe_lightning.distributions import TanhGaussianMixture
from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate


class Pathwise(AbstractEstimator):
    """u = mu + sigma eps and autograd: the estimator of SAC (Haarnoja et al. 2018, arXiv 1801.01290).

        loss = cost(u, log pi(u))

    Unbiased for K = 1, one critic evaluation. For K > 1 it would leave the weights without any gradient from the
    critic, so it refuses.

    Raises:
        ValueError: the mixture has more than one component.
    """

    def check(self, num_components: int) -> None:
        if num_components != 1:
            raise ValueError(
                f"estimator pathwise has no gradient for the weights of {num_components} components; "
                "use actor=gaussian, or another estimator such as marginalized"
            )

    def __call__(self, distribution: TanhGaussianMixture, objective: Objective) -> Surrogate:
        self.check(distribution.num_components)
        u = distribution.rsample_unsquashed()
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        return Surrogate(evaluation.cost, evaluation.log_prob.detach(), diagnostics=evaluation.diagnostics)
