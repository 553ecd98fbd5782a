"""A point mass among square cells: the dynamics and the rules of an episode that the mazes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box

TIME_STEP = 0.01  # s
MASS = 4.189  # kg, a sphere of radius 0.1 m and density 1000 kg/m^3
FORCE = 100.0  # N per unit of action
RADIUS = 0.1  # m
TOP_SPEED = 5.0  # m/s, before a step
REWARD = 100.0
_SPEED_BOUND = (TOP_SPEED + TIME_STEP * FORCE / MASS) / (1 + TIME_STEP / MASS)
_COLORS = {"#": (70, 70, 70), "x": (190, 190, 190), "G": (160, 215, 190), ".": (255, 255, 255)}
_POINT = (0, 114, 178)
_PIXELS = 40  # of the side of a cell


class PointMaze(gymnasium.Env):
    r"""A point that is pushed through a maze of cells of 1 m towards any of its goals; reward at the goal alone.

    The dynamics are those of the point of Gymnasium-Robotics' mazes, a damped sphere, in closed form. With action a in
    [-1, 1]^2, m = 4.189 kg, dt = 0.01 s, and for each of the two axes:

        v <- (clip(v, -5, 5) + dt 100 a / m) / (1 + dt / m),    x <- x + dt v

    A square of half-width 0.1 m around the point never enters a wall. Where a step would take it into one, the axis
    along which it alone could go on goes on and the other one stops (v = 0); at a corner, where either could, the
    faster one does, and of two equally fast ones neither.

    The origin is the centre of the map, and every rule treats (x, y), (-x, y), (x, -y) and (y, x) alike to the last
    bit: where the map has a symmetry, equally good ways are exactly equal.

    The point starts at rest at the centre of the cell R. In a goal cell G the episode ends with reward 100; everywhere
    else the reward is 0. Observation: (x, y, v_x, v_y), float32.

    Args:
        cells: rows of the map from north to south: ``#`` wall, ``.`` free, ``R`` start, ``G`` goal, ``x`` a passage
            that ``blocked`` closes. Both sides are odd.
        horizon: physics steps until an episode is truncated.
        frame_skip: physics steps of one step, which ends at once in a goal.
        blocked: close the passages ``x``.
        render_mode: ``rgb_array`` draws the map and the point.

    Raises:
        ValueError: ``frame_skip`` is not a whole number from 1 to ``horizon``, or ``blocked`` is not true or false.
    """

    metadata = {"render_modes": ["rgb_array"]}
    num_modes: int
    _STATE: ClassVar[tuple[str, ...]] = ("_x", "_y", "_vx", "_vy", "_time")

    def __init__(
        self, cells: Sequence[str], *, horizon: int, frame_skip: int, blocked: bool, render_mode: str | None
    ) -> None:
        if type(frame_skip) is not int or not 1 <= frame_skip <= horizon:
            raise ValueError(f"frame_skip must be a whole number from 1 to {horizon}, not {frame_skip!r}")
        if type(blocked) is not bool:
            raise ValueError(f"blocked must be true or false, not {blocked!r}")
        self.cells, self.frame_skip, self.blocked, self.render_mode = tuple(cells), frame_skip, blocked, render_mode
        self.horizon = horizon
        east, north = len(cells[0]) // 2, len(cells) // 2
        places = {(x - east, north - y): cell for y, row in enumerate(cells) for x, cell in enumerate(row)}
        walls = "#x" if blocked else "#"
        self._free = [[places[x, y] not in walls for y in _signed(north)] for x in _signed(east)]
        self._goals = [place for place, cell in places.items() if cell == "G"]
        (self._start,) = (place for place, cell in places.items() if cell == "R")
        self.plane = (-east - 0.5, east + 0.5, -north - 0.5, north + 0.5)
        bound = np.array([east + 0.5, north + 0.5, _SPEED_BOUND, _SPEED_BOUND], np.float32)
        self.observation_space = Box(-bound, bound, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self._x = self._y = self._vx = self._vy = 0.0
        self._time = 0

    @property
    def dt(self) -> float:
        """Simulated seconds of a step."""
        return TIME_STEP * self.frame_skip

    @abstractmethod
    def _mode(self, goal: int) -> int:
        """The mode of an episode that ends in this goal, counted from the north-west, row by row."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._x, self._y = map(float, self._start)
        self._vx = self._vy = 0.0
        self._time = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        push_x, push_y = (TIME_STEP * FORCE / MASS * float(a) for a in action)
        for _ in range(min(self.frame_skip, self.horizon - self._time)):
            self._move(push_x, push_y)
            self._time += 1
            cell = _cell(self._x), _cell(self._y)
            if cell in self._goals:
                mode = self._mode(self._goals.index(cell))
                return self._observation(), REWARD, True, False, {"mode": mode}
        return self._observation(), 0.0, False, self._time >= self.horizon, {"mode": -1}

    def _move(self, push_x: float, push_y: float) -> None:
        """One physics step, see the class."""
        decay = 1 + TIME_STEP / MASS
        vx = (min(max(self._vx, -TOP_SPEED), TOP_SPEED) + push_x) / decay
        vy = (min(max(self._vy, -TOP_SPEED), TOP_SPEED) + push_y) / decay
        x, y = self._x + TIME_STEP * vx, self._y + TIME_STEP * vy
        if not self._fits(x, y):
            along_x, along_y = self._fits(x, self._y), self._fits(self._x, y)
            if along_x and along_y:
                along_x, along_y = abs(vx) > abs(vy), abs(vy) > abs(vx)
            x, vx = (x, vx) if along_x else (self._x, 0.0)
            y, vy = (y, vy) if along_y else (self._y, 0.0)
        self._x, self._y, self._vx, self._vy = x, y, vx, vy

    def _fits(self, x: float, y: float) -> bool:
        """Whether the square around the point has all of its corners in free cells."""
        west, east = self._free[_cell(x - RADIUS)], self._free[_cell(x + RADIUS)]
        south, north = _cell(y - RADIUS), _cell(y + RADIUS)
        return west[south] and west[north] and east[south] and east[north]

    def _observation(self) -> np.ndarray:
        return np.array((self._x, self._y, self._vx, self._vy), np.float32)

    def get_state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, see ``envs.simulator_state``."""
        return {name: getattr(self, name) for name in self._STATE}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`get_state` was called."""
        for name in self._STATE:
            setattr(self, name, state[name])

    def render(self) -> np.ndarray | None:
        if self.render_mode != "rgb_array":
            return None
        colors = _COLORS | {"R": _COLORS["."], "x": _COLORS["#" if self.blocked else "x"]}
        cells = np.array([[colors[cell] for cell in row] for row in self.cells], np.uint8)
        picture = cells.repeat(_PIXELS, 0).repeat(_PIXELS, 1)
        left, _, _, top = self.plane
        row, column = np.indices(picture.shape[:2])
        x, y = left + (column + 0.5) / _PIXELS, top - (row + 0.5) / _PIXELS
        picture[(x - self._x) ** 2 + (y - self._y) ** 2 < RADIUS**2] = _POINT
        return picture


def _cell(coordinate: float) -> int:
    """The place, counted from the centre, of the cell that holds a coordinate; of -x it is that of x with the sign."""
    return int(coordinate + 0.5) if coordinate >= 0 else -int(0.5 - coordinate)


def _signed(half: int) -> list[int]:
    """0, 1, .., half, -half, .., -1: a list over these can be indexed by the place itself, from -half to half."""
    return [*range(half + 1), *range(-half, 0)]
