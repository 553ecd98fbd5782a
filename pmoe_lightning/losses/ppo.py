"""Proximal policy optimisation for mixture policies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.modules import SafeProbabilisticTensorDictSequential
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.ppo import _broadcast_advantage_to_log_weight, _check_advantage_broadcast

from pmoe_lightning.estimators import AbstractEstimator, Frequency, Marginalized, Objective, ObjectiveValue, check_pair
from pmoe_lightning.limits import NonNegativeFloat, checked
from pmoe_lightning.modules.actors import MixtureActor, stated_bounds
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.keys import beside
from pmoe_lightning.modules.mixture import MixtureDistribution

#: Of the parent; TorchRL drops what a call has left of them in its caches.
_PARAMETERS = tuple(
    f"{target}{network}_network_params" for target in ("", "target_") for network in ("actor", "critic")
)


class PMOEPPOLoss(ClipPPOLoss):
    r"""TorchRL's ``ClipPPOLoss`` (Schulman et al. 2017, arXiv 1707.06347) for mixture policies.

        loss_objective = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A),    ratio = pi(a|s) / pi_old(a|s)
        loss_entropy   = -entropy_coeff H(pi(.|s)), its gradient taken by ``estimator``
        loss_critic    = critic_coeff (V(s) - value_target)^2
        loss_qvalue    = qvalue_coeff (Q(s, a) - value_target)^2            } with ``routing``: PMOE-PPO
        loss_frequency = the frequency loss, components ranked by Q(s, .)   }

    Q reads the action normalised to [-1, 1] by the bounds in the actor's spec, of which the entropy is, too.

    Three things differ from ``ClipPPOLoss``. The stored action is scored at ``action_unsquashed`` where the batch holds
    it: scoring through atanh is wrong by nats once tanh has saturated, and the first ratio would not be one. The
    entropy bonus goes through a gradient estimator: the Monte Carlo entropy gives the router a gradient of mean zero.
    And the router can be trained by the frequency loss. The only public form of PMOE-PPO is a co-author's program; how
    the paper itself (Ren et al. 2021, arXiv 2104.09122) combines the two is not known to us.

    Args:
        actor_network: an actor whose distribution offers what the estimators ask for (``modules.mixture``).
        critic_network: writes ``state_value``.
        qvalue_network: writes ``state_action_value``; required by ``routing``, unused otherwise.
        estimator: of the entropy's gradient; ``Marginalized`` by default, which is unbiased.
        routing: the frequency estimator whose frequency loss trains the router.
        qvalue_coeff: weight of the regression of Q on the value target; it matters with ``routing`` alone.
        **arguments: of ``ClipPPOLoss`` (``clip_epsilon``, ``entropy_coeff``, ``critic_coeff`` ...). The critic's
            distance is ``l2`` unless ``loss_critic_type`` says otherwise. ``samples_mc_entropy`` and one
            ``entropy_coeff`` per action head are refused: the estimator decides how the one entropy is drawn.

    Raises:
        ValueError: an estimator that cannot serve the distribution of the actor, here or, of an actor that is no
            ``MixtureActor``, where it is first asked; ``routing`` without a ``qvalue_network``; or an argument that
            would be without effect.
        TypeError: an argument that ``ClipPPOLoss`` does not have; TorchRL itself would ignore it.
    """

    @dataclass
    class _AcceptedKeys(ClipPPOLoss._AcceptedKeys):
        """The keys of ``ClipPPOLoss``, and:

        action_unsquashed: the stored action before tanh. Defaults to where the actor writes it.
        state_action_value: what ``qvalue_network`` writes. Defaults to ``"state_action_value"``.
        """

        action_unsquashed: NestedKey = "action_unsquashed"
        state_action_value: NestedKey = "state_action_value"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _out_keys: list[str] | None
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    @checked
    def __init__(
        self,
        actor_network: SafeProbabilisticTensorDictSequential,
        critic_network: TensorDictModule,
        qvalue_network: TensorDictModule | None = None,
        *,
        estimator: AbstractEstimator | None = None,
        routing: Frequency | None = None,
        qvalue_coeff: NonNegativeFloat = 1.0,
        loss_critic_type: str = "l2",
        **arguments: Any,
    ) -> None:
        _check_arguments(arguments)
        if routing is not None and qvalue_network is None:
            raise ValueError("routing ranks the components by Q(s, a): give PMOEPPOLoss a qvalue_network")
        estimator = Marginalized() if estimator is None else estimator
        for needed in (estimator, routing) if isinstance(actor_network, MixtureActor) else ():
            if needed is not None:
                check_pair(needed, actor_network.distribution_class, actor_network.num_components)
        super().__init__(actor_network, critic_network, loss_critic_type=loss_critic_type, **arguments)
        self.estimator = estimator
        self.routing = routing
        if routing is not None and self.functional:
            shared = list(actor_network.parameters()) if self.separate_losses else None
            self.convert_to_functional(qvalue_network, "qvalue_network", compare_against=shared)
        elif routing is not None:
            self.qvalue_network, self.qvalue_network_params = qvalue_network, None
        self.set_keys(action_unsquashed=beside(self.tensor_keys.action, "_unsquashed"))
        for name, bound in zip(("low", "high"), stated_bounds(actor_network), strict=True):
            self.register_buffer(f"action_{name}", bound.to(self.entropy_coeff), persistent=False)
        self.register_buffer("qvalue_coeff", torch.tensor(qvalue_coeff, device=self.entropy_coeff.device))

    def _get_cur_log_prob(self, tensordict: TensorDictBase, params: TensorDictParams | None = None):
        unsquashed = tensordict.get(self.tensor_keys.action_unsquashed, None)
        if unsquashed is None:
            return super()._get_cur_log_prob(tensordict, params)
        # Without parameters it is the current policy, with them the one that ``delay_actor`` compares with.
        with self._with(self.actor_network_params if params is None else params, self.actor_network):
            distribution = self.actor_network.get_dist(tensordict)
        log_prob = distribution.log_prob_unsquashed(unsquashed) - distribution.log_abs_det_jacobian(unsquashed)
        return log_prob, distribution, False

    def _with(self, parameters: TensorDictParams | None, network: TensorDictModuleBase) -> AbstractContextManager:
        """Within this context the network has these parameters; with ``functional=False`` it has its own."""
        if parameters is None or not self.functional:
            return nullcontext()
        return parameters.to_module(network, preserve_module_state=False)

    def objective(self, tensordict: TensorDictBase | None, distribution: MixtureDistribution) -> Objective:
        """What the entropy bonus asks the estimator to minimise: cost = log pi(a|s), of the normalised action."""
        bounds = TanhBounds.normalized(distribution.low)

        def objective(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
            log_prob = log_prob - bounds.log_abs_det_jacobian(u)
            return ObjectiveValue(log_prob, log_prob, -log_prob)

        return objective

    def _get_entropy(self, dist: MixtureDistribution, adv_shape: torch.Size) -> Float[Tensor, "*B 1"]:
        check_pair(self.estimator, type(dist))
        return -self.estimator(dist, self.objective(None, dist)).expected_cost.unsqueeze(-1)

    def _qvalue(self, tensordict: TensorDictBase) -> Tensor:
        with self._with(self.qvalue_network_params, self.qvalue_network):
            return self.qvalue_network(tensordict).get(self.tensor_keys.state_action_value)

    def qvalue_loss(self, tensordict: TensorDictBase) -> Float[Tensor, "*B 1"]:
        """qvalue_coeff (Q(s, a) - value_target)^2 at the stored actions."""
        key = self.tensor_keys.action
        normalized = TanhBounds(self.action_low, self.action_high).normalize(tensordict.get(key))
        inputs = tensordict.select(*self.qvalue_network.in_keys).set(key, normalized)
        qvalue = self._qvalue(inputs)
        return self.qvalue_coeff * (qvalue - tensordict.get(self.tensor_keys.value_target)).square()

    def frequency_loss(
        self, tensordict: TensorDictBase, distribution: MixtureDistribution
    ) -> tuple[Float[Tensor, "*B 1"], dict[str, Tensor]]:
        """The frequency loss with fresh samples of all components ranked by Q, and its diagnostics."""
        state_keys = [key for key in self.qvalue_network.in_keys if key != self.tensor_keys.action]

        def score(u: Float[Tensor, "K *B A"]) -> Float[Tensor, "K *B"]:
            entries = {key: tensordict.get(key).expand(*u.shape[:-1], -1) for key in state_keys}
            entries[self.tensor_keys.action] = TanhBounds.normalized(u).squash(u)
            inputs = TensorDict(entries, batch_size=u.shape[:-1])
            return self._qvalue(inputs).squeeze(-1)

        assert self.routing is not None, "there is a frequency loss where there is a routing"
        loss, diagnostics = self.routing.routing_loss(distribution, score)
        return loss.unsqueeze(-1), diagnostics

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        own = [self.tensor_keys.action_unsquashed]
        own += self.qvalue_network.in_keys if self.routing is not None else []
        self._in_keys += [key for key in own if key not in self._in_keys]

    @property
    def out_keys(self) -> list:
        if self._out_keys is None:
            keys = list(super().out_keys)
            self._out_keys = keys if self.routing is None else [*keys, "loss_qvalue", "loss_frequency"]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list) -> None:
        self._out_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        # The parent's own forward keeps the distribution to itself, which ``frequency_loss`` asks, too: what follows
        # are the parent's parts in the parent's order.
        tensordict = tensordict.clone(False)
        advantage = self._normalized_advantage(tensordict)
        log_ratio, distribution, kl_approx, log_correction = self._log_weight(
            tensordict, adv_shape=advantage.shape[:-1]
        )
        out = self._clipped_objective(log_ratio, log_correction, advantage)
        out["kl_approx"] = kl_approx.detach().mean()
        if self.entropy_bonus:
            entropy = self._get_entropy(distribution, adv_shape=advantage.shape[:-1])
            out |= {"entropy": entropy.detach().mean(), "loss_entropy": self._weighted_loss_entropy(entropy)}
        if self._has_critic:
            of_critic = self.loss_critic(tensordict)
            names = ("loss_critic", "value_clip_fraction", "explained_variance")
            out |= {name: value for name, value in zip(names, of_critic, strict=True) if value is not None}
        if self.routing is not None:
            loss_frequency, diagnostics = self.frequency_loss(tensordict, distribution)
            out |= {"loss_qvalue": self.qvalue_loss(tensordict), "loss_frequency": loss_frequency, **diagnostics}
        for name in [name for name in out if name.startswith("loss_")]:
            out[name] = self._reduce_loss(out[name], tensordict).squeeze(-1)
        output = TensorDict(out)
        self._clear_weakrefs(tensordict, output, *_PARAMETERS)
        return output

    def _normalized_advantage(self, tensordict: TensorDictBase) -> Tensor:
        """A, computed where the tensordict does not hold it, which then does, with the value target."""
        key = self.tensor_keys.advantage
        advantage = tensordict.get(key, None, as_padded_tensor=True)
        is_new = advantage is None
        if is_new:
            if self.critic_network is None:
                raise RuntimeError("without a critic_network PMOEPPOLoss computes no advantage: give it one")
            parameters, targets = self._cached_critic_network_params_detached, self.target_critic_network_params
            self.value_estimator(tensordict, params=parameters, target_params=targets)
            advantage = tensordict.get(key)
        return self._maybe_normalize_advantage(advantage, tensordict, update_norm=is_new)

    def _clipped_objective(
        self, log_ratio: Float[Tensor, "*B 1"], log_correction: Float[Tensor, "*B 1"] | None, advantage: Tensor
    ) -> dict[str, Tensor]:
        r"""-min(ratio A, clip(ratio) A), and how far the ratios have spread.

        Args:
            log_ratio: log(pi / pi_prox), which is clipped; pi_prox is pi_old, or what ``delay_actor`` compares with.
            log_correction: log(pi_prox / pi_old), by which both terms are weighed, where it is not zero.
            advantage: A [*B, 1].
        """
        advantage = _broadcast_advantage_to_log_weight(advantage, log_ratio)
        _check_advantage_broadcast(advantage, log_ratio)
        clipped = log_ratio.clamp(*self._clip_bounds)
        clip_fraction = (clipped != log_ratio).to(log_ratio.dtype).mean()
        if log_correction is not None:
            log_ratio, clipped = log_ratio + log_correction, clipped + log_correction
        ratio = log_ratio.exp()
        gain = torch.stack([ratio * advantage, clipped.exp() * advantage], -1).min(-1).values
        weights, ratio = log_ratio.detach().squeeze(-1), ratio.detach()
        effective_size = (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp()
        out = {"loss_objective": -gain, "clip_fraction": clip_fraction, "ESS": effective_size / len(weights)}
        return out | {"max_ratio": ratio.max(), "mean_ratio": ratio.mean()}


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would be ignored."""
    known = {name for cls in (ClipPPOLoss, PPOLoss) for name in inspect.signature(cls.__init__).parameters}
    for name in arguments:
        if name not in known - {"actor", "critic", "kwargs"}:
            raise TypeError(f"PMOEPPOLoss got an unexpected argument {name!r}")
    if arguments.get("samples_mc_entropy", 1) != 1:
        raise ValueError("PMOEPPOLoss has no samples_mc_entropy: its estimator draws the entropy's samples")
    if isinstance(arguments.get("entropy_coeff"), Mapping):
        raise ValueError("PMOEPPOLoss has one action and so one entropy_coeff: give a number, not a mapping")
