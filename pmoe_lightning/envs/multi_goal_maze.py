"""A maze with four or eight equally near goals, and sparse reward."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from pmoe_lightning.envs.point_maze import PointMaze

Level = Literal["simple", "medium", "hard"]
MAPS = {
    "simple": (
        "#######",
        "#G...G#",
        "#.#x#.#",
        "#..R..#",
        "#.#.#.#",
        "#G...G#",
        "#######",
    ),
    "medium": (
        "#########",
        "#G..x..G#",
        "#.##.##.#",
        "#.#...#.#",
        "#...R...#",
        "#.#...#.#",
        "#.##.##.#",
        "#G..x..G#",
        "#########",
    ),
    "hard": (
        "###############",
        "#......x......#",
        "#.#G###.###G#.#",
        "#.G####.####G.#",
        "#.#####.#####.#",
        "#.#####.#####.#",
        "#.####...####.#",
        "#......R......#",
        "#.####...####.#",
        "#.#####.#####.#",
        "#.#####.#####.#",
        "#.G####.####G.#",
        "#.#G###.###G#.#",
        "#......x......#",
        "###############",
    ),
}
FOUR_SIDES = np.array([(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)], np.float32)
HORIZONS = {"simple": 150, "medium": 300, "hard": 600}  # physics steps


class MultiGoalMaze(PointMaze):
    """``MultiGoalMaze-v0``: all goals are at the same distance from the start by a symmetry of the map.

    ======== ===== ============================================== =============
    level    goals cells from the start to each                   physics steps
    ======== ===== ============================================== =============
    simple   4     4, on either of two ways                       150
    medium   4     6, on either of two ways                       300
    hard     8     11, or 15 through the next arm                 600
    ======== ===== ============================================== =============

    Each goal is a mode, so the optimum of the return is a tie of all, exact to the last bit, and the maximum-entropy
    optimum visits each equally often. After the family of mazes of DrAC (2025, arXiv 2511.01374), whose maps are not
    public: these are our own.

    Args:
        level: see above.
        frame_skip, blocked, render_mode: see ``PointMaze``. With ``frame_skip=5``, the quick version, random actions
            find a goal now and then; with 1, as in the source, hardly ever.

    Raises:
        ValueError: an unknown level, or an argument that ``PointMaze`` refuses.
    """

    def __init__(
        self,
        *,
        level: Level = "simple",
        frame_skip: int = 1,
        blocked: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if level not in get_args(Level):
            raise ValueError(f"level must be one of {', '.join(get_args(Level))}, not {level!r}")
        super().__init__(
            MAPS[level], horizon=HORIZONS[level], frame_skip=frame_skip, blocked=blocked, render_mode=render_mode
        )
        self.num_modes = len(self._goals)
        self.first_actions = None if blocked else FOUR_SIDES

    def _mode(self, goal: int) -> int:
        return goal
