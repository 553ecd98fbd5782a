"""Implicit reparameterisation of the mixture."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer


class Implicit(AbstractEstimator):
    r"""Autograd through a draw from the whole mixture, whose derivative is defined by its distribution function.

        loss = cost(u, log pi(u)),    u ~ pi,    du/dtheta = -(dF/du)^-1 dF/dtheta

    F_d(u) = sum_k r_kd Phi((u_d - mu_kd) / sigma_kd) is the conditional distribution function of dimension d given the
    earlier ones, r_kd proportional to w_k prod_{j<d} N(u_j; mu_kj, sigma_kj). F stays fixed while the parameters move,
    which defines du (Graves 2016, arXiv 1607.05690; Figurnov et al. 2018, arXiv 1805.08498).

    Unbiased for any K and A, one critic evaluation, and the only estimator whose single draw trains the weights, means
    and scales of every component. Its variance grows where components lie apart: a draw must cross the gap between them
    as the weights change. A single estimate depends on the order of the action dimensions, its mean does not.
    """

    asks: frozenset[Offer] = frozenset({"draws", "weights", "component_modes", "diagonal_scales"})

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        u = implicit_rsample(distribution)
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        evaluation = evaluation.scored(lambda: distribution.log_prob_unsquashed(u.detach()))
        return Surrogate(evaluation.cost, evaluation.log_prob.detach(), diagnostics=evaluation.diagnostics)


def implicit_rsample(distribution: MixtureDistribution) -> Float[Tensor, "*B A"]:
    r"""A draw from the mixture that carries the implicit derivative with respect to weights, means and scales.

    Solved for du_d, the definition above reads, with p_kd = P(component k | u_1..u_d) and
    c_kd = r_kd (Phi_kd - F_d) / f_d, f_d = sum_k r_kd N(u_d; mu_kd, sigma_kd),

        du_d = sum_k p_kd (dmu_kd + z_kd dsigma_kd) - sum_k c_kd [dlog w_k + sum_{j<d} dlog N(u_j; mu_kj, sigma_kj)]

    where dlog N includes its dependence on du_j, which makes it a unit lower triangular system in du. Every factor is a
    ratio of densities taken in the logarithm, so neither coincident components nor vanishing weights divide by zero.
    """
    loc, scale = distribution.loc, distribution.scale
    with torch.no_grad():
        u = distribution.rsample_unsquashed()
        z = (u.unsqueeze(-2) - loc) / scale
        log_density, log_earlier = _log_densities(u, loc, scale)
        log_prior = (distribution.log_weights.unsqueeze(-1) + log_earlier).log_softmax(-2)
        log_joint = log_prior + log_density
        log_conditional = log_joint.logsumexp(-2, keepdim=True)
        posterior = (log_joint - log_conditional).exp()
        crossing = _centred_distribution(z, log_prior.exp()) * (log_prior - log_conditional).exp()
        # Row d: how du_d depends on du_j, j < d, through the densities of the earlier dimensions.
        system = torch.einsum("...kd,...kj->...dj", crossing, -z / scale).tril(-1)
    _, log_earlier = _log_densities(u, loc, scale)
    explicit = posterior * (loc + z * scale) - crossing * (distribution.log_weights.unsqueeze(-1) + log_earlier)
    explicit = explicit.sum(-2)
    derivative = explicit - explicit.detach()  # zero, with the gradient
    derivative = torch.linalg.solve_triangular(system, derivative.unsqueeze(-1), upper=False, unitriangular=True)
    return u + derivative.squeeze(-1)


def _log_densities(
    u: Float[Tensor, "*B A"], loc: Float[Tensor, "*B K A"], scale: Float[Tensor, "*B K A"]
) -> tuple[Float[Tensor, "*B K A"], Float[Tensor, "*B K A"]]:
    """log N(u_d; mu_kd, sigma_kd), and its sum over the dimensions before d."""
    log_density = Normal(loc, scale, validate_args=False).log_prob(u.unsqueeze(-2))
    return log_density, F.pad(log_density[..., :-1].cumsum(-1), (1, 0))


def _centred_distribution(z: Float[Tensor, "*B K A"], weights: Float[Tensor, "*B K A"]) -> Float[Tensor, "*B K A"]:
    """Phi(z_k) - sum_j r_j Phi(z_j), taken in the smaller tail, where no digits cancel."""
    sign = torch.where((weights * _normal_cdf(z)).sum(-2, keepdim=True) > 0.5, -1.0, 1.0).to(z.dtype)
    tail = _normal_cdf(sign * z)
    return sign * (tail - (weights * tail).sum(-2, keepdim=True))


def _normal_cdf(z: Tensor) -> Tensor:
    # torch.special.ndtr has no correct digit left below -6 in single precision.
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)
