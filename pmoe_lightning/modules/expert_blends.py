r"""Two ways to merge K Gaussian experts into one Gaussian: the policies that a mixture is compared with.

A mixture chooses one of its experts, so its density has several modes. Both blends here merge all of them into a
single one (Ren et al. 2021, arXiv 2104.09122, compare with both kinds). They take what the mixture's own network
writes, ``mixture_logits`` [*B, K], ``loc`` and ``scale`` [*B, K, A], and return the same with K = 1, so that whatever
serves a mixture serves them: distribution, losses and every gradient estimator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Blended = tuple[Float[Tensor, "*B 1"], Float[Tensor, "*B 1 A"], Float[Tensor, "*B 1 A"]]
Blend = Callable[[Float[Tensor, "*B K"], Float[Tensor, "*B K A"], Float[Tensor, "*B K A"]], Blended]


def add_actions(
    mixture_logits: Float[Tensor, "*B K"], loc: Float[Tensor, "*B K A"], scale: Float[Tensor, "*B K A"]
) -> Blended:
    r"""The weighted sum of the experts' actions, u = sum_k w_k u_k with w = softmax(mixture_logits).

        u ~ N(sum_k w_k mu_k, sum_k w_k^2 sigma_k^2)

    Additive gating (Jacobs et al. 1991, for regression). The sum is taken before tanh, where it has this exact density.
    """
    weights = mixture_logits.softmax(-1).unsqueeze(-1)
    variance = (weights * scale).square().sum(-2, keepdim=True)
    return torch.zeros_like(mixture_logits[..., :1]), (weights * loc).sum(-2, keepdim=True), variance.sqrt()


def multiply_densities(
    mixture_logits: Float[Tensor, "*B K"], loc: Float[Tensor, "*B K A"], scale: Float[Tensor, "*B K A"]
) -> Blended:
    r"""The normalised product of the experts' densities, prod_k N(u; mu_k, sigma_k^2)^{w_k} with w = sigmoid(logits).

        u ~ N(mu, sigma^2),    1 / sigma^2 = sum_k w_k / sigma_k^2,    mu = sigma^2 sum_k (w_k / sigma_k^2) mu_k

    Multiplicative compositional policies, MCP (Peng et al. 2019, arXiv 1905.09808). The weights need not sum to one: an
    expert with a small weight leaves its action dimensions to the others.
    """
    log_precision = F.logsigmoid(mixture_logits).unsqueeze(-1) - 2 * scale.log()
    share = log_precision.softmax(-2)
    log_precision = log_precision.logsumexp(-2, keepdim=True)
    loc = (share * loc).sum(-2, keepdim=True)
    return torch.zeros_like(mixture_logits[..., :1]), loc, (-0.5 * log_precision).exp()
