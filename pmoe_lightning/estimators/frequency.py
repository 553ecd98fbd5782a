"""The frequency estimator of PMOE."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pmoe_lightning.estimators.base import (
    AbstractEstimator,
    Objective,
    ObjectiveValue,
    ScoringDensity,
    Surrogate,
    take_sample,
)
from pmoe_lightning.limits import NonNegativeFloat, checked
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer

Score = Callable[[Float[Tensor, "K *B A"]], Float[Tensor, "K *B"]]


class Frequency(AbstractEstimator):
    r"""The weights learn how often each component wins (Ren et al. 2021, arXiv 2104.09122).

        b      = argmax_k score(u_k),    u_k = mu_k + sigma_k eps_k                     (the winner)
        loss   = cost(u_b) or reduce_k cost(u_k)    +    weight * reduce_k (1[k = b] - w_k)^2

    The second term, the paper's *frequency loss*, has its minimum at w_k = P(component k wins), hence the name: the
    weights are regressed on outcomes and never see the critic's gradient. Biased for K > 1 (hard argmax; the winner's
    cost is a maximum over K draws); equal to ``pathwise`` for K = 1. K critic evaluations to rank.

    Only the abstract of the paper and its authors' code were at hand. The defaults follow that code; each choice is a
    named switch:

    Args:
        backpropagate: ``max`` sends the winner's cost back (back-propagate-max), ``all`` every component's
            (back-propagate-all).
        log_prob: whose log-density enters the cost, the critic target and the temperature loss: the drawing
            ``component``'s own (the authors' code) or the ``mixture``'s. Of separated components their own is higher by
            log K, and a winner's is higher than a plain draw's: what the temperature holds at its target is less than
            the policy's entropy by both.
        reduction: ``mean`` over K (the authors' code) or ``sum`` (the paper's form), for both sums above.
        rank_by: the winner has the largest ``q`` (the authors' code) or the largest ``soft_q`` = -cost.
        weight: factor of the frequency loss.

    Raises:
        ValueError: an unknown switch or a negative weight.
    """

    asks: frozenset[Offer] = frozenset({"draws", "weights", "component_draws", "component_densities"})
    auxiliary_losses: ClassVar[tuple[str, ...]] = ("loss_frequency",)

    @checked
    def __init__(
        self,
        *,
        backpropagate: Literal["max", "all"] = "max",
        log_prob: ScoringDensity = "component",
        reduction: Literal["mean", "sum"] = "mean",
        rank_by: Literal["q", "soft_q"] = "q",
        weight: NonNegativeFloat = 1.0,
    ) -> None:
        self.backpropagate, self.reduction, self.rank_by = backpropagate, reduction, rank_by
        self.log_prob, self.weight = log_prob, weight

    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        u = distribution.rsample_components()
        own = self.log_prob == "component"
        log_prob = distribution.stratum_log_prob_unsquashed(u) if own else distribution.log_prob_unsquashed(u)
        evaluation = objective(u, log_prob)
        winner = self._score(evaluation).argmax(0)
        if self.backpropagate == "all":
            evaluation = evaluation.scored(lambda: distribution.stratum_log_prob_unsquashed(u.detach()))
            expected_cost, entropy_term = self._reduce(evaluation.cost), evaluation.log_prob.mean(0)
        else:
            expected_cost, entropy_term, *_ = self._of_winner(distribution, evaluation, u.detach(), winner)
        routing = self._regression(distribution, winner)
        return Surrogate(
            expected_cost,
            entropy_term.detach(),
            {"loss_frequency": routing},
            {**evaluation.diagnostics, "winner_frequency": _frequencies(winner, distribution.num_components)},
        )

    def routing_loss(
        self, distribution: MixtureDistribution, score: Score
    ) -> tuple[Float[Tensor, "*B"], dict[str, Tensor]]:
        """The frequency loss alone, for algorithms that learn the components by other means (PPO).

        Args:
            distribution: the policy at B states.
            score: maps unsquashed draws [K, *B, A] to their ranking score [K, *B].

        Returns:
            the loss per state, whose gradient reaches only the weights, and the winner frequencies [K].
        """
        with torch.no_grad():
            winner = score(distribution.rsample_components()).argmax(0)
        diagnostics = {"winner_frequency": _frequencies(winner, distribution.num_components)}
        return self._regression(distribution, winner), diagnostics

    def _score(self, evaluation: ObjectiveValue) -> Float[Tensor, "K *B"]:
        return (evaluation.score if self.rank_by == "q" else -evaluation.cost).detach()

    def _of_winner(
        self, distribution: MixtureDistribution, evaluation: ObjectiveValue, u: Tensor, winner: Int[Tensor, "*B"]
    ) -> ObjectiveValue:
        """The winner's evaluation, scored.

        Which draw wins depends on all K of them, so each has a score. From that of component k may be subtracted what
        does not depend on u_k: the remainder r of the best of the others. For every loser, that is r of the winner
        itself, and nothing is left; for the winner, r of the runner-up.
        """
        of_winner, remainder = evaluation.of(winner), evaluation.remainder
        if remainder is None:
            return of_winner
        if distribution.num_components > 1:
            others = self._score(evaluation).scatter(0, winner.unsqueeze(0), -torch.inf)
            remainder = remainder - take_sample(remainder, others.argmax(0))
        log_density = take_sample(distribution.stratum_log_prob_unsquashed(u), winner)
        return of_winner._replace(remainder=take_sample(remainder, winner)).scored(lambda: log_density)

    def _regression(self, distribution: MixtureDistribution, winner: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        weights = distribution.weights
        target = F.one_hot(winner, distribution.num_components).to(weights.dtype)
        return self.weight * self._reduce((target - weights).square().movedim(-1, 0))

    def _reduce(self, values: Float[Tensor, "K *B"]) -> Float[Tensor, "*B"]:
        return values.mean(0) if self.reduction == "mean" else values.sum(0)


def _frequencies(winner: Int[Tensor, "*B"], num_components: int) -> Float[Tensor, "K"]:
    return F.one_hot(winner, num_components).float().view(-1, num_components).mean(0)
