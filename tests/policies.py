"""Untrained policies and the checkpoints that a training run would write of them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from pmoe_lightning.checkpoints.policy import ACTORS
from pmoe_lightning.normalization import ObservationNormalizer

SPACES = {
    "Pendulum-v1": (3, [-2.0], [2.0]),
    "InvertedPendulum-v5": (4, [-3.0], [3.0]),
    "Hopper-v5": (11, [-1.0] * 3, [1.0] * 3),
    "probe_envs:Forgetful-v0": (11, [-1.0] * 3, [1.0] * 3),
    "HalfCheetah-v5": (17, [-1.0] * 6, [1.0] * 6),
}


def make_policy(
    env_id: str = "Pendulum-v1", *, actor: str = "pmoe", normalize: bool = True, **arguments: Any
) -> tuple[TensorDictModuleBase, dict[str, Any]]:
    """A policy with fixed random weights and statistics, and its checkpoint."""
    observation_dim, low, high = SPACES[env_id]
    arguments = {"hidden_sizes": [32, 32], **arguments}
    if normalize:
        arguments["observation_key"] = "observation_normalized"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = ACTORS[actor](observation_dim, low, high, **arguments)
        if normalize:
            normalizer = ObservationNormalizer(observation_dim)
            normalizer.update(torch.randn(100, observation_dim) * 3 + 1)
            policy = TensorDictSequential(normalizer, policy)
    description = {
        "format": 1,
        "actor": actor,
        "arguments": arguments,
        "observation_dim": observation_dim,
        "action_low": low,
        "action_high": high,
        "normalize_observation": normalize,
        "env": {"id": env_id, "kwargs": {}},
    }
    entry = {"description": description, "state_dict": dict(policy.state_dict()), "env_frames": 1000, "updates": 10}
    return policy, {"policy": entry}
