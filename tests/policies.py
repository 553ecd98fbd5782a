"""Untrained policies and the checkpoints that a training run would write of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.algorithms.sac import SAC
from pmoe_lightning.checkpoints.policy import ACTORS, CRITICS
from pmoe_lightning.estimators import Marginalized, Pathwise
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.encoders import make_drq_encoder
from pmoe_lightning.modules.normalization import ObservationNormalizer
from pmoe_lightning.safe.constraint import CostConstraint

SPACES = {
    "Pendulum-v1": (3, [-2.0], [2.0]),
    "InvertedPendulum-v5": (4, [-3.0], [3.0]),
    "Hopper-v5": (11, [-1.0] * 3, [1.0] * 3),
    "probe_envs:Forgetful-v0": (11, [-1.0] * 3, [1.0] * 3),
    "HalfCheetah-v5": (17, [-1.0] * 6, [1.0] * 6),
    "TwoRoutes-v0": (4, [-1.0] * 2, [1.0] * 2),
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


def make_sac_policy(
    actor: str = "pmoe",
    *,
    env_id: str = "Hopper-v5",
    rule: str = "best_value",
    force: str | None = None,
    safe: bool = False,
    critic: str = "plain",
    normalize: bool = False,
    num_candidates: int = 5,
    pixels: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[SAC, dict[str, Any]]:
    """SAC on the spaces of an environment, and the checkpoint of its policy, which is judged by a rule.

    With ``pixels``, the settings of a ``PixelEnvironment`` whose pictures are grey, it sees these.
    """
    observation_dim, low, high = (6, *SPACES[env_id][1:]) if pixels else SPACES[env_id]
    encoder = None
    if pixels:
        shape = [pixels["stack"], pixels["size"], pixels["size"]]
        encoder = {"kind": "drq", "shape": shape, "channels": [4, 4], "strides": [2, 2], "features": 6}
    arguments = {"hidden_sizes": [16, 16], **arguments}
    arguments |= {"observation_key": "observation_normalized"} if normalize else {}
    sizes = {"observation_dim": observation_dim, "action_dim": len(low)}
    transform = {"force": force, "step_size": 0.3, "used_in": ["acting", "actor_loss"]} if force else None
    constraint = {"num_candidates": num_candidates, "cost_limit": 0.0} if safe else None
    description = {
        "format": 1,
        "actor": actor,
        "arguments": arguments | ({"deterministic": rule} if actor == "pmoe" else {}),
        "observation_dim": observation_dim,
        "action_low": low,
        "action_high": high,
        "normalize_observation": normalize,
        "action_transform": transform,
        "safe": constraint,
        "critic": {"kind": critic, "hidden_sizes": [16, 16], "activation": "relu"},
        "env": {"id": env_id, "kwargs": {"max_episode_steps": 20} | ({"pixels": pixels} if pixels else {})},
    } | ({"encoder": encoder} if encoder else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        algorithm = make_sac(
            ACTORS[actor](observation_dim, low, high, **arguments),
            Pathwise() if actor == "latent" else Marginalized(),
            encoder=make_drq_encoder(**{key: encoder[key] for key in encoder if key != "kind"}) if encoder else None,
            make_critic=partial(CRITICS[critic], hidden_sizes=(16, 16)),
            normalizer=ObservationNormalizer(observation_dim) if normalize else None,
            action_transform=make_hamiltonian_transform(**sizes, **transform) if transform else None,
            constraint=CostConstraint(**constraint) if constraint else None,
            policy_description=description,
            **sizes,
        )
    return algorithm, {"policy": algorithm.policy_state()}
