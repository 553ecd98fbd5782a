"""One goal and two equally long routes to it."""

from __future__ import annotations

import numpy as np

from pmoe_lightning.envs.point_maze import PointMaze

MAP = (
    "#####",
    "#.x.#",
    "#G#R#",
    "#...#",
    "#####",
)
HORIZON = 150  # physics steps
NORTH, SOUTH = 0, 1
NORTH_OR_SOUTH = np.array([(0.0, 1.0), (0.0, -1.0)], np.float32)


class TwoRoutes(PointMaze):
    """``TwoRoutes-v0``: a ring around one block, the start in its east, the goal in its west.

    The mode of an episode that reaches the goal is the side on which it entered the western half, x < 0, for the last
    time: 0 north, 1 south. Both are exactly equal, because the map is its own mirror image. After the ant of DDiffPG
    (2024), version 1, with the point of ``PointMaze``.

    Args:
        frame_skip, blocked, render_mode: see ``PointMaze``; ``blocked`` closes the northern route.

    Raises:
        ValueError: an argument that ``PointMaze`` refuses.
    """

    num_modes = 2
    _STATE = (*PointMaze._STATE, "_side")

    def __init__(self, *, frame_skip: int = 1, blocked: bool = False, render_mode: str | None = None) -> None:
        super().__init__(MAP, horizon=HORIZON, frame_skip=frame_skip, blocked=blocked, render_mode=render_mode)
        self.first_actions = None if blocked else NORTH_OR_SOUTH
        self._side = NORTH

    def _move(self, push_x: float, push_y: float) -> None:
        was_east = self._x >= 0
        super()._move(push_x, push_y)
        if was_east and self._x < 0:
            self._side = NORTH if self._y > 0 else SOUTH

    def _mode(self, goal: int) -> int:
        return self._side
