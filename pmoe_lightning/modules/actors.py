"""Policies as TorchRL probabilistic actors.

    observation [*B, O] -> trunk -> router: mixture_logits [*B, K];  heads: loc, scale [*B, K, A] -> action [*B, A]

An actor is a ``SafeProbabilisticTensorDictSequential``: it goes wherever TorchRL takes a ``ProbabilisticActor``
(collectors, ``SACLoss``, ``ClipPPOLoss``), and ``actor.get_dist(tensordict)`` returns the ``TanhGaussianMixture``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, TensorDictModuleBase, dispatch, skip_existing
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.modules import SafeProbabilisticModule, SafeProbabilisticTensorDictSequential

from pmoe_lightning.limits import Of, Width, checked
from pmoe_lightning.modules.distributions import DeterministicRule, TanhBounds, TanhGaussianMixture
from pmoe_lightning.modules.expert_blends import Blend, add_actions, multiply_densities
from pmoe_lightning.modules.keys import beside
from pmoe_lightning.modules.mixture import MixtureDistribution
from pmoe_lightning.modules.networks import Activation, HiddenSizes, Initialization, initialize, make_mlp

Router = Literal["detached", "attached"]
Scale = Literal["state_dependent", "state_independent"]
#: What only a mixture of several components is asked.
_OF_SEVERAL = ("num_components", "router", "deterministic")
PARAMETER_KEYS = ("mixture_logits", "loc", "scale")
_LOG_SCALE_RANGE = (-20.0, 2.0)


class MixtureNetwork(nn.Module):
    """Shared trunk with three heads: router, means and log-scales.

    Args:
        observation_dim: O.
        action_dim: A.
        num_components: K.
        hidden_sizes: widths of the trunk.
        activation: behind each of its layers.
        router: ``detached`` lets the router's losses train only its own layer (the PMOE authors' code);
            ``attached`` lets them reach the trunk.
        scale: ``state_dependent`` has a head for log sigma, clamped to [-20, 2] (SAC); ``state_independent`` has one
            free parameter per component and action dimension, which starts at 0 (PPO).
        initialization: ``default`` of ``nn.Linear``, or ``orthogonal`` with gain sqrt(2) in the trunk and 0.01 in the
            heads (PPO).
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        num_components: int,
        hidden_sizes: HiddenSizes,
        activation: Activation,
        router: Router,
        scale: Scale,
        initialization: Initialization,
    ) -> None:
        super().__init__()
        self.num_components, self.action_dim, self.router_is_detached = num_components, action_dim, router == "detached"
        self.trunk = make_mlp(observation_dim, hidden_sizes, activation, initialization)
        width = hidden_sizes[-1]
        self.loc = nn.Linear(width, num_components * action_dim)
        heads = [self.loc]
        # One component has nothing to route: no layer, so that no parameter stays without a gradient.
        self.router = nn.Linear(width, num_components) if num_components > 1 else None
        if self.router is not None:
            heads.append(self.router)
        self.log_scale: nn.Linear | nn.Parameter
        if scale == "state_dependent":
            self.log_scale = nn.Linear(width, num_components * action_dim)
            heads.append(self.log_scale)
        else:
            self.log_scale = nn.Parameter(torch.zeros(num_components, action_dim))
        for head in heads:
            initialize(head, initialization, gain=0.01)

    def forward(
        self, observation: Float[Tensor, "*B O"]
    ) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*B K A"], Float[Tensor, "*B K A"]]:
        """Mixture logits [*B, K], loc [*B, K, A] and scale [*B, K, A] of the policy at the observation [*B, O]."""
        return self.heads(self.trunk(observation))

    def heads(
        self, features: Float[Tensor, "*B H"]
    ) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*B K A"], Float[Tensor, "*B K A"]]:
        """The same from the features of the trunk."""
        shape = (*features.shape[:-1], self.num_components, self.action_dim)
        loc = self.loc(features).view(shape)
        if isinstance(self.log_scale, nn.Linear):
            scale = self.log_scale(features).view(shape).clamp(*_LOG_SCALE_RANGE).exp()
        else:
            scale = self.log_scale.exp().expand(shape)
        if self.router is None:
            return loc.new_zeros(shape[:-1]), loc, scale
        return self.router(features.detach() if self.router_is_detached else features), loc, scale


