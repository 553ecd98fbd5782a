"""What an exported policy is tried on: the observations of its own episodes, and some far outside of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor

from pmoe_lightning.checkpoints.loaded import LoadedPolicy
from pmoe_lightning.envs import AbstractEnvironment, with_memory
from pmoe_lightning.errors import RunError
from pmoe_lightning.evaluation.episodes import acting
from pmoe_lightning.modules.normalization import ObservationNormalizer
from pmoe_lightning.modules.option_policies import OptionActor

_NUM_ENVS = 16
_CORNERS = 100
_DEVIATIONS = 10.0  # of a corner from the mean, in every direction


@torch.no_grad()
def observe(
    policy: LoadedPolicy, make_env: Callable[..., AbstractEnvironment], number: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """What the policy reads in the first ``number`` steps [number, ...] of its episodes, from the given seed on."""
    env = with_memory(make_env, policy)(num_envs=_NUM_ENVS, seed=seed)
    roots = []
    try:
        with acting(policy, seed, sample=False) as act:
            env.set_seed(seed)
            root = env.reset()
            for _ in range(-(-number // _NUM_ENVS)):
                roots.append(root.select(*policy.in_keys).clone())
                _, root = env.step_and_maybe_reset(act(root))
    finally:
        env.close()
    return _entries(policy, torch.cat(roots)[:number])


def draw(policy: LoadedPolicy, number: int) -> dict[str, Tensor]:
    """Normal draws [number, ...] in their place: of the mean and deviation that the policy normalises by, else 0 and 1.

    Raises:
        RunError: the policy has a memory that only its environment could fill.
    """
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(number, policy.observation_dim, generator=generator)
    for module in policy.modules():
        if isinstance(module, ObservationNormalizer):
            observation = module.mean + module.var.sqrt() * observation
    inputs = {str(policy.in_keys[0]): observation}
    if isinstance(policy.actor, OptionActor):
        options = policy.actor.network.mixture.num_components
        inputs["option_previous"] = torch.randint(-1, options, (number, 1), generator=generator)
    if unknown := [str(key) for key in policy.in_keys if str(key) not in inputs]:
        raise RunError(f"the policy also reads {', '.join(unknown)}, which only its environment has: say env=<id>")
    return _entries(policy, TensorDict(inputs, batch_size=number))


def with_extremes(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries, the last rows replaced: corners ten deviations from the mean, and one row of zeros.

    The corners of pixels are pictures of black and white points alone.
    """
    generator = torch.Generator().manual_seed(0)
    tried = {}
    for key, values in inputs.items():
        tried[key] = values = values.clone()
        if values.dtype != torch.int64 and len(values) > 2 * _CORNERS:  # which numbers an option
            ends = torch.randint(0, 2, (_CORNERS, *values.shape[1:]), generator=generator)
            far = values.mean(0) + _DEVIATIONS * values.std(0) * (2 * ends - 1) if key != "pixels" else 255 * ends
            values[-_CORNERS:] = far.to(values.dtype)
            values[-1] = 0
    return tried


def _entries(policy: LoadedPolicy, states: TensorDict) -> dict[str, Tensor]:
    return {str(key): states.get(key).contiguous() for key in policy.in_keys}
