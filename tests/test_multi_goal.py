"""The multi-goal task: its dynamics and reward by hand, and as a TorchRL environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from pmoe_lightning.envs import make_env
from pmoe_lightning.envs.multi_goal import GOALS, MultiGoal, goals_reached


def test_it_is_a_torchrl_environment():
    env = make_env("MultiGoal-v0", num_envs=3, seed=0)
    check_env_specs(env)
    rollout = env.rollout(40, break_when_any_done=False)
    assert rollout["action"].shape == (3, 40, 2) and rollout["observation"].abs().max() <= 7
    lengths = rollout["next", "episode_length"][rollout["next", "done"]]
    assert lengths.max() <= 30


def test_reward_and_dynamics_by_hand():
    env = MultiGoal(action_cost=2.0, distance_cost=0.5, goal_reward=10.0, start_deviation=0.0)
    observation, _ = env.reset(seed=0)
    assert observation.tolist() == [0.0, 0.0]
    observation, reward, terminated, truncated, _ = env.step(np.array([1.0, 0.5], np.float32))
    assert observation.tolist() == [1.0, 0.5]
    # nearest goal (5, 0): 16.25 away in square; |a|^2 = 1.25
    assert reward == pytest.approx(-2.0 * 1.25 - 0.5 * 16.25)
    assert not terminated and not truncated
    for _ in range(3):
        observation, reward, terminated, _, _ = env.step(np.array([1.0, 0.0], np.float32))
        assert not terminated  # (4, 0.5) is more than 1 away
    observation, reward, terminated, _, _ = env.step(np.array([0.0, -0.1], np.float32))
    assert not terminated and observation.tolist() == pytest.approx([4.0, 0.4])
    observation, reward, terminated, _, _ = env.step(np.array([0.5, 0.0], np.float32))
    assert terminated and reward == pytest.approx(-2.0 * 0.25 - 0.5 * (0.25 + 0.16) + 10.0)


def test_the_goal_is_the_mode():
    for mode, goal in enumerate(GOALS / 5):
        env = MultiGoal(start_deviation=0.0)
        env.reset()
        infos = [env.step(goal)[-1] for _ in range(5)]
        assert [info["mode"] for info in infos] == [-1, -1, -1, -1, mode]
        np.testing.assert_array_equal(env.first_actions[mode], goal)


def test_walls_stand_before_two_of_the_goals():
    for x, y, stops in ((1, 0, True), (-1, 0, True), (0, 1, False), (0, -1, False)):
        env = MultiGoal(start_deviation=0.0, walls=True)
        env.reset()
        for _ in range(5):
            observation, _, terminated, _, info = env.step(np.array([x, y], np.float32))
        assert terminated != stops and (info["mode"] < 0) == stops
        if stops:
            assert observation.tolist() == pytest.approx([2.499 * x, 0.0])
    env = MultiGoal(start_deviation=0.0, walls=True)
    env.reset()
    for action in [(0.9, 1.0), (0.9, 1.0)]:
        observation, *_ = env.step(np.array(action, np.float32))
    observation, *_ = env.step(np.array([1.0, -0.5], np.float32))  # from (1.8, 2) it would cross x = 2.5 at y = 1.65
    assert observation.tolist() == pytest.approx([2.499, 1.65])
    observation, *_ = env.step(np.array([-1.0, 0.0], np.float32))  # and back, where nothing stands
    assert observation.tolist() == pytest.approx([1.499, 1.65])
    env.step(np.array([0.5, 1.0], np.float32))
    observation, *_ = env.step(np.array([1.0, 0.0], np.float32))  # past the end of the wall
    assert observation.tolist() == pytest.approx([2.999, 2.65])
    assert env.first_actions is None  # the ways to these two are longer


def test_the_plane_has_borders_and_the_start_is_seeded():
    env = MultiGoal(start_deviation=0.1)
    first, second = (env.reset(seed=3)[0].tolist() for _ in range(2))
    assert first == second and np.abs(first).max() < 0.6
    for _ in range(12):
        observation, *_ = env.step(np.array([1.0, 1.0], np.float32))
    assert observation.tolist() == [7.0, 7.0]


def test_goals_reached():
    positions = np.array([[5.0, 0.9], [-4.2, 0.0], [0.0, 4.0], [0.3, -5.3], [0.0, 0.0]], np.float32)
    assert goals_reached(positions).tolist() == [0, 1, -1, 3, -1]
    assert goals_reached(GOALS).tolist() == [0, 1, 2, 3]


def test_the_picture_shows_the_point_and_the_goals():
    env = MultiGoal(render_mode="rgb_array", start_deviation=0.0)
    env.reset(seed=0)
    before = env.render()
    assert before.shape == (240, 240, 3) and before.dtype == np.uint8
    blue = (before == np.array([0, 114, 178])).all(-1)
    rows, columns = np.nonzero(blue)
    assert abs(rows.mean() - 119.5) < 1 and abs(columns.mean() - 119.5) < 1
    env.step(np.array([1.0, 1.0], np.float32))
    rows, columns = np.nonzero((env.render() == np.array([0, 114, 178])).all(-1))
    assert rows.mean() < 110 and columns.mean() > 130  # up and to the right


def test_actions_are_clipped_by_the_environment_around_it():
    env = make_env("MultiGoal-v0", num_envs=1, seed=0, start_deviation=0.0)
    root = env.reset()
    step, _ = env.step_and_maybe_reset(root.set("action", torch.tensor([[3.0, 0.0]])))
    assert step["next", "observation"].tolist() == [[1.0, 0.0]]
