"""Ctrl-C and SIGTERM that leave a checkpoint from which the run goes on exactly."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pmoe_lightning.updates.processes import largest_over_processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, between two iterations and in every training process at the same one."""


class StopAfterIteration(Callback):
    """A signal ends the run after the iteration under way, not in the middle of an update; a second Ctrl-C at once.

    With several processes one that was asked is enough: all stop after the same iteration, so that they can save their
    checkpoint together. Lightning's own handler of SIGTERM communicates from inside the handler, which can pair one
    process's reduction with another one's broadcast.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            asked = largest_over_processes(asked, trainer.strategy.root_device)
        if asked == signal.SIGINT:
            raise Interrupted
        if asked == signal.SIGTERM:
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: Any) -> None:
        if number == self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked:
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            print(f"stopping after this iteration{again}", file=sys.stderr, flush=True)
            self._asked = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
