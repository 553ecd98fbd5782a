"""Plain reparameterisation, for one component."""

from __future__ import annotations

from typing import ClassVar

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate, check_pair
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer


class Pathwise(AbstractEstimator):
    """u = mu + sigma eps and autograd: the estimator of SAC (Haarnoja et al. 2018, arXiv 1801.01290).

        loss = cost(u, log pi(u))

    Unbiased for K = 1, one critic evaluation. For K > 1 it would leave the weights without any gradient from the
    critic, so it refuses. It asks for no density (``diversity``), as long as the objective leaves no ``remainder`` that
    only a score could differentiate.

    Raises:
        ValueError: the mixture has more than one component.
    """

    asks: frozenset[Offer] = frozenset({"diversity"})
    most_components: ClassVar[int] = 1

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        check_pair(self, type(distribution), distribution.num_components)  # silently wrong otherwise
        u = distribution.rsample_unsquashed()
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        evaluation = evaluation.scored(lambda: distribution.log_prob_unsquashed(u.detach()))
        return Surrogate(evaluation.cost, evaluation.log_prob.detach(), diagnostics=evaluation.diagnostics)
