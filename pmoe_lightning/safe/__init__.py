"""The cost: what of it is allowed, the value that pays for it, and a policy that drops costly candidates."""

from pmoe_lightning.safe.candidates import SafePolicy, choose_safe
from pmoe_lightning.safe.constraint import CostConstraint, SafeValues, constrained_value

__all__ = ["CostConstraint", "SafePolicy", "SafeValues", "choose_safe", "constrained_value"]