class BlendedNetwork(nn.Module):
    """The experts of a ``MixtureNetwork`` merged into one Gaussian: what a mixture with K = 1 reads."""

    num_components = 1

    def __init__(self, experts: MixtureNetwork, blend: Blend) -> None:
        super().__init__()
        self.experts, self.blend = experts, blend

    def forward(
        self, observation: Float[Tensor, "*B O"]
    ) -> tuple[Float[Tensor, "*B 1"], Float[Tensor, "*B 1 A"], Float[Tensor, "*B 1 A"]]:
        """Mixture logits [*B, 1] (zero), loc and scale [*B, 1, A] of the policy at the observation [*B, O]."""
        return self.blend(*self.experts(observation))


class MixtureSampler(SafeProbabilisticModule):
    """Turns mixture parameters into an action; the action bounds are its buffers, so they move with the actor.

    With ``return_log_prob`` it also writes ``action_log_prob`` and ``action_unsquashed`` [*B, A]: the draw before
    tanh, from which a policy-gradient loss can score the action exactly, however saturated it is. Both stand beside
    the action, whatever its key.

    Args:
        low, high: the action bounds [A].
        distribution_class: made of the entries ``parameter_keys``, the bounds and ``deterministic``.
        parameter_keys: entries that the sampler reads, in the order of the arguments of the class.
        deterministic: see ``TanhGaussianMixture``.
        return_log_prob: see above.
        action_key: the entry that it writes.
        spec: of the action.
    """

    def __init__(
        self,
        low: Tensor,
        high: Tensor,
        *,
        distribution_class: type[MixtureDistribution] = TanhGaussianMixture,
        parameter_keys: Sequence[str] = PARAMETER_KEYS,
        deterministic: DeterministicRule,
        return_log_prob: bool,
        action_key: NestedKey,
        spec: Bounded,
    ) -> None:
        super().__init__(
            in_keys=list(parameter_keys),
            out_keys=[action_key],
            spec=Composite({action_key: spec}),
            distribution_class=distribution_class,
            distribution_kwargs={"deterministic": deterministic},
            default_interaction_type=InteractionType.RANDOM,
            return_log_prob=return_log_prob,
        )
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    @property
    def out_keys(self) -> list:
        keys = super().out_keys
        return [*keys, beside(keys[0], "_unsquashed")] if self.return_log_prob else keys

    @out_keys.setter
    def out_keys(self, value: list) -> None:
        self._out_keys = value

    def get_dist(self, tensordict: TensorDictBase) -> MixtureDistribution:
        """The mixture whose parameters the tensordict holds."""
        parameters = (tensordict.get(key) for key in self.in_keys)
        return self.distribution_class(*parameters, self.low, self.high, **self.distribution_kwargs)

    @dispatch(auto_batch_size=False)
    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        _requires_sample: bool = True,
    ) -> TensorDictBase:
        if not _requires_sample:
            return super().forward(tensordict, tensordict_out, _requires_sample=False)
        if skip_existing() and all(tensordict.get(key, None) is not None for key in self.out_keys):
            return tensordict
        distribution = self.get_dist(tensordict)
        u = _unsquashed_action(distribution, interaction_type() or self.default_interaction_type)
        out = tensordict if tensordict_out is None else tensordict_out
        key = self.dist_sample_keys[0]
        out.set(key, distribution.squash(u))
        if self.return_log_prob:
            log_prob = distribution.log_prob_unsquashed(u) - distribution.log_abs_det_jacobian(u)
            out.set(beside(key, "_unsquashed"), u).set(self.log_prob_key, log_prob)
        return out


def _unsquashed_action(distribution: Any, kind: InteractionType) -> Tensor:
    """The u whose action TorchRL asks for by this exploration type; mean and median are no part of the contract."""
    if kind is InteractionType.RANDOM:
        return distribution.rsample_unsquashed()
    if kind is InteractionType.MODE:
        return distribution.mode_unsquashed()
    if kind is InteractionType.MEAN:
        return distribution.mean_unsquashed()
    if kind is InteractionType.MEDIAN:
        return distribution.median_unsquashed()
    return distribution.deterministic_unsquashed()


