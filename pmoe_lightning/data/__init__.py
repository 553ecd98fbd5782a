"""Lightning data modules that collect experience with the policy being trained: replay for SAC, rollouts for PPO."""

from typing import TYPE_CHECKING

from pmoe_lightning.lazy import load_on_first_use

if TYPE_CHECKING:
    from pmoe_lightning.data.off_policy import OffPolicyData as OffPolicyData
    from pmoe_lightning.data.on_policy import OnPolicyData as OnPolicyData

#: The processes that collect need none of Lightning, which the data modules load.
_HOMES = {"OffPolicyData": "off_policy", "OnPolicyData": "on_policy"}

__all__ = ["OffPolicyData", "OnPolicyData"]
__getattr__ = load_on_first_use(__name__, _HOMES)
