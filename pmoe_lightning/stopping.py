"""Signals end a run between two iterations, with a checkpoint from which it goes on exactly."""

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
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pmoe_lightning.updates.processes import largest_over_processes

_log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, between two iterations and in every training process at the same one."""


class Preempted(SystemExit):
    """SLURM needs the machine: the run is saved, and to be requeued."""


class StopAfterIteration(Callback):
    """A signal ends the run after the iteration under way, not in the middle of an update; a second Ctrl-C at once.

    Ctrl-C by :class:`Interrupted`, SIGTERM by Lightning's ``SIGTERMException``, and in a SLURM job SIGUSR1
    (``#SBATCH --signal=SIGUSR1@90``) by :class:`Preempted`. With several processes one that was asked is enough: all
    stop after the same iteration, so that they can save their checkpoint together.

    Lightning's own handlers work inside the signal: that of SIGUSR1 saves in the middle of an update, from where no run
    can go on exactly, and that of SIGTERM pairs its broadcast with whatever reduction another process is in.

    Whatever takes long between two iterations, such as an evaluation, looks at :attr:`is_asked`. After the last
    iteration Ctrl-C and SIGTERM still end the run, with its last checkpoint but without a film and a packaged policy.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and SLURMEnvironment.detect() and _in_main_thread():
            # Lightning leaves a signal alone that has a handler by now.
            signal.signal(signal.SIGUSR1, self._ask)

    @property
    def is_asked(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self._asked != 0

    def listen(self) -> None:
        """Answer Ctrl-C and SIGTERM from now on, at the latest from the start of training."""
        if _in_main_thread() and not self._previous:
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # What belongs to the end of an epoch, evaluation and best checkpoint, would not be made up for.
        if not trainer.datamodule.epoch_is_over:
            self._stop_if_asked(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer, ignored: int = 0) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            asked = largest_over_processes(asked, trainer.strategy.root_device)
        if asked == ignored:
            return
        if asked:
            ignore_further_stops()
        if asked == signal.SIGINT:
            raise Interrupted
        if asked == signal.SIGTERM:
            raise SIGTERMException
        if asked == signal.SIGUSR1:
            raise Preempted(128 + signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer, ignored=signal.SIGUSR1)  # a complete run has nothing to be requeued for
        listened = bool(self._previous)
        self._restore()
        if listened:  # Lightning's own only takes a note, which nobody reads any more
            signal.signal(signal.SIGTERM, _end_at_once)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: Any) -> None:
        if number == self._asked == signal.SIGINT:
            ignore_further_stops()
            raise KeyboardInterrupt
        if not self._asked:
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            print(f"stopping after this iteration{again}", file=sys.stderr, flush=True)
            self._asked = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._ask:  # not where a stop has silenced those that follow
                signal.signal(number, handler)
        self._previous = {}


def ignore_further_stops() -> None:
    """What follows a stop, saving and closing, is not cut short: ``mlflow run`` adds a SIGTERM to Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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


def _end_at_once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SIGTERMException


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
