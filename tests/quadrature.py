"""Exact expectations under a squashed Gaussian mixture, and the bounds within which Monte Carlo must meet them.

Written from the formulas alone, in float64, so that the tests hold the package against something it did not compute:

    E[f] = sum_n h^A pi(u_n) f(u_n, log pi(u_n))        on a regular grid u_n of spacing h

The trapezoid rule converges geometrically for the smooth, decaying integrands that occur here. Differentiated with
respect to the parameters at fixed nodes it is the exact gradient, including that of log pi inside f.

Shape letters: N nodes or draws, K components, A action dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

TEST_FAILURE_RATE = 1e-5
"""Chance that a statistical test fails on correct code, were its seed drawn afresh: all thresholds follow from it."""

Function = Callable[[Tensor, Tensor], Tensor]
"""Maps u [N, A] and log pi(u) [N] to values [N]."""


class Parameters(NamedTuple):
    """A mixture over the unsquashed action."""

    mixture_logits: Tensor
    """[K]"""
    loc: Tensor
    """[K, A]"""
    scale: Tensor
    """[K, A]"""


def parameters(num_components: int, action_dim: int, seed: int = 0) -> Parameters:
    """A mixture whose components overlap a little, with scales in [0.3, 0.9]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_components, action_dim)
    return Parameters(
        torch.randn(num_components, generator=generator, dtype=torch.float64),
        0.8 * torch.randn(shape, generator=generator, dtype=torch.float64),
        0.3 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64),
    )


def bounds(action_dim: int) -> tuple[Tensor, Tensor]:
    """Action bounds that are neither symmetric nor equal between dimensions."""
    low, high = torch.tensor([-2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    return low[:action_dim], high[:action_dim]


def squash(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The action a(u) = low + (high - low) (tanh(u) + 1) / 2."""
    return low + (high - low) * (u.tanh() + 1) / 2


def log_abs_det_jacobian(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """sum_d log |da_d/du_d|, from 1 - tanh^2 = 1 / cosh^2."""
    log_cosh = torch.logaddexp(u, -u) - math.log(2)
    return (((high - low) / 2).log() - 2 * log_cosh).sum(-1)


def component_log_density(mixture: Parameters, u: Tensor) -> Tensor:
    """log N(u; mu_k, sigma_k) [N, K]."""
    normal = torch.distributions.Normal(mixture.loc, mixture.scale, validate_args=False)
    return normal.log_prob(u.unsqueeze(-2)).sum(-1)


def log_density(mixture: Parameters, u: Tensor) -> Tensor:
    """log pi(u) [N] of the unsquashed action."""
    log_weights = mixture.mixture_logits - mixture.mixture_logits.logsumexp(-1, keepdim=True)
    return (log_weights + component_log_density(mixture, u)).logsumexp(-1)


def nodes(mixture: Parameters, spacing: float = 0.25, reach: float = 9.0) -> tuple[Tensor, float]:
    """A regular grid [N, A] that covers every component, and the volume of its cells.

    ``spacing`` is in units of the smallest standard deviation (or of 0.5, the scale of tanh, if that is less);
    integrands with sharper features need a finer one.
    """
    step = spacing * min(0.5, mixture.scale.min().item())
    first = (mixture.loc - reach * mixture.scale).amin(0).detach()
    last = (mixture.loc + reach * mixture.scale).amax(0).detach()
    axes = [torch.arange(a.item(), b.item(), step, dtype=torch.float64) for a, b in zip(first, last, strict=True)]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1), step ** len(axes)


def expectation(mixture: Parameters, function: Function, spacing: float = 0.25) -> Tensor:
    """E_{u ~ pi}[function(u, log pi(u))], differentiable with respect to the parameters."""
    u, volume = nodes(mixture, spacing)
    log_prob = log_density(mixture, u)
    return volume * (log_prob.exp() * function(u, log_prob)).sum()


def expectation_and_gradient(
    mixture: Parameters, function: Function, spacing: float = 0.25
) -> tuple[Tensor, Parameters]:
    """The expectation, and its gradient with respect to every parameter."""
    leaves = Parameters(*(value.clone().requires_grad_() for value in mixture))
    value = expectation(leaves, function, spacing)
    return value.detach(), Parameters(*torch.autograd.grad(value, leaves, materialize_grads=True))


def num_standard_errors(comparisons: int) -> float:
    """Half-width of the interval that ``comparisons`` normal means leave together with TEST_FAILURE_RATE."""
    return NormalDist().inv_cdf(1 - TEST_FAILURE_RATE / (2 * comparisons))


def assert_mean(draws: Tensor, exact: Tensor, *, resolution: float) -> None:
    """The mean of independent draws [N, ...] equals ``exact`` [...] within its standard error.

    ``resolution`` guards against a vacuous test: the bound itself may not exceed it.
    """
    error = draws.std(0) / math.sqrt(len(draws))
    bound = num_standard_errors(exact.numel()) * error + 1e-9
    assert bound.max() <= resolution, f"bound {bound.max():.3g} is wider than the resolution {resolution:.3g}"
    difference = (draws.mean(0) - exact).abs()
    assert (difference <= bound).all(), f"mean {draws.mean(0)} is not {exact}; bound {bound}"


def repeat(mixture: Parameters, draws: int) -> Parameters:
    """Leaves [N, ...] with one copy of the mixture per draw: their gradient is one estimate per draw."""
    return Parameters(*(value.expand(draws, *value.shape).clone().requires_grad_() for value in mixture))
