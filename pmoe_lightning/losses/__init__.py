"""Drop-in TorchRL loss modules for mixture policies."""

from pmoe_lightning.losses.dac import DACLoss
from pmoe_lightning.losses.ppo import PMOEPPOLoss
from pmoe_lightning.losses.sac import PMOESACLoss
from pmoe_lightning.losses.safe_sac import SafeSACLoss

__all__ = ["DACLoss", "PMOEPPOLoss", "PMOESACLoss", "SafeSACLoss"]
