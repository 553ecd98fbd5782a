r"""Bias, direction and noise of a gradient estimator, measured where the policy's output meets its networks.

The gradient is taken with respect to the parameters of the mixture in groups: ``router`` (the logits), and each of its
other ``parameters`` by name; of a ``TanhGaussianMixture`` those are ``loc`` and ``scale``. A policy network only adds
its Jacobian to it, the same for every estimator. One call draws N independent estimates g_1..g_N for a whole batch of
states; with m = (1/N) sum_n g_n and v = tr Cov(g) = sum_p Var(g_p), both over all parameters p of a group in all
states,

    signal-to-noise = |E g| / sqrt(v),    |E g|^2 estimated without bias as |m|^2 - v / N

Whether the gradient is that of the loss at all is what finite differences say, ``directional_slopes``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pmoe_lightning.estimators import AbstractEstimator, Objective
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer

#: The groups of a ``TanhGaussianMixture``.
GROUPS = ("router", "loc", "scale")
#: What a distribution must offer here.
ASKS_STATISTICS: frozenset[Offer] = frozenset({"parameters"})
ASKS_SLOPES: frozenset[Offer] = frozenset({"parameters", "component_modes", "diagonal_scales"})


class GroupStatistics(NamedTuple):
    """N estimates of the gradient for one group of parameters."""

    mean: Tensor
    """m, with the shape of the parameters."""
    variance: float
    """v, the summed variance of a single estimate."""
    num_samples: int
    """N."""

    @property
    def standard_error(self) -> float:
        """Root mean square of |m - E g|: sqrt(v / N)."""
        return (self.variance / self.num_samples) ** 0.5

    @property
    def signal_to_noise(self) -> float:
        """|E g| / sqrt(v); 0 where the signal is lost in the noise of m itself, infinite without noise."""
        signal = max(0.0, float(self.mean.square().sum()) - self.variance / self.num_samples)
        return (signal / self.variance) ** 0.5 if self.variance > 0 else float("inf") if signal > 0 else 0.0


def gradient_statistics(
    estimator: AbstractEstimator,
    distribution: MixtureDistribution,
    make_objective: Callable[[MixtureDistribution], Objective],
    *,
    num_samples: int,
) -> dict[str, GroupStatistics]:
    """Statistics of ``num_samples`` independent estimates at the states of ``distribution``, by group.

    Args:
        estimator: what is measured.
        distribution: the policy at the states [*B]; its parameters are detached.
        make_objective: the objective of a distribution whose batch [N, *B] repeats the states.
        num_samples: N, at least 2.
    """
    with torch.enable_grad():
        leaves = {
            name: value.detach().expand(num_samples, *value.shape).clone().requires_grad_()
            for name, value in distribution.parameters.items()
        }
        repeated = distribution.with_parameters(leaves)
        surrogate = estimator(repeated, make_objective(repeated))
        gradients = torch.autograd.grad(surrogate.loss.sum(), tuple(leaves.values()), materialize_grads=True)
    return {
        "router" if name == "mixture_logits" else name: GroupStatistics(
            gradient.mean(0), float(gradient.var(0).sum()), num_samples
        )
        for name, gradient in zip(leaves, gradients, strict=True)
    }


class DirectionalSlopes(NamedTuple):
    """The slope of the expected cost along one random direction of the means, per state [*B]."""

    estimate: Tensor
    """By the estimator's gradient, the mean of N."""
    variance: Tensor
    """Of one of these N."""
    difference: Tensor
    """By a central difference of the estimated cost, with N common draws."""
    control: Tensor
    """The same with N other draws: how well a difference knows itself."""

    @property
    def wrong_signs(self) -> float:
        """The share of states where the estimate has another sign than the difference."""
        return self._share(self.estimate)

    @property
    def wrong_signs_control(self) -> float:
        """The share of states where the control has: what the noise of the draws alone does."""
        return self._share(self.control)

    def _share(self, slope: Tensor) -> float:
        return float((slope * self.difference < 0).double().mean())


def directional_slopes(
    estimator: AbstractEstimator,
    distribution: MixtureDistribution,
    make_objective: Callable[[MixtureDistribution], Objective],
    *,
    num_samples: int,
    direction: Float[Tensor, "*B K A"] | None = None,
    step: float = 0.1,
) -> DirectionalSlopes:
    """The estimator's gradient against finite differences of the cost it says it minimises.

    The two agree for every estimator that is unbiased for the means of the components. ``frequency`` with K > 1 holds
    the winner fixed where its cost is differentiated, and a difference does not: there they differ a little by design.

    Args:
        estimator, distribution, make_objective, num_samples: as for ``gradient_statistics``.
        direction: of the means, in standard deviations of the components; None draws one of length 1 for each state.
        step: how far along it to either side.
    """
    repeated = {
        name: value.detach().expand(num_samples, *value.shape) for name, value in distribution.parameters.items()
    }
    loc, scale = repeated["loc"], repeated["scale"]
    if direction is None:
        direction = torch.randn_like(loc[0])
        direction = direction / direction.square().sum((-1, -2), keepdim=True).sqrt()
    direction = direction * scale[0]

    def cost(means: Tensor) -> Tensor:
        moved = distribution.with_parameters(repeated | {"loc": means})
        return estimator(moved, make_objective(moved)).expected_cost

    def difference() -> Tensor:
        devices = [loc.device] if loc.device.type == "cuda" else []
        with torch.no_grad():
            with torch.random.fork_rng(devices=devices):
                above = cost(loc + step * direction)
            return ((above - cost(loc - step * direction)) / (2 * step)).mean(0)

    with torch.enable_grad():
        means = loc.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cost(means).sum(), means)
    slopes = (gradient * direction).sum((-1, -2))
    return DirectionalSlopes(slopes.mean(0), slopes.var(0), difference(), difference())


def cosine(first: Float[Tensor, "..."], second: Float[Tensor, "..."]) -> float:
    """Cosine of the angle between two gradients; nan where one of them is zero."""
    norms = first.norm() * second.norm()
    return float((first * second).sum() / norms) if norms > 0 else float("nan")
