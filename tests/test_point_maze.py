"""The mazes of the point: their dynamics by hand, their walls, and that their ways are equal to the last bit."""

from __future__ import annotations

import time
from collections import deque

import gymnasium
import numpy as np
import pytest
from torchrl.envs.utils import check_env_specs

from pmoe_lightning.envs import make_env
from pmoe_lightning.envs.modes import named_modes
from pmoe_lightning.envs.multi_goal_maze import HORIZONS, MAPS, MultiGoalMaze
from pmoe_lightning.envs.point_maze import PointMaze, _cell
from pmoe_lightning.envs.two_routes import TwoRoutes
from pmoe_lightning.errors import ConfigurationError

IDENTITY = np.eye(2)
SQUARE = [
    np.diag(signs) @ axes for axes in (IDENTITY, IDENTITY[::-1]) for signs in ([1, 1], [-1, 1], [1, -1], [-1, -1])
]
ACROSS = [IDENTITY, np.diag([1, -1])]  # north and south change places
TASKS = [(lambda level=level: MultiGoalMaze(level=level, frame_skip=5), SQUARE) for level in MAPS]
TASKS += [(lambda: TwoRoutes(frame_skip=5), ACROSS)]


def distances(rows: tuple[str, ...], walls: str) -> list[int]:
    """Cells from R to every G, by breadth-first search that ends at goals."""
    start = next((y, row.index("R")) for y, row in enumerate(rows) if "R" in row)
    found, queue = {start: 0}, deque([start])
    while queue:
        y, x = queue.popleft()
        near = [] if rows[y][x] == "G" else [(y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)]
        for place in near:
            if place not in found and rows[place[0]][place[1]] not in walls:
                found[place] = found[y, x] + 1
                queue.append(place)
    return [number for (y, x), number in found.items() if rows[y][x] == "G"]


def test_all_goals_are_equally_far_and_can_be_reached_when_passages_are_blocked():
    assert [distances(MAPS[level], "#") for level in HORIZONS] == [[4] * 4, [6] * 4, [11] * 8]
    assert [sorted(set(distances(MAPS[level], "#x"))) for level in HORIZONS] == [[4], [6], [11, 15]]


@pytest.mark.parametrize(("make", "symmetries"), TASKS, ids=[*MAPS, "two_routes"])
def test_a_mirrored_or_turned_episode_is_the_mirror_image_to_the_last_bit(make, symmetries):
    """So that ways which the symmetry maps on each other have the same return, whatever the policy."""
    rng, ends = np.random.default_rng(0), [set() for _ in symmetries]
    for _ in range(30):
        # Pushes that last a while, half of them exactly along a diagonal: into walls, corners and goals.
        pushes = np.where(rng.random((40, 1)) < 0.5, rng.choice([-1.0, 1.0], (40, 2)), rng.uniform(-1, 1, (40, 2)))
        pushes = pushes.astype(np.float32).repeat(3, 0)
        envs = [make() for _ in symmetries]
        for env in envs:
            env.reset()
        for push in pushes:
            results = [env.step(push @ image) for env, image in zip(envs, symmetries, strict=True)]
            first = results[0][0]
            for (observation, *outcome, info), image, seen in zip(results, symmetries, ends, strict=True):
                np.testing.assert_array_equal(observation, np.concatenate([first[:2] @ image, first[2:] @ image]))
                assert outcome == list(results[0][1:4]) and (info["mode"] < 0) == (results[0][4]["mode"] < 0)
                seen.add(info["mode"])
            if results[0][2] or results[0][3]:
                break
    assert set().union(*ends) == set(range(-1, envs[0].num_modes))


def test_the_cell_of_the_mirror_image_is_the_mirror_image_of_the_cell():
    assert all(_cell(-x) == -_cell(x) for x in np.arange(0, 4, 0.25))  # at the borders between cells, too


def test_dynamics_by_hand():
    env = MultiGoalMaze()
    observation, _ = env.reset()
    assert observation.tolist() == [0.0] * 4
    observation, reward, terminated, truncated, info = env.step(np.array([1.0, -0.5], np.float32))
    velocity = 0.01 * 100 / 4.189 / (1 + 0.01 / 4.189) * np.array([1.0, -0.5])
    np.testing.assert_allclose(observation, [*(0.01 * velocity), *velocity], rtol=1e-6)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"mode": -1})
    second = (velocity + 0.01 * 100 / 4.189 * np.array([1.0, 0.0])) / (1 + 0.01 / 4.189)
    observation, *_ = env.step(np.array([1.0, 0.0], np.float32))
    np.testing.assert_allclose(observation, [*(0.01 * (velocity + second)), *second], rtol=1e-6)


