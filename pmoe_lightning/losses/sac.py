"""Soft actor-critic for mixture policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import SafeProbabilisticTensorDictSequential, ValueOperator
from torchrl.objectives import SACLoss
from torchrl.objectives.utils import distance_loss

from pmoe_lightning.estimators import AbstractEstimator, Marginalized, Objective, ObjectiveValue, Surrogate, check_pair
from pmoe_lightning.estimators.base import take_sample
from pmoe_lightning.hamiltonian import ActionValue, Evolution, EvolveAction, HamiltonianTransform, differentiable
from pmoe_lightning.hamiltonian.transform import Use
from pmoe_lightning.modules.actors import MixtureActor, stated_bounds
from pmoe_lightning.modules.critics import (
    KnownProducts,
    Products,
    QValueEnsemble,
    QValueNetwork,
    stacked_qvalue_and_products,
    stacked_qvalue_at,
)
from pmoe_lightning.modules.crossq import CrossQNetwork
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.encoders import PixelEncoder
from pmoe_lightning.modules.mixture import MixtureDistribution

_PIXELS, _OBSERVATION, _OF_TARGET = "pixels", "observation", "observation_of_target"


class NextAction(NamedTuple):
    """What is done in the next states [*B] of a minibatch, without a gradient."""

    action: Float[Tensor, "*B A"]
    """Normalised, and evolved where the target uses a transform."""
    log_prob: Float[Tensor, "*B"]
    """What the target takes for its log-density."""
    entropy: Float[Tensor, "*B"]
    """-log pi of the plain draw of the mixture that it began as."""


class CriticValues(NamedTuple):
    """What n critics say of a minibatch."""

    here: Float[Tensor, "Q *B"]
    """Q_i(s, a), with a gradient."""
    next: Float[Tensor, "Q *B"]
    """What the target is made of: Qbar_i(s', a'), without."""
    statistics: dict[str, Tensor]
    """What running statistics become, by their names in ``PMOESACLoss.statistics``."""


class PMOESACLoss(SACLoss):
    r"""TorchRL's ``SACLoss`` (Haarnoja et al. 2018, arXiv 1812.05905) with a gradient estimator for the actor.

        loss_qvalue = sum_i (Q_i(s, a) - y)^2
                  y = r + gamma (1 - terminated) [min_i Qbar_i(s', a') - alpha log pi(a'|s')]
        loss_actor  = estimate of E_{a ~ pi}[alpha log pi(a|s) - min_i Q_i(s, a)]
        loss_alpha  = -log alpha (target entropy - regulated entropy)

        regulated_entropy = minus what the estimator takes for E[log pi(a|s)], a transform's score included
        entropy           = estimate of E_{s', a' ~ pi(.|s')}[-log pi(a'|s')], with the draws of the critics' target

    Each loss reaches exactly its own parameters, so the sum of all ``loss_*`` entries is stepped by one optimizer. A
    truncated transition bootstraps, a terminated one does not. With one component the losses and gradients equal
    ``SACLoss`` with ``TanhNormal`` under the same random numbers, where the action bounds are -1 and 1.

    Critics of ``make_crossq_network`` have no targets: (s, a) and (s', a') pass through them together, normalised by
    the statistics of both, and Qbar_i(s', a') is what that same pass says, held fixed. Everything else asks them with
    their running statistics. What these become is in the output under ``statistics``; who takes the optimizer's step
    hands it to ``take_statistics``.

    With an ``encoder`` minibatches hold ``pixels`` in place of the observation z = f(pixels). f learns from the loss of
    the critics alone and at their rate: the actor sees z held fixed, and s' is encoded without a gradient. Where the
    critics have targets, so has the encoder: Qbar_i(s', a') reads fbar(pixels'), while a' is drawn at f(pixels')
    (Kostrikov et al. 2021, arXiv 2004.13649).

    Whatever the bounds in the spec of the actor (or in ``action_spec``), everything here is of the action normalised to
    [-1, 1]: what the critics read, the densities pi(a|s), the entropy and its target, the dynamics of the transform.
    Minibatches hold actions in the units of the environment, in which the actor acts and scores.

    Args:
        actor_network: an actor whose distribution offers what the estimator asks for (``modules.mixture``).
        qvalue_network: a list of critics of one architecture, stacked with their own initial weights.
        estimator: the gradient estimator of the actor; ``estimator.log_prob`` decides whether the mixture's or the
            drawing component's log-density enters the critic target and the temperature loss too.
        action_transform: evolves the drawn actions, in actor loss and critic target as its ``used_in`` says, along the
            loss's own critics; its parameters learn from the actor loss. ``acting_policy`` acts with it.
        encoder: writes ``observation`` from ``pixels``, see above; None where minibatches hold the observation.
        loss_function: distance of the critics to their target; ``l2`` here (TorchRL's own default is ``smooth_l1``).
        **arguments: of ``SACLoss`` (``alpha_init``, ``target_entropy``, ``fixed_alpha``, ``reduction`` ...), but for
            ``value_network`` and ``skip_done_states``, which are refused.

    Raises:
        ValueError: the estimator cannot serve the distribution of the actor, here or, of an actor that is no
            ``MixtureActor``, where it is first asked; or an argument that is refused, such as ``reduction="none"`` for
            critics with statistics.

    Output keys: ``loss_actor``, ``loss_qvalue``, ``loss_alpha``, the estimator's auxiliary losses (such as
    ``loss_frequency``), ``alpha``, ``regulated_entropy``, ``entropy``, and the estimator's diagnostics. The two
    entropies are equal in expectation where an estimator asks about plain draws of the mixture, no transform changes
    them, and s and s' are alike; ``entropy`` is the policy's, before a transform, always.

    Example:
        >>> loss = PMOESACLoss(actor, [make_qvalue_network(17, 6) for _ in range(2)], estimator=Frequency())
        >>> loss.make_value_estimator(gamma=0.99)
        >>> out = loss(minibatch)
        >>> sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    """

    #: The names of all critics, whose parameters are each name's ``..._params``.
    critics: ClassVar[tuple[str, ...]] = ("qvalue_network",)
    _out_keys: list[str] | None
    _in_keys: list[NestedKey]
    encoder: PixelEncoder
    encoder_params: TensorDictParams
    target_encoder_params: TensorDictParams

    def __init__(
        self,
        actor_network: SafeProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        estimator: AbstractEstimator | None = None,
        action_transform: HamiltonianTransform | None = None,
        encoder: PixelEncoder | None = None,
        loss_function: str = "l2",
        **arguments: Any,
    ) -> None:
        for name in ("value_network", "skip_done_states"):
            if arguments.get(name) not in (None, False):
                raise ValueError(f"PMOESACLoss has no {name}: its target needs the critics and all next states alone")
        estimator = Marginalized() if estimator is None else estimator
        if isinstance(actor_network, MixtureActor):
            check_pair(estimator, actor_network.distribution_class, actor_network.num_components)
        if isinstance(qvalue_network, Sequence):
            qvalue_network = list(qvalue_network)
            arguments.setdefault("num_qvalue_nets", len(qvalue_network))
        if _learns_jointly(qvalue_network[0] if isinstance(qvalue_network, list) else qvalue_network):
            if arguments.get("reduction") == "none":
                raise ValueError("the critics of CrossQ learn from a whole batch: use reduction='mean'")
            arguments["delay_qvalue"] = False
        super().__init__(actor_network, qvalue_network, loss_function=loss_function, **arguments)
        for name, bound in zip(("low", "high"), stated_bounds(actor_network, self._action_spec), strict=True):
            self.register_buffer(f"action_{name}", bound.to(self.log_alpha), persistent=False)
        self.estimator = estimator
        self.action_transform = action_transform
        self.encodes = encoder is not None
        if encoder is not None:
            self.convert_to_functional(encoder, "encoder", create_target_params=self.delay_qvalue)
            self._set_in_keys()
        # TorchRL creates this buffer at its first use; a state dict written before would not fit one written after.
        _ = self.target_entropy

    def _make_vmap(self) -> None:
        super()._make_vmap()
        if self.stacks_qvalues:
            self._vmap_qnetworkN0 = self._stacked_qvalue

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        if getattr(self, "encodes", False):  # TorchRL asks before there is an encoder, too
            kept = [key for key in self._in_keys if key not in (_OBSERVATION, ("next", _OBSERVATION))]
            self._in_keys = [*kept, _PIXELS, ("next", _PIXELS)]

    def encoded(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A minibatch with the observations that its pixels stand for, unless they are there.

        That of s has a gradient, those of s', the encoder's and its target's, have none.
        """
        if not self.encodes or _OBSERVATION in tensordict.keys():  # noqa: SIM118 (a TensorDict iterates over its batch)
            return tensordict
        tensordict = tensordict.copy()
        tensordict.set(_OBSERVATION, self._encode(tensordict, self.encoder_params))
        following = tensordict.get("next", None)
        if following is not None:
            with torch.no_grad():
                following.set(_OBSERVATION, self._encode(following, self.encoder_params))
                if self.delay_qvalue:
                    following.set(_OF_TARGET, self._encode(following, self.target_encoder_params))
        return tensordict

    def _encode(self, tensordict: TensorDictBase, parameters: TensorDictParams) -> Float[Tensor, "*B O"]:
        with parameters.to_module(self.encoder, preserve_module_state=False):
            return self.encoder.encode(tensordict.get(_PIXELS))

    def _held_fixed(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The minibatch as the actor is to see it: what the critics make of pixels is not its to change."""
        if not self.encodes:
            return tensordict
        tensordict = self.encoded(tensordict).copy()
        return tensordict.set(_OBSERVATION, tensordict.get(_OBSERVATION).detach())

    def _seen_by_target(self, following: TensorDictBase) -> TensorDictBase:
        target = following.get(_OF_TARGET, None)
        return following if target is None else following.copy().set(_OBSERVATION, target)

    @property
    def stacks_qvalues(self) -> bool:
        """Whether the critics are those of ``make_qvalue_network``, which need no ``vmap``."""
        network = self.qvalue_network
        return isinstance(network, ValueOperator) and isinstance(network.module, QValueNetwork)

    @property
    def learns_jointly(self) -> bool:
        """Whether the critics see (s, a) and (s', a') in one pass, and have no targets."""
        return _learns_jointly(self.qvalue_network)

    def statistics(self) -> dict[str, Tensor]:
        """The running statistics of the critics, live; none where critics have none."""
        if not self.learns_jointly:
            return {}
        names = self.qvalue_network.module.statistics
        return {
            _statistic(critics, name): getattr(self, f"{critics}_params")["module"][name]
            for critics in self.critics
            for name in names
        }

    @torch.no_grad()
    def take_statistics(self, new: Mapping[str, Tensor] | TensorDictBase | None, taken: Tensor | bool = True) -> None:
        """Make the running statistics those of an output (its ``statistics``, if any), where the step was taken."""
        if new is not None:
            for name, live in self.statistics().items():
                live.copy_(torch.where(torch.as_tensor(taken, device=live.device), new[name], live))

    def _stacked_qvalue(self, tensordict: TensorDictBase, parameters: TensorDictParams) -> TensorDictBase:
        values = self.qvalues(tensordict, tensordict.get(self.tensor_keys.action), parameters)
        key = self.tensor_keys.state_action_value
        return TensorDict({key: values.unsqueeze(-1)}, batch_size=values.shape)

    def qvalues(
        self,
        tensordict: TensorDictBase,
        action: Float[Tensor, "*S A"],
        parameters: TensorDictParams,
    ) -> Float[Tensor, "Q *S"]:
        """Q_i(s, a) of every critic at normalised actions [*S, *B, A]; the states [*B] repeat over the samples."""
        return self.qvalues_and_products(tensordict, action, parameters)[0]

    def qvalues_and_products(
        self,
        tensordict: TensorDictBase,
        action: Float[Tensor, "*S A"],
        parameters: TensorDictParams,
        known: KnownProducts | None = None,
    ) -> tuple[Float[Tensor, "Q *S"], Products]:
        """``qvalues`` and, of critics that are stacked, their hidden products; see ``KnownProducts``."""
        state_keys = [key for key in self.qvalue_network.in_keys if key != self.tensor_keys.action]
        if self.stacks_qvalues:
            network, parameters = self.qvalue_network.module, parameters["module"]
            weights, biases = network.stacked_layers(parameters)
            observation, norms = tensordict.get(*state_keys), network.layer_norms(parameters)
            layers = weights, biases, network.activation
            return stacked_qvalue_and_products(*layers, observation, action, known, norms)
        batch = action.shape[:-1]
        entries = {key: tensordict.get(key) for key in state_keys}
        entries = {key: value.expand(*batch, value.shape[-1]) for key, value in entries.items()}
        inputs = TensorDict({**entries, self.tensor_keys.action: action}, batch_size=batch)
        values = self._vmap_qnetworkN0(inputs, parameters).get(self.tensor_keys.state_action_value)
        return values.squeeze(-1), ()

    def normalize_action(self, action: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """An action of the environment as the critics read it."""
        return TanhBounds(self.action_low, self.action_high).normalize(action)

    def qvalue_v2_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        """The reduced critic loss; ``td_error`` [*B], the largest of the critics, ``entropy``, ``next_action`` and
        ``statistics``.
        """
        tensordict = self.encoded(tensordict)
        following = self._next_action(tensordict.get("next"))
        values = self.critic_values(tensordict, following.action)
        target = self._critic_target(tensordict, following, values.next)
        loss = distance_loss(values.here, target.expand_as(values.here), loss_function=self.loss_function).sum(0)
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights), {
            "td_error": (values.here - target).detach().abs().max(0).values,
            "entropy": following.entropy,
            "next_action": following.action,
            "statistics": values.statistics,
        }

    def critic_values(
        self, tensordict: TensorDictBase, next_action: Float[Tensor, "*B A"], critics: str = "qvalue_network"
    ) -> CriticValues:
        """What these critics say of a minibatch and of the normalised actions that follow."""
        action, following = self.normalize_action(tensordict.get(self.tensor_keys.action)), tensordict.get("next")
        parameters = getattr(self, f"{critics}_params")
        if not self.learns_jointly:
            here = self.qvalues(tensordict, action, parameters)
            with torch.no_grad():
                after = self.qvalues(
                    self._seen_by_target(following), next_action, getattr(self, f"target_{critics}_params")
                )
            return CriticValues(here, after, {})
        network, (key, _) = self.qvalue_network.module, self.qvalue_network.in_keys
        pairs = [(tensordict.get(key), following.get(key)), (action, next_action)]
        rows = (torch.cat([value.reshape(-1, value.shape[-1]) for value in pair]) for pair in pairs)
        values, statistics = network.training_values(parameters["module"], *rows)
        here, after = (half.unflatten(1, action.shape[:-1]) for half in values.chunk(2, 1))
        named = {_statistic(critics, name): value for name, value in statistics.items()}
        return CriticValues(here, after.detach(), named)

    def _distribution(self, tensordict: TensorDictBase) -> MixtureDistribution:
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            # Of entries of its own, because the actor writes the parameters of the mixture beside what it reads.
            return self.actor_network.get_dist(tensordict.select(*self.actor_network.in_keys))

    @torch.no_grad()
    def _compute_target_v2(self, tensordict: TensorDictBase) -> Float[Tensor, "*B"]:
        tensordict = self.encoded(tensordict)
        following = self._next_action(tensordict.get("next"))
        return self._critic_target(tensordict, following, self.critic_values(tensordict, following.action).next)

    @torch.no_grad()
    def _next_action(self, next_tensordict: TensorDictBase) -> NextAction:
        distribution = self._distribution(next_tensordict)
        u, log_prob, log_prob_of_mixture = _draw(distribution, self.estimator.log_prob)
        bounds = TanhBounds.normalized(u)
        entropy = bounds.log_abs_det_jacobian(u) - log_prob_of_mixture
        evolve = self._evolution("critic_target", next_tensordict, distribution)
        if evolve is not None:
            u, log_prob, *_ = evolve(u, log_prob)
        log_prob = log_prob - bounds.log_abs_det_jacobian(u)
        return NextAction(bounds.squash(u), log_prob, entropy)

    @torch.no_grad()
    def _critic_target(
        self, tensordict: TensorDictBase, following: NextAction, next_values: Float[Tensor, "Q *B"]
    ) -> Float[Tensor, "*B"]:
        """y: what the critics learn. The minibatch may say ``steps_to_next_obs`` [*B, 1], over which r is summed."""
        next_value = next_values.min(0).values - self._alpha * following.log_prob
        bootstrapped = tensordict.clone(False)
        bootstrapped.set(("next", self.value_estimator.tensor_keys.value), next_value.unsqueeze(-1))
        return self.value_estimator.value_estimate(bootstrapped).squeeze(-1)

    def objective(self, tensordict: TensorDictBase, distribution: MixtureDistribution) -> Objective:
        """What the actor minimises at the states of the tensordict: cost = alpha log pi(a|s) - min_i Q_i(s, a).

        With an action transform a is the evolved action. Its cost is that of the drawn one, which is differentiated as
        it would be without a transform, and a remainder, alpha times the change of energy where ``log_prob=joint``.
        """
        transform, evolve = self.action_transform, self._evolution("actor_loss", tensordict, distribution)
        bounds = TanhBounds.normalized(distribution.low)

        def evaluate(u: Tensor, log_prob: Tensor, qvalue: Tensor) -> ObjectiveValue:
            log_prob = log_prob - bounds.log_abs_det_jacobian(u)
            return ObjectiveValue(self._alpha * log_prob - qvalue, log_prob, qvalue)

        def of_draws(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
            qvalue, products = self.actor_value_and_products(tensordict, bounds.squash(u))

            def choose(sample: Tensor) -> ObjectiveValue:
                known = {critics: KnownProducts(of_critics, sample) for critics, of_critics in products.items()}
                chosen = take_sample(u, sample)
                value, _ = self.actor_value_and_products(tensordict, bounds.squash(chosen), known)
                return evaluate(chosen, take_sample(log_prob, sample), value)

            return evaluate(u, log_prob, qvalue)._replace(choose=choose)

        if evolve is None or transform is None:
            return of_draws

        def of_evolved(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
            evolution = evolve(u, log_prob.detach())
            # The dynamics know the values that are asked for, unless they climb another reduction of the critics.
            if transform.critic_reduction == "min":
                before, after = evolution.drawn_qvalue, evolution.qvalue
            else:
                before, after = (self.actor_value(tensordict, bounds.squash(at)) for at in (u, evolution.u))
            drawn = evaluate(u, log_prob, before)
            evolved = evaluate(evolution.u, evolution.log_prob, after)
            remainder = evolved.cost - drawn.cost.detach()
            diagnostics = transform.diagnose(u, evolution, bounds)
            return evolved._replace(cost=drawn.cost + remainder, remainder=remainder.detach(), diagnostics=diagnostics)

        return of_evolved

    def actor_value(self, tensordict: TensorDictBase, action: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """What the actor is to maximise besides its entropy: min_i Q_i(s, a), with frozen critics."""
        return self.actor_value_and_products(tensordict, action)[0]

    def actor_value_and_products(
        self,
        tensordict: TensorDictBase,
        action: Float[Tensor, "*S A"],
        known: Mapping[str, KnownProducts] | None = None,
    ) -> tuple[Float[Tensor, "*S"], dict[str, Products]]:
        """``actor_value`` and the hidden products of the critics by their name; ``known`` are those of before."""
        values, products = self._frozen_qvalues("qvalue_network", tensordict, action, known)
        return values.min(0).values, products

    def _frozen_qvalues(
        self, critics: str, tensordict: TensorDictBase, action: Tensor, known: Mapping[str, KnownProducts] | None
    ) -> tuple[Float[Tensor, "Q *S"], dict[str, Products]]:
        parameters = frozen(getattr(self, f"{critics}_params"))
        found = self.qvalues_and_products(tensordict, action, parameters, known[critics] if known else None)
        return found[0], {critics: found[1]}

    def _evolution(
        self, use: Use, tensordict: TensorDictBase, distribution: MixtureDistribution
    ) -> Callable[[Tensor, Tensor], Evolution] | None:
        """What evolves unsquashed draws with their log-densities; None where no transform is used.

        The momentum is drawn here, once: every sample of a state, and every call, evolves with the same.
        """
        transform = self.action_transform
        if transform is None or not transform.is_used_in(use):
            return None
        like = distribution.low.expand(*distribution.batch_shape, *distribution.event_shape)
        momentum = transform.sample_momentum(like)
        return partial(transform, momentum=momentum, **self.state_of(tensordict, distribution))

    def state_of(self, tensordict: TensorDictBase, distribution: MixtureDistribution) -> dict[str, Any]:
        """What the action transform must know of the states of the tensordict: keywords of its ``forward``."""
        observation, qvalue = tensordict.get(self.actor_network.in_keys[0]), self.action_value(tensordict)
        bounds = TanhBounds.normalized(distribution.low)
        return {"observation": observation, "qvalue": qvalue, "bounds": bounds, "alpha": self._alpha}

    def action_value(self, tensordict: TensorDictBase) -> ActionValue:
        """What the action transform climbs at the states of the tensordict: the critics, frozen."""
        return self.frozen_value(tensordict, self.qvalue_network_params)

    def frozen_value(self, tensordict: TensorDictBase, parameters: TensorDictParams) -> ActionValue:
        """Critics with these parameters, frozen, as functions of the action at the states of the tensordict."""
        parameters, network = frozen(parameters), self.qvalue_network
        if self.stacks_qvalues:
            observation = tensordict.get(network.in_keys[0])
            return stacked_qvalue_at(network.module, parameters["module"], observation)
        return differentiable(lambda action: self.qvalues(tensordict, action, parameters))

    def parameter_groups(self, *, lr_actor: float, lr_qvalue: float, lr_alpha: float) -> list[dict[str, Any]]:
        """What each loss trains, for one optimizer: the actor with its transform, the critics, the temperature."""
        groups = [
            {"params": self._acting_parameters(), "lr": lr_actor, "name": "actor"},
            {"params": list(self.qvalue_network_params.parameters()), "lr": lr_qvalue, "name": "qvalue"},
        ]
        if self.encodes:
            groups.append({"params": list(self.encoder_params.parameters()), "lr": lr_qvalue, "name": "encoder"})
        return groups if self.fixed_alpha else [*groups, {"params": [self.log_alpha], "lr": lr_alpha, "name": "alpha"}]

    def delayed_parameters(self) -> list[nn.Parameter]:
        """What ``critic_losses`` leaves be: the parameters of the actor, of its transform, and the temperature."""
        return [*self._acting_parameters(), *([] if self.fixed_alpha else [self.log_alpha])]

    def _acting_parameters(self) -> list[nn.Parameter]:
        acting = list(self.actor_network_params.parameters())
        return acting if self.action_transform is None else [*acting, *self.action_transform.parameters()]

    def acting_policy(self, actor: TensorDictModuleBase) -> TensorDictModuleBase:
        """The actor, followed by the action transform where that is used in acting, with the live critics.

        Raises:
            ValueError: the critics were not made by ``make_qvalue_network``.
        """
        if self.action_transform is None or "acting" not in self.action_transform.used_in:
            return actor
        low, high = self.action_low, self.action_high
        keys = {"observation_key": self.qvalue_network.in_keys[0], "action_key": self.tensor_keys.action}
        evolve = EvolveAction(self.action_transform, self.acting_values(), self.log_alpha, low, high, **keys)
        return TensorDictSequential(actor, evolve)

    def acting_values(self) -> nn.Module:
        """The critics, live, as a module that maps an observation to the ``ActionValue`` there.

        Raises:
            ValueError: the critics were not made by ``make_qvalue_network``.
        """
        if not self.stacks_qvalues:
            raise ValueError(
                "acting by action values needs critics of make_qvalue_network: compose EvolveAction yourself"
            )
        return QValueEnsemble(self.qvalue_network.module, self.qvalue_network_params)

    def estimate(self, tensordict: TensorDictBase) -> Surrogate:
        """The estimator's surrogate of the actor's objective at the states [*B] of the tensordict."""
        tensordict = self._held_fixed(tensordict)
        distribution = self._distribution(tensordict)
        check_pair(self.estimator, type(distribution))
        return self.estimator(distribution, self.objective(tensordict, distribution))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        """The reduced actor loss, and ``log_prob``, ``auxiliary`` (reduced) and ``diagnostics`` of the estimate."""
        surrogate = self.estimate(tensordict)
        weights = self._maybe_get_priority_weight(tensordict)
        auxiliary = {
            name: self._reduce_loss(value, tensordict=tensordict, weights=weights)
            for name, value in surrogate.auxiliary.items()
        }
        loss = self._reduce_loss(surrogate.expected_cost, tensordict=tensordict, weights=weights)
        metadata = {"log_prob": surrogate.log_prob, "auxiliary": auxiliary, "diagnostics": surrogate.diagnostics}
        return loss, metadata

    @property
    def out_keys(self) -> list:
        if self._out_keys is None:
            losses = ["loss_actor", "loss_qvalue", "loss_alpha", *self.estimator.auxiliary_losses]
            statistics = ["statistics"] if self.learns_jointly else []
            self._out_keys = [*losses, "alpha", "regulated_entropy", "entropy", *statistics]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list) -> None:
        self._out_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict = self.encoded(tensordict)
        of_critics, _ = self._of_critics(tensordict)
        return self._output(tensordict, self._of_actor(tensordict) | of_critics)

    def critic_losses(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What ``forward`` says of the critics alone: for updates that leave the actor and the temperature be."""
        tensordict = self.encoded(tensordict)
        return self._output(tensordict, self._of_critics(tensordict)[0])

    def _of_critics(self, tensordict: TensorDictBase) -> tuple[dict[str, Any], Float[Tensor, "*B A"]]:
        """Entries of the output, and the next action that the critics' target was taken at."""
        loss_qvalue, metadata = self.qvalue_v2_loss(tensordict)
        tensordict.set(self.tensor_keys.priority, metadata["td_error"])
        entries = {"loss_qvalue": loss_qvalue, "alpha": self._alpha, "entropy": metadata["entropy"].mean()}
        return entries | {"statistics": metadata["statistics"]}, metadata["next_action"]

    def _of_actor(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        loss_actor, metadata = self.actor_loss(tensordict)
        weights = self._maybe_get_priority_weight(tensordict)
        loss_alpha = self._alpha_loss(log_prob=metadata["log_prob"])
        loss_alpha = self._reduce_loss(loss_alpha, tensordict=tensordict, weights=weights)
        losses = {"loss_actor": loss_actor, "loss_alpha": loss_alpha, **metadata["auxiliary"]}
        return {**losses, "regulated_entropy": -metadata["log_prob"].mean(), **metadata["diagnostics"]}

    def _output(self, tensordict: TensorDictBase, entries: dict[str, Any]) -> TensorDictBase:
        statistics = entries.pop("statistics")
        if self.reduction != "none":
            return TensorDict(entries | ({"statistics": TensorDict(statistics)} if statistics else {}))
        losses = {name: value for name, value in entries.items() if name.startswith("loss_")}
        out = TensorDict(losses, batch_size=tensordict.batch_size)
        if self.scalar_output_mode == "non_tensor":
            for name in ("alpha", "regulated_entropy", "entropy"):
                if name in entries:
                    out.set_non_tensor(name, entries[name])
        return out


def _learns_jointly(network: TensorDictModule) -> bool:
    return isinstance(network, ValueOperator) and isinstance(network.module, CrossQNetwork)


def _statistic(critics: str, name: NestedKey) -> str:
    return ".".join([critics, *([name] if isinstance(name, str) else name)])


def frozen(parameters: TensorDictParams) -> TensorDictBase:
    """The parameters without their gradients.

    Detached anew, because TorchRL's cache of them, and tensordict's, would still hold the old tensors after a copy, a
    cast to another type or device, or within a functional call.
    """
    return parameters._fast_apply(Tensor.detach)


def _draw(
    distribution: MixtureDistribution, scoring: str
) -> tuple[Float[Tensor, "*B A"], Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """An unsquashed action, its log-density under the mixture or under the component that drew it, and the former."""
    if scoring == "mixture":
        u = distribution.rsample_unsquashed()
        log_prob = distribution.log_prob_unsquashed(u)
        return u, log_prob, log_prob
    component = distribution.sample_component()
    u = distribution.rsample_given(component)
    return u, distribution.log_prob_given(u, component), distribution.log_prob_unsquashed(u)
