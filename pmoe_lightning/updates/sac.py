r"""One SAC update as a graph of tensors: the mathematics of ``PMOESACLoss``, Adam and Polyak.

What is learned is defined in ``losses/sac.py``, ``critics.py`` and ``estimators/``; their functions are called here on
plain tensors. Left out are TensorDict and autograd's bookkeeping, which take about as long as the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor
from torch.func import functional_call, grad
from torchrl.objectives.value import TD0Estimator

from pmoe_lightning.actors import MixtureSampler
from pmoe_lightning.critics import stacked_layers, stacked_qvalue
from pmoe_lightning.distributions import TanhGaussianMixture
from pmoe_lightning.losses.sac import PMOESACLoss, soft_objective, soft_value
from pmoe_lightning.updates.adam import Moments, adam_, moments, step_factors
from pmoe_lightning.updates.compilation import compiled
from pmoe_lightning.updates.processes import average_over_processes

Metrics = dict[str, Tensor]


class Transitions(NamedTuple):
    """A minibatch."""

    observation: Float[Tensor, "*B O"]
    action: Float[Tensor, "*B A"]
    reward: Float[Tensor, "*B"]
    next_observation: Float[Tensor, "*B O"]
    terminated: Bool[Tensor, "*B"]


class State(NamedTuple):
    """All that an update reads and changes: the tensors that the loss and the optimizer hold, not copies."""

    actor: list[Tensor]
    qvalue: list[Tensor]
    log_alpha: Tensor
    target_qvalue: list[Tensor]
    bounds: tuple[Tensor, Tensor]
    moments: list[Moments]


class SACUpdate:
    r"""Steps a ``PMOESACLoss`` as loss, summed backward pass, ``torch.optim.Adam`` and ``SoftUpdate`` together would.

    Every gradient is taken at the old parameters, then the optimizer's groups are stepped, then the targets follow.
    Parameters and optimizer state change in place, so checkpoints hold what they always hold, and the readable form can
    take over at any update. With several processes gradients are averaged between the two halves of the update.

    Args:
        loss: the definition; its value estimator (gamma) is set.
        optimizer: Adam over the actor's parameters, the critics' and, unless alpha is fixed, ``log_alpha``, as three
            groups in this order.
        tau: the targets move by tau (Q - Qbar).
        compile: compile at the first call; otherwise the same function runs as it is, slower than the loss module.

    Raises:
        ValueError: a loss or an optimizer that has no compiled form, with the reason.

    Example:
        >>> update = SACUpdate(loss, torch.optim.Adam(groups), tau=0.005)
        >>> metrics = update(buffer.sample(16 * 256).view(16, 256))  # 16 updates
    """

    def __init__(self, loss: PMOESACLoss, optimizer: torch.optim.Adam, *, tau: float, compile: bool = True) -> None:
        if reason := _obstacle(loss, optimizer):
            raise ValueError(f"this SAC has no compiled form: {reason}; use compile=false")
        self.loss, self.optimizer, self.tau, self.estimator = loss, optimizer, tau, loss.estimator
        self._policy, self._critic = loss.actor_network[0].module, loss.qvalue_network.module
        self.gamma, self.target_entropy = float(loss.value_estimator.gamma), float(loss.target_entropy)
        self._actor_names = [name.removeprefix("module.0.module.") for name in _names(loss.actor_network_params)]
        self._qvalue_names = [tuple(name.split(".")[1:]) for name in _names(loss.qvalue_network_params)]
        self._whole, self._first_half, self._second_half = self.update, self.gradients, self.apply
        if compile:
            device = loss.log_alpha.device
            self._whole = compiled(self.update, "the SAC update", device)
            self._first_half = compiled(self.gradients, "the gradients of SAC", device)
            self._second_half = compiled(self.apply, "the optimizer step of SAC", device)

    @torch.no_grad()
    def __call__(self, minibatches: TensorDictBase) -> Metrics:
        """One update for each of the minibatches [U, B]; every metric with U values in front."""
        state = self.state()
        groups = zip(self.optimizer.param_groups, state.moments, strict=True)
        factors = torch.stack([step_factors(group, moments.step[0], len(minibatches)) for group, moments in groups], 1)
        steps = zip(self.transitions(minibatches), factors, strict=True)
        metrics = [self._step(state, transitions, factors) for transitions, factors in steps]
        return {name: torch.stack([each[name] for each in metrics]) for name in metrics[0]}

    def _step(self, state: State, transitions: Transitions, factors: Tensor) -> Metrics:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._whole(state, transitions, factors)
        gradients, metrics = self._first_half(state, transitions)
        average_over_processes([gradient for group in gradients for gradient in group])
        return metrics | self._second_half(state, gradients, factors)

    def update(self, state: State, transitions: Transitions, factors: Float[Tensor, "groups 2"]) -> Metrics:
        """Change the state by one minibatch."""
        gradients, metrics = self.gradients(state, transitions)
        return metrics | self.apply(state, gradients, factors)

    def gradients(self, state: State, transitions: Transitions) -> tuple[list[list[Tensor]], Metrics]:
        """The gradient of every group at the state, and the entries of ``PMOESACLoss.forward``."""
        alpha = state.log_alpha.exp()
        observation, action, reward, next_observation, terminated = transitions

        def values(parameters: list[Tensor], observation: Tensor, action: Tensor) -> Tensor:
            layers = stacked_layers(self._critic, dict(zip(self._qvalue_names, parameters, strict=True)))
            return stacked_qvalue(*layers, self._critic.layers[1], observation, action)

        def policy(parameters: list[Tensor], observation: Tensor) -> TanhGaussianMixture:
            named = dict(zip(self._actor_names, parameters, strict=True))
            return TanhGaussianMixture(*functional_call(self._policy, named, (observation,)), *state.bounds)

        def next_qvalues(action: Tensor) -> Tensor:
            return values(state.target_qvalue, next_observation, action)

        next_value = soft_value(policy(state.actor, next_observation), next_qvalues, alpha, self.estimator.log_prob)
        target = reward + self.gamma * ~terminated * next_value

        def qvalue_loss(parameters: list[Tensor]) -> tuple[Tensor, Metrics]:
            loss = (values(parameters, observation, action) - target).square().sum(0).mean()
            return loss, {"loss_qvalue": loss}

        def actor_loss(parameters: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Metrics, Metrics]]:
            distribution = policy(parameters, observation)
            objective = soft_objective(distribution, lambda action: values(state.qvalue, observation, action), alpha)
            surrogate = self.estimator(distribution, objective)
            losses = {"loss_actor": surrogate.expected_cost, **surrogate.auxiliary}
            losses = {name: value.mean() for name, value in losses.items()}
            return sum(losses.values()), (surrogate.log_prob.mean(), losses, dict(surrogate.diagnostics))

        of_qvalue, loss_qvalue = grad(qvalue_loss, has_aux=True)(state.qvalue)
        of_actor, (log_prob, loss_actor, diagnostics) = grad(actor_loss, has_aux=True)(state.actor)
        of_alpha = -(log_prob + self.target_entropy)
        metrics = {**loss_actor, **loss_qvalue, "loss_alpha": state.log_alpha * of_alpha}
        metrics |= {"alpha": alpha, "entropy": -log_prob, **diagnostics}
        return [of_actor, of_qvalue, [of_alpha]][: len(state.moments)], metrics

    def apply(self, state: State, gradients: list[list[Tensor]], factors: Float[Tensor, "groups 2"]) -> Metrics:
        """Adam's step for every group, unless a gradient is not finite, then the targets follow."""
        norm = torch.stack([gradient.square().sum() for group in gradients for gradient in group]).sum().sqrt()
        parameters = [state.actor, state.qvalue, [state.log_alpha]]
        for i, group in enumerate(self.optimizer.param_groups):
            adam = {name: group[name] for name in ("betas", "eps")}
            adam_(parameters[i], gradients[i], state.moments[i], factors[i], norm.isfinite(), **adam)
        for target, parameter in zip(state.target_qvalue, state.qvalue, strict=True):
            target.lerp_(parameter, self.tau)
        return {"gradient_norm": norm}

    def transitions(self, minibatches: TensorDictBase) -> Iterator[Transitions]:
        """The minibatches [U, B] one by one."""
        key, after = self.loss.actor_network.in_keys[0], minibatches.get("next")
        stacks = (
            minibatches.get(key),
            minibatches.get("action"),
            after.get("reward").squeeze(-1),
            after.get(key),
            after.get("terminated").squeeze(-1),
        )
        return (Transitions(*each) for each in zip(*(stack.unbind(0) for stack in stacks), strict=True))

    def state(self) -> State:
        """The tensors themselves; looked up for every stack of minibatches, because loading a checkpoint swaps them."""
        loss = self.loss
        low, high = (loss.actor_network_params["module", "1", bound] for bound in ("low", "high"))
        groups = [group["params"] for group in self.optimizer.param_groups]
        return State(
            actor=groups[0],
            qvalue=groups[1],
            log_alpha=loss.log_alpha,
            target_qvalue=[loss.target_qvalue_network_params["module", *name] for name in self._qvalue_names],
            bounds=(low, high),
            moments=[moments(self.optimizer, group) for group in groups],
        )


def _names(parameters: TensorDictParams) -> list[str]:
    return [name for name, _ in parameters.named_parameters()]


def _obstacle(loss: PMOESACLoss, optimizer: torch.optim.Optimizer) -> str | None:
    """What of ``SACLoss``'s and Adam's options the update above leaves out."""
    actor = loss.actor_network
    obstacles = {
        "its critics are not QValueNetworks": not loss.stacks_qvalues,
        "its actor is not a network and a sampler": len(actor) != 2 or not isinstance(actor[1], MixtureSampler),
        "its value estimator is not TD0": type(loss.value_estimator) is not TD0Estimator,
        f"loss_function={loss.loss_function}": loss.loss_function != "l2",
        f"reduction={loss.reduction}": loss.reduction != "mean",
        "other networks than the critics are delayed": loss.delay_actor or not loss.delay_qvalue,
        "alpha is limited": loss.min_log_alpha is not None or loss.max_log_alpha is not None,
        "its optimizer is not Adam": type(optimizer) is not torch.optim.Adam,
    }
    for option in ("weight_decay", "amsgrad", "maximize"):
        obstacles[f"its Adam has {option}"] = any(group.get(option) for group in optimizer.param_groups)
    return next((reason for reason, stands in obstacles.items() if stands), None)
