"""Ctrl-C that leaves a checkpoint from which the run goes on exactly."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfterIteration(Callback):
    """Ctrl-C ends the run after the iteration under way, not in the middle of an update; a second one ends it at once.

    SIGTERM needs nothing: Lightning itself acts on it between two iterations.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        self._restore()
        print("stopping after this iteration; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
