"""What an environment says of its modes: the ways in which an episode can succeed.

An environment names them with two things: ``num_modes``, their number N, at least 2, and ``info["mode"]`` at the last
step of an episode, an int from 0 to N - 1, or -1 where the episode succeeded in none. Everything else is optional:

* ``blocked``: whether some passages are closed; also an argument of the environment, which is trained open;
* ``start_deviation``: the noise of the start; also an argument, measured at 0, because noise alone reaches many modes;
* ``first_actions`` [W, A]: actions at the start that begin equally good ways, by a symmetry of the task;
* ``plane``: (left, right, bottom, top) of what the picture shows, where an observation begins with a position (x, y).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torchrl.envs import EnvBase


@dataclass(frozen=True)
class NamedModes:
    """What one environment says of its modes, see above."""

    number: int
    can_be_blocked: bool
    has_noisy_start: bool
    first_actions: np.ndarray | None
    plane: tuple[float, float, float, float] | None


def named_modes(env: EnvBase) -> NamedModes | None:
    """What the task of an ``AbstractEnvironment`` says of its modes; None where it does not name two or more."""
    task = getattr(env, "task", None)
    number = getattr(task, "num_modes", None)
    if not isinstance(number, int | np.integer) or number < 2:
        return None
    return NamedModes(
        number=int(number),
        can_be_blocked=hasattr(task, "blocked"),
        has_noisy_start=hasattr(task, "start_deviation"),
        first_actions=getattr(task, "first_actions", None),
        plane=getattr(task, "plane", None),
    )
