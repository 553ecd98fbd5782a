"""The checkpoint that a run is resumed from."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pmoe_lightning.callbacks.reporting import warn_on_failure


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, except that what goes wrong while saving the end of a failed run is a warning.

    It would hide why the run failed. The end of a run that failed often cannot be saved: its weights are not finite,
    its disk is full, its environment broke in the middle of a rollout. The checkpoint before it stays.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with warn_on_failure("the end of the run was not saved"):
            super().on_exception(trainer, pl_module, exception)
