"""A point among four equally good goals: the task in which a policy with one mode must give three of them up."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

GOALS = np.array([(5.0, 0.0), (-5.0, 0.0), (0.0, 5.0), (0.0, -5.0)], np.float32)
LIMIT = 7.0
GOAL_RADIUS = 1.0
WALL_DISTANCE, WALL_HALF_LENGTH = 2.5, 2.0
_GAP = 1e-3  # between a wall and a point that it has stopped
_PIXELS = 240


class MultiGoal(gymnasium.Env):
    """The multi-goal task of soft Q-learning (Haarnoja et al. 2017, arXiv 1702.08165), registered as ``MultiGoal-v0``.

    A point at s in [-7, 7]^2 moves by its action, s' = s + a with a in [-1, 1]^2, from a start near the origin,
    s_0 ~ N(0, start_deviation^2). It seeks any of four goals, (+-5, 0) and (0, +-5):

        r = -action_cost |a|^2 - distance_cost min_g |s' - g|^2    (+ goal_reward, and the end, within 1 of a goal)

    At the origin all goals are equally good, so a maximum-entropy policy reaches each of them equally often.
    The registered id ends an episode after 30 steps. (The numbers are those of the mixture example in the code of
    soft actor-critic, but for the names.)

    With ``walls`` two of the goals, (+-5, 0), lie behind walls at x = +-2.5, |y| < 2, where a step that would cross one
    ends. The ways to them are truly longer: these goals do not tie with the others. (After the world ``Obstacle`` of
    DrAC 2025, arXiv 2511.01374, scaled to this plane.)

    The goals are the modes, in the order above, and ``first_actions`` leads straight to each; none do with walls.

    Args:
        start_deviation, action_cost, distance_cost, goal_reward, walls: see above.
        render_mode: ``rgb_array`` draws the plane, the goals and the point.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    num_modes = len(GOALS)
    plane = (-LIMIT, LIMIT, -LIMIT, LIMIT)

    def __init__(
        self,
        *,
        start_deviation: float = 0.1,
        action_cost: float = 1.0,
        distance_cost: float = 0.1,
        goal_reward: float = 1.0,
        walls: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if type(walls) is not bool:
            raise ValueError(f"walls must be true or false, not {walls!r}")
        self.start_deviation = start_deviation
        self.action_cost, self.distance_cost, self.goal_reward = action_cost, distance_cost, goal_reward
        self.walls, self.render_mode = walls, render_mode
        self.first_actions = None if walls else GOALS / np.abs(GOALS).max()
        self.observation_space = Box(-LIMIT, LIMIT, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self._position = np.zeros(2, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._position = self.np_random.normal(0.0, self.start_deviation, 2).astype(np.float32)
        return self._position.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        target = np.clip(self._position + action, -LIMIT, LIMIT).astype(np.float32)
        self._position = _stopped_by_walls(self._position, target) if self.walls else target
        squared_distances = ((GOALS - self._position) ** 2).sum(-1)
        squared_distance = float(squared_distances.min())
        reward = -self.action_cost * float(np.square(action).sum()) - self.distance_cost * squared_distance
        terminated = squared_distance < GOAL_RADIUS**2
        mode = int(squared_distances.argmin()) if terminated else -1
        return self._position.copy(), reward + self.goal_reward * terminated, terminated, False, {"mode": mode}

    def render(self) -> np.ndarray | None:
        if self.render_mode != "rgb_array":
            return None
        center = (np.arange(_PIXELS) + 0.5) / _PIXELS * 2 * LIMIT - LIMIT
        plane = np.stack(np.meshgrid(center, -center), -1)
        picture = np.full((_PIXELS, _PIXELS, 3), 255, np.uint8)
        for goal in GOALS:
            picture[((plane - goal) ** 2).sum(-1) < GOAL_RADIUS**2] = (160, 215, 190)
        if self.walls:
            x, y = np.abs(plane[..., 0]), np.abs(plane[..., 1])
            picture[(np.abs(x - WALL_DISTANCE) < 0.07) & (y < WALL_HALF_LENGTH)] = (70, 70, 70)
        picture[((plane - self._position) ** 2).sum(-1) < 0.25**2] = (0, 114, 178)
        return picture


def _stopped_by_walls(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where a step from a position to a target [2] ends: there, or just in front of the first wall that it crosses."""
    (x, y), (to_x, to_y) = position.tolist(), target.tolist()
    walls = (WALL_DISTANCE, -WALL_DISTANCE) if x > to_x else (-WALL_DISTANCE, WALL_DISTANCE)
    for wall in walls:
        if (x < wall) == (to_x < wall):
            continue
        crossing = y + (to_y - y) * (wall - x) / (to_x - x)
        if abs(crossing) < WALL_HALF_LENGTH:
            return np.array((wall - _GAP if x < wall else wall + _GAP, crossing), np.float32)
    return target


def goals_reached(position: np.ndarray) -> np.ndarray:
    """Index of the goal within reach of each position [..., 2], -1 where there is none."""
    distance = ((position[..., None, :] - GOALS) ** 2).sum(-1)
    return np.where(distance.min(-1) < GOAL_RADIUS**2, distance.argmin(-1), -1)
