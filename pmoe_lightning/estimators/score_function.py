"""The score-function (likelihood-ratio, REINFORCE) estimator."""

from __future__ import annotations

import torch

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, Surrogate
from pmoe_lightning.estimators.baselines import Baseline, check_baseline, subtract_baseline
from pmoe_lightning.limits import PositiveInt, checked
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer


class ScoreFunction(AbstractEstimator):
    r"""The density is differentiated, never the cost (Williams 1992).

        grad = (1/N) sum_i grad log pi(u_i) (cost(u_i) - b_i),    u_i ~ pi

    Unbiased with ``none`` and ``leave_one_out``; ``mean`` shrinks the gradient by (N-1)/N, see ``baselines``. N critic
    evaluations, none of them differentiated. Variance grows with the action dimension. The dependence of the cost on
    log pi itself is left out: its gradient E[grad log pi] has mean zero for a cost that is affine in log pi.

    Args:
        num_samples: N, draws and critic evaluations per state.
        baseline: b_i, which lowers the variance: ``none``, ``mean`` or ``leave_one_out``.

    Raises:
        ValueError: an unknown baseline, or too few draws for it.
    """

    asks: frozenset[Offer] = frozenset({"draws"})

    @checked
    def __init__(self, *, num_samples: PositiveInt = 4, baseline: Baseline = "leave_one_out") -> None:
        check_baseline(self, baseline, num_samples)
        self.num_samples, self.baseline = num_samples, baseline

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        with torch.no_grad():
            u = distribution.rsample_unsquashed((self.num_samples,))
        density = distribution.log_prob_unsquashed(u)
        # Not without gradients: an action transform inside the objective has parameters of its own.
        evaluation = objective(u, density.detach())
        advantage = subtract_baseline(evaluation.cost, self.baseline)
        score_term = ((density - density.detach()) * advantage).mean(0)
        expected_cost, log_prob = evaluation.cost.mean(0) + score_term, evaluation.log_prob.mean(0).detach()
        return Surrogate(expected_cost, log_prob, diagnostics=evaluation.diagnostics)