class MixtureActor(SafeProbabilisticTensorDictSequential):
    """A network and its ``MixtureSampler``, of which only the sampler's entries come out.

    K (2 A + 1) parameters a step would otherwise go into every buffer.

    Args:
        network: a ``TensorDictModule`` whose module has ``num_components``.
        sampler: see above.
    """

    def __init__(self, network: TensorDictModuleBase, sampler: MixtureSampler) -> None:
        super().__init__(network, sampler)
        self.select_out_keys(*sampler.out_keys)

    @property
    def distribution_class(self) -> type[MixtureDistribution]:
        """What ``get_dist`` makes."""
        return self[-1].distribution_class

    @property
    def num_components(self) -> int:
        """K."""
        return self[0].module.num_components

    @property
    def spec(self) -> Composite:
        """That of the entries that come out: TorchRL's combined modules take no other."""
        entries = {key: spec for key, spec in self._spec.items(True, True) if key in self.out_keys}
        return Composite(entries, shape=self._spec.shape, device=self._spec.device)

    @spec.setter
    def spec(self, spec: Composite) -> None:
        self._spec = spec


@checked
def make_pmoe_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    num_components: Width = 4,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    router: Router = "detached",
    scale: Scale = "state_dependent",
    initialization: Initialization = "default",
    deterministic: DeterministicRule | Literal["best_value"] = "best_value",
    return_log_prob: bool = False,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> MixtureActor:
    """A probabilistic mixture-of-experts policy (Ren et al. 2021, arXiv 2104.09122).

    Args:
        observation_dim: O.
        action_low, action_high: the action bounds [A], from the environment's action spec.
        num_components: K, the number of Gaussians.
        hidden_sizes, activation, router, scale, initialization: see ``MixtureNetwork``.
        deterministic: in evaluation, the mean of which component: ``max_weight`` is the likeliest,
            ``sample_component`` one drawn by its weight, ``best_value`` the one the critics prefer, see
            ``BestValueActor``; an actor alone then follows ``max_weight``.
        return_log_prob: also write ``action_log_prob`` and ``action_unsquashed`` (PPO needs both).
        observation_key, action_key: entries the policy reads and writes.

    Returns:
        an actor that reads ``observation_key`` and writes ``action_key``.

    Raises:
        ValueError: an unknown switch, or bounds that are not finite or not ordered.

    Example:
        >>> actor = make_pmoe_actor(17, [-1.0] * 6, [1.0] * 6, num_components=4)
        >>> actor(TensorDict(observation=torch.randn(5, 17), batch_size=5))["action"].shape
        torch.Size([5, 6])
    """
    low, high = action_bounds(action_low, action_high)
    network = MixtureNetwork(
        observation_dim,
        low.numel(),
        num_components=num_components,
        hidden_sizes=hidden_sizes,
        activation=activation,
        router=router,
        scale=scale,
        initialization=initialization,
    )
    return MixtureActor(
        TensorDictModule(network, in_keys=[observation_key], out_keys=list(PARAMETER_KEYS)),
        MixtureSampler(
            low,
            high,
            deterministic="max_weight" if deterministic == "best_value" else deterministic,
            return_log_prob=return_log_prob,
            action_key=action_key,
            spec=Bounded(low.clone(), high.clone(), shape=low.shape),
        ),
    )


def make_gaussian_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    **arguments: Annotated[Any, Of(make_pmoe_actor, without=_OF_SEVERAL)],
) -> MixtureActor:
    """The unimodal squashed Gaussian of SAC: ``make_pmoe_actor`` with one component and the same arguments."""
    return make_pmoe_actor(observation_dim, action_low, action_high, num_components=1, **arguments)


@checked
def make_additive_moe_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    num_experts: Width = 4,
    **arguments: Annotated[Any, Of(make_pmoe_actor, without=_OF_SEVERAL)],
) -> MixtureActor:
    """Experts whose actions are added by weight, ``expert_blends.add_actions``: unimodal, a baseline.

    Args:
        num_experts: how many Gaussians are merged.
        **arguments: of ``make_pmoe_actor``, but for ``num_components``, ``router`` and ``deterministic``: the gate is
            part of the action and learns with it.
    """
    return _make_blend(add_actions, num_experts, observation_dim, action_low, action_high, **arguments)


