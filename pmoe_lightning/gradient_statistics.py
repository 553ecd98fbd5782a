r"""Bias, direction and noise of a gradient estimator, measured where the policy's output meets its networks.

The gradient is taken with respect to the parameters of the mixture, in three groups: ``router`` (the logits), ``loc``
and ``scale``. A policy network only adds its Jacobian to it, the same for every estimator. One call draws N independent
estimates g_1..g_N for a whole batch of states; with m = (1/N) sum_n g_n and v = tr Cov(g) = sum_p Var(g_p), both over
all parameters p of a group in all states,

    signal-to-noise = |E g| / sqrt(v),    |E g|^2 estimated without bias as |m|^2 - v / N
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pmoe_lightning.distributions import TanhGaussianMixture
from pmoe_lightning.estimators import AbstractEstimator, Objective

GROUPS = ("router", "loc", "scale")


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
    distribution: TanhGaussianMixture,
    make_objective: Callable[[TanhGaussianMixture], Objective],
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
    leaves = (
        value.detach().expand(num_samples, *value.shape).clone().requires_grad_()
        for value in (distribution.log_weights, distribution.loc, distribution.scale)
    )
    with torch.enable_grad():
        leaves = tuple(leaves)
        repeated = TanhGaussianMixture(*leaves, distribution.low, distribution.high)
        surrogate = estimator(repeated, make_objective(repeated))
        gradients = torch.autograd.grad(surrogate.loss.sum(), leaves, materialize_grads=True)
    return {
        name: GroupStatistics(gradient.mean(0), float(gradient.var(0).sum()), num_samples)
        for name, gradient in zip(GROUPS, gradients, strict=True)
    }


def cosine(first: Float[Tensor, "..."], second: Float[Tensor, "..."]) -> float:
    """Cosine of the angle between two gradients; nan where one of them is zero."""
    norms = first.norm() * second.norm()
    return float((first * second).sum() / norms) if norms > 0 else float("nan")
