"""The actor inside a policy, its distribution, and which component of its mixture the policy follows."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Int
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import SafeProbabilisticTensorDictSequential

from pmoe_lightning.modules.encoders import PixelEncoder
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer, offers
from pmoe_lightning.modules.normalization import ObservationNormalizer
from pmoe_lightning.modules.option_policies import OptionActor, OptionPolicies

#: What a mixture must offer for it to be told which of its components acts.
ASKS_ACTING: frozenset[Offer] = frozenset({"weights", "component_modes", "component_densities"})
_SAME = 1e-5  # as a share of the action range: the same mode in another batch size


Actor: TypeAlias = SafeProbabilisticTensorDictSequential | OptionActor


def find_actor(policy: TensorDictModuleBase) -> Actor | None:
    """The actor of a policy, whatever stands around it; None where there is none."""
    return next((module for module in policy.modules() if isinstance(module, Actor)), None)


def states_of_actor(policy: TensorDictModuleBase, states: TensorDictBase) -> TensorDictBase:
    """States that hold what a policy reads, with what its actor and its critics read behind normaliser or encoder."""
    for module in policy.modules():
        if isinstance(module, ObservationNormalizer | PixelEncoder):
            states = module(states)
    return states


def distribution_at(policy: TensorDictModuleBase, states: TensorDictBase) -> Distribution | OptionPolicies:
    """What the actor of a policy draws from at states that hold what the policy reads, before normaliser or encoder."""
    actor = find_actor(policy)
    if actor is None:
        raise ValueError("the policy has no actor")
    return actor.get_dist(states_of_actor(policy, states))


@torch.no_grad()
def mixture_at(policy: TensorDictModuleBase, states: TensorDictBase) -> MixtureDistribution | None:
    """The mixture of a policy at states [*B], whatever stands around its actor.

    None where it has none, or one of which ``acting_component`` could not be told.
    """
    if find_actor(policy) is None:
        return None
    inputs = states.select(*policy.in_keys, strict=False).to(next(policy.parameters()).device)
    distribution = distribution_at(policy, inputs)
    distribution = distribution.mixture if isinstance(distribution, OptionPolicies) else distribution
    return distribution if offers(distribution, ASKS_ACTING) else None


@torch.no_grad()
def acting_component(mixture: MixtureDistribution, states: TensorDictBase) -> Int[Tensor, "*B"]:
    """The component behind every action of ``states`` [*B], int64 [*B].

    That is the option that a policy with options wrote, the component whose mode the action is, or otherwise (the
    action was drawn, is the mean of several modes, or evolved by a transform) the one that is likeliest given the
    action.
    """
    option = states.get("option", None)
    if option is not None:
        return option.squeeze(-1)
    action = states.get("action").to(mixture.loc.device)
    distance = (mixture.component_modes - action.unsqueeze(-2)) / (mixture.high - mixture.low)
    nearest = distance.abs().amax(-1).min(-1)
    likeliest = mixture.component_posterior(action).argmax(-1)
    return torch.where(nearest.values < _SAME, nearest.indices, likeliest)
