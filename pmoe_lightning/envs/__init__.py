"""Environments: what others ask of one, and Gymnasium's and the DeepMind Control Suite's as such ones."""

from collections.abc import Callable

from gymnasium.envs.registration import register

from pmoe_lightning.envs.base import AbstractEnvironment, carried_entries, with_memory
from pmoe_lightning.envs.dm_control import DMControlEnv, make_dm_control
from pmoe_lightning.envs.gymnasium import GymnasiumEnv, make_env

__all__ = [
    "MAKERS",
    "AbstractEnvironment",
    "DMControlEnv",
    "GymnasiumEnv",
    "carried_entries",
    "make_dm_control",
    "make_env",
    "with_memory",
]

#: What makes the environments of each choice of ``conf/env``; a checkpoint names one that is not the first.
MAKERS: dict[str, Callable[..., AbstractEnvironment]] = {"gymnasium": make_env, "dm_control": make_dm_control}

register("MultiGoal-v0", "pmoe_lightning.envs.multi_goal:MultiGoal", max_episode_steps=30)
register("MultiGoalMaze-v0", "pmoe_lightning.envs.multi_goal_maze:MultiGoalMaze")
register("TwoRoutes-v0", "pmoe_lightning.envs.two_routes:TwoRoutes")
