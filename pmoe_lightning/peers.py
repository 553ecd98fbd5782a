"""Several training processes end together: when one dies, the others follow within seconds, and one line says why.

Left alone, a process whose peer has died waits in its next reduction, for ever in the worst case, or is killed by
Lightning without a word, its MLflow run still open.
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

_POLL_SECONDS = 0.2
#: How long a process may take to notice by itself, in a reduction that fails, and to close what it has open.
_PATIENCE_SECONDS = 10.0
_CLOSING_SECONDS = 25.0


class PeerWatch:
    """``with PeerWatch(trainer): trainer.fit(...)``. With one process it does nothing.

    The process that launched the others watches them, and they watch it. A reduction that fails because of a dead peer
    becomes a :class:`RunError` in the first process and a silent exit in the others; a process that hangs in one is
    ended all the same.

    Raises:
        RunError: in the first process, when another one has died.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._parent = os.getppid()
        self._over = threading.Event()
        self._death = threading.Event()
        self._reason = "contact with another training process was lost"

    def __enter__(self) -> None:
        if self.trainer.world_size > 1 and self.trainer.strategy.launcher is not None:
            watch = self._watch_children if self.trainer.local_rank == 0 else self._watch_parent
            threading.Thread(target=watch, daemon=True, name="peer-watch").start()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None and self.trainer.world_size > 1 and _is_contact_loss(error):
            if not self.trainer.is_global_zero:
                self._over.set()
                raise SystemExit(1) from None
            self._death.wait(_PATIENCE_SECONDS)
            self._over.set()
            raise RunError(self._reason) from error
        self._over.set()

    def _watch_children(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            _dismiss_other_observer()
            children: list[subprocess.Popen] = getattr(self.trainer.strategy.launcher, "procs", [])
            for rank, child in enumerate(children, start=1):
                if child.poll():
                    self._reason = (
                        f"training process {rank} of {self.trainer.world_size} {describe_end(child.returncode)}"
                    )
                    self._death.set()
                    if not self._leaves():
                        self._end(children)
                    return

    def _watch_parent(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            if os.getppid() != self._parent:
                if not self._leaves():
                    os._exit(1)
                return

    def _leaves(self) -> bool:
        """Whether this process ends by itself in time; longer where it is closing already."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._over.wait(_POLL_SECONDS):
            patience = _CLOSING_SECONDS - _PATIENCE_SECONDS if self.trainer.interrupted else 0.0
            if time.monotonic() > deadline + patience:
                return False
        return True

    def _end(self, children: list[subprocess.Popen]) -> None:
        """The main thread hangs in a reduction, from which nothing in Python can free it."""
        print(f"error: {self._reason}", file=sys.stderr, flush=True)
        for logger in self.trainer.loggers:
            logger.finalize("failed")
        for child in children:
            child.kill()
        os._exit(1)


def _is_contact_loss(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _dismiss_other_observer() -> None:
    """Lightning's own observer would kill this process at once, before it can close anything."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
