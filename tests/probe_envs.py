"""Gymnasium environments for tests: one of which every stored number can be predicted, one that forgets rounding."""

from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from typing import NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from pmoe_lightning.envs import GymnasiumEnv

#: (what ends the episode, after how many steps), episode by episode, over and over.
SCRIPT = (("terminated", 3), ("truncated", 5), ("both", 2), ("terminated", 1))


class ScriptedEnv(gymnasium.Env):
    """Observes (seed, episode, step); the reward is 10 episode + step - 3, whatever the action."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    action_space = Box(np.array([-0.5, -2.0], np.float32), np.array([0.25, 3.0], np.float32))

    def __init__(self, script: tuple[tuple[str, int], ...] = SCRIPT) -> None:
        self.script, self.identity, self.episode, self.actions, self.closed = script, -1.0, -1, [], False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.identity = float(seed)
        self.episode += 1
        self.elapsed = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.actions.append(np.array(action))
        self.elapsed += 1
        end, length = self.script[self.episode % len(self.script)]
        ended = self.elapsed == length
        reward = 10.0 * self.episode + self.elapsed - 3
        return self._observation(), reward, ended and end != "truncated", ended and end != "terminated", {}

    def close(self) -> None:
        self.closed = True

    def _observation(self) -> np.ndarray:
        return np.array([self.identity, self.episode, self.elapsed], np.float64)


def make_scripted_env(*, num_envs: int = 1, seed: int | None = 0, carry: Sequence[str] = ()) -> GymnasiumEnv:
    """A batch of scripted environments; environment i plays the script from its entry i on."""
    return GymnasiumEnv([ScriptedEnv(SCRIPT[i:] + SCRIPT[:i]) for i in range(num_envs)], seed=seed, carry=carry)


class ForgetfulEnv(gymnasium.Env):
    """x' = x / 2 + action + noise in 11 dimensions, of which actions move the first 3; episodes end by chance alone.

    A simulator of bodies multiplies a difference in the last bit of an action with every step. This one halves it, so
    that whole runs of two computations can be compared within the rounding of one.
    """

    observation_space = Box(-np.inf, np.inf, (11,), np.float64)
    action_space = Box(-1.0, 1.0, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=11)
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.x = self.x / 2 + self.np_random.normal(size=11)
        self.x[:3] += action
        return self.x.copy(), -abs(self.x[0]), *(self.np_random.random(2) < 0.06).tolist(), {}


gymnasium.register("Forgetful-v0", ForgetfulEnv)


def make_forgetful_env(*, num_envs: int = 1, seed: int | None = 0, carry: Sequence[str] = ()) -> GymnasiumEnv:
    return GymnasiumEnv([ForgetfulEnv() for _ in range(num_envs)], seed=seed, carry=carry)


class Transition(NamedTuple):
    observation: list[float]
    next_observation: list[float]
    reward: float
    terminated: bool
    truncated: bool
    episode_return: float
    episode_length: int


def expected_transitions(num_steps: int, *, seed: int = 0, index: int = 0) -> list[Transition]:
    """The first ``num_steps`` transitions of environment ``index`` of a batch, worked out from the script alone."""
    return list(islice(_transitions(float(seed + index), SCRIPT[index:] + SCRIPT[:index]), num_steps))


def _transitions(identity: float, script: tuple[tuple[str, int], ...]) -> Iterator[Transition]:
    for episode, (end, length) in zip(count(), cycle(script)):  # noqa: B905
        total = 0.0
        for step in range(1, length + 1):
            reward = 10.0 * episode + step - 3
            total += reward
            yield Transition(
                observation=[identity, episode, step - 1],
                next_observation=[identity, episode, step],
                reward=reward,
                terminated=step == length and end in ("terminated", "both"),
                truncated=step == length and end in ("truncated", "both"),
                episode_return=total,
                episode_length=step,
            )


class DrawnEnv(gymnasium.Env):
    """Observes images, in any of the forms there are; its picture is as red as its last action is large."""

    render_mode, metadata = "rgb_array", {"render_modes": ["rgb_array"], "render_fps": 30}
    action_space = Box(-1.0, 1.0, (2,))
    SPACES = {
        "last": Box(0, 255, (96, 96, 3), np.uint8),
        "first": Box(0, 255, (3, 96, 96), np.uint8),
        "float": Box(0.0, 1.0, (96, 96, 3), np.float32),
        "dict": gymnasium.spaces.Dict(image=Box(0, 255, (96, 96, 3), np.uint8), speed=Box(-1.0, 1.0, (2,))),
    }

    def __init__(self, form: str, render_mode: str | None = None) -> None:
        self.observation_space, self.red, self.elapsed = self.SPACES[form], 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.red = self.elapsed = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple:
        self.red, self.elapsed = int(100 + 100 * action[0]), self.elapsed + 1
        return self.observation_space.sample(), float(action[1]), False, self.elapsed == 3, {}

    def render(self) -> np.ndarray:
        return np.full((96, 96, 3), (self.red, 0, 0), np.uint8)


gymnasium.register("Drawn-v0", DrawnEnv)
