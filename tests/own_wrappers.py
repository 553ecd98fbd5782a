"""Wrappers of a user's own, and what may be taken for one."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Halved(gymnasium.RewardWrapper):
    def reward(self, reward):
        return reward / 2


class Shifted(gymnasium.RewardWrapper):
    def __init__(self, env, *, by: float = 1.0, noise: float = 0.0) -> None:
        super().__init__(env)
        self.by, self.noise, self.draws = by, noise, np.random.default_rng(3)

    def reward(self, reward):
        return reward + self.by + self.noise * self.draws.normal()


class OneMore(gymnasium.ObservationWrapper):
    """Observes the length of its episode, too."""

    def __init__(self, env) -> None:
        super().__init__(env)
        space = env.observation_space
        self.observation_space = Box(*(np.append(bound, bound[-1]) for bound in (space.low, space.high)))

    def reset(self, **given):
        self.steps = -1
        return super().reset(**given)

    def observation(self, observation):
        self.steps += 1
        return np.append(observation, np.float32(self.steps))


class First(gymnasium.ActionWrapper):
    """Its policy acts with one number, which is the action's every entry, of half the size."""

    def __init__(self, env) -> None:
        super().__init__(env)
        self.action_space = Box(-0.5, 0.5, (1,), np.float32)

    def action(self, action):
        return np.repeat(action, *self.env.action_space.shape)


class Locked(gymnasium.Wrapper):
    """Holds what cannot be captured."""

    def __init__(self, env) -> None:
        super().__init__(env)
        self.output = sys.stdout


class Forgetful(gymnasium.Wrapper):
    def __init__(self, env) -> None:
        pass


class Undeclared(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return observation[:-1]


class Exits(gymnasium.Wrapper):
    def __init__(self, env) -> None:
        sys.exit(3)


def function(env):
    return env
