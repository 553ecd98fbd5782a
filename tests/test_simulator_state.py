"""A captured and restored environment steps on as if nothing had happened, to the last bit."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from test_resume import differing

import pmoe_lightning.envs  # noqa: F401  (registers MultiGoal-v0)
from pmoe_lightning.envs.simulator_state import capture, restore

MUJOCO = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"]
MUJOCO += ["Pusher", "Reacher", "Swimmer", "Walker2d"]
IDS = [f"{name}-v5" for name in MUJOCO] + ["Pendulum-v1", "MountainCarContinuous-v0", "MultiGoal-v0"]


def _step(env: gymnasium.Env, rng: np.random.Generator) -> tuple:
    action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
    observation, reward, terminated, truncated, _ = env.step(action)
    if terminated or truncated:
        observation, _ = env.reset()
    return observation.tobytes(), float(reward), terminated, truncated


@pytest.mark.parametrize("id", IDS)
def test_a_restored_environment_steps_on_exactly(id, tmp_path):
    env = gymnasium.make(id, disable_env_checker=True)
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(46):
        _step(env, rng)
    state = capture(env)
    torch.save(state, tmp_path / "state.pt")
    actions_from_here = rng.bit_generator.state
    expected = [_step(env, rng) for _ in range(80)]

    other = gymnasium.make(id, disable_env_checker=True)
    other.reset(seed=4)
    _step(other, rng)
    restore(other, torch.load(tmp_path / "state.pt", weights_only=True))
    assert differing(state, capture(other)) == [], "something else than state was captured"
    rng.bit_generator.state = actions_from_here
    assert [_step(other, rng) for _ in range(80)] == expected


def test_an_environment_with_parts_of_its_own_is_not_captured():
    class Remote(gymnasium.Wrapper):
        def __init__(self, env):
            super().__init__(env)
            self.connection = object()

    env = Remote(gymnasium.make("Pendulum-v1"))
    env.reset(seed=0)
    assert capture(env) is None
    assert capture(env.env) is not None


def test_the_state_of_another_environment_is_refused():
    hopper, ant, pendulum = (gymnasium.make(id) for id in ("Hopper-v5", "Ant-v5", "Pendulum-v1"))
    for env in (hopper, ant, pendulum):
        env.reset(seed=0)
    with pytest.raises(ValueError, match="another"):
        restore(hopper, capture(ant))
    with pytest.raises(ValueError, match="another"):
        restore(hopper, capture(pendulum))
