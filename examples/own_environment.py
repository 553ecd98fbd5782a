"""An environment of one's own, trained by the train command.

    PYTHONPATH=examples python -m pmoe_lightning.train algo=sac env=own_environment:Fork-v0 total_frames=10000

``module:Id`` imports the module first, which registers the id. Nothing else is needed: any Gymnasium environment with a
bounded vector of actions can be trained, and every argument of its constructor set: ``+env.obstacle=0.5``.

A resumed run goes on exactly where the environment keeps plain values, arrays, random generators and environments, as
this one does. With anything else in it, it offers ``get_state()`` and ``set_state(state)``: docs/reliability.md.
"""

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Fork(gymnasium.Env):
    """A point that walks to the right and has to pass an obstacle in the middle: above it or below it.

    Observation: position (x, y) [2]. Action: velocity [2] in [-1, 1]. The reward of a step is the way made to the
    right; hitting the obstacle costs 1 and ends the episode. Both ways round are equally good, straight on is not.

    Args:
        obstacle: its radius.
    """

    observation_space = Box(-2.0, 2.0, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, obstacle: float = 0.4) -> None:
        self.obstacle = obstacle

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = np.array([-1.0, self.np_random.uniform(-0.1, 0.1)], np.float32)
        return self.position.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        before = self.position[0]
        self.position = np.clip(self.position + 0.1 * action, -2.0, 2.0).astype(np.float32)
        has_hit = bool(np.hypot(*self.position) < self.obstacle)
        reward = float(self.position[0] - before) - has_hit
        return self.position.copy(), reward, has_hit or bool(self.position[0] >= 1), False, {}


gymnasium.register("Fork-v0", Fork, max_episode_steps=60)
