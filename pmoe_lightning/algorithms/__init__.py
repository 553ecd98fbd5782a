"""LightningModules that optimise, and nothing else: data reach them as TensorDict batches."""

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.algorithms.dac import DAC, make_dac
from pmoe_lightning.algorithms.ppo import PPO, make_ppo
from pmoe_lightning.algorithms.sac import SAC, make_sac

__all__ = ["DAC", "PPO", "SAC", "AbstractAlgorithm", "make_dac", "make_ppo", "make_sac"]
