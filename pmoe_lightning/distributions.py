r"""The one distribution of the project: a Gaussian mixture squashed into the action bounds.

    pi(u|s) = sum_k w_k(s) N(u; mu_k(s), diag sigma_k(s)^2),    w = softmax(mixture_logits)
    a       = low + (high - low) (tanh(u) + 1) / 2

Shape letters, here and in the estimators: B batch (any leading dimensions), S sample dimensions (in front of B, as in
``torch.distributions``), K components, A action dimensions.

``u`` is the *unsquashed* action. Sampling and scoring belong together: once tanh has saturated, ``u`` cannot be
recovered from ``a`` and a score through atanh is wrong by several nats. Every ``*_and_log_prob`` method therefore
scores the ``u`` it drew, and learning code passes ``u`` around with its density.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution, constraints

DeterministicRule = Literal["max_weight", "sample_component"]
_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class TanhBounds:
    """The map between unsquashed actions u and actions a in ``[low, high]``.

        a = low + (high - low) (tanh(u) + 1) / 2

    Args:
        low, high: action bounds, tensors that broadcast to [A], in the units of the environment.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self._half_range = (high - low) / 2
        self._center = (high + low) / 2

    def squash(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """Bounded action a(u). The clamp removes the last-bit overshoot of ``center + half_range``."""
        return (self._center + self._half_range * u.tanh()).clamp(self.low, self.high)

    @classmethod
    def normalized(cls, like: Tensor) -> TanhBounds:
        """The bounds -1 and 1, of the type and on the device of a tensor: what everything that learns sees."""
        return cls(like.new_full((), -1.0), like.new_full((), 1.0))

    def normalize(self, action: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The action in units of its bounds: ``low`` becomes -1 and ``high`` 1. Exact where the bounds are these."""
        return (action - self._center) / self._half_range

    def squash_derivative(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """da_d/du_d, zero where tanh has saturated."""
        return self._half_range * (1 - u.tanh().square())

    def unsquash(self, action: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The inverse of ``squash``, inexact where tanh has saturated; finite at the bounds."""
        limit = 1 - torch.finfo(action.dtype).eps
        return self.normalize(action).clamp(-limit, limit).atanh()

    def log_abs_det_jacobian(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """sum_d log |da_d/du_d|, with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), finite for every u."""
        return (self._half_range.log() + 2 * (_LOG_2 - u - F.softplus(-2 * u))).sum(-1)


class TanhGaussianMixture(TanhBounds, Distribution):
    """Mixture of K diagonal Gaussians under one joint categorical, squashed by tanh into ``[low, high]``.

    With one component it is the squashed Gaussian of SAC (Haarnoja et al. 2018, arXiv 1801.01290). As a policy of
    several components it is the probabilistic mixture-of-experts of Ren et al. (2021, arXiv 2104.09122), whose
    "primitives" and "mixing coefficients" are our components and weights.

    Args:
        mixture_logits: unnormalised log-weights [*B, K].
        loc: component means of the unsquashed action [*B, K, A].
        scale: component standard deviations of the unsquashed action, positive [*B, K, A].
        low, high: action bounds, numbers or tensors that broadcast to [A], in the units of the environment.
        deterministic: the action taken when no exploration is wanted. ``max_weight`` squashes the mean of the
            component with the largest weight; ``sample_component`` draws the component from the weights and squashes
            its mean (what the authors' code does). A third rule, ``best_value``, needs critics and is an actor of its
            own (``actors.BestValueActor``). The mean of the modes is never used: it lies between them.

    Raises:
        ValueError: the shapes do not fit together, or the rule is unknown.

    Example:
        >>> mixture = TanhGaussianMixture(torch.zeros(8, 4), torch.randn(8, 4, 2), torch.ones(8, 4, 2))
        >>> action, log_prob = mixture.rsample_and_log_prob()  # [8, 2], [8]
    """

    arg_constraints = {}
    # Within the chosen component only: the choice itself carries no pathwise gradient (see ``rsample``).
    has_rsample = True

    def __init__(
        self,
        mixture_logits: Float[Tensor, "*B K"],
        loc: Float[Tensor, "*B K A"],
        scale: Float[Tensor, "*B K A"],
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        *,
        deterministic: DeterministicRule = "max_weight",
        validate_args: bool | None = None,
    ) -> None:
        if loc.shape != scale.shape or mixture_logits.shape != loc.shape[:-1]:
            shapes = f"{tuple(mixture_logits.shape)}, {tuple(loc.shape)}, {tuple(scale.shape)}"
            raise ValueError(f"mixture_logits [*B,K], loc and scale [*B,K,A] do not fit together: got {shapes}")
        if deterministic not in get_args(DeterministicRule):
            raise ValueError(f"unknown deterministic rule {deterministic!r}; use one of {get_args(DeterministicRule)}")
        self.loc, self.scale, self.deterministic = loc, scale, deterministic
        self.log_weights = F.log_softmax(mixture_logits, -1)
        low, high = (torch.as_tensor(bound, dtype=loc.dtype, device=loc.device) for bound in (low, high))
        TanhBounds.__init__(self, low, high)
        Distribution.__init__(self, loc.shape[:-2], loc.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    @property
    def num_components(self) -> int:
        """K."""
        return self.loc.shape[-2]

    @property
    def weights(self) -> Float[Tensor, "*B K"]:
        """Mixture weights w, which sum to one."""
        return self.log_weights.exp()

    @property
    def component_modes(self) -> Float[Tensor, "*B K A"]:
        """The squashed mean of every component: the candidates of all deterministic rules."""
        return self.squash(self.loc)

    @property
    def _log_normalizer(self) -> Float[Tensor, "*B K"]:
        """log sqrt((2 pi)^A |Sigma_k|), of which all samples share one."""
        return self.scale.log().sum(-1) + _HALF_LOG_2PI * self.loc.shape[-1]

    # --- densities of the unsquashed action --------------------------------------------------------------------------

    def component_log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """log N(u; mu_k, sigma_k) of every component."""
        z = (u.unsqueeze(-2) - self.loc) / self.scale
        return -0.5 * z.square().sum(-1) - self._log_normalizer

    def log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """log sum_k w_k N(u; mu_k, sigma_k)."""
        return (self.log_weights + self.component_log_prob_unsquashed(u)).logsumexp(-1)

    # --- densities of the action -------------------------------------------------------------------------------------

    def log_prob(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """log pi(a|s). Goes through atanh: score fresh samples with a ``*_and_log_prob`` method instead."""
        u = self.unsquash(value)
        return self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def component_log_prob(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """Each component's own log-density of the action."""
        u = self.unsquash(value)
        return self.component_log_prob_unsquashed(u) - self.log_abs_det_jacobian(u).unsqueeze(-1)

    def component_posterior(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """P(k | a, s), which sums to one over k (the Jacobian cancels)."""
        return (self.log_weights + self.component_log_prob_unsquashed(self.unsquash(value))).softmax(-1)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def sample_component(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Int[Tensor, "*S"]:
        """Component indices k ~ w, shape [*S, *B]."""
        shape = (*sample_shape, *self.log_weights.shape)
        # argmax of log w plus Gumbel noise; with one component nothing is drawn, so that the random numbers that
        # follow are those of a plain squashed Gaussian.
        if self.num_components == 1:
            return torch.zeros(shape[:-1], dtype=torch.long, device=self.loc.device)
        exponential = self.log_weights.new_empty(shape).exponential_()
        return (self.log_weights.detach() - exponential.log()).argmax(-1)

    def take_component(self, values: Float[Tensor, "*B K A"], component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB A"]:
        """values[..., k, :] at the given k, broadcasting [*B, K, A] values over sample dimensions."""
        values = values.expand(*component.shape, *values.shape[-2:])
        index = component[..., None, None].expand(*component.shape, 1, values.shape[-1])
        return values.gather(-2, index).squeeze(-2)

    def rsample_unsquashed(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Float[Tensor, "*S A"]:
        """u = mu_k + sigma_k eps with k ~ w; gradients reach mu_k and sigma_k, never the choice of k."""
        return self.rsample_given(self.sample_component(sample_shape))

    def rsample_given(self, component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB A"]:
        """u = mu_k + sigma_k eps for components that were chosen already."""
        loc, scale = (self.take_component(values, component) for values in (self.loc, self.scale))
        return loc + scale * torch.randn_like(loc)

    def rsample_components(self) -> Float[Tensor, "K *B A"]:
        """One pathwise draw u_k = mu_k + sigma_k eps_k from every component: a stratified sample of size K."""
        return (self.loc + self.scale * torch.randn_like(self.loc)).movedim(-2, 0)

    def stratum_log_prob_unsquashed(self, u: Float[Tensor, "K *B A"]) -> Float[Tensor, "K *B"]:
        """log N(u_k; mu_k, sigma_k) of a stratified sample: each draw under the component it came from."""
        z = (u - self.loc.movedim(-2, 0)) / self.scale.movedim(-2, 0)
        return -0.5 * z.square().sum(-1) - self._log_normalizer.movedim(-1, 0)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Float[Tensor, "*S A"]:
        """A pathwise action. Its gradient is that of the chosen component alone: averaged over samples it misses the
        gradient of the weights. Gradient estimators (``pmoe_lightning.estimators``) are what supplies it."""
        return self.squash(self.rsample_unsquashed(sample_shape))

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Float[Tensor, "*S A"]:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_and_log_prob(
        self, sample_shape: torch.Size | tuple[int, ...] = ()
    ) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S"]]:
        """An action and its mixture log-density, scored at the ``u`` that was drawn: exact under saturation."""
        u = self.rsample_unsquashed(sample_shape)
        return self.squash(u), self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def sample_and_log_prob(
        self, sample_shape: torch.Size | tuple[int, ...] = ()
    ) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S"]]:
        """As ``rsample_and_log_prob``, with the action detached; the score keeps its gradient."""
        with torch.no_grad():
            u = self.rsample_unsquashed(sample_shape)
        return self.squash(u), self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def deterministic_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The unsquashed action of the deterministic rule."""
        if self.deterministic == "max_weight":
            return self.mode_unsquashed()
        return self.take_component(self.loc, self.sample_component())

    @property
    def deterministic_sample(self) -> Float[Tensor, "*B A"]:
        """The action of the deterministic rule (what TorchRL takes for ``ExplorationType.DETERMINISTIC``)."""
        return self.squash(self.deterministic_unsquashed())

    @property
    def mode(self) -> Float[Tensor, "*B A"]:
        """The squashed mean of the heaviest component, whatever the rule."""
        return self.squash(self.mode_unsquashed())

    def mode_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The mean of the heaviest component."""
        return self.take_component(self.loc, self.log_weights.argmax(-1))

    # --- entropy -----------------------------------------------------------------------------------------------------

    def entropy(self) -> Float[Tensor, "*B"]:
        r"""Stratified one-draw estimate of the entropy of the action, sum_k w_k E_{u ~ k}[-log pi(a(u))], in nats.

        Unbiased, and so is its gradient with respect to weights, means and scales: the weights enter as factors. The
        plain Monte Carlo form -log pi(u), u ~ pi, has a gradient of mean zero for the weights, which is what TorchRL's
        PPO would use if this class did not define ``entropy``. (Roeder et al. 2017, arXiv 1703.09194, for the sum over
        components.)
        """
        u = self.rsample_components()
        log_prob = self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)
        return -(self.weights.movedim(-1, 0) * log_prob).sum(0)
