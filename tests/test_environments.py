"""Environments that other packages register train, are filmed and resumed, exactly or with a line that says why not."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
from test_dm_control import actions, play, saved_and_read
from test_resume import differing, state_of

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.envs import GymnasiumEnv, make_env
from pmoe_lightning.envs.object_parts import NotCaptured
from pmoe_lightning.envs.simulator_state import capture
from pmoe_lightning.errors import ConfigurationError

pytestmark = pytest.mark.environments
ROBOTICS = ["PointMaze_UMaze-v3", "AntMaze_UMaze-v5", "FetchPush-v4", "AdroitHandDoor-v1"]
ALSO_EXACT = ["PointMaze_Medium_Diverse_GR-v3", "AntMaze_Medium_Diverse_G-v5", "FetchReach-v4", "FetchSlide-v4"]
ALSO_EXACT += ["FetchPickAndPlace-v4", "AdroitHandPen-v1", "AdroitHandHammer-v1", "AdroitHandRelocate-v1"]
ALSO_EXACT += ["HandReach-v3", "HandManipulateEgg_BooleanTouchSensors-v1"]
BEGIN_ANEW = ["env=pybullet_envs_gymnasium:HopperBulletEnv-v0", "env=metaworld:Meta-World/MT1 +env.env_name=reach-v3"]
TINY = ["algo=sac", "algo.hidden_sizes=[8]", "data.batch_size=8", "data.init_random_frames=500", "compile=false"]
TINY += ["data.frames_per_epoch=1008", "logger=none", "callbacks=[metrics,checkpoint_last,final_policy]"]
TINY += ["callbacks.final_policy.video_frames=4"]
GREETINGS = ("argv[0]=", "pybullet build time")


def trained(train, words: list[str], frames: int, capfd) -> str:
    """Train, and see the film; returns all that was said, by C too."""
    capfd.readouterr()
    said = train(*TINY, *words, f"total_frames={frames}")
    said += "".join(capfd.readouterr())
    assert "no video" not in said
    assert len(imageio.mimread(Path("run", "checkpoints", "last.mp4"), memtest=False)) >= 2
    return said


@pytest.mark.parametrize("words", BEGIN_ANEW)
def test_it_trains_2000_frames_is_filmed_and_resumed(words: str, train, capfd) -> None:
    said = trained(train, [*words.split(), "hydra.run.dir=run"], 1008, capfd)
    said += trained(train, [*words.split(), "resume=run"], 2000, capfd)
    assert "starts a new episode" in said and "cannot be captured" in said
    assert not any(greeting in said for greeting in GREETINGS)
    assert read_checkpoint(Path("run", "checkpoints", "last.ckpt"))["policy"]["env_frames"] == 2000


@pytest.mark.parametrize("id", ROBOTICS)
def test_it_trains_2000_frames_is_filmed_and_goes_on_bit_for_bit(id: str, train, capfd) -> None:
    words = [f"env=gymnasium_robotics:{id}", "+env.max_episode_steps=150"]
    trained(train, [*words, "hydra.run.dir=run"], 1008, capfd)
    said = trained(train, [*words, "resume=run"], 2000, capfd)
    assert "new episode" not in said
    train(*TINY, *words, "total_frames=2000", "callbacks.final_policy.video=false", "hydra.run.dir=whole")
    found = differing(state_of(Path("whole")), state_of(Path("run")))
    # A maze writes its model into a file that is named by the time, reads it once, and keeps the name.
    assert [where for where in found if not where.endswith((".tmp_xml_file_path", ".fullpath"))] == []


@pytest.mark.parametrize("id", ROBOTICS + ALSO_EXACT)
def test_it_goes_on_bit_for_bit_through_resets(id: str) -> None:
    """Which move goals, objects and doors: parts of the model that a restore puts back as well."""
    env, other = (make_env(f"gymnasium_robotics:{id}", num_envs=2, seed=seed, max_episode_steps=25) for seed in (3, 99))
    env.reset(), other.reset()
    begun = saved_and_read(env)
    acts = actions(env, 100)
    first = play(env, acts[:33])
    state = saved_and_read(env)
    rest = play(env, acts[33:])
    play(other, acts[:3])
    for saved, expected, after in ((state, rest, acts[33:]), (begun, first, acts[:33])):
        assert other.load_simulator_state(saved) is None
        for ours, again in zip(expected, play(other, after), strict=True):
            np.testing.assert_array_equal(ours, again)


def test_a_subclass_of_ones_own_goes_on_exactly_or_is_refused() -> None:
    from gymnasium_robotics.envs.maze.maze_v4 import Maze
    from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

    class Counting(PointMazeEnv):
        """Its noise is its own, and its walls become taller."""

        def reset(self, **given):
            self.noise = np.random.default_rng(5) if not hasattr(self, "noise") else self.noise
            return super().reset(**given)

        def step(self, action):
            self.maze._maze_height += 0.25
            observed, reward, *ends, info = super().step(action)
            return observed, reward + self.noise.normal() + self.maze.maze_height, *ends, info

    class Known(Maze):
        pass

    class Drawn(PointMazeEnv):
        def reset(self, **given):
            self.maze = Known(*(getattr(self.maze, f"_maze_{name}") for name in ("map", "size_scaling", "height")))
            return PointMazeEnv.reset(self, **given) if self.maze.unique_goal_locations else ({}, {})

    envs = [GymnasiumEnv([gymnasium.wrappers.TimeLimit(Counting(), 25)], seed=seed) for seed in (0, 1)]
    for env in envs:
        env.reset()
    acts = actions(envs[0], 60)
    play(envs[0], acts[:9]), play(envs[1], acts[:4])
    assert envs[1].load_simulator_state(saved_and_read(envs[0])) is None
    for ours, again in zip(play(envs[0], acts[9:]), play(envs[1], acts[9:]), strict=True):
        np.testing.assert_array_equal(ours, again)
    own = Drawn()
    own.reset(seed=0)
    with pytest.raises(NotCaptured, match=r"^Drawn\.maze is a .*Known$"):
        capture([own])


def test_metaworlds_goals_come_from_the_seed() -> None:
    make = {"id": "metaworld:Meta-World/MT1", "env_name": "push-v3"}
    first, second = make_env(**make, num_envs=2, seed=4), make_env(**make, num_envs=1, seed=5)
    for _ in range(2):  # the first from the seed, the next from what follows
        first.reset(), second.reset()
        goals = [env.unwrapped._target_pos.tolist() for env in (*first.envs, *second.envs)]
        assert goals[1] == goals[2] != goals[0]


@pytest.mark.parametrize("id", ["metaworld:Meta-World/MT1", "metaworld:reach-v3", "reach-v3"])
def test_how_metaworld_is_written_is_one_line(id: str) -> None:
    written = r"--no-deps metaworld==3.1.1, .* env.id=metaworld:Meta-World/MT1 \+env.env_name=reach-v3"
    with pytest.raises(ConfigurationError, match=written) as caught:
        make_env(id)
    assert "\n" not in str(caught.value)


def test_the_versions_are_those_that_are_documented() -> None:
    assert (version("metaworld"), version("mujoco")) == ("3.1.1", "3.11.0")
