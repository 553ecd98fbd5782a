"""Reparameterised within the component, score function for its choice."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate
from pmoe_lightning.estimators.baselines import Baseline, check_baseline, subtract_baseline
from pmoe_lightning.limits import PositiveInt, checked
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer


class HalfReparameterized(AbstractEstimator):
    r"""Autograd through the draw, a score for the choice of the component that drew it.

        grad = (1/N) sum_i [grad cost(u_i) + grad log w_{k_i} (cost(u_i) - b_i)],
               k_i ~ w,  u_i = mu_{k_i} + sigma_{k_i} eps_i

    Unbiased with ``none`` and ``leave_one_out``; ``mean`` shrinks the second term by (N-1)/N, see ``baselines``. N
    critic evaluations. He et al. (2026, arXiv 2605.09157) compare with it; without the second term it would be plain
    reparameterisation, which never trains the weights.

    Args:
        num_samples: N, draws and critic evaluations per state.
        baseline: b_i, which lowers the variance: ``none``, ``mean`` or ``leave_one_out``.

    Raises:
        ValueError: an unknown baseline, or too few draws for it.
    """

    asks: frozenset[Offer] = frozenset({"draws", "weights", "component_draws", "component_densities"})

    @checked
    def __init__(self, *, num_samples: PositiveInt = 2, baseline: Baseline = "leave_one_out") -> None:
        check_baseline(self, baseline, num_samples)
        self.num_samples, self.baseline = num_samples, baseline

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        component = distribution.sample_component((self.num_samples,))

        def chosen(values: Float[Tensor, "N *B K"]) -> Float[Tensor, "N *B"]:
            return values.gather(-1, component.unsqueeze(-1)).squeeze(-1)

        u = distribution.rsample_given(component)
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        evaluation = evaluation.scored(lambda: chosen(distribution.component_log_prob_unsquashed(u.detach())))
        log_weight = chosen(distribution.log_weights.expand(*component.shape, -1))
        advantage = subtract_baseline(evaluation.cost, self.baseline)
        choice_term = (log_weight - log_weight.detach()) * advantage
        expected_cost, log_prob = (evaluation.cost + choice_term).mean(0), evaluation.log_prob.mean(0).detach()
        return Surrogate(expected_cost, log_prob, diagnostics=evaluation.diagnostics)
