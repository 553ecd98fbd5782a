"""Ctrl-C, and a SLURM job that must go, leave a checkpoint from which the run goes on exactly."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

_log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """SLURM needs the machine: the run is saved, and to be requeued."""


class StopAfterIteration(Callback):
    """Ctrl-C ends the run after the iteration under way, not in the middle of an update; a second one ends it at once.

    In a SLURM job SIGUSR1 (``#SBATCH --signal=SIGUSR1@90``) does too, by :class:`Preempted`. Lightning's own answer to
    it is to save inside the signal handler, in the middle of an update, from where no run can go on exactly.

    SIGTERM needs nothing: Lightning itself acts on it between two iterations.
    """

    def __init__(self) -> None:
        self._asked = self._preempted = self._in_slurm = False
        self._previous: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._in_slurm = stage == "fit" and SLURMEnvironment.detect()
        if self._in_slurm and _in_main_thread():
            # Lightning leaves a signal alone that has a handler by now.
            signal.signal(signal.SIGUSR1, self._preempt)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _in_main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        # The signal reaches the processes of a job at different iterations.
        if self._in_slurm and trainer.strategy.reduce_boolean_decision(self._preempted, all=False):
            raise Preempted(128 + signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        self._restore()
        print("stopping after this iteration; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def _preempt(self, number: int, frame: Any) -> None:
        self._preempted = True

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def requeue() -> None:
    """Put this SLURM job back into the queue; with ``resume=auto`` its command then goes on."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("SLURM job %s is saved but could not be requeued: %s", job, " ".join(str(reason).split()))
    else:
        _log.warning("SLURM job %s is saved and requeued; it goes on if its command says resume=auto", job)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
