"""The checkpoint that a run is resumed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from pmoe_lightning.processes.stop_after_iteration import StoppedAfterIteration
from pmoe_lightning.processes.stopping import Stopped

from .reporting import warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, for the state at the end of every epoch and at the end of the run.

    A run that breaks off saves its state too, where it can: what goes wrong with that is a warning, because it would
    hide why the run failed. Often it cannot be saved: its weights are not finite, its disk is full, its environment
    broke in the middle of a rollout. With several processes it is saved only if a signal has stopped all of them
    together: saving takes every process, and of an error in one the others know nothing. The one before it stays, and
    so does the one that a run was resumed from until there is something to add to it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_trained = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        self._has_trained = True

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        between_iterations = isinstance(exception, StoppedAfterIteration)
        # Broken off in one, a run has an exact state to go on from: the one that is saved.
        can_be_saved = between_iterations or (trainer.world_size == 1 and not isinstance(exception, Stopped))
        if self._has_trained and can_be_saved:
            with warn_on_failure("the end of the run was not saved"):
                super().on_exception(trainer, pl_module, exception)
