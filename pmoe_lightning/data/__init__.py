"""Lightning data modules that collect experience with the policy being trained: replay for SAC, rollouts for PPO."""

from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.on_policy import OnPolicyData

__all__ = ["OffPolicyData", "OnPolicyData"]
