"""Several training processes end together: when one dies, the others follow within seconds, and one line says why.

Left alone, a process whose peer has died waits in its next reduction, for ever in the worst case, or is killed by
Lightning without a word, its MLflow run still open. One that waits for the others to start waits in C++, for half an
hour and whatever signals come.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist
from lightning.pytorch import Trainer

from pmoe_lightning.errors import RunError, describe_end
from pmoe_lightning.processes.orphans import LAUNCHER, kill_descendants
from pmoe_lightning.processes.stopping import STOP_CODES, STOPS, Stopped, stop

_POLL_SECONDS = 0.2
#: How long a process may take to notice by itself, in a reduction that fails, and to close what it has open.
_PATIENCE_SECONDS = 10.0
_CLOSING_SECONDS = 25.0
#: How long after a signal a process may go on to wait for the others to start.
_START_PATIENCE_SECONDS = 5.0


class ProcessWatch:
    """``with ProcessWatch(trainer): trainer.fit(...)``. With one process it does nothing.

    The process that launched the others watches them from their start on; they watch it from their first line on, see
    ``orphans.end_with_launcher``. A reduction that fails because of a dead peer becomes a :class:`RunError` in the
    first process and a silent exit in the others; a process that hangs in one is ended all the same. One that a signal
    has ended is no failure: it stops the run.

    Raises:
        RunError: in the first process, when another one has died.
        Stopped: in the first process, when a signal has ended another one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._over = threading.Event()
        self._death = threading.Event()
        self._reason = "contact with another training process was lost"
        self._signal = 0

    def __enter__(self) -> None:
        if self.trainer.world_size > 1:
            os.environ[LAUNCHER] = str(os.getpid())
            threading.Thread(target=self._watch, daemon=True, name="peer-watch").start()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None and self.trainer.world_size > 1 and _is_contact_loss(error):
            if not self.trainer.is_global_zero:
                self._over.set()
                raise SystemExit(1) from None
            self._death.wait(_PATIENCE_SECONDS)
            self._over.set()
            if self._signal:
                raise Stopped(self._signal) from error
            raise RunError(self._reason) from error
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            _dismiss_other_observer()
            if stop.is_asked and not self._joins_the_others():
                stop.end(128 + stop.asked)
            children: list[subprocess.Popen] = getattr(self.trainer.strategy.launcher, "procs", [])
            for rank, child in enumerate(children, start=1):
                if child.poll():
                    self._note_death(rank, child.returncode)
                    if not self._leaves():
                        self._end()
                    return

    def _joins_the_others(self) -> bool:
        deadline = time.monotonic() + _START_PATIENCE_SECONDS
        while not (dist.is_initialized() or self._over.wait(_POLL_SECONDS)):
            if time.monotonic() > deadline:
                return False
        return True

    def _note_death(self, rank: int, code: int) -> None:
        if code in STOP_CODES or -code in STOPS:
            self._signal = -code if code < 0 else code - 128
        self._reason = f"training process {rank} of {self.trainer.world_size} {describe_end(code)}"
        self._death.set()

    def _leaves(self) -> bool:
        """Whether this process ends by itself in time; longer where it is closing already."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._over.wait(_POLL_SECONDS):
            if self._signal and self.trainer.interrupted:
                return True  # stopped together, and this one has more to close
            patience = _CLOSING_SECONDS - _PATIENCE_SECONDS if self.trainer.interrupted else 0.0
            if time.monotonic() > deadline + patience:
                return False
        return True

    def _end(self) -> None:
        """The main thread hangs in a reduction, from which nothing in Python can free it."""
        if self._signal:
            stop.end(128 + self._signal)
        print(f"error: {self._reason}", file=sys.stderr, flush=True)
        for logger in self.trainer.loggers:
            logger.finalize("failed")
        kill_descendants()
        os._exit(1)


def _is_contact_loss(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _dismiss_other_observer() -> None:
    """Lightning's own observer would kill this process at once, before it can close anything."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
