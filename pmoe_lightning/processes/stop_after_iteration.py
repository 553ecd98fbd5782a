"""A run that is asked to stop ends between two iterations, with a checkpoint from which it goes on exactly."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from pmoe_lightning.errors import error_line
from pmoe_lightning.processes.collectives import largest_over_processes
from pmoe_lightning.processes.stopping import Stopped, stop

_log = logging.getLogger(__name__)


class StoppedAfterIteration(Stopped):
    """The same, in every training process after the same iteration: the run can be saved and goes on exactly."""


class Preempted(StoppedAfterIteration):
    """SLURM needs the machine: the run is saved, and to be requeued."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


class StopAfterIteration(Callback):
    """A signal ends the run after the iteration under way, not in the middle of an update.

    The signals of ``stopping.py`` by :class:`StoppedAfterIteration`, and in a SLURM job SIGUSR1
    (``#SBATCH --signal=SIGUSR1@90``) by :class:`Preempted`. With several processes one that was asked is enough: all
    stop after the same iteration, so that they can save their checkpoint together.

    Lightning's own handlers work inside the signal: that of SIGUSR1 saves in the middle of an update, from where no run
    can go on exactly, and that of SIGTERM pairs its broadcast with whatever reduction another process is in. They are
    left out.

    Whatever takes long between two iterations, such as an evaluation, looks at :attr:`is_asked`. After the last
    iteration a signal still ends the run, with its last checkpoint but without a film and a packaged policy.
    """

    def __init__(self) -> None:
        self._preempted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = lambda: None
        in_main_thread = threading.current_thread() is threading.main_thread()
        if stage == "fit" and SLURMEnvironment.detect() and in_main_thread:
            signal.signal(signal.SIGUSR1, self._preempt)

    @property
    def is_asked(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return stop.is_asked or self._preempted

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop.when = " after this iteration"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # What belongs to the end of an epoch, evaluation and best checkpoint, would not be made up for.
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning does not declare it
        if not data.epoch_is_over:
            self._stop_if_asked(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop.when = ""
        self._preempted = False  # a complete run has nothing to be requeued for
        self._stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stop.when = ""

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = stop.asked or (signal.SIGUSR1 if self._preempted else 0)
        if trainer.world_size > 1:
            asked = largest_over_processes(asked, trainer.strategy.root_device)
        if asked == signal.SIGUSR1:
            raise Preempted
        if asked:
            raise StoppedAfterIteration(asked)

    def _preempt(self, number: int, frame: Any) -> None:
        self._preempted = True


def requeue() -> None:
    """Put this SLURM job back into the queue; with ``resume=auto`` its command then goes on."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or "").split()) or error_line(error)
        _log.warning("SLURM job %s is saved but could not be requeued: %s", job, reason)
    else:
        _log.warning("SLURM job %s is saved and requeued; it goes on if its command says resume=auto", job)
