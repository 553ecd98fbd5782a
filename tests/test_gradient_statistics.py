"""The measurement of estimators, on estimators whose bias and noise are known."""

from __future__ import annotations

import math

import pytest
import torch
from quadrature import bounds, expectation_and_gradient, parameters, squash

from pmoe_lightning.estimators import AbstractEstimator, Frequency, Marginalized, ObjectiveValue, Surrogate
from pmoe_lightning.estimators.gradient_statistics import (
    GROUPS,
    GroupStatistics,
    cosine,
    directional_slopes,
    gradient_statistics,
)
from pmoe_lightning.modules.distributions import TanhGaussianMixture


class Noisy(AbstractEstimator):
    """Gradient 2 + noise for every mean, exactly 3 for every scale, none for the router."""

    def __call__(self, distribution, objective) -> Surrogate:
        noise = 2 + 0.5 * torch.randn_like(distribution.loc)
        loss = (distribution.loc * noise + 3 * distribution.scale).sum((-1, -2))
        return Surrogate(loss, loss.detach())


def quadratic(distribution: TanhGaussianMixture):
    def objective(u, log_prob):
        cost = (distribution.squash(u) - 0.4).square().sum(-1)
        return ObjectiveValue(cost, log_prob, -cost)

    return objective


def mixture(*batch: int, K: int = 3, A: int = 2) -> TanhGaussianMixture:
    torch.manual_seed(0)
    shape = (*batch, K, A)
    return TanhGaussianMixture(
        torch.zeros(shape[:-1]).double(), torch.randn(shape).double(), torch.ones(shape).double()
    )


def test_mean_variance_and_signal_to_noise_of_known_noise():
    """Six means in each of four states: v = 24 / 4, |E g| = 2 sqrt(24); 4.9 standard errors for each (1e-6)."""
    measured = gradient_statistics(Noisy(), mixture(4), quadratic, num_samples=4000)
    assert set(measured) == set(GROUPS)
    loc = measured["loc"]
    assert loc.mean.shape == (4, 3, 2)
    assert (loc.mean - 2).abs().max() < 4.9 * 0.5 / math.sqrt(4000)
    assert loc.variance == pytest.approx(24 * 0.25, rel=4.9 * math.sqrt(2 / (24 * 4000)))
    assert loc.standard_error == pytest.approx(math.sqrt(loc.variance / 4000))
    assert loc.signal_to_noise == pytest.approx(2 / 0.5, rel=0.05)
    assert (measured["scale"].mean == 3).all() and measured["scale"].signal_to_noise == math.inf
    assert measured["router"].signal_to_noise == 0.0


def test_noise_alone_has_no_signal():
    """|m|^2 of pure noise has the expectation v / N, which is taken off."""
    torch.manual_seed(0)
    noise = torch.randn(1000, 50)
    statistics = GroupStatistics(noise.mean(0), float(noise.var(0).sum()), 1000)
    assert statistics.signal_to_noise < 0.03


def test_an_unbiased_estimator_meets_the_exact_gradient_and_a_biased_one_does_not():
    exact_mixture, (low, high) = parameters(3, 2), bounds(2)
    _, exact = expectation_and_gradient(exact_mixture, lambda u, _: (squash(u, low, high) - 0.4).square().sum(-1))
    distribution = TanhGaussianMixture(*exact_mixture, low, high)
    torch.manual_seed(0)
    unbiased = gradient_statistics(Marginalized(), distribution, quadratic, num_samples=4000)
    biased = gradient_statistics(Frequency(), distribution, quadratic, num_samples=4000)
    for group, gradient in zip(GROUPS, exact, strict=True):
        measured = unbiased[group]
        assert (measured.mean - gradient).norm() < 4 * measured.standard_error
        assert cosine(measured.mean, gradient) > 0.99
    assert (biased["loc"].mean - exact.loc).norm() > 10 * biased["loc"].standard_error


def test_cosine():
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert cosine(first, second) == pytest.approx(math.sqrt(0.5))
    assert cosine(first, -first) == pytest.approx(-1.0)
    assert math.isnan(cosine(first, 0 * first))


class Reversed(AbstractEstimator):
    """The cost of ``Marginalized`` with the gradient turned round."""

    def __call__(self, distribution, objective) -> Surrogate:
        surrogate = Marginalized()(distribution, objective)
        cost = surrogate.expected_cost
        return surrogate._replace(expected_cost=2 * cost.detach() - cost)


@pytest.mark.parametrize("estimator, wrong", [(Marginalized(), 0.0), (Reversed(), 1.0)], ids=["right", "reversed"])
def test_a_difference_tells_a_gradient_from_its_reverse(estimator, wrong):
    """20 states whose slopes are far from zero, and one random state of the generator left where it should be."""
    policy = mixture(20)
    policy = TanhGaussianMixture(policy.log_weights, policy.loc, 0.3 * policy.scale)
    slopes = directional_slopes(estimator, policy, quadratic, num_samples=4000)
    clear = slopes.difference.abs() > 0.02
    assert clear.sum() >= 10
    sign = 1 - 2 * wrong
    torch.testing.assert_close(slopes.control, slopes.difference, rtol=0.02, atol=0.01)
    torch.testing.assert_close(sign * slopes.estimate, slopes.difference, rtol=0.02, atol=0.01)
    assert (slopes.estimate * slopes.difference < 0)[clear].double().mean() == wrong
    assert slopes.wrong_signs == pytest.approx(wrong, abs=0.15) and slopes.wrong_signs_control <= 0.15
