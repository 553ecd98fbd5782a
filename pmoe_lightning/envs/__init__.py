"""Environments: what others ask of one, and any Gymnasium environment with continuous actions as such a one."""

from gymnasium.envs.registration import register

from pmoe_lightning.envs.base import AbstractEnvironment, carried_entries, with_memory
from pmoe_lightning.envs.gymnasium import GymnasiumEnv, make_env

__all__ = ["AbstractEnvironment", "GymnasiumEnv", "carried_entries", "make_env", "with_memory"]

register("MultiGoal-v0", "pmoe_lightning.envs.multi_goal:MultiGoal", max_episode_steps=30)
register("MultiGoalMaze-v0", "pmoe_lightning.envs.multi_goal_maze:MultiGoalMaze")
register("TwoRoutes-v0", "pmoe_lightning.envs.two_routes:TwoRoutes")
