"""The checkpoint from which a run goes on."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pmoe_lightning.stopping import Interrupted


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, for the state at the end of every epoch and at the end of the run.

    A run that breaks off saves its state too. With several processes only where it was stopped by a signal, which all
    of them follow: saving takes every process, and of an error in one the others know nothing.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1 or isinstance(exception, (Interrupted, SIGTERMException)):
            super().on_exception(trainer, pl_module, exception)
