"""A policy distribution of one's own: a squashed mixture of Gaussians with full covariance, its network and its actor.

    pi(u|s) = sum_k w_k(s) N(u; mu_k(s), L_k(s) L_k(s)^T),    a = low + (high - low) (tanh(u) + 1) / 2

It offers all that ``modules.mixture`` has words for but diagonal scales. Nothing of the package is touched to add it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, get_args

import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.data import Bounded

from pmoe_lightning.modules.actors import MixtureActor, MixtureSampler, action_bounds
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.mixture import Offer
from pmoe_lightning.modules.networks import make_mlp

PARAMETERS = ("mixture_logits", "loc", "scale_tril")


class FullCovarianceMixture(TanhBounds, Distribution):
    """Mixture of K Gaussians with Cholesky factors, squashed by tanh into ``[low, high]``.

    Args:
        mixture_logits: unnormalised log-weights [*B, K].
        loc: component means [*B, K, A].
        scale_tril: lower triangular factors L_k with positive diagonals [*B, K, A, A].
        low, high: action bounds.
        deterministic: only ``max_weight``.
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True
    offers: ClassVar[frozenset[Offer]] = frozenset(get_args(Offer)) - {"diagonal_scales"}

    def __init__(
        self,
        mixture_logits: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        *,
        deterministic: str = "max_weight",
    ) -> None:
        assert deterministic == "max_weight"
        self.log_weights, self.loc, self.scale_tril = F.log_softmax(mixture_logits, -1), loc, scale_tril.tril()
        low, high = (torch.as_tensor(bound, dtype=loc.dtype, device=loc.device) for bound in (low, high))
        TanhBounds.__init__(self, low, high)
        Distribution.__init__(self, loc.shape[:-2], loc.shape[-1:], validate_args=False)

    @property
    def num_components(self) -> int:
        return self.loc.shape[-2]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(zip(PARAMETERS, (self.log_weights, self.loc, self.scale_tril), strict=True))

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> FullCovarianceMixture:
        return FullCovarianceMixture(**parameters, low=self.low, high=self.high)

    @property
    def weights(self) -> Tensor:
        return self.log_weights.exp()

    @property
    def component_modes(self) -> Tensor:
        return self.squash(self.loc)

    def mode_unsquashed(self) -> Tensor:
        return self.take_component(self.loc, self.log_weights.argmax(-1))

    deterministic_unsquashed = mode_unsquashed

    def sample_component(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = torch.empty(*sample_shape, *self.log_weights.shape).to(self.loc).exponential_()
        return (self.log_weights.detach() - noise.log()).argmax(-1)

    def take_component(self, values: Tensor, component: Tensor) -> Tensor:
        values = values.expand(*component.shape, *values.shape[-2:])
        index = component[..., None, None].expand(*component.shape, 1, values.shape[-1])
        return values.gather(-2, index).squeeze(-2)

    def _of(self, component: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.take_component(self.scale_tril.flatten(-2), component)
        return self.take_component(self.loc, component), factor.unflatten(-1, (-1, self.loc.shape[-1]))

    def rsample_given(self, component: Tensor) -> Tensor:
        return _draw(*self._of(component))

    def rsample_unsquashed(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.rsample_given(self.sample_component(sample_shape))

    def rsample_components(self) -> Tensor:
        return _draw(self.loc, self.scale_tril).movedim(-2, 0)

    def component_log_prob_unsquashed(self, u: Tensor) -> Tensor:
        return _log_density(u.unsqueeze(-2), self.loc, self.scale_tril)

    def stratum_log_prob_unsquashed(self, u: Tensor) -> Tensor:
        return _log_density(u, self.loc.movedim(-2, 0), self.scale_tril.movedim(-3, 0))

    def log_prob_given(self, u: Tensor, component: Tensor) -> Tensor:
        return _log_density(u, *self._of(component))

    def log_prob_unsquashed(self, u: Tensor) -> Tensor:
        return (self.log_weights + self.component_log_prob_unsquashed(u)).logsumexp(-1)

    def component_posterior(self, value: Tensor) -> Tensor:
        return (self.log_weights + self.component_log_prob_unsquashed(self.unsquash(value))).softmax(-1)


def _draw(loc: Tensor, scale_tril: Tensor) -> Tensor:
    """mu + L eps."""
    return loc + (scale_tril @ torch.randn_like(loc).unsqueeze(-1)).squeeze(-1)


def _log_density(u: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """log N(u; mu, L L^T)."""
    difference = u - loc
    factor = scale_tril.expand(*difference.shape, scale_tril.shape[-1])
    z = torch.linalg.solve_triangular(factor, difference.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * z.square().sum(-1) - log_det - 0.5 * math.log(2 * math.pi) * u.shape[-1]


class FullCovarianceNetwork(nn.Module):
    """observation [*B, O] -> logits [*B, K], loc [*B, K, A], scale_tril [*B, K, A, A]."""

    def __init__(self, observation_dim: int, action_dim: int, num_components: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.num_components, self.action_dim = num_components, action_dim
        self.trunk = make_mlp(observation_dim, hidden_sizes, "relu", "default")
        self.router = nn.Linear(hidden_sizes[-1], num_components)
        self.loc = nn.Linear(hidden_sizes[-1], num_components * action_dim)
        self.factor = nn.Linear(hidden_sizes[-1], num_components * action_dim**2)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(observation)
        loc = self.loc(features).unflatten(-1, (self.num_components, self.action_dim))
        raw = self.factor(features).unflatten(-1, (self.num_components, self.action_dim, self.action_dim))
        diagonal = raw.diagonal(dim1=-2, dim2=-1).clamp(-5, 2).exp()
        return self.router(features), loc, raw.tril(-1) + diagonal.diag_embed()


def make_full_covariance_actor(
    observation_dim: int,
    action_low: Sequence[float],
    action_high: Sequence[float],
    *,
    num_components: int = 3,
    hidden_sizes: Sequence[int] = (32, 32),
    return_log_prob: bool = False,
    observation_key: str = "observation",
) -> MixtureActor:
    """``make_pmoe_actor`` with full covariance."""
    low, high = action_bounds(action_low, action_high)
    network = FullCovarianceNetwork(observation_dim, low.numel(), num_components, hidden_sizes)
    sampler = MixtureSampler(
        low,
        high,
        distribution_class=FullCovarianceMixture,
        parameter_keys=PARAMETERS,
        deterministic="max_weight",
        return_log_prob=return_log_prob,
        action_key="action",
        spec=Bounded(low.clone(), high.clone(), shape=low.shape),
    )
    return MixtureActor(TensorDictModule(network, in_keys=[observation_key], out_keys=list(PARAMETERS)), sampler)
