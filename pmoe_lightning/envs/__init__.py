"""Environments: any Gymnasium environment with continuous actions, as one fast batched TorchRL environment."""

from gymnasium.envs.registration import register

from pmoe_lightning.envs.gymnasium import GymnasiumEnv, carried_entries, make_env, with_memory

__all__ = ["GymnasiumEnv", "carried_entries", "make_env", "with_memory"]

register("MultiGoal-v0", "pmoe_lightning.envs.multi_goal:MultiGoal", max_episode_steps=30)
