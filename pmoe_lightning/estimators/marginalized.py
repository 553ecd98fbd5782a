"""Exact sum over components, pathwise within each."""

from __future__ import annotations

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer


class Marginalized(AbstractEstimator):
    """The expectation over the component is summed, not sampled.

        loss = sum_k w_k cost(u_k, log pi(u_k)),    u_k = mu_k + sigma_k eps_k

    with autograd through w, u_k and log pi. Unbiased for any K; K critic evaluations, batched into one call. This is
    the marginalised reparameterisation of He et al. (2026, arXiv 2605.09157, whose formula we reconstructed from its
    reviews) and the stratified bound of Roeder et al. (2017, arXiv 1703.09194).
    """

    asks: frozenset[Offer] = frozenset({"draws", "weights", "component_draws", "component_densities"})

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        u = distribution.rsample_components()
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        evaluation = evaluation.scored(lambda: distribution.stratum_log_prob_unsquashed(u.detach()))
        weights = distribution.weights.movedim(-1, 0)
        log_prob = (weights * evaluation.log_prob).sum(0).detach()
        return Surrogate((weights * evaluation.cost).sum(0), log_prob, diagnostics=evaluation.diagnostics)
