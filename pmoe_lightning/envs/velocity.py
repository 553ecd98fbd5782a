"""The cost of moving too fast, from what Gymnasium's MuJoCo tasks report of every step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pmoe_lightning.errors import ConfigurationError

#: In m/s; half of what PPO reached after 1e7 steps. Safety-Gymnasium (Ji et al. 2023, arXiv 2310.12567), tasks
#: Safety<Name>Velocity-v1, files safety_gymnasium/tasks/safe_velocity/*_v1.py of its repository.
PUBLISHED_LIMITS = {
    "Ant": 2.6222,
    "HalfCheetah": 3.2096,
    "Hopper": 0.7402,
    "Humanoid": 1.4149,
    "Swimmer": 0.2282,
    "Walker2d": 2.3415,
}


class VelocityCost:
    """1 for a step that is faster than the limit, otherwise 0.

        cost = 1[v > limit],    v = x_velocity, or sqrt(x_velocity^2 + y_velocity^2) where the task reports both

    So do Safety-Gymnasium's velocity tasks. A task that moves along a line is limited forwards only; of a swimmer,
    which swings sideways to move at all, only x_velocity counts.

    Args:
        env_id: Gymnasium id.
        limit: in m/s, or ``published``: that of the task in ``PUBLISHED_LIMITS``.

    Raises:
        ConfigurationError: no limit is published for this task, or the number is not positive; when called, the
            environment does not report ``x_velocity``.
    """

    def __init__(self, env_id: str, limit: float | str) -> None:
        self.env_id, self._task = env_id, re.sub(r"-v\d+$", "", env_id)
        if limit == "published":
            if self._task not in PUBLISHED_LIMITS:
                known = ", ".join(PUBLISHED_LIMITS)
                raise ConfigurationError(
                    f"no velocity limit is published for {env_id}, only for {known}: set env.velocity_limit in m/s"
                )
            limit = PUBLISHED_LIMITS[self._task]
        if isinstance(limit, str | bool) or not 0 < limit < math.inf:
            raise ConfigurationError(f"env.velocity_limit={limit} must be a positive number, in m/s, or 'published'")
        self.limit = float(limit)

    def __call__(self, info: Mapping[str, Any]) -> float:
        if "x_velocity" not in info:
            raise ConfigurationError(
                f"environment {self.env_id} does not report x_velocity, so its velocity cannot be limited: use a "
                "MuJoCo locomotion task, or safe=none with env.velocity_limit=null"
            )
        velocity = info["x_velocity"]
        if "y_velocity" in info and self._task != "Swimmer":
            velocity = math.hypot(velocity, info["y_velocity"])
        return float(velocity > self.limit)