@checked
def make_mcp_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    num_experts: Width = 4,
    **arguments: Annotated[Any, Of(make_pmoe_actor, without=_OF_SEVERAL)],
) -> MixtureActor:
    """Experts whose densities are multiplied, ``expert_blends.multiply_densities``: unimodal, a baseline.

    Args:
        num_experts: how many Gaussians are merged.
        **arguments: as those of the additive one.
    """
    return _make_blend(multiply_densities, num_experts, observation_dim, action_low, action_high, **arguments)


def _make_blend(
    blend: Blend,
    num_experts: int,
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    **arguments: Any,
) -> MixtureActor:
    """A mixture of experts whose network says one Gaussian of them all."""
    arguments |= {"num_components": num_experts, "router": "attached"}
    actor = make_pmoe_actor(observation_dim, action_low, action_high, **arguments)
    actor[0].module = BlendedNetwork(actor[0].module, blend)
    return actor


def action_bounds(
    low: Tensor | Sequence[float], high: Tensor | Sequence[float]
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """The bounds of an actor as tensors [A].

    Raises:
        ValueError: they are not finite vectors with low < high.
    """
    low, high = (torch.as_tensor(bound, dtype=torch.get_default_dtype()) for bound in (low, high))
    if low.ndim != 1 or low.shape != high.shape or not (low.isfinite() & high.isfinite() & (low < high)).all():
        raise ValueError(f"action bounds must be finite vectors with low < high, not {low.tolist()}, {high.tolist()}")
    return low, high


def stated_bounds(
    actor: SafeProbabilisticTensorDictSequential, spec: TensorSpec | None = None
) -> tuple[Tensor, Tensor]:
    """The action bounds [A] that a spec states, by default the actor's; -1 and 1, which change nothing, without one."""
    spec = actor.spec if spec is None else spec
    leaf = spec.get(actor.dist_sample_keys[0], None) if isinstance(spec, Composite) else spec
    if not isinstance(leaf, Bounded):
        return torch.tensor(-1.0), torch.tensor(1.0)
    low, high = leaf.space.low, leaf.space.high
    return tuple(bound.reshape(-1, bound.shape[-1])[0].clone() for bound in (low, high))


class BestValueActor(TensorDictModuleBase):
    r"""A mixture actor whose deterministic rule asks the critics which component to follow.

        a = squash(mu_b),    b = argmax_k min_i Q_i(s, tanh(mu_k))

    That is its action under ``ExplorationType.DETERMINISTIC``, or where nothing is said; under every other type the
    actor acts itself, so that ``ExplorationType.RANDOM`` draws from its mixture.

    Args:
        actor: a mixture actor; its own ``deterministic`` rule is not used.
        critics: modules that read the observation and the action, normalised to [-1, 1] as ``PMOESACLoss`` does, and
            write ``state_action_value`` [*B, 1].
    """

    def __init__(self, actor: SafeProbabilisticTensorDictSequential, critics: Sequence[TensorDictModuleBase]) -> None:
        super().__init__()
        self.actor, self.critics = actor, nn.ModuleList(critics)
        self.in_keys, self.out_keys = list(actor.in_keys), list(actor.dist_sample_keys)
        self.default_interaction_type = InteractionType.DETERMINISTIC

    def get_dist(self, tensordict: TensorDictBase) -> TanhGaussianMixture:
        """The mixture of the actor, from which ``ExplorationType.RANDOM`` draws."""
        return self.actor.get_dist(tensordict)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        kind = interaction_type() or self.default_interaction_type
        if kind is not InteractionType.DETERMINISTIC:
            return self.actor(tensordict)
        distribution = self.actor.get_dist(tensordict.select(*self.in_keys))
        modes = TanhBounds.normalized(distribution.loc).squash(distribution.loc).movedim(-2, 0)
        states = {key: tensordict.get(key).expand(*modes.shape[:-1], -1) for key in self.in_keys}
        inputs = TensorDict({**states, self.out_keys[0]: modes}, batch_size=modes.shape[:-1])
        values = torch.stack([critic(inputs.copy())["state_action_value"].squeeze(-1) for critic in self.critics])
        best = values.min(0).values.argmax(0)
        return tensordict.set(self.out_keys[0], distribution.take_component(distribution.component_modes, best))
