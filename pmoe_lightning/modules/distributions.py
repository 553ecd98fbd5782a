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
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints
from torch.distributions.kl import kl_divergence, register_kl

from pmoe_lightning.modules.mixture import Offer

DeterministicRule = Literal["max_weight", "mean", "sample_component"]
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
            component with the largest weight; ``mean`` is the mean of the squashed means by weight, sum_k w_k a(mu_k),
            which is right where the components surround one way and wrong where they are several, between which it
            lies; ``sample_component`` draws the component from the weights and squashes its mean (what the authors'
            code does). A fourth rule, ``best_value``, needs critics and is an actor of its own
            (``actors.BestValueActor``).
        validate_args: check parameters here and actions where they are scored, as ``torch.distributions`` do. ``None``
            means no, because a policy is built anew in every update and a check waits for the device.

    Raises:
        ValueError: the shapes do not fit together, the rule is unknown, or with ``validate_args`` a number is not one
            that a parameter or an action can be.

    Example:
        >>> mixture = TanhGaussianMixture(torch.zeros(8, 4), torch.randn(8, 4, 2), torch.ones(8, 4, 2))
        >>> action, log_prob = mixture.rsample_and_log_prob()  # [8, 2], [8]
    """

    arg_constraints = {
        "mixture_logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
        "low": constraints.dependent(is_discrete=False, event_dim=1),
        "high": constraints.dependent(is_discrete=False, event_dim=1),
    }
    offers: ClassVar[frozenset[Offer]] = frozenset(get_args(Offer))
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
        Distribution.__init__(self, loc.shape[:-2], loc.shape[-1:], validate_args=bool(validate_args))
        if validate_args and not (low < high).all():
            raise ValueError(f"{type(self).__name__} needs low < high, not {low.tolist()}, {high.tolist()}")

    def __repr__(self) -> str:
        bounds = f"low: {self.low.tolist()}, high: {self.high.tolist()}"
        shapes = ", ".join(f"{name}: {tuple(getattr(self, name).shape)}" for name in ("mixture_logits", "loc", "scale"))
        return f"{type(self).__name__}({shapes}, {bounds}, deterministic: {self.deterministic!r})"

    def expand(
        self, batch_shape: torch.Size | Sequence[int], _instance: TanhGaussianMixture | None = None
    ) -> TanhGaussianMixture:
        """The same distribution repeated over leading dimensions, without copies."""
        new = self._get_checked_instance(TanhGaussianMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        for name, event_dim in (("log_weights", 1), ("loc", 2), ("scale", 2)):
            value = getattr(self, name)
            setattr(new, name, value.expand(*batch_shape, *value.shape[-event_dim:]))
        new.deterministic = self.deterministic
        TanhBounds.__init__(new, self.low, self.high)
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    @property
    def num_components(self) -> int:
        """K."""
        return self.loc.shape[-2]

    @property
    def mixture_logits(self) -> Float[Tensor, "*B K"]:
        """The log-weights, normalised."""
        return self.log_weights

    @property
    def weights(self) -> Float[Tensor, "*B K"]:
        """Mixture weights w, which sum to one."""
        return self.log_weights.exp()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Logits [*B, K], loc and scale [*B, K, A], by name."""
        return {"mixture_logits": self.log_weights, "loc": self.loc, "scale": self.scale}

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> TanhGaussianMixture:
        """The mixture of these parameters within the same bounds."""
        mixture_logits, loc, scale = (parameters[name] for name in ("mixture_logits", "loc", "scale"))
        return TanhGaussianMixture(mixture_logits, loc, scale, self.low, self.high)

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
        u = self._unsquash_checked(value)
        return self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def component_log_prob(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """Each component's own log-density of the action."""
        u = self._unsquash_checked(value)
        return self.component_log_prob_unsquashed(u) - self.log_abs_det_jacobian(u).unsqueeze(-1)

    def component_posterior(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """P(k | a, s), which sums to one over k (the Jacobian cancels)."""
        return (self.log_weights + self.component_log_prob_unsquashed(self._unsquash_checked(value))).softmax(-1)

    def _unsquash_checked(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        if self._validate_args:
            self._validate_sample(value)
        return self.unsquash(value)

    # --- probabilities and moments of the action ---------------------------------------------------------------------

    def cdf(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """P(a <= value) of an action with one dimension, exactly 0 and 1 at the bounds.

        Raises:
            NotImplementedError: the action has several dimensions.
        """
        self._check_one_dimension("cdf")
        probability = self._marginal_cdf(self._unsquash_checked(value)).squeeze(-1)
        value = value.squeeze(-1)
        probability = torch.where(value <= self.low.squeeze(-1), 0.0, probability)
        return torch.where(value >= self.high.squeeze(-1), 1.0, probability)

    def icdf(self, value: Float[Tensor, "*S"]) -> Float[Tensor, "*S 1"]:
        """The action below which lies the probability ``value``, by bisection: without a gradient.

        Raises:
            NotImplementedError: the action has several dimensions.
        """
        self._check_one_dimension("icdf")
        return self.squash(self._marginal_icdf(value.unsqueeze(-1)))

    def _check_one_dimension(self, name: str) -> None:
        if self.event_shape != (1,):
            raise NotImplementedError(f"{name} needs an action of one dimension, not of {self.event_shape.numel()}")

    def _marginal_cdf(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """P(u_d <= u) of every dimension by itself."""
        below = torch.special.ndtr((u.unsqueeze(-2) - self.loc) / self.scale)
        return (self.weights.unsqueeze(-1) * below).sum(-2)

    @torch.no_grad()
    def _marginal_icdf(self, probability: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The quantile of every dimension by itself: it lies between the lowest and the highest of the components'."""
        quantiles = self.loc + self.scale * torch.special.ndtri(probability).unsqueeze(-2)
        low, high = quantiles.amin(-2), quantiles.amax(-2)
        for _ in range(torch.finfo(low.dtype).bits):
            middle = (low + high) / 2
            is_below = self._marginal_cdf(middle) < probability
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2

    @property
    def median(self) -> Float[Tensor, "*B A"]:
        """The median of every action dimension by itself, without a gradient."""
        return self.squash(self.median_unsquashed())

    def median_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The u of the median: tanh keeps the order."""
        return self._marginal_icdf(self.loc.new_full(self._extended_shape(), 0.5))

    @property
    def mean(self) -> Float[Tensor, "*B A"]:
        """E[a], by quadrature: within 1e-8 of the range, or the rounding of the type. It is differentiable."""
        return self.squash(self.mean_unsquashed())

    def mean_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The u whose action is the mean, which is not E[u]."""
        mean, _ = self._tanh_moments()
        limit = 1 - torch.finfo(mean.dtype).eps
        return mean.clamp(-limit, limit).atanh().to(self.loc.dtype)

    @property
    def variance(self) -> Float[Tensor, "*B A"]:
        """Var[a_d] of every dimension by itself, by the quadrature of the mean: within 1e-8 of the range squared."""
        _, variance = self._tanh_moments()
        return (self._half_range.square() * variance).to(self.loc.dtype)

    def _tanh_moments(self) -> tuple[Float[Tensor, "*B A"], Float[Tensor, "*B A"]]:
        """Mean and variance of tanh(u), in double precision."""
        weights = self.weights.double().unsqueeze(-1)
        means, variances = _tanh_moments(self.loc.double(), self.scale.double())
        mean = (weights * means).sum(-2)
        between = (means - mean.unsqueeze(-2)).square()
        return mean, (weights * (variances + between)).sum(-2)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def sample_component(self, sample_shape: Sequence[int] = ()) -> Int[Tensor, "*S"]:
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

    def rsample_unsquashed(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "*S A"]:
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

    def log_prob_given(self, u: Float[Tensor, "*SB A"], component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB"]:
        """log N(u; mu_k, sigma_k) of components that were chosen already: each draw under the one it came from."""
        loc, scale = (self.take_component(values, component) for values in (self.loc, self.scale))
        log_normalizer = scale.log().sum(-1) + _HALF_LOG_2PI * self.loc.shape[-1]
        return -0.5 * ((u - loc) / scale).square().sum(-1) - log_normalizer

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "*S A"]:
        """A pathwise action. Its gradient is that of the chosen component alone: averaged over samples it misses the
        gradient of the weights. Gradient estimators (``pmoe_lightning.estimators``) are what supplies it."""
        return self.squash(self.rsample_unsquashed(sample_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "*S A"]:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = ()
    ) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S"]]:
        """An action and its mixture log-density, scored at the ``u`` that was drawn: exact under saturation."""
        u = self.rsample_unsquashed(sample_shape)
        return self.squash(u), self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def sample_and_log_prob(
        self, sample_shape: Sequence[int] = ()
    ) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S"]]:
        """As ``rsample_and_log_prob``, with the action detached; the score keeps its gradient."""
        with torch.no_grad():
            u = self.rsample_unsquashed(sample_shape)
        return self.squash(u), self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def deterministic_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The unsquashed action of the deterministic rule."""
        if self.deterministic == "max_weight":
            return self.mode_unsquashed()
        if self.deterministic == "mean":
            return self.mean_of_modes_unsquashed()
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

    def mean_of_modes_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The u whose action is sum_k w_k a(mu_k), finite at the bounds; exactly mu of a single component."""
        if self.num_components == 1:
            return self.loc.squeeze(-2)
        return TanhBounds.normalized(self.loc).unsquash((self.weights.unsqueeze(-1) * self.loc.tanh()).sum(-2))

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


def _tanh_moments(loc: Float[Tensor, "*S"], scale: Float[Tensor, "*S"]) -> tuple[Float[Tensor, "*S"], ...]:
    r"""Mean and variance of tanh(u), u ~ N(mu, sigma^2), by trapezoid rules that converge geometrically.

    Up to sigma = 1 the sum runs over the Gaussian, and above over the slope of tanh,

        E[f(tanh(u))] = int phi(z) f(tanh(mu + sigma z)) dz
        E[tanh(u)]    = 1/2 int sech(t)^2 erf((mu - t) / (sigma sqrt 2)) dt
        E[tanh(u)^2]  = 1 - int sech(t)^2 phi((mu - t) / sigma) / sigma dt

    so that no integrand is narrower than a few nodes.
    """
    step = 0.25
    loc, scale = loc.unsqueeze(-1), scale.unsqueeze(-1)
    narrow, wide = scale.clamp_max(1.0), scale.clamp_min(1.0)
    z = torch.arange(-8.0, 8.0 + step, step, dtype=loc.dtype, device=loc.device)
    weight = step / math.sqrt(2 * math.pi) * (-0.5 * z.square()).exp()
    values = (loc + narrow * z).tanh()
    mean = (weight * values).sum(-1)
    variance = (weight * (values - mean.unsqueeze(-1)).square()).sum(-1)
    t = torch.arange(-12.0, 12.0 + step, step, dtype=loc.dtype, device=loc.device)
    slope, distance = step * t.cosh().pow(-2), (loc - t) / wide
    wide_mean = (slope / 2 * (distance / math.sqrt(2)).erf()).sum(-1)
    density = (-0.5 * distance.square()).exp() / (math.sqrt(2 * math.pi) * wide)
    wide_variance = (1 - (slope * density).sum(-1) - wide_mean.square()).clamp_min(0.0)
    is_narrow = scale.squeeze(-1) <= 1
    return torch.where(is_narrow, mean, wide_mean), torch.where(is_narrow, variance, wide_variance)


@register_kl(TanhGaussianMixture, TanhGaussianMixture)
def _kl_of_single_gaussians(p: TanhGaussianMixture, q: TanhGaussianMixture) -> Float[Tensor, "*B"]:
    """KL(p || q) of two squashed Gaussians, that of the Gaussians themselves: squashing both alike changes nothing."""
    if p.num_components > 1 or q.num_components > 1:
        raise NotImplementedError("KL(p || q) of mixtures has no closed form: average log p - log q over samples of p")
    bounds = torch.broadcast_tensors(p.low, q.low, p.high, q.high)
    if not (torch.equal(*bounds[:2]) and torch.equal(*bounds[2:])):
        raise NotImplementedError("KL(p || q) of actions with different bounds has no closed form")
    normals = (Normal(mixture.loc.squeeze(-2), mixture.scale.squeeze(-2), validate_args=False) for mixture in (p, q))
    return kl_divergence(*normals).sum(-1)
