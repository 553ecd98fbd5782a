"""Whole updates as compiled graphs: the mathematics of a loss module, its gradients and the optimizer step in one."""

from pmoe_lightning.updates.on_policy import OnPolicyUpdate
from pmoe_lightning.updates.sac import SACUpdate

__all__ = ["OnPolicyUpdate", "SACUpdate"]