def test_walls_stop_one_axis_and_the_point_slides_along_them():
    env = TwoRoutes()
    env.reset()
    for _ in range(40):
        observation, *_ = env.step(np.array([1.0, 0.2], np.float32))
    x, y, vx, vy = observation.tolist()
    assert 1.35 < x <= 1.4 and vx == 0.0  # half of the ring's width less the radius
    assert y > 0.1 and vy > 0.5
    rng, env = np.random.default_rng(1), MultiGoalMaze(level="medium", blocked=True)
    env.reset()
    for push in rng.uniform(-1, 1, (60, 2)).astype(np.float32).repeat(10, 0):
        observation, _, terminated, truncated, _ = env.step(push)
        corners = observation[:2] + np.array([(sx, sy) for sx in (-0.1, 0.1) for sy in (-0.1, 0.1)]) * 0.999
        rows = [env.cells[len(env.cells) // 2 - _cell(y)][_cell(x) + len(env.cells[0]) // 2] for x, y in corners]
        assert not set("#x") & set(rows)
        if terminated or truncated:
            env.reset()


@pytest.mark.parametrize(("vx", "vy", "moves"), [(3.0, 1.0, "x"), (1.0, 3.0, "y"), (2.0, 2.0, "")])
def test_at_a_corner_the_faster_axis_goes_on(vx, vy, moves):
    env = MultiGoalMaze()  # with a wall at 0.5 < x, y < 1.5, where only both steps together would enter it
    env.reset()
    env._x = env._y = 0.395
    env._vx, env._vy = vx, vy
    env._move(0.0, 0.0)
    assert (env._x > 0.395, env._y > 0.395) == (moves == "x", moves == "y")
    assert (env._vx > 0, env._vy > 0) == (moves == "x", moves == "y")


def drive(env: PointMaze, *pushes: tuple[float, float, int]) -> tuple:
    """The last step of pushes (x, y, number), and how many were made."""
    env.reset()
    made = 0
    for x, y, number in pushes:
        for _ in range(number):
            result = env.step(np.array([x, y], np.float32))
            made += 1
            if result[2] or result[3]:
                return result, made
    return result, made


def test_a_goal_ends_the_episode_at_once_and_says_which():
    to_goals = {0: (-1, 1), 1: (1, 1), 2: (-1, -1), 3: (1, -1)}  # row by row
    for mode, (x, y) in to_goals.items():
        for frame_skip in (1, 5):
            (_, reward, terminated, truncated, info), made = drive(
                MultiGoalMaze(frame_skip=frame_skip), (x, 0, 70 // frame_skip), (x, y, 80 // frame_skip)
            )
            assert (reward, terminated, truncated, info["mode"]) == (100.0, True, False, mode)
            assert made * frame_skip < 150
    (_, reward, terminated, truncated, info), made = drive(MultiGoalMaze(frame_skip=4), (0, 0, 1000))
    assert (reward, terminated, truncated, info["mode"], made) == (0.0, False, True, -1, 38)  # 150 physics steps


def test_the_routes_are_the_sides_and_one_can_be_closed():
    north = [(0, 1, 60), (-1, 1, 60), (-1, -1, 60)]
    for sign, mode in ((1, 0), (-1, 1)):
        route = [(x, sign * y, number) for x, y, number in north]
        (_, _, terminated, _, info), _ = drive(TwoRoutes(), *route)
        assert terminated and info["mode"] == mode
        (_, _, terminated, _, info), _ = drive(TwoRoutes(blocked=True), *route)
        assert terminated == (mode == 1) and info["mode"] == (1 if mode == 1 else -1)


@pytest.mark.parametrize("id", ["MultiGoalMaze-v0", "TwoRoutes-v0"])
def test_they_are_torchrl_environments_that_name_their_modes(id):
    env = make_env(id, num_envs=2, seed=0, frame_skip=5)
    check_env_specs(env)
    named = named_modes(env)
    assert named.can_be_blocked and not named.has_noisy_start
    assert named.number == len(named.first_actions) == (2 if id == "TwoRoutes-v0" else 4)
    assert named_modes(make_env(id, blocked=True)).first_actions is None  # no longer equal
    assert env.seconds_per_step == 0.05


def test_the_picture_shows_the_map_and_the_point():
    env = gymnasium.make("MultiGoalMaze-v0", render_mode="rgb_array", disable_env_checker=True)
    env.reset()
    picture = env.render()
    assert picture.shape == (280, 280, 3) and picture.dtype == np.uint8
    rows, columns = np.nonzero((picture == np.array([0, 114, 178])).all(-1))
    assert rows.mean() == columns.mean() == 139.5 and len(rows) == pytest.approx(np.pi * 16, rel=0.1)
    goals = (picture == np.array([160, 215, 190])).all(-1).reshape(7, 40, 7, 40).all((1, 3))
    assert sorted(zip(*np.nonzero(goals), strict=True)) == [(1, 1), (1, 5), (5, 1), (5, 5)]
    assert (picture[100, 140] != 70).all()  # an open passage
    closed = gymnasium.make("MultiGoalMaze-v0", render_mode="rgb_array", blocked=True, disable_env_checker=True)
    closed.reset()
    assert (closed.render()[100, 140] == 70).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "easy"}, "level must be one of simple, medium, hard, not 'easy'"),
        ({"frame_skip": 0}, "frame_skip must be a whole number from 1 to 150, not 0"),
        ({"frame_skip": 2.5}, "frame_skip must be a whole number from 1 to 150, not 2.5"),
        ({"blocked": "no"}, "blocked must be true or false, not 'no'"),
    ],
)
def test_arguments_that_make_no_maze_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        make_env("MultiGoalMaze-v0", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"frame_skip": 5}, {"level": "hard", "frame_skip": 5}])
def test_they_make_fifty_thousand_steps_per_cpu_second(arguments):
    env, rates = MultiGoalMaze(**arguments), []
    pushes = np.random.default_rng(0).uniform(-1, 1, (20_000, 2)).astype(np.float32)
    for _ in range(3):
        env.reset()
        start = time.process_time()
        for push in pushes:
            _, _, terminated, truncated, _ = env.step(push)
            if terminated or truncated:
                env.reset()
        rates.append(len(pushes) / (time.process_time() - start))
    assert max(rates) > 50_000
