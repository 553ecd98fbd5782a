"""Environments: any Gymnasium environment with continuous actions, as one fast batched TorchRL environment."""

from pmoe_lightning.envs.gymnasium import GymnasiumEnv, make_env

__all__ = ["GymnasiumEnv", "make_env"]
