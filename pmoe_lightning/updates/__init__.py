"""Whole updates as compiled graphs: the mathematics of a loss module, its gradients and the optimizer step in one."""

from pmoe_lightning.updates.on_policy import OnPolicyUpdate

__all__ = ["OnPolicyUpdate"]
